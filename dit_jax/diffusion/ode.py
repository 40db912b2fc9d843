"""One step along the probability flow: Euler's and Heun's, of a sampler or of a teacher."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.diffusion.conversions import Prediction, Process, expand


def ode_step(
    process: Process,
    denoise: Callable[..., tuple[Prediction, Any]],
    x: Float[Array, "b *shape"],
    t: Float[Array, "..."],
    s: Float[Array, "..."],
    carry: Any = None,
    *,
    order: int,
) -> tuple[Float[Array, "b *shape"], Any]:
    """One step of Euler (order 1) or Heun (2) along the probability flow, in the coordinates of
    the process in which it is straightest (`Process.ode_coordinates`).

    A step to clean data, where no slope is defined, is Euler's (Karras et al. 2022).

    Args:
        process: The process that x belongs to.
        denoise: The prediction at x and a time.
        x: The state at t.
        t: Time to start from, a scalar or one an example.
        s: Time to reach, likewise.
        carry: Anything that denoise passes on.
        order: 1 or 2, as many evaluations; of scalar times to clean data one.

    Returns:
        The state at s, and the carry.
    """
    (scale_t, clock_t), (scale_s, clock_s) = process.ode_coordinates(t), process.ode_coordinates(s)
    elapsed, scale = expand(clock_s - clock_t, x), expand(scale_s, x)
    prediction, carry = denoise(x, t, carry)
    slope, start = process.ode_derivative(prediction), x / expand(scale_t, x)
    predicted = start + elapsed * slope
    if order == 1:
        return scale * predicted, carry

    def correct(carry: Any) -> tuple[Array, Any]:
        prediction, carry = denoise(scale * predicted, s, carry)
        return start + elapsed * 0.5 * (slope + process.ode_derivative(prediction)), carry

    noisy = expand(s, x) > process.clean_time
    if noisy.ndim:
        end, carry = correct(carry)
        return jnp.where(noisy, scale * end, scale * predicted), carry
    end, carry = jax.lax.cond(noisy, correct, lambda carry: (predicted, carry), carry)
    return scale * end, carry
