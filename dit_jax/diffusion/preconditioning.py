"""Preconditionings of EDM's process: what stands around the network (Karras et al. 2022, table 1).

All read ``x0 = c_skip x + c_out F(c_in x, c_noise)`` of ``x = x0 + sigma eps``. The raw output F is
one linear combination of x0 and eps; `raw_row` gives it, finite also for sigma = 0. Besides EDM's
own, three describe networks that were trained as diffusions of another kind: F is then eps or its
negative, whatever the noise level, and an unweighted squared error of F is their published weight
1 / sigma^2 on the error of x0.
"""

import dataclasses
import functools
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# c_noise must be finite for sigma = 0; far below any sigma in use.
_SMALLEST_SIGMA = 1e-8


@runtime_checkable
class Preconditioning(Protocol):
    """The four coefficients, float32 functions of a float32 sigma."""

    def c_skip(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Share of x in the predicted x0."""
        ...

    def c_out(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Share of the network's output in it."""
        ...

    def c_in(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Scale of the network's input."""
        ...

    def c_noise(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The time that the network sees."""
        ...

    def raw_row(self, sigma: Float[Array, "*s"]) -> tuple[Array, Array]:
        """(p, q) with F = p x0 + q eps."""
        ...

    def round_sigma(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The nearest noise level that the network knows."""
        ...

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Least and largest noise level that the network knows."""
        ...


@dataclasses.dataclass(frozen=True)
class EDMPreconditioning:
    """Karras et al.: inputs and targets of unit variance at all noise levels.

    Attributes:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 0.5

    def c_skip(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """sigma_data^2 / (sigma^2 + sigma_data^2)."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return sigma * self.sigma_data * self.c_in(sigma)

    def c_in(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """1 / sqrt(sigma^2 + sigma_data^2)."""
        return jax.lax.rsqrt(sigma**2 + self.sigma_data**2)

    def c_noise(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """log(sigma) / 4."""
        return 0.25 * jnp.log(jnp.maximum(sigma, _SMALLEST_SIGMA))

    def raw_row(self, sigma: Float[Array, "*s"]) -> tuple[Array, Array]:
        """(sigma / sigma_data, -sigma_data) c_in."""
        c_in = self.c_in(sigma)
        return sigma / self.sigma_data * c_in, -self.sigma_data * c_in

    def round_sigma(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """sigma itself."""
        return sigma

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Everything."""
        return 0.0, math.inf


class _PredictsNoise:
    """F = sign eps: c_skip 1 and c_out -sign sigma."""

    sign: float = 1.0

    def c_skip(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """1."""
        return jnp.ones_like(sigma)

    def c_out(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """-sigma, for VE sigma."""
        return -self.sign * sigma

    def raw_row(self, sigma: Float[Array, "*s"]) -> tuple[Array, Array]:
        """(0, 1), for VE (0, -1)."""
        return jnp.zeros_like(sigma), jnp.full_like(sigma, self.sign)

    def round_sigma(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """sigma itself."""
        return sigma


@dataclasses.dataclass(frozen=True)
class VP(_PredictsNoise):
    """Song et al.'s variance-preserving SDE, beta(t) = beta_d t + beta_min.

    Attributes:
        beta_d: extent of the schedule.
        beta_min: its initial slope.
        epsilon_t: smallest t of training.
        num_timesteps: M, of the discrete chain whose index the network sees.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5
    num_timesteps: int = 1000

    def c_in(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """1 / sqrt(sigma^2 + 1)."""
        return jax.lax.rsqrt(sigma**2 + 1)

    def c_noise(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """(M - 1) t, where sigma(t) is sigma."""
        # (sqrt(beta_min^2 + 2 beta_d l) - beta_min) / beta_d, l = log(1 + sigma^2), without the
        # cancellation for small sigma.
        log = 2 * jnp.log1p(sigma**2)
        t = log / (jnp.sqrt(self.beta_min**2 + self.beta_d * log) + self.beta_min)
        return (self.num_timesteps - 1) * t

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Between t = epsilon_t and t = 1."""

        def sigma(t):
            return math.sqrt(math.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))

        return sigma(self.epsilon_t), sigma(1.0)


@dataclasses.dataclass(frozen=True)
class VE(_PredictsNoise):
    """Song et al.'s variance-exploding SDE.

    Attributes:
        sigma_min: least noise level of training.
        sigma_max: largest one.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    sign = -1.0

    def c_in(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """1."""
        return jnp.ones_like(sigma)

    def c_noise(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """log(sigma / 2)."""
        return jnp.log(0.5 * jnp.maximum(sigma, _SMALLEST_SIGMA))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """That of training."""
        return self.sigma_min, self.sigma_max


@functools.lru_cache(maxsize=16)
def _iddpm_table(c_1: float, c_2: float, num_timesteps: int) -> np.ndarray:
    """u_0 > ... > u_M = 0, in float32: networks were trained with that arithmetic's rounding, which
    is 5e-4 of the smallest level."""
    f = np.float32
    angles = f(0.5 * np.pi) * np.arange(num_timesteps + 1, dtype=f) / f(num_timesteps) / f(1 + c_2)
    alpha_bar = np.sin(angles) ** 2
    u = np.zeros(num_timesteps + 1, f)
    for j in range(num_timesteps, 0, -1):
        kept = max(alpha_bar[j - 1] / alpha_bar[j], f(c_1))
        u[j - 1] = np.sqrt((u[j] ** 2 + f(1)) / kept - f(1))
    return u


@dataclasses.dataclass(frozen=True)
class IDDPM(_PredictsNoise):
    """Nichol & Dhariwal's improved DDPM: a table of M noise levels, of a cosine schedule.

    Attributes:
        c_1: least factor of alpha-bar from one level to the next.
        c_2: offset of the cosine.
        num_timesteps: M.
    """

    c_1: float = 0.001
    c_2: float = 0.008
    num_timesteps: int = 1000

    @property
    def table(self) -> np.ndarray:
        """The levels u_0 > ... > u_{M-1}, then u_M = 0, float32."""
        return _iddpm_table(self.c_1, self.c_2, self.num_timesteps)

    def c_in(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """1 / sqrt(sigma^2 + 1)."""
        return jax.lax.rsqrt(sigma**2 + 1)

    def c_noise(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """M - 1 - the index of the nearest level."""
        return (self.num_timesteps - 1 - self._index(sigma)).astype(jnp.float32)

    def round_sigma(self, sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The nearest level."""
        return jnp.asarray(self.table)[self._index(sigma)]

    def _index(self, sigma: Array) -> Array:
        ascending = jnp.asarray(self.table[::-1])
        above = jnp.clip(jnp.searchsorted(ascending, sigma), 1, self.num_timesteps)
        nearer_below = sigma - ascending[above - 1] < ascending[above] - sigma
        return self.num_timesteps - jnp.where(nearer_below, above - 1, above)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The table's, without 0."""
        return float(self.table[-2]), float(self.table[0])
