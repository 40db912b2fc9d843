"""Solvers that draw from the posterior of the noising process: ancestral sampling and DDIM."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.diffusion.process import DDPM, Prediction, Process
from dit_jax.diffusion.solvers.solver import CLIP, TINY, Denoise, Ends, Solver, Step, ends_of
from dit_jax.options import option
from dit_jax.ranges import SHARE


@dataclasses.dataclass(frozen=True)
class Ancestral(Solver):
    """DDPM's ancestral sampling, for any subset of the chain's times (Ho et al. 2020; Nichol &
    Dhariwal 2021).

    The step is a draw from q(x_s | x_t, x0) at the predicted x0, with mean alpha' (1 - shrink^2) x0
    + shrink (sigma' / sigma) x. Its variance is the posterior one sigma'^2 (1 - shrink^2), or beta
    = 1 - alpha-bar_t / alpha-bar_s = sigma^2 (1 - shrink^2), or between the two in the logarithm as
    the network says. The step to clean data adds no noise.

    `variance` is 'learned' (needs a process with learned_variance), 'fixed_small' (posterior),
    'fixed_large' (beta), or 'auto': learned where the network predicts it, else fixed_small.
    """

    variance: str = option(
        "auto",
        "auto | learned | fixed_small | fixed_large: of a step's noise; auto: learned where the "
        "network predicts it",
    )
    clip_denoised: bool = option(False, CLIP)

    @property
    def is_stochastic(self) -> bool:
        """Every step but the last is a draw."""
        return True

    def __post_init__(self):
        if self.variance not in ("auto", "learned", "fixed_small", "fixed_large"):
            raise ValueError(
                f"Unknown variance {self.variance!r}: expected 'auto', 'learned', 'fixed_small' or "
                "'fixed_large'."
            )

    def init(self, process: Process, x: Float[Array, "b *shape"]) -> None:
        """Nothing; refuses other processes."""
        if not isinstance(process, DDPM):
            raise ValueError(
                f"Solver 'ddpm' is DDPM's own and cannot sample {type(process).__name__}: 'ddim' "
                "with eta=1 is the same draw, with the posterior variance, for every process."
            )

    def step(
        self,
        process: Process,
        denoise: Denoise,
        x: Float[Array, "b *shape"],
        step: Step,
        state: Any,
        carry: Any,
    ) -> tuple[Float[Array, "b *shape"], Any, Any]:
        """Draws x at time s."""
        prediction, carry = self._predict(process, denoise, x, step.t, carry)
        ends = ends_of(process, step)
        lost = (1.0 - ends.shrink) * (1.0 + ends.shrink)  # 1 - shrink^2
        mean = ends.alpha_s * lost * prediction.x0 + ends.shrink * (ends.sigma_s / ends.sigma_t) * x
        std = jnp.where(
            ends.sigma_s > 0, jnp.exp(0.5 * self._log_variance(ends, lost, prediction)), 0.0
        )
        return mean + std * step.noise(x.shape), state, carry

    def _log_variance(self, ends: Ends, lost: Array, prediction: Prediction) -> Array:
        smallest = jnp.log(jnp.maximum(ends.sigma_s**2 * lost, TINY))
        largest = jnp.log(jnp.maximum(ends.sigma_t**2 * lost, TINY))
        fraction = prediction.variance_fraction
        if self.variance == "learned" and fraction is None:
            raise ValueError(
                "Solver 'ddpm' with variance='learned' needs a network that predicts one "
                "(learn_sigma, and the process's "
                "learned_variance): use variance='fixed_small' or 'fixed_large' with this one."
            )
        if self.variance == "fixed_large":
            return largest
        if self.variance == "fixed_small" or fraction is None:
            return smallest
        return fraction * largest + (1.0 - fraction) * smallest


@dataclasses.dataclass(frozen=True)
class DDIM(Solver):
    """Denoising diffusion implicit models (Song et al. 2020, eq. 12), for every process.

    Of the noise sigma' to be left, eta^2 (1 - shrink^2) is fresh (in variance) and the rest is the
    predicted eps; for DDPM that is DDIM's sigma_t(eta).
    """

    eta: float = option(
        0.0, "noise of a step: 0 is deterministic, 1 ancestral with the posterior variance", SHARE
    )
    clip_denoised: bool = option(False, CLIP)

    @property
    def is_stochastic(self) -> bool:
        """With eta."""
        return self.eta > 0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM needs eta in [0, 1], got {self.eta}.")

    def step(
        self,
        process: Process,
        denoise: Denoise,
        x: Float[Array, "b *shape"],
        step: Step,
        state: Any,
        carry: Any,
    ) -> tuple[Float[Array, "b *shape"], Any, Any]:
        """Steps along the prediction, with eta's share of fresh noise."""
        prediction, carry = self._predict(process, denoise, x, step.t, carry)
        ends = ends_of(process, step)
        fresh = self.eta**2 * (1.0 - ends.shrink) * (1.0 + ends.shrink)
        kept = ends.sigma_s * jnp.sqrt(1.0 - fresh)
        x = ends.alpha_s * prediction.x0 + kept * prediction.eps
        if self.eta > 0:
            x = x + ends.sigma_s * jnp.sqrt(fresh) * step.noise(x.shape)
        return x, state, carry
