"""The range of every number of the configuration, and the pairs of them that have an order.

A value outside its range cannot mean anything; what fits only together with other values is checked
by the objects that are built from them. Imports nothing, so that commands can check at their door.
"""

import dataclasses
import math
from typing import Any

# Seeds of jax.random.key are 32 bits: larger ones would silently be the same as smaller ones.
LARGEST_SEED = 2**32 - 1
LARGEST_COUNT = 2**31 - 1  # of images, steps, ...: what an int32 holds


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; never NaN or infinite.

    Attributes:
        low: the smallest, None for no bound.
        high: the largest, None for no bound.
        above: `low` itself is left out.
        below: `high` itself is left out.
        also: single numbers outside it that have a meaning of their own.
        whole: integers alone.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        """Whether `value` is a number of the range."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if value in self.also:
            return True
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """'at least 1, a whole number', as it stands in errors."""
        bounds = []
        if self.low is not None:
            bounds.append(f"{'above' if self.above else 'at least'} {self.low}")
        if self.high is not None:
            bounds.append(f"{'below' if self.below else 'at most'} {self.high}")
        kind = "a whole number" if self.whole else "a finite number"
        text = " and ".join(bounds)
        if self.whole or len(bounds) < 2:
            text = f"{text}, {kind}" if text else kind
        return text + "".join(f"; or {value}" for value in self.also)


COUNT = Range(1, LARGEST_COUNT, whole=True)
PERIOD = Range(0, LARGEST_COUNT, whole=True)  # 0: never, none or by itself
SEED = Range(0, LARGEST_SEED, whole=True)
FINITE = Range()
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
SHARE_BELOW_ONE = Range(0, 1, below=True)
SOLVER_STEPS = Range(1, 100_000, whole=True)
GUIDANCE = Range(0, 1000)  # 0: no condition, 1: no guidance

_KEYS = {
    SEED: "seed",
    COUNT: """
        model.image_size model.input_size model.in_channels model.dit.patch_size
        model.dit.hidden_size model.dit.depth model.dit.num_heads
        model.*_unet.model_channels model.*_unet.channel_mult model.*_unet.channel_mult_emb
        model.*_unet.num_blocks model.song_unet.channel_mult_noise
        process.ddpm.num_timesteps process.edm.num_timesteps timesteps.polynomial.num_levels
        method.*.images_per_stage method.*.student_update_frequency method.f_distill.ratio_bins
        training.num_steps training.batch_size training.num_microbatches training.log_every
        training.preview_images training.keep_last
        sampling.batch_size autoencoder.batch_size evaluation.num_images
    """,
    Range(1, LARGEST_COUNT, also=(-1,), whole=True): "mesh.*",
    SOLVER_STEPS: "sampling.steps",
    PERIOD: """
        model.num_classes model.augment_dim model.*_unet.attn_resolutions
        timesteps.speed.tau method.tcm.images_before method.*.tangent_warmup_steps
        method.*.feature_indices data.num_workers optimizer.warmup_steps training.preview_every
        training.checkpoint_every training.keep_every autoencoder.tile
    """,
    Range(whole=True): "model.song_unet.resample_filter",
    FINITE: """
        timesteps.*.mean method.mean_flow.r_mean sampling.shift_by_tokens
    """,
    POSITIVE: """
        model.dit.mlp_ratio model.dit.mlp_norm_epsilon process.flow.time_scale
        process.edm.sigma_data process.edm.sigma_min process.edm.sigma_max process.edm.vp_beta_d
        process.edm.vp_beta_min process.edm.vp_epsilon_t process.edm.ve_sigma_min
        process.edm.ve_sigma_max process.edm.iddpm_c_1 process.edm.iddpm_c_2
        timesteps.*.std timesteps.log_student_t.df timesteps.polynomial.rho loss.p2.k
        loss.min_snr.gamma method.scm.sigma_data method.*.finite_difference_step
        method.*.r1_noise method.mean_flow.r_std
        method.mean_flow.guidance_omega method.f_distill.ratio_lower method.f_distill.ratio_upper
        method.*.gan_critic_weight sampling.shift sampling.rho optimizer.learning_rate
    """,
    NOT_NEGATIVE: """
        timesteps.*.min_time timesteps.*.max_time loss.p2.gamma loss.vlb_weight
        method.*.huber_constant method.*.min_r method.tcm.transition method.tcm.boundary_weight
        method.scm.tangent_constant method.mean_flow.weight_power method.mean_flow.weight_constant
        method.kd.huber_c method.*.discriminator_learning_rate method.*.fake_score_learning_rate
        method.*.gan_weight method.*.r1_weight
        augmentation.xflip augmentation.yflip augmentation.rotate_int augmentation.translate_int
        augmentation.scale augmentation.rotate_frac augmentation.aniso
        augmentation.translate_frac augmentation.brightness augmentation.contrast
        augmentation.lumaflip augmentation.hue augmentation.saturation
        augmentation.translate_int_max augmentation.*_std augmentation.rotate_frac_max
        augmentation.hue_max optimizer.final_learning_rate optimizer.weight_decay
        optimizer.gradient_clip_norm optimizer.*.epsilon sampling.heun.s_churn
        sampling.heun.s_min sampling.heun.s_max sampling.heun.s_noise *.guidance_interval
    """,
    Range(0, also=(-1,)): "sampling.times",  # -1: DDPM's clean data
    GUIDANCE: "sampling.guidance_scale teacher.guidance_scale",
    SHARE: """
        method.label_dropout method.tcm.boundary_probability method.mean_flow.interval_share
        augmentation.probability augmentation.aniso_rotate_prob sampling.ddim.eta
    """,
    Range(0.5, 1): "timesteps.speed.lam",
    Range(1): "timesteps.speed.k",
    Range(1, above=True): "method.*.growth",
    SHARE_BELOW_ONE: """
        model.*_unet.dropout timesteps.polynomial.min_fraction timesteps.polynomial.max_fraction
        method.*.ratio_limit method.mean_flow.guidance_kappa method.f_distill.ratio_decay
        data.image_folder.test_fraction optimizer.*.beta1 optimizer.*.beta2 ema.decays
    """,
    Range(0, 1, above=True, below=True): "process.ddpm.beta_start process.ddpm.beta_end",
    Range(0, 0.28, above=True, below=True): "ema.power_stds",  # EDM2's widths
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two keys of which the first must not exceed the second.

    Attributes:
        low: flat key.
        high: flat key.
        strict: they must differ.
        zero: 0 stands for the process's own end, which takes no part in the order.
    """

    low: str
    high: str
    strict: bool = True
    zero: bool = False

    def fits(self, low: float, high: float) -> bool:
        """Whether two values are in order."""
        if self.zero and 0 in (low, high):
            return True
        return low < high if self.strict else low <= high


