"""f-distill: DMD2 under any f-divergence (Xu et al. 2025, arXiv 2502.15681).

The gradient of an f-divergence between the teacher's and the student's distributions is DMD2's,
weighted example by example with h(r) = f''(r) r^2 of the density ratio r = real / fake, which the
discriminator knows: r = exp(its logit). Ratios are clipped, optionally divided by their recent mean
at like times (a histogram over bins of time, part of the state), and h by its mean over the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int, Key

from dit_jax.config import ConfigError
from dit_jax.diffusion.process import EDM, Process
from dit_jax.distill.adversarial import refuse_changed
from dit_jax.distill.dmd2 import DMD2, DMD2Options, dmd2_parts
from dit_jax.distill.student import DistillState, Player
from dit_jax.nearest import one_of
from dit_jax.options import option
from dit_jax.ranges import COUNT, POSITIVE, SHARE_BELOW_ONE
from dit_jax.training.method import Metrics

# Logits are clipped before the exponential.
_LARGEST_LOGIT = 10.0
_EPSILON = 1e-6

DIVERGENCES = {
    "rkl": jnp.ones_like,  # reverse Kullback-Leibler: DMD2 itself
    "kl": lambda r: r,  # forward Kullback-Leibler
    "js": lambda r: r / (1 + r),  # Jensen-Shannon
    "sf": lambda r: 1 / (1 + r),  # softened reverse Kullback-Leibler
    "neyman": lambda r: 1 / jnp.maximum(r, 1e-8),  # Neyman's chi squared
    "sh": jnp.sqrt,  # squared Hellinger
    "jf": lambda r: 1 + r,  # Jeffreys
}
"""h(r) by the divergence's name."""


def density_ratio(
    logits: Float[Array, "b heads"], lower: float, upper: float
) -> Float[Array, " b"]:
    """exp of the heads' mean logit, clipped: density of real over that of generated data."""
    logit = jnp.clip(jnp.mean(logits, axis=1), -_LARGEST_LOGIT, _LARGEST_LOGIT)
    return jnp.clip(jnp.exp(logit), lower, upper)


def weights_of(ratio: Float[Array, " b"], divergence: str) -> Float[Array, " b"]:
    """h(r) over its mean in the batch."""
    h = DIVERGENCES[divergence](ratio)
    return h / (jnp.mean(h) + _EPSILON)


@dataclasses.dataclass(frozen=True)
class FDistillOptions(DMD2Options):
    """Keys of config.method.f_distill."""

    divergence: str = option("js", "js | kl | rkl | sh | neyman | jf | sf")
    ratio_lower: float = option(
        0.1,
        "of real over generated density; smaller ratios are clipped",
        POSITIVE,
        below="ratio_upper",
    )
    ratio_upper: float = option(20.0, "of the same; larger ones are clipped", POSITIVE)
    ratio_normalization: bool = option(True, "divide it by its recent mean at like times")
    ratio_bins: int = option(10, "of time", COUNT)
    ratio_decay: float = option(
        0.0, "share of the old mean kept; 0: the batch's own", SHARE_BELOW_ONE
    )


@dataclasses.dataclass(frozen=True)
class RatioHistogram:
    """Recent means of the density ratio in bins of time, evenly spaced in the process's own time.

    Attributes:
        process: whose times are binned.
        bins: how many.
        decay: share of the old mean that is kept where a batch has times in the bin.
    """

    process: Process
    bins: int = FDistillOptions.ratio_bins
    decay: float = FDistillOptions.ratio_decay

    def __post_init__(self):
        if self.bins < 1 or not 0 <= self.decay < 1:
            raise ValueError(
                f"ratio_bins={self.bins}, ratio_decay={self.decay}: expected at least 1 and in "
                "[0, 1)"
            )

    def init(self) -> Float[Array, " bins"]:
        """Ones."""
        return jnp.ones(self.bins, jnp.float32)

    def index(self, t: Float[Array, " b"]) -> Int[Array, " b"]:
        """Bin of every time."""
        process = self.process
        low = process.sigma_min if isinstance(process, EDM) else max(process.clean_time, 0.0)
        width = (process.noise_time - low) / self.bins
        return jnp.clip(jnp.floor((t - low) / width), 0, self.bins - 1).astype(jnp.int32)

    def count(
        self, ratio: Float[Array, " b"], t: Float[Array, " b"]
    ) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
        """How many examples each bin has, and the sum of their ratios."""
        member = (self.index(t)[:, None] == jnp.arange(self.bins)[None]).astype(jnp.float32)
        return member.sum(axis=0), (member * ratio[:, None]).sum(axis=0)

    def update(
        self,
        means: Float[Array, " bins"],
        count: Float[Array, " bins"],
        total: Float[Array, " bins"],
    ) -> Float[Array, " bins"]:
        """The means after a batch; bins without examples stay."""
        blended = means * self.decay + (1 - self.decay) * total / (count + _EPSILON)
        return jnp.where(count > 0, blended, means)

    def normalise(
        self, ratio: Float[Array, " b"], t: Float[Array, " b"], means: Float[Array, " bins"]
    ) -> Float[Array, " b"]:
        """Ratios over the mean of their bin."""
        return ratio / (means[self.index(t)] + _EPSILON)


