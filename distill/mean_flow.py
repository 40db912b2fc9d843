"""MeanFlow: a network of average velocities, for sampling in one or a few steps.

Geng et al., "Mean Flows for One-step Generative Modeling" (arXiv 2505.13447), and the objective of
"Improved Mean Flows" (Geng et al., arXiv 2512.02012). Time is the rectified flow's, r <= t; the
average velocity u(x, r, t) = (x_t - x_r) / (t - r) along the flow satisfies

    u = v - (t - r) du/dt,   du/dt = v . grad_x u + partial_t u   (2505.13447, eqs. 6 and 8)

which is learned by regression, du/dt being one Jacobian-vector product. The instantaneous velocity
v is the data's eps - x0, or a teacher's. Learned from data it may be mixed with the network's own
answers, so that one evaluation is guided (eqs. 13 and 19).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Key

from dit_jax import conditions as conditions_lib
from dit_jax import experiment
from dit_jax.data.augmentation import Augmentation
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion.process import RectifiedFlow, expand
from dit_jax.diffusion.timesteps import LogitNormal, TimeDistribution, Uniform
from dit_jax.distill import mean_flow_checks
from dit_jax.distill.average_velocity import (
    GuidanceMixing,
    MeanFlowOptions,
    Regression,
    TotalDerivative,
    sum_pixels,
)
from dit_jax.distill.student import (
    DistillState,
    Student,
    Teacher,
    build_student,
    build_teacher,
    drift_metrics,
)
from dit_jax.models.call import Request
from dit_jax.models.linear import resolve_dtype
from dit_jax.training.denoising import require_augmentation
from dit_jax.training.learner import nulls_of
from dit_jax.training.method import Batch, Metrics, OnePhase, accumulated_gradients

Examples = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MeanFlow(OnePhase):
    """The Method 'mean_flow'.

    Of every batch a fixed share of the examples is trained over an interval r < t; for the others r
    = t, where the objective is flow matching and no derivative is computed. Dropped labels go to
    those others first, as in the authors' code: without a class there is little to learn but the
    instantaneous velocity that guidance asks for.

    Attributes:
        student: the network, which sees a second time.
        timesteps: distribution of t; the later of the two draws is t, the earlier r.
        end_timesteps: distribution of r.
        teacher: gives v; None for the data's.
        mixing: guidance without a teacher.
        direction: of du/dt in x: 'velocity', the one that is regressed to (MeanFlow); 'network',
            the network's own u(x, t, t) (improved MeanFlow, 2512.02012, eq. 12).
        regression: the loss.
        derivative: how du/dt is computed.
        interval_share: of the examples with r < t.
        tangent_warmup_steps: updates over which the factor of du/dt grows from 0 to 1.
        augmentation: of the images, told to the network by its labels; None for none.
    """

    student: Student
    timesteps: TimeDistribution
    end_timesteps: TimeDistribution
    teacher: Teacher | None = None
    mixing: GuidanceMixing = dataclasses.field(default_factory=GuidanceMixing)
    direction: str = MeanFlowOptions.direction
    regression: Regression = dataclasses.field(default_factory=Regression)
    derivative: TotalDerivative = dataclasses.field(default_factory=TotalDerivative)
    interval_share: float = MeanFlowOptions.interval_share
    tangent_warmup_steps: int = MeanFlowOptions.tangent_warmup_steps
    augmentation: Augmentation | None = None

    def __post_init__(self):
        for denoiser in (self.student, self.teacher):
            if denoiser is not None and not isinstance(denoiser.denoiser.process, RectifiedFlow):
                raise ValueError(
                    "method 'mean_flow' learns average velocities of a rectified flow, not of "
                    f"{type(denoiser.denoiser.process).__name__}: set process.name='flow'"
                )
        if "r" not in self.student.denoiser.network.conditions:
            raise ValueError(
                "method 'mean_flow' needs a network that sees a second time: set "
                "model.second_time='t-r' or 'r'"
            )
        if self.direction not in ("velocity", "network"):
            raise ValueError(
                f"method.mean_flow.direction={self.direction!r}: expected 'velocity' or 'network'"
            )
        if not 0 < self.interval_share <= 1:
            raise ValueError(
                f"method.mean_flow.interval_share={self.interval_share}: expected above 0, up to 1"
            )
        if self.tangent_warmup_steps < 0:
            raise ValueError(
                f"method.mean_flow.tangent_warmup_steps={self.tangent_warmup_steps}: expected 0 or "
                "more"
            )
        require_augmentation(self.student.denoiser.network, self.augmentation)
        if self.mixing.guides:
            self._check_mixing()

    def _check_mixing(self):
        if self.teacher is not None:
            raise ValueError(
                "method.mean_flow.guidance_omega and guidance_kappa are for learning from data: "
                "with method.mean_flow.velocity='teacher' set teacher.guidance_scale"
            )
        if not self.student.label_dropout:
            raise ValueError(
                "method.mean_flow.guidance_omega and guidance_kappa need a class-conditional "
                "network that also learns without classes: set model.num_classes and "
                "method.label_dropout above 0"
            )

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The teacher, if there is one."""
        return () if self.teacher is None else ("teacher",)

    @property
    def flops_per_example(self) -> float:
        """Forward and backward pass (3), the derivative of the examples with r < t, and the passes
        that the velocity and its direction take, nothing of which is differentiated."""
        passes = 3 + self.interval_share * (1 if self.derivative.shares else 2)
        if self.teacher is not None:
            passes += 1 if self.teacher.guidance_scale == 1.0 else 2
        passes += 1.0 * self.mixing.guides
        passes += 1 if self.mixing.kappa else self.interval_share * (self.direction == "network")
        return passes * self.student.denoiser.network.flops_per_example

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> DistillState:
        """Fresh parameters, with those of `params` in their places."""
        return self.student.create_state(key, params)

    def weights(self, state: DistillState) -> dict[str, Any]:
        """'raw' and every average by its name."""
        return self.student.weights(state)

    def num_intervals(self, batch_size: int) -> int:
        """How many examples of a batch have r < t: the share, in equal numbers a microbatch."""
        parts = self.student.num_microbatches
        part = batch_size // parts
        return parts * min(max(round(self.interval_share * part), 1), part)

    def draw_examples(self, batch: Batch, key: Key[Array, ""], frozen: Any = None) -> Examples:
        """Times, noise and dropped labels of a whole batch, before it is split in any way.

        Returns:
            {"interval": examples with r < t, "instant": examples with r = t, if any}.
        """
        t_key, r_key, noise_key, label_key, dropout_key, augment_key = jax.random.split(key, 6)
        x0, network = batch["image"], self.student.denoiser.network
        b = x0.shape[0]
        first, second = self.timesteps.sample(t_key, b), self.end_timesteps.sample(r_key, b)
        intervals = self.num_intervals(b)
        examples = {
            "x0": x0,
            "eps": jax.random.normal(noise_key, x0.shape, jnp.float32),
            "t": jnp.maximum(first, second),
            "r": jnp.minimum(first, second),
            "conditions": conditions_lib.select(network.conditions, batch),
        }
        if network.has_dropout:
            examples["dropout_keys"] = jax.random.split(dropout_key, b)
        if self.augmentation is not None:
            keys = jax.random.split(augment_key, b)
            examples["x0"], augment = self.augmentation(keys, x0)
            examples["conditions"] = {**examples["conditions"], "augment": augment}
        groups = _split(examples, intervals)
        if "instant" in groups:
            groups["instant"]["r"] = groups["instant"]["t"]
        rate = self.student.label_dropout
        if rate and conditions_lib.can_guide(network.conditions):
            nulls = conditions_lib.null_values(network.conditions, nulls_of(frozen))
            num_dropped = jnp.sum(jax.random.bernoulli(label_key, rate, (b,)))
            place = {
                "instant": jnp.arange(b - intervals),
                "interval": b - 1 - jnp.arange(intervals),
            }
            for name, group in groups.items():
                group["dropped"] = place[name] < num_dropped
                group["conditions"] = conditions_lib.drop(
                    group["conditions"], nulls, group["dropped"]
                )
        return groups

    def velocities(
        self, params: Any, examples: Examples, num_intervals: int, frozen: Any
    ) -> tuple[Array, Array]:
        """The velocity to regress to, and the direction in x of du/dt of the first examples.

        The network's own answers that either needs are one batch: u(x, t, t) with the class, of all
        examples if it is mixed in or else of those with an interval, and without.
        """
        denoiser = self.student.denoiser
        x, t = examples["x"], examples["t"]
        velocity = examples["eps"] - examples["x0"]
        if self.teacher is not None:
            request = Request(x, t, examples["conditions"])
            velocity = self.teacher.velocity(frozen["teacher"], request, nulls_of(frozen))
        conditional = x.shape[0] if self.mixing.kappa else 0
        if self.direction == "network":
            conditional = max(conditional, num_intervals)
        unconditional = x.shape[0] if self.mixing.guides else 0
        if not conditional + unconditional:
            return velocity, velocity[:num_intervals]

        def ask(value):
            return jnp.concatenate([value[:conditional], value[:unconditional]])

        conditions = jax.tree.map(ask, examples["conditions"])
        if unconditional:
            declared = denoiser.network.conditions
            null = jnp.arange(conditional + unconditional) >= conditional
            nulls = conditions_lib.null_values(declared, nulls_of(frozen))
            conditions = conditions_lib.drop(conditions, nulls, null)
        request = Request(ask(x), ask(t), {**conditions, "r": ask(t)})
        answers = denoiser.velocity(params, request)
        own, without = answers[:conditional], answers[conditional:]
        if self.mixing.guides:
            guided = self.mixing(velocity, without, own if self.mixing.kappa else None, t)
            velocity = jnp.where(examples["dropped"][:, None, None, None], velocity, guided)
        direction = own if self.direction == "network" else velocity
        return velocity, direction[:num_intervals]

    def average_velocity(
        self, params: Any, examples: Examples, direction: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """u(x, r, t), differentiable in `params`, and du/dt, which is not."""
        x, t, r = (examples[name] for name in ("x", "t", "r"))

        def u(denoiser, params):
            return lambda x, t, r: _average_velocity(denoiser, params, {**examples, "x": x}, t, r)

        denoiser = self.student.denoiser
        ends = (x, t, r)
        tangents = (direction, jnp.ones_like(t), jnp.zeros_like(r))
        if self.derivative.shares:
            value, slope = jax.jvp(u(denoiser, params), ends, tangents)
            return value, jax.lax.stop_gradient(slope)
        differentiated = u(self.derivative.denoiser or denoiser, jax.lax.stop_gradient(params))
        if self.derivative.method == "jvp":
            slope = jax.jvp(differentiated, ends, tangents)[1]
        else:
            slope = self.derivative.finite_difference(differentiated, *ends, direction)
        return u(denoiser, params)(x, t, r), jax.lax.stop_gradient(slope)

    def loss(
        self,
        params: Any,
        groups: Examples,
        frozen: Any = None,
        warmup: Float[Array, ""] | float = 1.0,
    ) -> tuple[Array, Metrics]:
        """Mean loss over examples, and metrics."""
        denoiser = self.student.denoiser
        n = groups["interval"]["t"].shape[0]
        names = [name for name in ("interval", "instant") if name in groups]
        examples = jax.tree.map(
            lambda *parts: jnp.concatenate(parts), *(groups[name] for name in names)
        )
        x0, eps, t, r = (examples[name] for name in ("x0", "eps", "t", "r"))
        examples["x"] = x = denoiser.process.add_noise(x0, eps, t)
        velocity, direction = self.velocities(jax.lax.stop_gradient(params), examples, n, frozen)
        interval = jax.tree.map(lambda a: a[:n], examples)
        u, slope = self.average_velocity(params, interval, direction)
        span = expand(warmup * (t - r)[:n], slope)
        target = velocity.at[:n].add(-span * slope)
        if "instant" in groups:
            instant = jax.tree.map(lambda a: a[n:], examples)
            rest = _average_velocity(denoiser, params, instant, instant["t"], instant["r"])
            u = jnp.concatenate([u, rest])

        losses, weight = self.regression(u, target)
        loss = jnp.mean(losses * self.timesteps.weight(t))
        metrics = {
            "loss": loss,
            "squared_error": jnp.mean(jnp.square(u - target)),
            "velocity_error": jnp.mean(jnp.square(u - (eps - x0))),
            "derivative_norm": jnp.mean(jnp.sqrt(sum_pixels(jnp.square(slope)))),
            "loss_weight": jnp.mean(weight),
            "tangent_warmup": jnp.asarray(warmup, jnp.float32),
            **drift_metrics(x - expand(t, x) * u),
        }
        return loss, metrics

    def update(
        self,
        state: DistillState,
        batch: Batch,
        key: Key[Array, ""],
        frozen: Any = None,
        phase: str = "train",
    ) -> tuple[DistillState, Metrics]:
        """One optimizer step on the mean loss of `batch`, then the averages."""
        warmup = jnp.minimum(1.0, state.step / max(self.tangent_warmup_steps, 1))
        if not self.tangent_warmup_steps:
            warmup = jnp.float32(1.0)
        metrics, gradients = accumulated_gradients(
            lambda params, examples: self.loss(params, examples, frozen, warmup),
            state.params,
            self.draw_examples(batch, key, frozen),
            self.student.num_microbatches,
        )
        metrics["gradient_norm"] = optax.global_norm(gradients)
        return self.student.apply_gradients(state, gradients), metrics


def _average_velocity(denoiser: Denoiser, params: Any, examples: Examples, t, r) -> Array:
    conditions = {**examples["conditions"], "r": r}
    request = Request(examples["x"], t, conditions, examples.get("dropout_keys"))
    return denoiser.velocity(params, request)


def _split(examples: Examples, first: int) -> dict[str, Examples]:
    """Evenly strided parts of a batch: on one sharded over devices neither moves data."""
    batch = examples["t"].shape[0]
    if first == batch:
        return {"interval": dict(examples)}
    groups = math.gcd(first, batch)

    def part(leaf, start, stop):
        rows = leaf.reshape(groups, batch // groups, *leaf.shape[1:])[:, start:stop]
        return rows.reshape(-1, *leaf.shape[1:])

    width = first // groups
    return {
        "interval": jax.tree.map(lambda leaf: part(leaf, 0, width), examples),
        "instant": jax.tree.map(lambda leaf: part(leaf, width, None), examples),
    }


def build(config: ml_collections.ConfigDict) -> MeanFlow:
    """The Method 'mean_flow' of a configuration.

    Raises:
        ConfigError: a network, process or sampler that does not fit, with what to set.
    """
    c = config.method.mean_flow
    mean_flow_checks.check(config)
    student, timesteps = build_student(config), experiment.build_timesteps(config)
    derivative = {"method": c.derivative}
    if c.derivative == "finite_difference":
        derivative["step"] = c.finite_difference_step
    own = resolve_dtype(config.model.dtype)
    if c.derivative_dtype and resolve_dtype(c.derivative_dtype) != own:
        exact = config.copy_and_resolve_references()
        with exact.unlocked():
            exact.model.dtype = c.derivative_dtype
        derivative["denoiser"] = experiment.build_denoiser(exact)
    process = student.denoiser.process
    end_timesteps = {
        "same": lambda: timesteps,
        "uniform": lambda: Uniform(process),
        "logit_normal": lambda: LogitNormal(process, c.r_mean, c.r_std),
    }
    return MeanFlow(
        student=student,
        timesteps=timesteps,
        end_timesteps=end_timesteps[c.r_distribution](),
        teacher=build_teacher(config) if c.velocity == "teacher" else None,
        mixing=GuidanceMixing(
            c.guidance_omega, c.guidance_kappa, tuple(c.guidance_interval) or None
        ),
        direction=c.direction,
        regression=Regression(c.loss, c.weight_power, c.weight_constant, c.scale_by_dimension),
        derivative=TotalDerivative(**derivative),
        interval_share=c.interval_share,
        tangent_warmup_steps=c.tangent_warmup_steps,
        augmentation=experiment.build_augmentation(config),
    )
