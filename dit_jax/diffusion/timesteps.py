"""Training distributions of the time t: which noise levels a batch is trained on, and with what
weight.

A distribution has ``sample(key, n) -> t`` (static n) and ``weight(t)``, a weight of its own for the
squared error (1 except for SpeeD, in speed.py). Times are float32 in the process's own units.
Distributions are frozen, hashable and jittable. Those over continuous times also have `quantile`
and `cdf`, on which SpeeD's grid is laid.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, PRNGKeyArray

from dit_jax.diffusion.process import DDPM, EDM, Process, RectifiedFlow

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
        mean: Mean of log(sigma / alpha); EDM's default for pixels.
        std: Its standard deviation.
    """

    process: Process
    mean: float = -1.2
    std: float = 1.2

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
        return np.exp(self.mean + self.std * scipy.special.ndtri(u))


@dataclasses.dataclass(frozen=True)
class LogitNormal(_Unweighted):
    """logit(t) is normal, favouring the middle of the path (Esser et al. 2024, section 3.1).

    RectifiedFlow: t. DDPM: t / T, rounded down to an index.

    Attributes:
        process: The process whose times are drawn.
        mean: Mean of logit(t): negative favours data, positive noise.
        std: Its standard deviation.

    Raises:
        ValueError: For EDM, whose times have no upper end.
    """

    process: Process
    mean: float = 0.0
    std: float = 1.0

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


ContinuousDistribution = Uniform | LogNormal | LogitNormal


def default_base(process: Process) -> ContinuousDistribution:
    """The usual distribution of a process with continuous times: uniform for RectifiedFlow,
    log-normal for EDM."""
    _require_continuous(process)
    return Uniform(process) if isinstance(process, RectifiedFlow) else LogNormal(process)