@dataclasses.dataclass(frozen=True)
class FDistill(DMD2):
    """The Method 'f_distill'; see also `DMD2`, whose adversary it needs.

    In several microbatches every one is normalised by itself, and the histogram then updated with
    all of them.

    Attributes:
        divergence: one of `DIVERGENCES`.
        ratio_lower: smallest density ratio, smaller ones are clipped.
        ratio_upper: largest.
        histogram: by whose means ratios are divided; None for no such normalisation.
    """

    divergence: str = FDistillOptions.divergence
    ratio_lower: float = FDistillOptions.ratio_lower
    ratio_upper: float = FDistillOptions.ratio_upper
    histogram: RatioHistogram | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.adversary is None:
            raise ValueError("gan_weight=0: f-distill needs a discriminator's density ratio")
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence={self.divergence!r}: {one_of(self.divergence, DIVERGENCES)}"
            )
        if not 0 < self.ratio_lower < self.ratio_upper:
            raise ValueError(
                f"ratio_lower={self.ratio_lower}, ratio_upper={self.ratio_upper}: expected "
                "0 < lower < upper"
            )

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> DistillState:
        """As DMD2's, with the histogram beside the players."""
        state = super().init(key, params, frozen)
        if self.histogram is None:
            return state
        ratio = Player({"means": self.histogram.init()}, optax.EmptyState())
        return dataclasses.replace(state, players={**state.players, "ratio": ratio})

    def scale_of(
        self,
        logits: Float[Array, "b heads"] | None,
        examples: dict[str, Any],
        players: dict[str, Any],
    ) -> tuple[Float[Array, " b"] | None, Metrics]:
        """h of every example, without gradients, and what to watch and to remember of it."""
        assert logits is not None, "f-distill has an adversary"
        ratio = density_ratio(jax.lax.stop_gradient(logits), self.ratio_lower, self.ratio_upper)
        metrics = {"ratio_mean": jnp.mean(ratio)}
        if self.histogram is not None:
            t = examples["t"]
            count, total = self.histogram.count(ratio, t)
            means = self.histogram.update(players["ratio"]["means"], count, total)
            ratio = self.histogram.normalise(ratio, t, means)
            metrics |= {"ratio_count": count, "ratio_total": total}
        h = weights_of(ratio, self.divergence)
        return h, {**metrics, "h_min": h.min(), "h_mean": h.mean(), "h_max": h.max()}

    def finish_student(self, state: DistillState, metrics: Metrics) -> tuple[DistillState, Metrics]:
        """Takes the batch's ratios into the histogram."""
        if self.histogram is None:
            return state, metrics
        metrics = dict(metrics)
        # Means over the microbatches; the update needs sums.
        parts = self.student.num_microbatches
        count, total = (parts * metrics.pop(f"ratio_{name}") for name in ("count", "total"))
        old = state.players["ratio"]
        means = self.histogram.update(old.params["means"], count, total)
        ratio = dataclasses.replace(old, params={"means": means})
        return dataclasses.replace(state, players={**state.players, "ratio": ratio}), metrics


def build(config: ml_collections.ConfigDict) -> FDistill:
    """The Method 'f_distill' of a configuration.

    Raises:
        ConfigError: options that do not fit each other, before anything is compiled.
    """
    options = config.method.f_distill
    if options.divergence == "rkl":
        refuse_changed(
            config,
            ("ratio_lower", "ratio_upper", "ratio_normalization", "ratio_bins", "ratio_decay"),
            "config.method.f_distill.divergence='rkl' weights all examples alike",
        )
    refuse_changed(
        config,
        ("ratio_bins", "ratio_decay"),
        "config.method.f_distill.ratio_normalization is False",
        unless=options.ratio_normalization,
    )
    parts = dmd2_parts(config)
    try:
        histogram = None
        if options.ratio_normalization:
            process = parts["student"].denoiser.process
            histogram = RatioHistogram(process, options.ratio_bins, options.ratio_decay)
        return FDistill(
            **parts,
            divergence=options.divergence,
            ratio_lower=options.ratio_lower,
            ratio_upper=options.ratio_upper,
            histogram=histogram,
        )
    except ValueError as error:
        raise ConfigError(f"config.method.f_distill: {error}") from error
