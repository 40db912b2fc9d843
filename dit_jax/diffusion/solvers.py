"""Solvers: one step of the way from noise to data.

A solver is a frozen, hashable record of its options; `samplers.sample` scans its `step` over a
schedule. All are written with alpha and sigma at the two ends of a step, so each serves every
process (the ancestral one only DDPM), at any spacing. The quantity

    shrink = (sigma' / alpha') / (sigma / alpha)

of a step from (alpha, sigma) to (alpha', sigma') is 0 at a step to clean data or from pure noise
and below 1 elsewhere; every formula below is finite for it, where those with log(alpha / sigma) are
not.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dit_jax.diffusion.ode import ode_step
from dit_jax.diffusion.process import DDPM, Prediction, Process, RectifiedFlow
from dit_jax.options import option, register
from dit_jax.ranges import NOT_NEGATIVE, SHARE

Denoise = Callable[..., tuple[Prediction, Any]]
"""``denoise(x, t_scalar, carry) -> (Prediction, carry)``; networks of average velocities are also
told the time at the end of the step, ``denoise(x, t_scalar, carry, r=s_scalar)``."""

_TINY = 1e-20
_CLIP = "clamp predicted x0 to [-1, 1] (of pixels)"


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


class _Ends(NamedTuple):
    """alpha and sigma at both ends of a step, and how much sigma / alpha shrinks."""

    alpha_t: Array
    sigma_t: Array
    alpha_s: Array
    sigma_s: Array
    shrink: Array


def _ends(process: Process, step: Step) -> _Ends:
    alpha_t, sigma_t = process.alpha(step.t), process.sigma(step.t)
    alpha_s, sigma_s = process.alpha(step.s), process.sigma(step.s)
    shrink = sigma_s / jnp.maximum(alpha_s, _TINY) * (alpha_t / jnp.maximum(sigma_t, _TINY))
    return _Ends(alpha_t, sigma_t, alpha_s, sigma_s, shrink)


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
    clip_denoised: bool = option(False, _CLIP)

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
        ends = _ends(process, step)
        lost = (1.0 - ends.shrink) * (1.0 + ends.shrink)  # 1 - shrink^2
        mean = ends.alpha_s * lost * prediction.x0 + ends.shrink * (ends.sigma_s / ends.sigma_t) * x
        std = jnp.where(
            ends.sigma_s > 0, jnp.exp(0.5 * self._log_variance(ends, lost, prediction)), 0.0
        )
        return mean + std * step.noise(x.shape), state, carry

    def _log_variance(self, ends: _Ends, lost: Array, prediction: Prediction) -> Array:
        smallest = jnp.log(jnp.maximum(ends.sigma_s**2 * lost, _TINY))
        largest = jnp.log(jnp.maximum(ends.sigma_t**2 * lost, _TINY))
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
    clip_denoised: bool = option(False, _CLIP)

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
        ends = _ends(process, step)
        fresh = self.eta**2 * (1.0 - ends.shrink) * (1.0 + ends.shrink)
        kept = ends.sigma_s * jnp.sqrt(1.0 - fresh)
        x = ends.alpha_s * prediction.x0 + kept * prediction.eps
        if self.eta > 0:
            x = x + ends.sigma_s * jnp.sqrt(fresh) * step.noise(x.shape)
        return x, state, carry


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
        ends = _ends(process, step)
        finite = ends.shrink > 0
        growth = jnp.where(finite, -jnp.log(jnp.where(finite, ends.shrink, 1.0)), 0.0)
        second_order = state.growth > 0
        ratio = jnp.where(second_order, growth / jnp.where(second_order, state.growth, 1.0), 0.0)
        x0 = prediction.x0 + 0.5 * ratio * (prediction.x0 - state.x0)
        x = (ends.sigma_s / ends.sigma_t) * x + ends.alpha_s * (1.0 - ends.shrink) * x0
        return x, _History(prediction.x0, growth), carry


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


SOLVERS: dict[str, type[Solver]] = {
    "ddpm": Ancestral,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": DPMSolverPP2M,
    "consistency": Consistency,
    "mean_flow": MeanFlow,
}
"""Solvers by their name in configs; see `register_solver`."""


def register_solver(name: str, solver: type[Solver]) -> None:
    """Makes a solver known under `name`.

    Args:
        name: as config.sampling.solver.
        solver: its fields made by `options.option` are the keys config.sampling.<name>.*.

    Raises:
        ValueError: the name is another solver's.
    """
    if SOLVERS.get(name, solver) is not solver:
        raise ValueError(f"there is a solver {name!r} already")
    register("sampling", name, solver)
    SOLVERS[name] = solver


for _name, _solver in SOLVERS.items():
    register("sampling", _name, _solver)
