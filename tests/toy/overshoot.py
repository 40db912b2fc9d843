"""A solver whose steps are each a little too long."""

import dataclasses

from dit_jax.diffusion.solvers import Euler, register_solver
from dit_jax.options import option
from dit_jax.ranges import POSITIVE


@dataclasses.dataclass(frozen=True)
class Overshoot(Euler):
    factor: float = option(1.0, "by which a step is too long", POSITIVE)

    def step(self, process, denoise, x, step, state, carry):
        new, state, carry = super().step(process, denoise, x, step, state, carry)
        return x + self.factor * (new - x), state, carry


def register() -> None:
    register_solver("overshoot", Overshoot)
