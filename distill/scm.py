"""sCM: simplified continuous-time consistency models (Lu & Song 2024, arXiv 2410.11081).

In TrigFlow (trig_flow.py) a consistency model is f(x, angle) = cos x - sin sigma_data F(x, angle),
and it is one if df / d angle vanishes along the paths of the probability flow. Training moves F
along the tangent, at fixed parameters (algorithm 1; r is the warm-up, growing from 0 to 1):

    g = -cos^2 (sigma_data F - dx/d angle) - r cos sin (x + sigma_data dF/d angle)
    g <- g / (|g| + c)   or   clip(g, -1, 1)
    loss = prior exp(-u) mean (F_params - F - g)^2 + u,   prior = 1 / (sigma / alpha)

dx/d angle is the teacher's (sCD, guidance included) or -sin x0 + cos sigma_data eps of the data and
the noise (sCT). dF/d angle is a Jacobian-vector product through the network, along the path.
u(t) is learned beside F (adaptive_weight.py).

F, its tangent and its gradient come from one `jax.jvp` inside the gradient: the tangent leaves it
through a stop_gradient, so nothing is differentiated twice, and the network is evaluated once. That
costs 4 forward passes (evaluation 1, tangent 1, backward pass 2) instead of 5 for a tangent apart,
scanned or unrolled, measured by XLA's count of operations.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Key

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion.process import expand
from dit_jax.diffusion.timesteps import TimeDistribution
from dit_jax.distill.adaptive_weight import AdaptiveWeight, weighted
from dit_jax.distill.student import (
    DistillState,
    Student,
    Teacher,
    build_student,
    build_teacher,
    create_player,
    drift_metrics,
    require_forward_mode,
    update_player,
)
from dit_jax.distill.trig_flow import TrigFlow
from dit_jax.models.call import Request
from dit_jax.nearest import one_of
from dit_jax.options import option
from dit_jax.ranges import NOT_NEGATIVE, PERIOD, POSITIVE
from dit_jax.training.learner import nulls_of
from dit_jax.training.method import Batch, Metrics, OnePhase, accumulated_gradients

VELOCITIES = ("data", "teacher")
DERIVATIVES = ("jvp", "finite_difference")
TANGENTS = ("normalize", "clip")
# Smaller noise ratios, which are next to never drawn, weigh as much as this one.
_SMALLEST_PRIOR_RATIO = 1e-4


def rearranged_tangent(
    trig: TrigFlow,
    f: Float[Array, "b h w c"],
    f_tangent: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    velocity: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    warmup: Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """g, the tangent cos(angle) df / d angle with its unstable part warmed up.

    Args:
        trig: the process as TrigFlow.
        f: the network's F.
        f_tangent: cos sin dF / d angle, which is dF / d log(sigma / alpha).
        x: TrigFlow's noisy x.
        velocity: dx / d angle.
        t: the process's time.
        warmup: r, from 0 to 1.
    """
    cos, sin = (expand(part, x) for part in trig.cos_sin(t))
    steady = -(cos**2) * (trig.sigma_data * f - velocity)
    return steady - warmup * (cos * sin * x + trig.sigma_data * f_tangent)


def bounded_tangent(
    g: Float[Array, "b h w c"], *, kind: str, constant: float, spatially_invariant: bool
) -> Float[Array, "b h w c"]:
    """g / (|g| + constant) of each example, or g clipped to [-1, 1].

    Args:
        g: the tangent.
        kind: 'normalize' or 'clip'.
        constant: c.
        spatially_invariant: whether |g| is the root mean square, which does not grow with the
            image, instead of the root of the sum.
    """
    if kind == "clip":
        return jnp.clip(g, -1.0, 1.0)
    reduce = jnp.mean if spatially_invariant else jnp.sum
    norm = jnp.sqrt(reduce(jnp.square(g), axis=(1, 2, 3), keepdims=True))
    return g / (norm + constant)


@dataclasses.dataclass(frozen=True)
class SCMOptions:
    """Keys of config.method.scm."""

    velocity: str = option("teacher", "teacher (sCD) | data (sCT): which flow is followed")
    sigma_data: float = option(0.5, "standard deviation of the data, for TrigFlow", POSITIVE)
    tangent_warmup_steps: int = option(10_000, "over which the derivative comes in", PERIOD)
    tangent: str = option("normalize", "normalize: g / (|g| + constant) | clip: to [-1, 1]")
    tangent_constant: float = option(
        0.1, "added to the norm that the tangent is divided by", NOT_NEGATIVE
    )
    spatially_invariant: bool = option(True, "|g| a root mean square, not of the sum")
    adaptive_weighting: bool = option(True, "learn a log variance of the loss by noise level")
    prior_weighting: bool = option(True, "divide the loss by sigma / alpha")
    divide_by_dimension: bool = option(True, "the mean square by the values of an example")
    derivative: str = option("jvp", "jvp | finite_difference")
    derivative_dtype: str = option("", "float32 | bfloat16; empty: as model.dtype")
    finite_difference_step: float = option(1e-3, "in log(sigma / alpha)", POSITIVE)


@dataclasses.dataclass(frozen=True)
class SCM(OnePhase):
    """The Method 'scm', sCT without and sCD with a teacher.

    Attributes:
        student: the network and how it is trained.
        timesteps: training distribution of the process's times.
        teacher: whose flow is followed; None to learn from data.
        sigma_data: TrigFlow's.
        tangent_warmup_steps: updates over which r grows from 0 to 1; 0 for none.
        tangent: 'normalize' or 'clip'.
        tangent_constant: c of the normalisation.
        spatially_invariant: see `bounded_tangent`.
        adaptive_weighting: whether u(t) is learned; 0 otherwise.
        prior_weighting: whether the loss is divided by sigma / alpha.
        divide_by_dimension: whether the mean square is once more divided by the values of an
            example (as in the paper's norm over D of a mean; with adaptive weighting it shifts u).
        derivative: 'jvp', exact; or 'finite_difference' for networks without forward mode.
        finite_difference_step: half the central difference's width in log(sigma / alpha).
        derivative_denoiser: the student's in another precision, to take the tangent of; None for
            the student's own, which saves an evaluation.
    """

    student: Student
    timesteps: TimeDistribution
    teacher: Teacher | None = None
    sigma_data: float = SCMOptions.sigma_data
    tangent_warmup_steps: int = SCMOptions.tangent_warmup_steps
    tangent: str = SCMOptions.tangent
    tangent_constant: float = SCMOptions.tangent_constant
    spatially_invariant: bool = SCMOptions.spatially_invariant
    adaptive_weighting: bool = SCMOptions.adaptive_weighting
    prior_weighting: bool = SCMOptions.prior_weighting
    divide_by_dimension: bool = SCMOptions.divide_by_dimension
    derivative: str = SCMOptions.derivative
    finite_difference_step: float = SCMOptions.finite_difference_step
    derivative_denoiser: Denoiser | None = None

    def __post_init__(self):
        for key, choices in (("derivative", DERIVATIVES), ("tangent", TANGENTS)):
            value = getattr(self, key)
            if value not in choices:
                raise ValueError(f"method.scm.{key}={value!r}: {one_of(value, choices)}")
        if self.tangent_warmup_steps < 0:
            raise ValueError(
                f"method.scm.tangent_warmup_steps={self.tangent_warmup_steps}: expected 0 or more"
            )
        for key in ("sigma_data", "tangent_constant", "finite_difference_step"):
            if not getattr(self, key) > 0:
                raise ValueError(f"method.scm.{key}={getattr(self, key)}: expected above 0")

    @functools.cached_property
    def trig(self) -> TrigFlow:
        """The student's process as TrigFlow."""
        return TrigFlow(self.student.denoiser.process, self.sigma_data)

    @property
    def adaptive_weight(self) -> AdaptiveWeight:
        """u(t)."""
        return AdaptiveWeight()

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The teacher's parameters, if there is one."""
        return ("teacher",) if self.teacher else ()

    @property
    def flops_per_example(self) -> float:
        """Evaluation, tangent and backward pass (4 forward passes, 5 where the tangent is taken
        apart), and the teacher's evaluations."""
        apart = self.derivative != "jvp" or self.derivative_denoiser is not None
        passes = 5 if apart else 4
        if self.teacher:
            passes += 1 if self.teacher.guidance_scale == 1.0 else 2
        return passes * self.student.denoiser.network.flops_per_example

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> DistillState:
        """The student from `params` (or fresh), and its learned weight."""
        players = {}
        if self.adaptive_weighting:
            weight = self.adaptive_weight.init(key)
            players["adaptive_weight"] = create_player(self.student.optimizer, weight)
        return self.student.create_state(key, params, players)

    def weights(self, state: DistillState) -> dict[str, Any]:
        """'raw' and every average by its name."""
        return self.student.weights(state)

    def draw_examples(
        self, batch: Batch, key: Key[Array, ""], frozen: Any = None
    ) -> dict[str, Any]:
        """Times, noise and conditions of a whole batch, before it is split in any way."""
        time_key, noise_key, label_key, dropout_key = jax.random.split(key, 4)
        x0 = batch["image"]
        n = x0.shape[0]
        return {
            "x0": x0,
            "t": self.timesteps.sample(time_key, n),
            "eps": jax.random.normal(noise_key, x0.shape, jnp.float32),
            "conditions": self.student.draw_conditions(batch, label_key, frozen),
            "dropout_keys": jax.random.split(dropout_key, n),
        }

    def velocity(
        self, examples: dict[str, Any], x: Float[Array, "b h w c"], frozen: Any
    ) -> Float[Array, "b h w c"]:
        """dx / d angle at TrigFlow's x: the teacher's, or that of the examples' data and noise."""
        t, trig = examples["t"], self.trig
        if self.teacher is None:
            return trig.velocity(examples["x0"], examples["eps"], t)
        scaled = expand(trig.scale(t), x) * x
        request = Request(scaled, t, examples["conditions"])
        prediction = self.teacher.predict(frozen["teacher"], request, nulls_of(frozen))
        return trig.velocity(prediction.x0, prediction.eps, t)

    def output_and_tangent(
        self,
        params: Any,
        x: Float[Array, "b h w c"],
        velocity: Float[Array, "b h w c"],
        examples: dict[str, Any],
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """F, and dF / d log(sigma / alpha) along the path without a gradient.

        Both with the same dropout: the tangent is that of the network being trained.
        """
        t, trig = examples["t"], self.trig

        def output(x, t, denoiser=self.student.denoiser):
            request = Request(x, t, examples["conditions"], examples["dropout_keys"])
            return trig.output(denoiser, params, request)

        cos, sin = trig.cos_sin(t)
        direction = expand(cos * sin, x) * velocity, trig.log_ratio_speed(t)
        if self.derivative == "jvp" and self.derivative_denoiser is None:
            f, f_tangent = jax.jvp(output, (x, t), direction)
            return f, jax.lax.stop_gradient(f_tangent)

        apart = functools.partial(
            output, denoiser=self.derivative_denoiser or self.student.denoiser
        )
        if self.derivative == "jvp":
            f_tangent = jax.jvp(apart, (x, t), direction)[1]
        else:
            step = self.finite_difference_step
            ahead, behind = (
                apart(x + sign * step * direction[0], t + sign * step * direction[1])
                for sign in (1, -1)
            )
            f_tangent = (ahead - behind) / (2 * step)
        return output(x, t), jax.lax.stop_gradient(f_tangent)

    def loss(
        self, params: Any, examples: dict[str, Any], warmup: Float[Array, ""], frozen: Any = None
    ) -> tuple[Array, Metrics]:
        """Mean loss over examples and what to watch.

        Args:
            params: {'student': ..., 'adaptive_weight': ...}, the latter if it is learned.
            examples: of `draw_examples`.
            warmup: r.
            frozen: {'teacher': ...} for sCD.
        """
        t, trig = examples["t"], self.trig
        x = trig.add_noise(examples["x0"], examples["eps"], t)
        velocity = self.velocity(examples, x, frozen)
        f, f_tangent = self.output_and_tangent(params["student"], x, velocity, examples)

        fixed = jax.lax.stop_gradient(f)
        g = rearranged_tangent(trig, fixed, f_tangent, x, velocity, t, warmup)
        target = bounded_tangent(
            g,
            kind=self.tangent,
            constant=self.tangent_constant,
            spatially_invariant=self.spatially_invariant,
        )
        squared = jnp.square(f - fixed - target).mean(axis=(1, 2, 3))

        weight = self.timesteps.weight(t)
        if self.prior_weighting:
            weight /= jnp.maximum(trig.process.sigma_ratio(t), _SMALLEST_PRIOR_RATIO)
        if self.divide_by_dimension:
            weight /= x[0].size
        loss = weight * squared
        metrics = {
            "unweighted_loss": squared.mean(),
            "tangent_rms": jnp.sqrt(jnp.square(g).mean(axis=(1, 2, 3))).mean(),
            "tangent_warmup": warmup,
            **drift_metrics(trig.x0(x, fixed, t)),
        }
        if self.adaptive_weighting:
            log_variance = self.adaptive_weight(params["adaptive_weight"], trig.process, t)
            loss = weighted(loss, log_variance)
            metrics["log_variance"] = log_variance.mean()
        metrics["loss"] = loss.mean()
        return metrics["loss"], metrics

    def update(
        self,
        state: DistillState,
        batch: Batch,
        key: Key[Array, ""],
        frozen: Any = None,
        phase: str = "train",
    ) -> tuple[DistillState, Metrics]:
        """One optimizer step of the student and of its learned weight."""
        examples = self.draw_examples(batch, key, frozen)
        steps = self.tangent_warmup_steps
        warmup = jnp.minimum(1.0, state.step / steps) if steps else jnp.ones(())
        players = {name: player.params for name, player in state.players.items()}
        metrics, gradients = accumulated_gradients(
            lambda params, part: self.loss(params, part, warmup, frozen),
            {"student": state.params, **players},
            examples,
            self.student.num_microbatches,
        )
        metrics["gradient_norm"] = optax.global_norm(gradients["student"])
        players = {
            name: update_player(self.student.optimizer, player, gradients[name])
            for name, player in state.players.items()
        }
        state = self.student.apply_gradients(state, gradients["student"])
        return dataclasses.replace(state, players=players), metrics


def build(config: ml_collections.ConfigDict) -> SCM:
    """The Method of `config.method.scm`.

    Raises:
        ConfigError: a network without forward mode, or keys that would do nothing.
    """
    options = config.method.scm.to_dict()
    velocity, dtype = options.pop("velocity"), options.pop("derivative_dtype")
    if velocity not in VELOCITIES:
        raise ConfigError(
            f"config.method.scm.velocity={velocity!r}: {one_of(velocity, VELOCITIES)}"
        )
    if dtype not in ("", "float32", "bfloat16"):
        raise ConfigError(
            f"config.method.scm.derivative_dtype={dtype!r}: expected 'float32', 'bfloat16' or ''"
        )
    if options["derivative"] == "jvp":
        require_forward_mode(config, dtype)
    _refuse_unused(options)
    precise = None
    if dtype:
        precise = config.copy_and_resolve_references()
        precise.model.dtype = dtype
    return SCM(
        student=build_student(config),
        timesteps=experiment.build_timesteps(config),
        teacher=build_teacher(config) if velocity == "teacher" else None,
        derivative_denoiser=precise and experiment.build_denoiser(precise),
        **options,
    )


def _refuse_unused(options: dict[str, Any]) -> None:
    """Refuses keys of an alternative that was not chosen."""
    for key, selector, value in (
        ("finite_difference_step", "derivative", "finite_difference"),
        ("tangent_constant", "tangent", "normalize"),
        ("spatially_invariant", "tangent", "normalize"),
    ):
        if options[selector] != value and options[key] != getattr(SCMOptions, key):
            raise ConfigError(
                f"config.method.scm.{key}={options[key]!r} would do nothing: "
                f"config.method.scm.{selector} is {options[selector]!r}, not {value!r}"
            )
