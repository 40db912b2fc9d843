"""Optimizers and learning-rate schedules, by optax."""

import dataclasses
import math
from typing import Any

import jax
import optax

from dit_jax.nearest import one_of
from dit_jax.options import option, register, register_section
from dit_jax.ranges import NOT_NEGATIVE, PERIOD, POSITIVE, SHARE_BELOW_ONE

SCHEDULES = ("constant", "cosine", "linear")
MU_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Keys of config.optimizer, whatever the optimizer."""

    learning_rate: float = option(1e-4, "after the warm-up", POSITIVE)
    schedule: str = option("constant", "constant | cosine | linear, after the warm-up")
    warmup_steps: int = option(0, "steps in which the learning rate rises to its value", PERIOD)
    final_learning_rate: float = option(
        0.0, "of cosine and linear, at training.num_steps", NOT_NEGATIVE
    )
    weight_decay: float = option(0.0, "decoupled, times the learning rate", NOT_NEGATIVE)
    gradient_clip_norm: float = option(0.0, "0: no clipping", NOT_NEGATIVE)


def _mean_dtype() -> Any:
    # The mean of gradients changes by a tenth at every update, which rounding to the nearest does
    # not lose; the mean of their squares changes by a thousandth, and stays float32.
    return option("float32", "float32 | bfloat16: what the mean of gradients is stored in")


def _checked(mu_dtype: str, name: str) -> str | None:
    """As optax takes it.

    Raises:
        ValueError: unknown.
    """
    if mu_dtype not in MU_DTYPES:
        raise ValueError(f"optimizer.{name}.mu_dtype={mu_dtype!r}: {one_of(mu_dtype, MU_DTYPES)}")
    return None if mu_dtype == "float32" else mu_dtype


@dataclasses.dataclass(frozen=True)
class _Adam:
    beta1: float = option(0.9, "decay of the mean of gradients", SHARE_BELOW_ONE)
    beta2: float = option(0.999, "decay of the mean of their squares", SHARE_BELOW_ONE)
    epsilon: float = option(1e-8, "added to the root of that, which divides", NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class AdamW(_Adam):
    """Adam with decoupled weight decay."""

    mu_dtype: str = _mean_dtype()

    def create(self, schedule: optax.Schedule, weight_decay: float):
        """The optax transformation."""
        stored = {"mu_dtype": _checked(self.mu_dtype, "adamw")}
        adam = schedule, self.beta1, self.beta2, self.epsilon
        return optax.adamw(*adam, weight_decay=weight_decay, mask=_decays, **stored)


@dataclasses.dataclass(frozen=True)
class RAdam(_Adam):
    """Adam with a rectified variance at first, which needs no warm-up."""

    def create(self, schedule: optax.Schedule, weight_decay: float):
        """The optax transformation."""
        return optax.chain(
            optax.scale_by_radam(self.beta1, self.beta2, self.epsilon),
            optax.add_decayed_weights(weight_decay, _decays),
            optax.scale_by_learning_rate(schedule),
        )


@dataclasses.dataclass(frozen=True)
class Lion:
    """Steps by the sign of the mean gradient."""

    beta1: float = option(
        0.9, "share of the mean, beside the gradient, in an update's sign", SHARE_BELOW_ONE
    )
    beta2: float = option(0.99, "decay of the mean of gradients", SHARE_BELOW_ONE)
    mu_dtype: str = _mean_dtype()

    def create(self, schedule: optax.Schedule, weight_decay: float):
        """The optax transformation."""
        stored = {"mu_dtype": _checked(self.mu_dtype, "lion")}
        betas = self.beta1, self.beta2
        return optax.lion(schedule, *betas, weight_decay=weight_decay, mask=_decays, **stored)


OPTIMIZERS = {"adamw": AdamW, "radam": RAdam, "lion": Lion}
"""Optimizers by their name in configs."""

register_section("optimizer", OptimizerOptions, "name", "adamw")
for _name, _optimizer in OPTIMIZERS.items():
    register("optimizer", _name, _optimizer)


def learning_rate_schedule(
    learning_rate: float,
    *,
    schedule: str = "constant",
    warmup_steps: int = 0,
    num_steps: int = 0,
    final_learning_rate: float = 0.0,
) -> optax.Schedule:
    """Linear warm-up from 0 to `learning_rate`, then constant, or decay to the final rate.

    Args:
        learning_rate: peak rate.
        schedule: 'constant', 'cosine' or 'linear'.
        warmup_steps: updates of the warm-up; 0 for none.
        num_steps: updates in all; where 'cosine' and 'linear' end. A warm-up that is not shorter
            becomes a tenth of them (`fitted_warmup`).
        final_learning_rate: rate at `num_steps` of 'cosine' and 'linear'.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule={schedule!r}: {one_of(schedule, SCHEDULES)}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(
            f"optimizer.learning_rate={learning_rate}: expected above 0, and not infinite"
        )
    if warmup_steps < 0:
        raise ValueError(f"optimizer.warmup_steps={warmup_steps}: expected 0 or more")
    warmup_steps = fitted_warmup(schedule, warmup_steps, num_steps)
    rest = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(
            learning_rate, final_learning_rate, num_steps - warmup_steps
        ),
        "cosine": lambda: optax.cosine_decay_schedule(
            learning_rate, num_steps - warmup_steps, final_learning_rate / learning_rate
        ),
    }[schedule]()
    if not warmup_steps:
        return rest

    # The first update already moves: rate (i + 1) / warmup_steps of the peak at update i.
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    return optax.join_schedules([warmup, rest], [warmup_steps])


def fitted_warmup(schedule: str, warmup_steps: int, num_steps: int) -> int:
    """`warmup_steps`, or a tenth of a run too short to decay after so many.

    A constant rate has no end, so a run that stops within its warm-up may be continued later.
    """
    if schedule == "constant" or warmup_steps < num_steps:
        return warmup_steps
    return num_steps // 10


def create_optimizer(
    optimizer: AdamW | RAdam | Lion,
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    gradient_clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """An optimizer with decoupled weight decay, after clipping by global norm.

    Args:
        optimizer: one of `OPTIMIZERS` with its options.
        schedule: learning rate by update.
        weight_decay: decoupled; 0 for none.
        gradient_clip_norm: largest global gradient norm; 0 for no clipping.
    """
    clip = optax.clip_by_global_norm(gradient_clip_norm) if gradient_clip_norm else optax.identity()
    return optax.chain(clip, optimizer.create(schedule, weight_decay))


def _decays(params):
    """Which parameters decay: all but frequencies, which are drawn once and never trained."""

    def decays(path, leaf):
        return getattr(path[-1], "key", None) != "freqs" if path else True

    return jax.tree_util.tree_map_with_path(decays, params)
