"""Solvers for distilled networks: consistency models and average velocities."""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float

from dit_jax.diffusion.process import Process, RectifiedFlow
from dit_jax.diffusion.solvers.solver import Denoise, Solver, Step


@dataclasses.dataclass(frozen=True)
class Consistency(Solver):
    """Multistep sampling of consistency models (Song et al. 2023, algorithm 1), also DMD2's.

    Each step jumps to the predicted x0 and adds fresh noise, x' = alpha' x0 + sigma' eps; the last
    step, to clean data, adds none. With one step this is Euler's.
    """

    few_steps: ClassVar[bool] = True
    extrapolates: ClassVar[bool] = True

    @property
    def is_stochastic(self) -> bool:
        """Every step but the last adds fresh noise."""
        return True

    def step(
        self,
        process: Process,
        denoise: Denoise,
        x: Float[Array, "b *shape"],
        step: Step,
        state: Any,
        carry: Any,
    ) -> tuple[Float[Array, "b *shape"], Any, Any]:
        """Predicts clean data and renoises it to time s."""
        prediction, carry = self._predict(process, denoise, x, step.t, carry)
        return process.add_noise(prediction.x0, step.noise(x.shape), step.s), state, carry


@dataclasses.dataclass(frozen=True)
class MeanFlow(Solver):
    """Steps along average velocities (Geng et al. 2025, eq. 12): x' = x - (t - s) u(x, s, t).

    The network is told both ends of the step, and its answer, read as a velocity, is the average
    one between them.
    """

    second_time: ClassVar[bool] = True
    follows_velocity: ClassVar[bool] = True

    def init(self, process: Process, x: Float[Array, "b *shape"]) -> None:
        """Nothing; refuses other processes, and clipping."""
        if self.clip_denoised:
            raise ValueError("Solver 'mean_flow' predicts no x0 to clip: leave clip_denoised off.")
        if not isinstance(process, RectifiedFlow):
            raise ValueError(
                "Solver 'mean_flow' follows average velocities of a rectified flow and cannot "
                f"sample {type(process).__name__}: use process.name='flow', or another solver."
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
        """Moves along the average velocity between t and s."""
        prediction, carry = denoise(x, step.t, carry, r=step.s)
        return x + (step.s - step.t) * (prediction.eps - prediction.x0), state, carry
