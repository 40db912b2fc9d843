"""What every solver offers, and the quantities that their formulas are written with.

A solver is a frozen, hashable record of its options; `samplers.sample` scans its `step` over a
schedule. All are written with alpha and sigma at the two ends of a step, so each serves every
process (the ancestral one only DDPM), at any spacing. The quantity

    shrink = (sigma' / alpha') / (sigma / alpha)

of a step from (alpha, sigma) to (alpha', sigma') is 0 at a step to clean data or from pure noise
and below 1 elsewhere; every formula of this package is finite for it, where those with
log(alpha / sigma) are not.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dit_jax.diffusion.process import Prediction, Process

Denoise = Callable[..., tuple[Prediction, Any]]
"""``denoise(x, t_scalar, carry) -> (Prediction, carry)``; networks of average velocities are also
told the time at the end of the step, ``denoise(x, t_scalar, carry, r=s_scalar)``."""


TINY = 1e-20


CLIP = "clamp predicted x0 to [-1, 1] (of pixels)"


class Step(NamedTuple):
    """Where a solver goes in one step.

    Attributes:
        t: Time to start from.
        s: Time to reach, of less noise.
        key: Randomness of this step, one key or one for each example.
        count: Number of steps in the whole schedule.
    """

    t: Float[Array, ""]
    s: Float[Array, ""]
    key: Key[Array, "*keys"]
    count: int

    def noise(self, shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
        """Normal noise; with one key an example, each example's depends on its own key alone."""
        if self.key.ndim == 0:
            return jax.random.normal(self.key, shape, jnp.float32)
        draw = jax.vmap(lambda key: jax.random.normal(key, shape[1:], jnp.float32))
        return draw(self.key)


@dataclasses.dataclass(frozen=True)
class Solver(abc.ABC):
    """What every solver offers.

    Attributes:
        clip_denoised: Whether predictions of x0 are clamped to [-1, 1] (for pixels; latents have no
            such range) and eps made to match. An option of the solvers that say so.
        evaluations_per_step: Network evaluations of one step.
        second_time: Whether it asks the network for average velocities, between two times.
        few_steps: Whether students of few steps are trained for being sampled with it.
        extrapolates: Whether long last steps, as of indices evenly spaced from 0, mislead it.
        follows_velocity: Whether networks of average velocities can be sampled with it: by these,
            or in many steps by the instantaneous ones.
        ode_order: Of its steps along the probability flow if `ode_step` makes them, else 0.
    """

    clip_denoised: bool = False

    evaluations_per_step: ClassVar[int] = 1
    follows_velocity: ClassVar[bool] = False
    ode_order: ClassVar[int] = 0
    second_time: ClassVar[bool] = False
    few_steps: ClassVar[bool] = False
    extrapolates: ClassVar[bool] = False

    @property
    def is_stochastic(self) -> bool:
        """Whether it draws noise on its way, so that its end does not follow from its beginning."""
        return False

    def evaluations(self, steps: int) -> int:
        """Network evaluations of a whole schedule that ends with clean data."""
        return steps * self.evaluations_per_step

    def evaluated_times(self, times: np.ndarray) -> np.ndarray:
        """At which times of a schedule the network is evaluated."""
        return times[:-1]

    def init(self, process: Process, x: Float[Array, "b *shape"]) -> Any:
        """What the solver itself carries from step to step."""
        return None

    @abc.abstractmethod
    def step(
        self,
        process: Process,
        denoise: Denoise,
        x: Float[Array, "b *shape"],
        step: Step,
        state: Any,
        carry: Any,
    ) -> tuple[Float[Array, "b *shape"], Any, Any]:
        """Takes x from time t to time s; returns (x, state, carry)."""

    def _predict(
        self, process: Process, denoise: Denoise, x: Array, t: Array, carry: Any
    ) -> tuple[Prediction, Any]:
        prediction, carry = denoise(x, t, carry)
        if self.clip_denoised:
            x0 = jnp.clip(prediction.x0, -1.0, 1.0)
            eps = process.convert(x0, "x0", "eps", x, t)
            prediction = dataclasses.replace(prediction, x0=x0, eps=eps)
        return prediction, carry


class Ends(NamedTuple):
    """alpha and sigma at both ends of a step, and how much sigma / alpha shrinks."""

    alpha_t: Array
    sigma_t: Array
    alpha_s: Array
    sigma_s: Array
    shrink: Array


def ends_of(process: Process, step: Step) -> Ends:
    """The process at both ends of a step."""
    alpha_t, sigma_t = process.alpha(step.t), process.sigma(step.t)
    alpha_s, sigma_s = process.alpha(step.s), process.sigma(step.s)
    shrink = sigma_s / jnp.maximum(alpha_s, TINY) * (alpha_t / jnp.maximum(sigma_t, TINY))
    return Ends(alpha_t, sigma_t, alpha_s, sigma_s, shrink)
