"""Solvers of one step of the probability flow: Euler and Heun."""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_jax.diffusion.ode import ode_step
from dit_jax.diffusion.process import Prediction, Process
from dit_jax.diffusion.solvers.solver import Denoise, Solver, Step
from dit_jax.options import option
from dit_jax.ranges import NOT_NEGATIVE


@dataclasses.dataclass(frozen=True)
class Euler(Solver):
    """x' = alpha' x0 + sigma' eps: Euler's method in any coordinates in which the process is linear
    (for flow, x + (s - t) v)."""

    few_steps: ClassVar[bool] = True
    follows_velocity: ClassVar[bool] = True
    ode_order: ClassVar[int] = 1

    def step(
        self,
        process: Process,
        denoise: Denoise,
        x: Float[Array, "b *shape"],
        step: Step,
        state: Any,
        carry: Any,
    ) -> tuple[Float[Array, "b *shape"], Any, Any]:
        """Keeps the predictions and lowers the noise."""
        prediction, carry = self._predict(process, denoise, x, step.t, carry)
        return process.add_noise(prediction.x0, prediction.eps, step.s), state, carry


@dataclasses.dataclass(frozen=True)
class Heun(Solver):
    """Second-order Heun steps with optional churn (Karras et al. 2022, algorithm 2), for every
    process.

    Slopes are averaged in the process's own coordinates: velocity against t for flow, eps against
    sigma / alpha for the others. The step to clean data is Euler's, without a second evaluation.
    Churn first adds noise: sigma / alpha grows by the factor 1 + min(s_churn / steps, sqrt(2) - 1)
    where it lies between s_min and s_max (not beyond DDPM's noisiest index, and not at
    flow's pure noise).
    """

    s_churn: float = option(0.0, "noise added back, over all steps; 0: deterministic", NOT_NEGATIVE)
    s_min: float = option(
        0.0,
        "smallest sigma / alpha at which noise is added",
        NOT_NEGATIVE,
        at_most="s_max",
        needs="s_churn",
    )
    s_max: float = option(
        1e9, "largest sigma / alpha at which noise is added", NOT_NEGATIVE, needs="s_churn"
    )
    s_noise: float = option(
        1.0, "standard deviation of the added noise", NOT_NEGATIVE, needs="s_churn"
    )

    evaluations_per_step: ClassVar[int] = 2
    follows_velocity: ClassVar[bool] = True
    ode_order: ClassVar[int] = 2

    @property
    def is_stochastic(self) -> bool:
        """With churn."""
        return self.s_churn > 0

    def evaluated_times(self, times: np.ndarray) -> np.ndarray:
        """The second evaluation is at the step's end."""
        return times

    def __post_init__(self):
        if self.s_churn < 0 or self.s_noise < 0 or not 0 <= self.s_min <= self.s_max:
            raise ValueError(
                "Heun needs s_churn >= 0, s_noise >= 0 and 0 <= s_min <= s_max, got "
                f"s_churn={self.s_churn}, s_noise={self.s_noise}, s_min={self.s_min}, "
                f"s_max={self.s_max}."
            )

    def evaluations(self, steps: int) -> int:
        """2 steps - 1: the last step takes one."""
        return 2 * steps - 1

    def step(
        self,
        process: Process,
        denoise: Denoise,
        x: Float[Array, "b *shape"],
        step: Step,
        state: Any,
        carry: Any,
    ) -> tuple[Float[Array, "b *shape"], Any, Any]:
        """Predicts with the first slope, corrects with the average of two."""
        t = step.t
        if self.s_churn > 0:
            x, t = self._churn(process, x, step)

        def predict(x: Array, t: Array, carry: Any) -> tuple[Prediction, Any]:
            return self._predict(process, denoise, x, t, carry)

        x, carry = ode_step(process, predict, x, t, step.s, carry, order=self.ode_order)
        return x, state, carry

    def _churn(self, process: Process, x: Array, step: Step) -> tuple[Array, Array]:
        gamma = min(self.s_churn / step.count, math.sqrt(2.0) - 1.0)
        alpha, ratio = process.alpha(step.t), process.sigma_ratio(step.t)
        churned = (ratio >= self.s_min) & (ratio <= self.s_max) & (alpha > 1e-6)
        t = jnp.where(churned, process.time_from_sigma_ratio((1.0 + gamma) * ratio), step.t)
        # Read back from t, as processes with a noisiest time do not reach every ratio.
        alpha_up, ratio_up = process.alpha(t), process.sigma_ratio(t)
        added = jnp.sqrt(jnp.maximum((ratio_up - ratio) * (ratio_up + ratio), 0.0))
        noise = self.s_noise * step.noise(x.shape)
        scaled = alpha_up * (x / jnp.where(churned, alpha, 1.0) + added * noise)
        return jnp.where(churned, scaled, x), t
