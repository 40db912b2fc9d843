"""What consistency models share: how far r stays behind t, and how their predictions are compared.

The schedule and the map from t to r are those of ECT (Geng et al. 2024, arXiv 2406.14548).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dit_jax.diffusion.process import DDPM, EDM, Process, RectifiedFlow
from dit_jax.nearest import one_of
from dit_jax.options import option
from dit_jax.ranges import COUNT, NOT_NEGATIVE, SHARE_BELOW_ONE, Range

DISTANCES = ("pseudo_huber", "l2", "squared_l2")
WEIGHTINGS = ("default", "c_out", "c_out_sq", "sigma_sq", "sqrt", "one")

# Smallest distance of t and r: 1 / (t - r) is a weight.
_SMALLEST_GAP = 1e-6


@dataclasses.dataclass(frozen=True)
class StageOptions:
    """Keys that both stages of consistency models have."""

    growth: float = option(
        2.0, "q: the ratio r / t is 1 - growth^-(stage + 1)", Range(1, above=True)
    )
    ratio_limit: float = option(0.999, "its largest value", SHARE_BELOW_ONE)
    images_per_stage: int = option(6_400_000, "images seen until r comes nearer to t", COUNT)
    min_r: float = option(0.0, "smallest noise level of r; 0: clean data", NOT_NEGATIVE)
    distance: str = option("pseudo_huber", "pseudo_huber | l2 | squared_l2")
    huber_constant: float = option(
        1e-8, "c of pseudo_huber, sqrt(|error|^2 + c^2) - c", NOT_NEGATIVE
    )
    weighting: str = option(
        "default",
        "default: 1 / (t - r) | c_out | c_out_sq | sigma_sq | sqrt: 1 / sqrt(t - r) | one",
    )


@dataclasses.dataclass(frozen=True)
class ECTSchedule:
    """How far r stays behind t, by the images seen (ECT, section 3.3 and eq. 15).

    In stage s = 0, 1, ... the ratio is 1 - growth^-(s + 1), up to `ratio_limit`. It follows from
    the step, so that it continues where an interrupted run stopped.

    Attributes:
        growth: ECT's q.
        ratio_limit: largest ratio, below 1.
        images_per_stage: images of a stage.
        images_before: images that count as seen before the first update.
    """

    growth: float = StageOptions.growth
    ratio_limit: float = StageOptions.ratio_limit
    images_per_stage: int = StageOptions.images_per_stage
    images_before: int = 0

    def __post_init__(self):
        if not self.growth > 1:
            raise ValueError(f"growth={self.growth}: expected above 1, the ratio grows with it")
        if not 0 <= self.ratio_limit < 1:
            raise ValueError(f"ratio_limit={self.ratio_limit}: expected from 0 to below 1")
        if self.images_per_stage < 1 or self.images_before < 0:
            raise ValueError(
                f"images_per_stage={self.images_per_stage} and images_before="
                f"{self.images_before}: expected at least 1 and at least 0"
            )

    def decrement(self, step: Int[Array, ""], batch_size: int) -> Float[Array, ""]:
        """1 - ratio for the update after `step` others of `batch_size` images."""
        smallest = 1.0 - self.ratio_limit
        count = max(0, int(np.ceil(-np.log(smallest) / np.log(self.growth))))
        decrements = [max(self.growth ** -(stage + 1.0), smallest) for stage in range(count + 1)]
        starts = [
            -(-(stage * self.images_per_stage - self.images_before) // batch_size)
            for stage in range(1, count + 1)
        ]
        starts = np.clip(starts, -1, np.iinfo(np.int32).max).astype(np.int32)
        stage = jnp.sum(jnp.asarray(step, jnp.int32) >= jnp.asarray(starts))
        return jnp.asarray(decrements, jnp.float32)[stage]


def noise_level(process: Process, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The coordinate in which r is chosen: sigma for EDM, sigma / alpha for DDPM, t for flow.

    ECT's mapping is about EDM's sigma. A DDPM chain divided by alpha is EDM with sigma / alpha;
    flow's sigma / alpha has no end, so that there the mapping acts on t itself.
    """
    return jnp.asarray(t, jnp.float32) if _native(process) else process.sigma_ratio(t)


def _native(process: Process) -> bool:
    return isinstance(process, RectifiedFlow)


