"""Solvers that remember the steps before: DPM-Solver++(2M)."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.diffusion.process import Process
from dit_jax.diffusion.solvers.solver import Denoise, Solver, Step, ends_of


class _History(NamedTuple):
    """What DPM-Solver++(2M) remembers: the last x0, and the last step's growth of log(alpha /
    sigma), 0 where not finite."""

    x0: Array
    growth: Array


@dataclasses.dataclass(frozen=True)
class DPMSolverPP2M(Solver):
    """DPM-Solver++(2M): second-order multistep in x0, midpoint form (Lu et al. 2022, algorithm 2).

    With h the growth of log(alpha / sigma) in a step, x' = (sigma' / sigma) x + alpha' (1 - shrink)
    (x0 + h / (2 h_last) (x0 - x0_last)), as exp(-h) = shrink. First-order where h or h_last is
    infinite: the first step, that after flow's pure noise, and the step to clean data.

    On DDPM with 20 steps or fewer, choose the spacings 'trailing' or 'karras': those that stop at
    index 0 before clean data extrapolate across a last step that spans most of log(alpha / sigma)
    (on normal data of standard deviation 0.5, 20 steps give 0.62 with 'iddpm' and 0.48 with
    'trailing').
    """

    extrapolates: ClassVar[bool] = True

    def init(self, process: Process, x: Float[Array, "b *shape"]) -> _History:
        """No history."""
        return _History(jnp.zeros_like(x), jnp.zeros((), jnp.float32))

    def step(
        self,
        process: Process,
        denoise: Denoise,
        x: Float[Array, "b *shape"],
        step: Step,
        state: Any,
        carry: Any,
    ) -> tuple[Float[Array, "b *shape"], Any, Any]:
        """Extrapolates x0 from this and the last evaluation."""
        prediction, carry = self._predict(process, denoise, x, step.t, carry)
        ends = ends_of(process, step)
        finite = ends.shrink > 0
        growth = jnp.where(finite, -jnp.log(jnp.where(finite, ends.shrink, 1.0)), 0.0)
        second_order = state.growth > 0
        ratio = jnp.where(second_order, growth / jnp.where(second_order, state.growth, 1.0), 0.0)
        x0 = prediction.x0 + 0.5 * ratio * (prediction.x0 - state.x0)
        x = (ends.sigma_s / ends.sigma_t) * x + ends.alpha_s * (1.0 - ends.shrink) * x0
        return x, _History(prediction.x0, growth), carry
