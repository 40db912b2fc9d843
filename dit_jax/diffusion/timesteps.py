"""Training distributions of the time t: which noise levels a batch is trained on, and with what
weight.

A distribution has ``sample(key, n) -> t`` (static n) and ``weight(t)``, a weight of its own for the
squared error (1 except for SpeeD, in speed.py). Times are float32 in the process's own units.
Distributions are frozen, hashable and jittable. Those over continuous times also have `quantile`
and `cdf`, on which SpeeD's grid is laid.
"""

import dataclasses
import functools
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dit_jax.diffusion.process import DDPM, EDM, Process, RectifiedFlow
from dit_jax.options import option, same_option
from dit_jax.ranges import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, SHARE_BELOW_ONE

# Keeps quantiles of unbounded distributions finite: the smallest step of a float32 uniform number.
_SMALLEST_PROBABILITY = 2.0**-24


@runtime_checkable
class TimeDistribution(Protocol):
    """What a training loop asks of a distribution of times."""

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        """Draws n times."""

    def weight(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        """Weights of the squared error at these times."""


class _Unweighted:
    """A distribution that leaves the loss as it is."""

    weights_loss: ClassVar[bool] = False

    def weight(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        """Ones."""
        return jnp.ones_like(t, jnp.float32)


def _require_continuous(process: Process) -> None:
    if isinstance(process, DDPM):
        raise TypeError(
            "DDPM's times are indices: quantile and cdf are for the continuous times of "
            "RectifiedFlow and EDM."
        )


def _require_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"The distribution's std must be > 0, got {std}.")


@dataclasses.dataclass(frozen=True)
class Uniform(_Unweighted):
    """Every noise level alike.

    DDPM: the indices 0..T-1. RectifiedFlow: t in [0, 1). EDM has no uniform of its own: log(sigma)
        is uniform between log(sigma_min)
    and log(sigma_max).

    Attributes:
        process: The process whose times are drawn.
    """

    process: Process

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        """Draws n times."""
        if isinstance(self.process, DDPM):
            return jax.random.randint(key, (n,), 0, self.process.num_timesteps).astype(jnp.float32)
        return self.quantile(jax.random.uniform(key, (n,)))

    def quantile(self, u: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The time below which a fraction u of the draws lies."""
        _require_continuous(self.process)
        if isinstance(self.process, EDM):
            low, high = np.log(self.process.sigma_min), np.log(self.process.sigma_max)
            return jnp.exp(low + (high - low) * u)
        return jnp.asarray(u, jnp.float32)

    def cdf(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The fraction of draws below t."""
        _require_continuous(self.process)
        if isinstance(self.process, EDM):
            low, high = np.log(self.process.sigma_min), np.log(self.process.sigma_max)
            return jnp.clip((jnp.log(t) - low) / (high - low), 0.0, 1.0)
        return jnp.clip(t, 0.0, 1.0)

    def sigma_ratio_quantile(self, u: np.ndarray) -> np.ndarray:
        """sigma / alpha at a quantile, float64 (for tables)."""
        if isinstance(self.process, EDM):
            return self.process.sigma_min * (self.process.sigma_max / self.process.sigma_min) ** u
        return u / (1.0 - u)


@dataclasses.dataclass(frozen=True)
class LogNormal(_Unweighted):
    """log(sigma / alpha) is normal (Karras et al. 2022, section 5).

    EDM: sigma itself is log-normal. RectifiedFlow: the same as `LogitNormal`, as t / (1 - t) =
        sigma / alpha. DDPM: the nearest index.

    Attributes:
        process: The process whose times are drawn.
    """

    process: Process
    mean: float = option(-1.2, "of log(sigma / alpha); the default is EDM's for pixels", FINITE)
    std: float = option(1.2, "standard deviation of log(sigma / alpha)", POSITIVE)

    def __post_init__(self):
        _require_std(self.std)

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        """Draws n times."""
        ratio = jnp.exp(self.mean + self.std * jax.random.normal(key, (n,)))
        t = self.process.time_from_sigma_ratio(ratio)
        return jnp.maximum(jnp.round(t), 0.0) if isinstance(self.process, DDPM) else t

    def quantile(self, u: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The time below which a fraction u of the draws lies."""
        _require_continuous(self.process)
        u = jnp.clip(u, _SMALLEST_PROBABILITY, 1.0 - _SMALLEST_PROBABILITY)
        return self.process.time_from_sigma_ratio(
            jnp.exp(self.mean + self.std * jax.scipy.special.ndtri(u))
        )

    def cdf(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The fraction of draws below t."""
        _require_continuous(self.process)
        ratio = jnp.maximum(self.process.sigma_ratio(t), 1e-30)
        return jax.scipy.special.ndtr((jnp.log(ratio) - self.mean) / self.std)

    def sigma_ratio_quantile(self, u: np.ndarray) -> np.ndarray:
        """sigma / alpha at a quantile, float64 (for tables)."""
        import scipy.special  # a fifth of a second, and samplers need none of it

        return np.exp(self.mean + self.std * scipy.special.ndtri(u))


@dataclasses.dataclass(frozen=True)
class LogitNormal(_Unweighted):
    """logit(t) is normal, favouring the middle of the path (Esser et al. 2024, section 3.1).

    RectifiedFlow: t. DDPM: t / T, rounded down to an index.

    Attributes:
        process: The process whose times are drawn.

    Raises:
        ValueError: For EDM, whose times have no upper end.
    """

    process: Process
    mean: float = option(0.0, "of log(t / (1 - t)): above 0 more noise", FINITE)
    std: float = option(1.0, "standard deviation of log(t / (1 - t))", POSITIVE)

    def __post_init__(self):
        _require_std(self.std)
        if isinstance(self.process, EDM):
            raise ValueError(
                "LogitNormal needs times with two ends, and EDM's sigma has none: use LogNormal "
                "with EDM."
            )

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        """Draws n times."""
        t = jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (n,)))
        if isinstance(self.process, DDPM):
            return jnp.clip(
                jnp.floor(t * self.process.num_timesteps), 0, self.process.num_timesteps - 1
            )
        return t

    def quantile(self, u: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The time below which a fraction u of the draws lies."""
        return self._as_log_normal().quantile(u)

    def cdf(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The fraction of draws below t."""
        return self._as_log_normal().cdf(t)

    def sigma_ratio_quantile(self, u: np.ndarray) -> np.ndarray:
        """sigma / alpha at a quantile, float64 (for tables)."""
        return self._as_log_normal().sigma_ratio_quantile(u)

    def _as_log_normal(self) -> LogNormal:
        return LogNormal(self.process, self.mean, self.std)


# Truncated distributions are inverted by a table: this many points, and log(sigma / alpha) between
# these, so that the ends of a process's time (0, infinity) stay finite.
_TABLE_SIZE = 4096
_SMALLEST_RATIO, _LARGEST_RATIO = 1e-6, 1e6


@functools.lru_cache(maxsize=32)
def _truncated_table(
    df: float | None, low: float, high: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(probabilities, y, scale) of the standard normal (df None) or Student-t truncated to [low,
    high]: the quantile is y itself, or ``scale sinh(y)``, in which heavy tails are short."""
    import scipy.special

    scale = 1.0 if df is None else float(np.sqrt(df))
    ends = (low, high) if df is None else np.arcsinh(np.array([low, high]) / scale)
    y = np.linspace(*ends, _TABLE_SIZE)
    # Differences of cdfs near 1 are rounded, those of the other tail are not: F(x) = 1 - F(-x).
    sign = -1.0 if low > 0 else 1.0
    x = sign * (y if df is None else scale * np.sinh(y))
    cdf = sign * (scipy.special.ndtr(x) if df is None else scipy.special.stdtr(df, x))
    probabilities = (cdf - cdf[0]) / (cdf[-1] - cdf[0])
    return probabilities.astype(np.float32), y.astype(np.float32), scale


@dataclasses.dataclass(frozen=True)
class _Truncated(_Unweighted):
    """A distribution of log(sigma / alpha) cut off at two times, drawn by its inverse cdf."""

    process: Process
    mean: float
    std: float
    min_time: float
    max_time: float

    def __post_init__(self):
        _require_std(self.std)
        low, high = self.bounds
        if not low < high:
            raise ValueError(
                f"{type(self).__name__} is truncated to times from min_time={self.min_time} to "
                f"max_time={self.max_time}, which within {type(self.process).__name__}'s own is "
                f"{low} to {high}: expected an interval. 0 stands for the process's own end."
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest time drawn, within the process's own (from EDM's sigma_min)."""
        smallest = self.process.sigma_min if isinstance(self.process, EDM) else 0.0
        largest = self.process.noise_time
        low = max(self.min_time, smallest)
        return low, min(self.max_time, largest) if self.max_time else largest

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        """Draws n times."""
        return self.quantile(jax.random.uniform(key, (n,)))

    def quantile(self, u: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The time below which a fraction u of the draws lies; for DDPM the nearest index."""
        low, high = self.bounds
        with jax.ensure_compile_time_eval():
            ratios = np.asarray(self.process.sigma_ratio(jnp.array([low, high])), np.float64)
        ends = (np.log(np.clip(ratios, _SMALLEST_RATIO, _LARGEST_RATIO)) - self.mean) / self.std
        df = getattr(self, "df", None)
        probabilities, y, scale = _truncated_table(df, float(ends[0]), float(ends[1]))
        y = jnp.interp(u, jnp.asarray(probabilities), jnp.asarray(y))
        standard = y if df is None else scale * jnp.sinh(y)
        t = self.process.time_from_sigma_ratio(jnp.exp(self.mean + self.std * standard))
        t = jnp.round(t) if isinstance(self.process, DDPM) else t
        return jnp.clip(t, low, high)


@dataclasses.dataclass(frozen=True)
class TruncatedLogNormal(_Truncated):
    """log(sigma / alpha) is normal, between two times: `LogNormal` without its tails.

    Consistency training draws from the whole range of noise levels that way (Geng et al. 2024).

    Attributes:
        process: The process whose times are drawn.
    """

    mean: float = option(-1.1, "of log(sigma / alpha), before truncation", FINITE)
    std: float = option(2.0, "standard deviation of log(sigma / alpha)", POSITIVE)
    min_time: float = option(
        0.0,
        "smallest time; 0: the process's own (EDM's sigma_min)",
        NOT_NEGATIVE,
        below="max_time",
        zero_is_open=True,
    )
    max_time: float = option(0.0, "largest time; 0: the process's own", NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class LogStudentT(_Truncated):
    """log(sigma / alpha) is Student-t, between two times (Lee et al. 2024, section 4.2).

    With few degrees of freedom the times pile up at `mean`, the transition of truncated consistency
    models, and fall off slowly towards noise.

    Attributes:
        process: The process whose times are drawn.
    """

    mean: float = option(0.0, "location of log(sigma / alpha)", FINITE)
    std: float = option(0.2, "scale of log(sigma / alpha)", POSITIVE)
    min_time: float = same_option(TruncatedLogNormal, "min_time", 0.0)
    max_time: float = same_option(TruncatedLogNormal, "max_time", 0.0)
    df: float = option(0.01, "degrees of freedom: few of them pile times up at the mean", POSITIVE)

    def __post_init__(self):
        super().__post_init__()
        if not self.df > 0:
            raise ValueError(f"LogStudentT needs df > 0, got {self.df}.")


@dataclasses.dataclass(frozen=True)
class Polynomial(_Unweighted):
    """The noise levels of EDM's sampling schedule, evenly in their number (Karras et al. 2022, eq.
    5).

    sigma_i = (sigma_min^(1/rho) + i / (N - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho for a
    whole i between fractions of N: where DMD2 renoises what its student generates.

    Attributes:
        process: The process whose times are drawn.

    Raises:
        ValueError: For processes other than EDM, or fractions that leave no level.
    """

    process: Process
    rho: float = option(7.0, "larger ones favour small noise", POSITIVE)
    num_levels: int = option(1000, "N, noise levels of EDM's sampling schedule", COUNT)
    min_fraction: float = option(
        0.002,
        "the first level drawn, as a share of all, rounded down",
        SHARE_BELOW_ONE,
        at_most="max_fraction",
    )
    max_fraction: float = option(0.998, "the last level drawn likewise", SHARE_BELOW_ONE)

    def __post_init__(self):
        if not isinstance(self.process, EDM):
            raise ValueError(
                f"Polynomial is of EDM's noise levels; {type(self.process).__name__}'s times are "
                "other: use Uniform or LogitNormal with it."
            )
        first, last = self.bounds
        if not self.rho > 0 or self.num_levels < 2 or not 0 <= first <= last < self.num_levels:
            raise ValueError(
                f"Polynomial needs rho > 0, num_levels >= 2 and 0 <= min_fraction <= max_fraction "
                f"< 1, got rho={self.rho}, num_levels={self.num_levels}, min_fraction="
                f"{self.min_fraction} and max_fraction={self.max_fraction}."
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """First and last i."""
        return int(self.min_fraction * self.num_levels), int(self.max_fraction * self.num_levels)

    @property
    def levels(self) -> np.ndarray:
        """Every sigma_i, from little noise, float64."""
        assert isinstance(self.process, EDM)
        low, high = (s ** (1 / self.rho) for s in (self.process.sigma_min, self.process.sigma_max))
        return np.linspace(low, high, self.num_levels) ** self.rho

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        """Draws n times."""
        first, last = self.bounds
        index = jax.random.randint(key, (n,), first, last + 1)
        return jnp.asarray(self.levels, jnp.float32)[index]


ContinuousDistribution = Uniform | LogNormal | LogitNormal


def default_base(process: Process) -> ContinuousDistribution:
    """The usual distribution of a process with continuous times: uniform for RectifiedFlow,
    log-normal for EDM."""
    _require_continuous(process)
    return Uniform(process) if isinstance(process, RectifiedFlow) else LogNormal(process)