class TimePair(NamedTuple):
    """Two times of a trajectory.

    Attributes:
        t: the noisier, in process time.
        r: the cleaner.
        gap: how much their noise levels differ, above 0.
    """

    t: Float[Array, " b"]
    r: Float[Array, " b"]
    gap: Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class TimePairs:
    """ECT's map from t to r, on the noise level l: r = l - l decrement (1 + 8 sigmoid(-l)).

    Attributes:
        process: whose times they are.
        min_r: smallest noise level of r, where data would have 0.
        quantize: DDPM: both times are indices of the chain, at least one apart.
    """

    process: Process
    min_r: float = StageOptions.min_r
    quantize: bool = False

    def __post_init__(self):
        if self.min_r < 0:
            raise ValueError(f"min_r={self.min_r}: expected a noise level, at least 0")
        if self.quantize and not isinstance(self.process, DDPM):
            raise ValueError(
                f"quantize=True: {type(self.process).__name__} has no table of times; only ddpm "
                "has, leave it out"
            )

    def __call__(self, t: Float[Array, " b"], decrement: Float[Array, ""]) -> TimePair:
        """Pairs of the given t, moved away from r where they would fall together."""
        level_t = noise_level(self.process, t)
        fall = level_t * decrement * (1.0 + 8.0 * jax.nn.sigmoid(-level_t))
        level_r = jnp.maximum(level_t - fall, self.min_r)
        # level_t - level_r is rounded; where r was not clamped, the fall is the exact difference.
        gap = jnp.minimum(fall, level_t - self.min_r)
        close = gap < _SMALLEST_GAP
        level_t = jnp.where(close, level_r + _SMALLEST_GAP, level_t)
        r = self._time(level_r)
        t = jnp.where(close, self._time(level_t), t)
        return (
            self._quantized(t, r)
            if self.quantize
            else TimePair(t, r, jnp.maximum(gap, _SMALLEST_GAP))
        )

    def _time(self, level: Array) -> Array:
        return level if _native(self.process) else self.process.time_from_sigma_ratio(level)

    def _quantized(self, t: Array, r: Array) -> TimePair:
        t, r = jnp.round(t), jnp.round(r)
        same, last = t == r, t >= self.process.noise_time
        t = jnp.where(same & ~last, t + 1.0, t)
        r = jnp.where(same & last, r - 1.0, r)
        gap = noise_level(self.process, t) - noise_level(self.process, r)
        return TimePair(t, r, gap)


@dataclasses.dataclass(frozen=True)
class ConsistencyLoss:
    """Distance of two predictions of x0, and its weight.

    Attributes:
        distance: 'pseudo_huber' is sqrt(|d|^2 + c^2) - c, 'l2' |d|, 'squared_l2' |d|^2, with the
            norm over a whole image.
        huber_constant: c of pseudo_huber.
        weighting: 'default' 1 / (t - r) in noise levels, 'sqrt' its root, 'c_out' and 'c_out_sq'
            one over EDM's c_out(t) or its square, 'sigma_sq' one over sigma(t)^2, or 'one'.
    """

    distance: str = StageOptions.distance
    huber_constant: float = StageOptions.huber_constant
    weighting: str = StageOptions.weighting

    def __post_init__(self):
        if self.distance not in DISTANCES:
            raise ValueError(f"distance={self.distance!r}: {one_of(self.distance, DISTANCES)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={self.weighting!r}: {one_of(self.weighting, WEIGHTINGS)}")
        if self.distance == "pseudo_huber" and not self.huber_constant > 0:
            raise ValueError(
                f"huber_constant={self.huber_constant}: expected above 0; distance='l2' is without"
            )

    def unweighted(
        self, x0_t: Float[Array, "b *shape"], x0_r: Float[Array, "b *shape"]
    ) -> Float[Array, " b"]:
        """The distance, per image."""
        squared = jnp.sum((x0_t - x0_r) ** 2, axis=tuple(range(1, x0_t.ndim)))
        if self.distance == "squared_l2":
            return squared
        if self.distance == "l2":
            apart = squared > 0
            return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
        c = self.huber_constant
        return squared / (jnp.sqrt(squared + c**2) + c)  # no difference of large numbers

    def weight(self, process: Process, pair: TimePair) -> Float[Array, " b"]:
        """The weight, per image."""
        if self.weighting == "default":
            return 1.0 / pair.gap
        if self.weighting == "sqrt":
            return jax.lax.rsqrt(pair.gap)
        if self.weighting == "sigma_sq":
            return 1.0 / process.sigma(pair.t) ** 2
        if self.weighting == "one":
            return jnp.ones_like(pair.t)
        sigma_data = process.sigma_data if isinstance(process, EDM) else 0.5
        sigma = process.sigma_ratio(pair.t)
        # 1 / c_out = sqrt(1 / sigma^2 + 1 / sigma_data^2): finite for any sigma > 0.
        inverse = jnp.sqrt(1.0 / sigma**2 + 1.0 / sigma_data**2)
        return inverse if self.weighting == "c_out" else inverse**2
