"""What a regression of average velocities is made of: loss, guidance mixing, total derivative.

Used by the Method 'mean_flow' (mean_flow.py), where the references are.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion.process import expand
from dit_jax.options import option
from dit_jax.ranges import NOT_NEGATIVE, PERIOD, POSITIVE, SHARE, SHARE_BELOW_ONE


@dataclasses.dataclass(frozen=True)
class MeanFlowOptions:
    """Keys of config.method.mean_flow."""

    velocity: str = option("data", "data | teacher: whose velocity is learned")
    direction: str = option("velocity", "velocity (MeanFlow) | network (improved MeanFlow)")
    interval_share: float = option(0.25, "of examples with r < t; of the others r = t", SHARE)
    r_distribution: str = option("same", "same (as timesteps) | uniform | logit_normal")
    r_mean: float = option(0.0, "of logit_normal")
    r_std: float = option(1.0, "of logit_normal", POSITIVE)
    guidance_omega: float = option(
        1.0, "guidance of scale omega / (1 - kappa), from data only", POSITIVE
    )
    guidance_kappa: float = option(
        0.0, "share of the network's own conditional velocity", SHARE_BELOW_ONE
    )
    guidance_interval: tuple[float, ...] = option(
        (), "(low, high) times of that; empty: always", NOT_NEGATIVE, interval=True
    )
    loss: str = option("l2", "l2 | opt_grad")
    weight_power: float = option(1.0, "of the adaptive loss weight; 0: none", NOT_NEGATIVE)
    weight_constant: float = option(0.01, "kept from the weight's pole", NOT_NEGATIVE)
    scale_by_dimension: bool = option(False, "errors by the root of the pixels, in opt_grad")
    tangent_warmup_steps: int = option(0, "over which the derivative comes in", PERIOD)
    derivative: str = option("jvp", "jvp | finite_difference")
    derivative_dtype: str = option("", "float32 | bfloat16; empty: as model.dtype")
    finite_difference_step: float = option(1e-3, "in t", POSITIVE)


@dataclasses.dataclass(frozen=True)
class Regression:
    """The loss of an average velocity and its weight (2505.13447, eq. 22).

    Attributes:
        loss: 'l2', the squared error e divided by (e + constant)^power; or 'opt_grad', FastGen's,
            whose gradient is that of e divided by (sqrt(e) + constant)^power.
        power: p; 0 for the plain squared error.
        constant: c.
        scale_by_dimension: of 'opt_grad': divides the error by the root of the number of pixels, so
            that the constant means the same for all sizes.
    """

    loss: str = MeanFlowOptions.loss
    power: float = MeanFlowOptions.weight_power
    constant: float = MeanFlowOptions.weight_constant
    scale_by_dimension: bool = MeanFlowOptions.scale_by_dimension

    def __post_init__(self):
        if self.loss not in ("l2", "opt_grad"):
            raise ValueError(f"method.mean_flow.loss={self.loss!r}: expected 'l2' or 'opt_grad'")
        for name in ("power", "constant"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"method.mean_flow.weight_{name}={getattr(self, name)}: expected 0 or more"
                )
        if self.scale_by_dimension and self.loss != "opt_grad":
            raise ValueError(
                "method.mean_flow.scale_by_dimension would do nothing with loss='l2': leave it out "
                "or set method.mean_flow.loss='opt_grad'"
            )

    def __call__(
        self, u: Float[Array, "b h w c"], target: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """The loss of each example, differentiable in `u` alone, and its weight."""
        target = jax.lax.stop_gradient(target)
        error = u - target
        if self.loss == "l2":
            squared = sum_pixels(jnp.square(error))
            weight = jax.lax.stop_gradient((squared + self.constant) ** -self.power)
            return squared * weight, weight
        error = jax.lax.stop_gradient(error)
        if self.scale_by_dimension:
            error = error / math.sqrt(math.prod(error.shape[1:]))
        weight = (jnp.sqrt(sum_pixels(jnp.square(error))) + self.constant) ** -self.power
        step = error * expand(weight, error)
        return sum_pixels(jnp.square(u - jax.lax.stop_gradient(u) + step)), weight


def sum_pixels(x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Sum over everything but the batch."""
    return jnp.sum(x, axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class GuidanceMixing:
    """Guidance without a teacher, folded into the velocity that is learned (2505.13447, eq. 19).

    v_guided = omega v + (1 - omega - kappa) u(x, t, t | no class) + kappa u(x, t, t | class), whose
    fixed point is classifier-free guidance of scale omega / (1 - kappa).

    Attributes:
        omega: weight of the data's velocity.
        kappa: weight of the network's own class-conditional one.
        interval: (low, high) times outside which there is no guidance, or None.
    """

    omega: float = MeanFlowOptions.guidance_omega
    kappa: float = MeanFlowOptions.guidance_kappa
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        if not self.omega > 0:
            raise ValueError(
                f"method.mean_flow.guidance_omega={self.omega}: expected above 0 (1 for none)"
            )
        if not 0 <= self.kappa < 1:
            raise ValueError(
                f"method.mean_flow.guidance_kappa={self.kappa}: expected 0 to below 1; the scale "
                "of guidance is guidance_omega / (1 - guidance_kappa)"
            )
        if self.interval is not None and not self.guides:
            raise ValueError(
                "method.mean_flow.guidance_interval would do nothing with guidance_omega=1 and "
                "guidance_kappa=0"
            )

    @property
    def guides(self) -> bool:
        """Whether there is any guidance."""
        return self.omega != 1.0 or self.kappa != 0.0

    def __call__(
        self,
        velocity: Float[Array, "b h w c"],
        unconditional: Float[Array, "b h w c"],
        conditional: Float[Array, "b h w c"] | None,
        t: Float[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """The guided velocity; `conditional` is not looked at where kappa is 0."""
        omega, kappa = jnp.full_like(t, self.omega), jnp.full_like(t, self.kappa)
        if self.interval is not None:
            inside = (t >= self.interval[0]) & (t <= self.interval[1])
            omega, kappa = jnp.where(inside, omega, 1.0), jnp.where(inside, kappa, 0.0)
        omega, kappa = expand(omega, velocity), expand(kappa, velocity)
        guided = omega * velocity + (1 - omega - kappa) * unconditional
        return guided if self.kappa == 0 else guided + kappa * conditional


@dataclasses.dataclass(frozen=True)
class TotalDerivative:
    """How du/dt along the flow is found.

    Attributes:
        method: 'jvp', exact; or 'finite_difference', of two evaluations, for networks that cannot
            be differentiated forwards.
        step: half the distance in t of the finite difference; one-sided where t + step is beyond
            noise or t - step beyond r.
        denoiser: computes it in place of the student's own, for instance in float32 where that is
            in bfloat16; then nothing is shared with the pass that trains, and it costs one more.
    """

    method: str = MeanFlowOptions.derivative
    step: float = MeanFlowOptions.finite_difference_step
    denoiser: Denoiser | None = None

    def __post_init__(self):
        if self.method not in ("jvp", "finite_difference"):
            raise ValueError(
                f"method.mean_flow.derivative={self.method!r}: expected 'jvp' or "
                "'finite_difference'"
            )
        if not 0 < self.step < 0.5:
            raise ValueError(
                f"method.mean_flow.finite_difference_step={self.step}: expected above 0, below 0.5"
            )

    @property
    def shares(self) -> bool:
        """Whether the network's value comes with its derivative."""
        return self.method == "jvp" and self.denoiser is None

    def finite_difference(
        self,
        u: Callable[[Array, Array, Array], Array],
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        r: Float[Array, " b"],
        direction: Float[Array, "b h w c"],
    ) -> Float[Array, "b h w c"]:
        """(u(x+, t+) - u(x-, t-)) / (t+ - t-); 0 where neither step is possible."""
        later = jnp.where(t + self.step <= 1.0, t + self.step, t)
        earlier = jnp.where(t - self.step > r, t - self.step, t)
        times = jnp.stack([earlier, later])
        # One after the other, from one compiled network.
        before, after = jax.lax.map(
            lambda time: u(x + expand(time - t, x) * direction, time, r), times
        )
        distance = later - earlier
        rate = jnp.where(distance > 0, 1 / jnp.where(distance > 0, distance, 1.0), 0.0)
        return (after - before) * expand(rate, x)
