"""Exponential moving averages of parameters: constant decays and EDM2's power functions.

An average may be stored in bfloat16, half the memory. With a decay of 0.9999 an update changes it
by 1e-4 of its distance from the parameters, far less than bfloat16 tells apart, and rounding to the
nearest would never move it. It is rounded up or down at random with the probabilities that make the
expectation exact; its error then stays about one unit in the last place, as the average forgets it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dit_jax.nearest import one_of
from dit_jax.options import option, register_section
from dit_jax.ranges import SHARE_BELOW_ONE, Range

DTYPES = ("float32", "bfloat16")
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
    dtype: str = option("float32", "float32 | bfloat16: stored, rounded at random")
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
class EMA:
    """One average, either of constant decay or of power-function profile.

    Attributes:
        decay: share of the old average kept at every update, or None.
        power_std: relative width of EDM2's profile, or None.
        warmup: keep less at first: the smaller of `decay` and (1 + step) / (10 + step).
        dtype: it is stored in, 'float32' or 'bfloat16'.
    """

    decay: float | None = None
    power_std: float | None = None
    warmup: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"ema.dtype={self.dtype!r}: {one_of(self.dtype, DTYPES)}")
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
    decays: Sequence[float] = (),
    power_stds: Sequence[float] = (),
    *,
    warmup: bool = False,
    dtype: str = "float32",
) -> list[EMA]:
    """The averages a configuration asks for, constant decays first, these with `warmup` or not."""
    found = [EMA(decay=d, warmup=warmup, dtype=dtype) for d in decays]
    found += [EMA(power_std=s, dtype=dtype) for s in power_stds]
    names = [average.name for average in found]
    if len(set(names)) != len(names):
        raise ValueError(f"ema: the same average is asked for twice: {names}")
    return found


def init(averages: Sequence[EMA], params) -> dict:
    """Every average starts as a copy of the parameters."""

    def copied(average):
        return jax.tree.map(lambda leaf: jnp.array(leaf, _dtype(average, leaf)), params)

    return {average.name: copied(average) for average in averages}


def _dtype(average: EMA, leaf: Array) -> jnp.dtype:
    """What an average of `leaf` is stored in; never wider than that."""
    dtype = jnp.dtype(average.dtype)
    return dtype if dtype.itemsize < leaf.dtype.itemsize else leaf.dtype


def stochastically_rounded(x: Float[Array, "*s"], key: Key[Array, ""]) -> Float[Array, "*s"]:
    """float32 `x` as bfloat16, one of its two neighbours, so that the expectation is `x`.

    What is not finite stays what it is. The bits drawn do not depend on how `x` is sharded.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A bfloat16 is the upper half of a float32: whether the lower half, as a fraction, carries.
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + drawn) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def update(averages: Sequence[EMA], ema: dict, params, step: Int[Array, ""]) -> dict:
    """The averages after the update that ended step `step` with `params`.

    What is drawn to round one depends on the step and its place among the averages alone.
    """
    return {
        average.name: _updated(average, ema[average.name], params, step, number)
        for number, average in enumerate(averages)
    }


def _updated(average: EMA, ema, params, step: Int[Array, ""], number: int):
    share = average.share(step)
    if average.dtype == "float32":
        return jax.tree.map(lambda old, new: old + share * (new - old), ema, params)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), number)
    leaves, treedef = jax.tree.flatten(params)

    def blend(i, old, new):
        if old.dtype == new.dtype:
            return old + share * (new - old)
        old = old.astype(jnp.float32)
        return stochastically_rounded(old + share * (new - old), jax.random.fold_in(key, i))

    olds = jax.tree.leaves(ema)
    pairs = enumerate(zip(olds, leaves, strict=True))
    return treedef.unflatten([blend(i, old, new) for i, (old, new) in pairs])