PAIRS = (
    Pair("process.ddpm.beta_start", "process.ddpm.beta_end", strict=False),
    Pair("process.edm.sigma_min", "process.edm.sigma_max"),
    Pair("process.edm.ve_sigma_min", "process.edm.ve_sigma_max"),
    Pair(
        "timesteps.truncated_log_normal.min_time",
        "timesteps.truncated_log_normal.max_time",
        zero=True,
    ),
    Pair("timesteps.log_student_t.min_time", "timesteps.log_student_t.max_time", zero=True),
    Pair("timesteps.polynomial.min_fraction", "timesteps.polynomial.max_fraction", strict=False),
    Pair("method.f_distill.ratio_lower", "method.f_distill.ratio_upper"),
    Pair("sampling.heun.s_min", "sampling.heun.s_max", strict=False),
)
# Keys that hold a (low, high) of their own, or nothing.
INTERVALS = (
    "sampling.guidance_interval",
    "teacher.guidance_interval",
    "method.mean_flow.guidance_interval",
)

# Keys that hold a (height, width), or nothing.
SIZES = ("model.input_size",)


def _matches(pattern: str, path: str) -> bool:
    """Whether a flat key is meant by a pattern, in which a '*' is a part of one name, or names."""
    head, star, tail = pattern.partition("*")
    return path == pattern if not star else path.startswith(head) and path.endswith(tail)


def range_of(path: str) -> Range | None:
    """The range of a flat key, as 'model.dit.depth'; None for what is no number."""
    for found, patterns in _KEYS.items():
        if any(_matches(pattern, path) for pattern in patterns.split()):
            return found
    return None


def number_error(path: str, value: Any) -> str | None:
    """What is wrong with the number, or numbers, of one key; None where nothing is.

    Args:
        path: flat key.
        value: of the type of its default, a tuple perhaps of anything.
    """
    wanted = range_of(path)
    if wanted is None or isinstance(value, (bool, str)):
        return None
    if not isinstance(value, tuple):
        return None if value in wanted else f"config.{path}={value!r}: expected {wanted}"
    if any(element not in wanted for element in value):
        return f"config.{path}={value!r}: expected every element {wanted}"
    if path in SIZES and len(value) not in (0, 2):
        return f"config.{path}={value!r}: expected (height, width) or ()"
    if path in INTERVALS:
        if len(value) not in (0, 2):
            return f"config.{path}={value!r}: expected (low, high) or ()"
        if value and value[0] > value[1]:
            return f"config.{path}={value!r}: expected (low, high), the lower one first"
    return None


def order_error(values: dict[str, Any]) -> str | None:
    """What pair of a flat, complete configuration is not in order; None where all are."""
    for pair in PAIRS:
        low, high = values[pair.low], values[pair.high]
        if not pair.fits(low, high):
            relation = "below" if pair.strict else "at most"
            return f"config.{pair.low}={low!r}: expected {relation} config.{pair.high}={high!r}"
    return None
