"""Exponential moving averages of parameters: constant decays and EDM2's power functions."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dit_jax.options import option, register_section
from dit_jax.ranges import SHARE_BELOW_ONE, Range

_WIDTH = Range(0, 0.28, above=True, below=True)  # EDM2's


@dataclasses.dataclass(frozen=True)
class EMAOptions:
    """Which averages are kept."""

    decays: tuple[float, ...] = option(
        (0.9999,), "constant decays, each its own average", SHARE_BELOW_ONE
    )
    power_stds: tuple[float, ...] = option(
        (), "EDM2 power-function averages by relative width, e.g. 0.05", _WIDTH
    )
    warmup: bool = option(True, "constant decays grow to theirs, as (1 + step) / (10 + step)")


register_section("ema", EMAOptions)


def power_function_exponent(std: float) -> float:
    """EDM2's gamma for an average of relative width `std` (arXiv 2312.02696, equation 123 on).

    The positive root of std^2 = (g + 1) / ((g + 2)^2 (g + 3)).

    Raises:
        ValueError: `std` is not in (0, 0.28), the widths the profile can have.
    """
    if not 0 < std < 0.28:
        raise ValueError(
            f"ema.power_stds: {std} is not between 0 and 0.28 (EDM2 uses 0.01 to 0.25)"
        )
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


@dataclasses.dataclass(frozen=True)
class Average:
    """One average, either of constant decay or of power-function profile.

    Attributes:
        decay: share of the old average kept at every update, or None.
        power_std: relative width of EDM2's profile, or None.
        warmup: keep less at first: the smaller of `decay` and (1 + step) / (10 + step).
    """

    decay: float | None = None
    power_std: float | None = None
    warmup: bool = False

    def __post_init__(self):
        if (self.decay is None) == (self.power_std is None):
            raise ValueError("an average has either a decay or a power_std")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"ema.decays: {self.decay} is not in [0, 1)")
        if self.power_std is not None:
            power_function_exponent(self.power_std)
            if self.warmup:
                raise ValueError("only an average of constant decay has a warmup")

    @property
    def name(self) -> str:
        """The average's name in checkpoints and on command lines, as 'ema_0.9999'."""
        return f"ema_{self.decay}" if self.decay is not None else f"ema_std{self.power_std}"

    def share(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Share of the new parameters in the update that ends step `step` (1 for the first).

        One minus the decay; for the power function 1 - (1 - 1 / step)^(gamma + 1), in a form whose
        float32 rounding does not grow with the step. The power function forgets the initial
        parameters at the first step by itself. A constant decay starts from them, as DiT does:
        after n steps they still weigh decay^n. Warmed up, as TensorFlow's ExponentialMovingAverage
        does it, they weigh 10! (n + 1)! / (n + 10)! while the warm-up lasts, hardly anything after
        ten steps; it lasts 9 / (1 - decay).
        """
        if self.decay is not None:
            share = jnp.float32(1 - self.decay)
            return jnp.maximum(share, 9 / (10 + step.astype(jnp.float32))) if self.warmup else share
        exponent = power_function_exponent(self.power_std) + 1
        return -jnp.expm1(exponent * jnp.log1p(-1 / step.astype(jnp.float32)))


def averages(
    decays: Sequence[float] = (), power_stds: Sequence[float] = (), *, warmup: bool = False
) -> list[Average]:
    """The averages a configuration asks for, constant decays first, these with `warmup` or not."""
    found = [Average(decay=d, warmup=warmup) for d in decays]
    found += [Average(power_std=s) for s in power_stds]
    names = [average.name for average in found]
    if len(set(names)) != len(names):
        raise ValueError(f"ema: the same average is asked for twice: {names}")
    return found


def init(averages: Sequence[Average], params) -> dict:
    """Every average starts as a copy of the parameters."""
    return {average.name: jax.tree.map(jnp.copy, params) for average in averages}


def update(averages: Sequence[Average], ema: dict, params, step: Int[Array, ""]) -> dict:
    """The averages after the update that ended step `step` with `params`."""

    def blend(share):
        return lambda old, new: old + share * (new - old)

    return {
        average.name: jax.tree.map(blend(average.share(step)), ema[average.name], params)
        for average in averages
    }
