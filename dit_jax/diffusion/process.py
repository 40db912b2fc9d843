"""The diffusion processes: DDPM's chain, rectified flow, and EDM.

What they share, and the conversions between kinds of prediction, is in conversions.py.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_jax.diffusion.conversions import (
    KINDS,
    SMALLEST_ALPHA,
    Kind,
    Prediction,
    Process,
    Row,
    expand,
)
from dit_jax.diffusion.preconditioning import IDDPM, VE, VP, EDMPreconditioning, Preconditioning
from dit_jax.options import option
from dit_jax.ranges import COUNT, POSITIVE, Range

__all__ = ["DDPM", "EDM", "KINDS", "Kind", "Prediction", "Process", "RectifiedFlow", "expand"]

_BETA = Range(0, 1, above=True, below=True)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class DDPMTables(NamedTuple):
    """What the discrete chain q(x_t | x_{t-1}) is made of, one float64 entry per index 0..T-1
    (DDPM, eqs. 4, 6, 7)."""

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    log_sigma_ratio: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance: (
        np.ndarray
    )  # index 0, whose variance is 0, holds that of index 1 (Improved DDPM)
    posterior_mean_x0: np.ndarray
    posterior_mean_x: np.ndarray


@functools.lru_cache(maxsize=32)
def _ddpm_tables(num_timesteps: int, beta_start: float, beta_end: float) -> DDPMTables:
    betas = np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)
    alphas_cumprod = np.cumprod(1.0 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
    return DDPMTables(
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        log_sigma_ratio=0.5 * (np.log1p(-alphas_cumprod) - np.log(alphas_cumprod)),
        posterior_variance=variance,
        posterior_log_variance=np.log(np.append(variance[1], variance[1:])),
        posterior_mean_x0=betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
        posterior_mean_x=(1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
    )


@dataclasses.dataclass(frozen=True)
class DDPM(Process):
    """The variance-preserving chain of DDPM with linear betas (Ho et al. 2020), alpha^2 + sigma^2 =
    1.

    Time is the index 0..T-1 of the chain; -1 is clean data. Between indices log(sigma / alpha) is
    interpolated linearly (between -1 and 0, where it is unbounded, sigma / alpha itself is), so
    solvers may also stop in between. The network is given the index. velocity = alpha eps - sigma
    x0 (Salimans & Ho 2022).

    The default betas are those of 1000 levels; Improved DDPM scales both by 1000 / T for other T.

    Attributes:
        learned_variance: Whether the last half of the network's output is a learned-range variance
            (Improved DDPM); it follows from the network and is no key.
    """

    num_timesteps: int = option(1000, "noise levels", COUNT)
    beta_start: float = option(
        1e-4, "variance of the first level's noise", _BETA, at_most="beta_end"
    )
    beta_end: float = option(2e-2, "of the last level's; linear in between", _BETA)
    prediction: str = option("eps", "eps | x0 | velocity")
    learned_variance: bool = False

    def __post_init__(self):
        _require(
            self.num_timesteps >= 2, f"DDPM needs num_timesteps >= 2, got {self.num_timesteps}."
        )
        _require(
            0 < self.beta_start <= self.beta_end < 1,
            f"DDPM needs 0 < beta_start <= beta_end < 1, got {self.beta_start} and "
            f"{self.beta_end}.",
        )
        _require(
            self.prediction in ("eps", "x0", "velocity"),
            f"Unknown DDPM prediction {self.prediction!r}: expected 'eps', 'x0' or 'velocity'.",
        )

    @property
    def tables(self) -> DDPMTables:
        """The chain's constants, float64, computed once."""
        return _ddpm_tables(self.num_timesteps, self.beta_start, self.beta_end)

    @property
    def clean_time(self) -> float:
        """-1, one before the first index."""
        return -1.0

    @property
    def noise_time(self) -> float:
        """T - 1, the last index."""
        return float(self.num_timesteps - 1)

    @property
    def prior_scale(self) -> float:
        """1."""
        return 1.0

    def alpha(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """sqrt(alpha-bar)."""
        return jax.lax.rsqrt(1.0 + self.sigma_ratio(t) ** 2)

    def sigma(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """sqrt(1 - alpha-bar)."""
        ratio = self.sigma_ratio(t)
        return ratio * jax.lax.rsqrt(1.0 + ratio**2)

    def sigma_ratio(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """sigma / alpha, by interpolation of its logarithm between indices."""
        table = jnp.asarray(self.tables.log_sigma_ratio, jnp.float32)
        t = jnp.clip(jnp.asarray(t, jnp.float32), self.clean_time, self.noise_time)
        index = jnp.clip(jnp.floor(t), 0, self.num_timesteps - 2)
        low, high = table[index.astype(jnp.int32)], table[index.astype(jnp.int32) + 1]
        # Summed this way round an integer t reads its table entry exactly.
        fraction = jnp.maximum(t - index, 0.0)
        ratio = jnp.exp((1.0 - fraction) * low + fraction * high)
        return jnp.where(t < 0, (1.0 + t) * jnp.exp(table[0]), ratio)

    def time_from_sigma_ratio(self, ratio: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Real-valued index of a sigma / alpha."""
        table = jnp.asarray(self.tables.log_sigma_ratio, jnp.float32)
        ratio = jnp.asarray(ratio, jnp.float32)
        smallest = jnp.exp(table[0])
        indices = jnp.arange(self.num_timesteps, dtype=jnp.float32)
        between = jnp.interp(jnp.log(jnp.maximum(ratio, smallest)), table, indices)
        return jnp.where(ratio < smallest, ratio / smallest - 1.0, between)

    def velocity_row(self, t: Float[Array, "*s"]) -> Row:
        """(-sigma, alpha)."""
        return -self.sigma(t), self.alpha(t)

    def raw_row(self, t: Float[Array, "*s"]) -> Row:
        """Row of the configured prediction."""
        return self.row(self.prediction, t)

    def network_inputs(
        self, x: Float[Array, "b *shape"], t: Float[Array, "..."]
    ) -> tuple[Float[Array, "b *shape"], Float[Array, " b"]]:
        """x unchanged, and the index: the network of a respaced chain still sees indices of the
        full one."""
        return x, self._network_time(t, x)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Process):
    """Straight lines from data to noise, ``x = (1 - t) x0 + t eps`` (Liu et al. 2022; Lipman et al.
    2022).

    Time runs from 0 (data) to 1 (pure noise); velocity = dx/dt = eps - x0.

    A network of convention 'sit' sees 1 - t and outputs x0 - eps (Ma et al. 2024); one of 'flux'
    sees t and outputs eps - x0 (Flux, SD3).
    """

    network_convention: str = option("sit", "sit | flux")
    time_scale: float = option(
        1.0, "multiplies the time the network sees: 1 for SiT, 1000 for Flux", POSITIVE
    )

    def __post_init__(self):
        _require(
            self.network_convention in ("sit", "flux"),
            f"Unknown network_convention {self.network_convention!r}: expected 'sit' (the network "
            "sees 1 - t and outputs x0 - eps) or 'flux' (it sees t and outputs eps - x0).",
        )
        _require(self.time_scale > 0, f"RectifiedFlow needs time_scale > 0, got {self.time_scale}.")

    @property
    def clean_time(self) -> float:
        """0."""
        return 0.0

    @property
    def noise_time(self) -> float:
        """1."""
        return 1.0

    @property
    def prior_scale(self) -> float:
        """1."""
        return 1.0

    def alpha(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """1 - t."""
        return 1.0 - jnp.asarray(t, jnp.float32)

    def sigma(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """t."""
        return jnp.asarray(t, jnp.float32)

    def sigma_ratio(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """t / (1 - t), 1e12 for pure noise."""
        return self.sigma(t) / jnp.maximum(self.alpha(t), SMALLEST_ALPHA)

    def time_from_sigma_ratio(self, ratio: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """ratio / (1 + ratio)."""
        ratio = jnp.asarray(ratio, jnp.float32)
        return ratio / (1.0 + ratio)

    def velocity_row(self, t: Float[Array, "*s"]) -> Row:
        """(-1, 1)."""
        one = jnp.ones_like(t)
        return -one, one

    def raw_row(self, t: Float[Array, "*s"]) -> Row:
        """(1, -1) for 'sit', (-1, 1) for 'flux'."""
        p, q = self.velocity_row(t)
        return (-p, -q) if self.network_convention == "sit" else (p, q)

    def network_inputs(
        self, x: Float[Array, "b *shape"], t: Float[Array, "..."]
    ) -> tuple[Float[Array, "b *shape"], Float[Array, " b"]]:
        """x unchanged, and the time in the network's convention and scale."""
        t = self._network_time(t, x)
        return x, self.time_scale * (1.0 - t if self.network_convention == "sit" else t)

    def ode_coordinates(
        self, t: Float[Array, "*s"]
    ) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
        """(1, t): x itself, whose path is straight in t."""
        t = jnp.asarray(t, jnp.float32)
        return jnp.ones_like(t), t

    def ode_derivative(self, prediction: Prediction) -> Float[Array, "b *shape"]:
        """The velocity eps - x0."""
        return prediction.eps - prediction.x0


@dataclasses.dataclass(frozen=True)
class EDM(Process):
    """Noise added to unscaled data, ``x = x0 + sigma eps``, and preconditioning around any network
    (Karras et al. 2022).

    Time is sigma itself; velocity = dx/dsigma = eps. The network F outputs what makes ``x0 = c_skip
    x + c_out F(c_in x, c_noise)``, with the coefficients of a preconditioning (preconditioning.py):
    EDM's own, or that of a network trained otherwise.
    """

    sigma_data: float = option(
        0.5, "standard deviation of the data, 0.5 for pixels in [-1, 1]", POSITIVE
    )
    sigma_min: float = option(0.002, "where sampling ends, before 0", POSITIVE, below="sigma_max")
    sigma_max: float = option(80.0, "where sampling starts", POSITIVE)
    preconditioning: str = option("edm", "edm | vp | ve | iddpm: how the network is wrapped")
    vp_beta_d: float = option(19.9, "of vp: growth of beta from time 0 to 1", POSITIVE)
    vp_beta_min: float = option(0.1, "of vp: beta at time 0", POSITIVE)
    vp_epsilon_t: float = option(1e-5, "of vp: smallest time trained on", POSITIVE)
    ve_sigma_min: float = option(
        0.02, "of ve: smallest noise level", POSITIVE, below="ve_sigma_max"
    )
    ve_sigma_max: float = option(100.0, "of ve: largest noise level", POSITIVE)
    iddpm_c_1: float = option(0.001, "of iddpm: least ratio of neighbouring alpha bars", POSITIVE)
    iddpm_c_2: float = option(0.008, "of iddpm: offset of its cosine schedule", POSITIVE)
    num_timesteps: int = option(1000, "M of vp and iddpm", COUNT)

    def __post_init__(self):
        _require(self.sigma_data > 0, f"EDM needs sigma_data > 0, got {self.sigma_data}.")
        _require(
            0 < self.sigma_min < self.sigma_max,
            f"EDM needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}.",
        )
        self._require_used_options()
        low, high = self.coefficients.sigma_range
        _require(
            low <= self.sigma_min and self.sigma_max <= high,
            f"Networks of preconditioning {self.preconditioning!r} know noise levels from "
            f"{low:.7g} to {high:.7g}: set sigma_min and sigma_max, here {self.sigma_min} and "
            f"{self.sigma_max}, within that range.",
        )

    def _require_used_options(self):
        _require(
            self.preconditioning in ("edm", "vp", "ve", "iddpm"),
            f"Unknown preconditioning {self.preconditioning!r}: expected 'edm', 'vp', 've' or "
            "'iddpm'.",
        )
        for field in dataclasses.fields(self):
            owner = field.name.partition("_")[0]
            owners = ("vp", "iddpm") if field.name == "num_timesteps" else (owner,)
            _require(
                owners[0] not in ("vp", "ve", "iddpm")
                or self.preconditioning in owners
                or getattr(self, field.name) == field.default,
                f"EDM's {field.name} would do nothing with preconditioning "
                f"{self.preconditioning!r}: it is of {' and '.join(owners)}.",
            )
        _require(
            self.vp_beta_d > 0 and self.vp_beta_min > 0 and 0 < self.vp_epsilon_t < 1,
            "VP needs vp_beta_d > 0, vp_beta_min > 0 and vp_epsilon_t in (0, 1), got "
            f"{self.vp_beta_d}, {self.vp_beta_min} and {self.vp_epsilon_t}.",
        )
        _require(
            0 < self.ve_sigma_min < self.ve_sigma_max,
            f"VE needs 0 < ve_sigma_min < ve_sigma_max, got {self.ve_sigma_min} and "
            f"{self.ve_sigma_max}.",
        )
        _require(
            0 < self.iddpm_c_1 < 1 and self.iddpm_c_2 > 0 and self.num_timesteps >= 2,
            "iDDPM needs iddpm_c_1 in (0, 1), iddpm_c_2 > 0 and num_timesteps >= 2, got "
            f"{self.iddpm_c_1}, {self.iddpm_c_2} and {self.num_timesteps}.",
        )

    @property
    def coefficients(self) -> Preconditioning:
        """The preconditioning, with its options."""
        steps = self.num_timesteps
        if self.preconditioning == "vp":
            return VP(self.vp_beta_d, self.vp_beta_min, self.vp_epsilon_t, steps)
        if self.preconditioning == "ve":
            return VE(self.ve_sigma_min, self.ve_sigma_max)
        if self.preconditioning == "iddpm":
            return IDDPM(self.iddpm_c_1, self.iddpm_c_2, steps)
        return EDMPreconditioning(self.sigma_data)

    @property
    def clean_time(self) -> float:
        """0."""
        return 0.0

    @property
    def noise_time(self) -> float:
        """sigma_max."""
        return float(self.sigma_max)

    @property
    def prior_scale(self) -> float:
        """sigma_max."""
        return float(self.sigma_max)

    def alpha(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """1."""
        return jnp.ones_like(t, jnp.float32)

    def sigma(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """t."""
        return jnp.asarray(t, jnp.float32)

    def sigma_ratio(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """t."""
        return jnp.asarray(t, jnp.float32)

    def time_from_sigma_ratio(self, ratio: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The ratio itself, also beyond sigma_max; for iDDPM the nearest level of its table."""
        return self.coefficients.round_sigma(jnp.asarray(ratio, jnp.float32))

    def start_scale(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The noise's own, as schedules may start at another than sigma_max."""
        return self.sigma(t)

    def c_skip(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Of the preconditioning; EDM's sigma_data^2 / (sigma^2 + sigma_data^2) (Table 1)."""
        return self.coefficients.c_skip(self.sigma(t))

    def c_out(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Of the preconditioning; EDM's sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return self.coefficients.c_out(self.sigma(t))

    def c_in(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Of the preconditioning; EDM's 1 / sqrt(sigma^2 + sigma_data^2)."""
        return self.coefficients.c_in(self.sigma(t))

    def c_noise(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Of the preconditioning; EDM's log(sigma) / 4."""
        return self.coefficients.c_noise(self.sigma(t))

    def velocity_row(self, t: Float[Array, "*s"]) -> Row:
        """(0, 1)."""
        return self.row("eps", t)

    def raw_row(self, t: Float[Array, "*s"]) -> Row:
        """(x0 - c_skip x) / c_out as a row, finite also for sigma = 0; for EDM's preconditioning
        (sigma / sigma_data, -sigma_data) c_in."""
        return self.coefficients.raw_row(self.sigma(t))

    def network_inputs(
        self, x: Float[Array, "b *shape"], t: Float[Array, "..."]
    ) -> tuple[Float[Array, "b *shape"], Float[Array, " b"]]:
        """(c_in x, c_noise)."""
        return expand(self.c_in(t), x) * x, self.c_noise(self._network_time(t, x))
