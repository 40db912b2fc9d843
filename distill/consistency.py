"""Consistency models: one network evaluation that maps any noisy x to the end of its trajectory.

The network's x0 at time t is regressed onto its own x0 at an earlier time r of the same trajectory.
Two adjacent points come from data with the same noise (consistency training), or from a teacher's
step along its probability flow (consistency distillation; Song et al. 2023, arXiv 2303.01469). The
distance between t and r shrinks over training and every network starts from a trained diffusion
model, for which r = 0 is the objective (ECT, Geng et al. 2024, arXiv 2406.14548).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Key

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.diffusion.conversions import expand
from dit_jax.diffusion.ode import ode_step
from dit_jax.diffusion.solvers import SOLVERS
from dit_jax.diffusion.timesteps import TimeDistribution
from dit_jax.distill.consistency_loss import (
    ConsistencyLoss,
    ECTSchedule,
    StageOptions,
    TimePair,
    TimePairs,
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
from dit_jax.nearest import one_of
from dit_jax.options import option
from dit_jax.training.learner import nulls_of
from dit_jax.training.method import Batch, Metrics, OnePhase, accumulated_gradients


@dataclasses.dataclass(frozen=True)
class ConsistencyOptions(StageOptions):
    """Keys of config.method.consistency."""

    trajectory: str = option("data", "data (training) | teacher (distillation): x at time r")
    solver: str = option("euler", "euler | heun: of the teacher's step from t to r")
    target: str = option("student", "whose x0 at r: student (its own), or an average's name")
    quantize: bool = option(False, "t and r are indices (process.name = ddpm)")


@dataclasses.dataclass(frozen=True)
class Consistency(OnePhase):
    """Consistency training (no teacher) or distillation (with one).

    Attributes:
        student: what is trained.
        timesteps: distribution of t.
        pairs: t to r.
        schedule: how far apart they are.
        criterion: distance and weight.
        teacher: whose step leads from t to r; None for consistency training.
        solver: of that step, 'euler' (DDIM's, one evaluation) or 'heun' (two).
        target: whose x0 at r is the target: 'student', its current weights, or an average's name.
    """

    student: Student
    timesteps: TimeDistribution
    pairs: TimePairs
    schedule: ECTSchedule = dataclasses.field(default_factory=ECTSchedule)
    criterion: ConsistencyLoss = dataclasses.field(default_factory=ConsistencyLoss)
    teacher: Teacher | None = None
    solver: str = ConsistencyOptions.solver
    target: str = ConsistencyOptions.target

    def __post_init__(self):
        known = [name for name, solver in SOLVERS.items() if solver.ode_order]
        if self.solver not in known:
            raise ValueError(f"solver={self.solver!r}: {one_of(self.solver, known)}")
        targets = ["student", *(average.name for average in self.student.averages)]
        if self.target not in targets:
            raise ValueError(
                f"target={self.target!r}: {one_of(self.target, targets)} (config.ema names "
                "the averages that are kept)"
            )

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The teacher, of distillation."""
        return () if self.teacher is None else ("teacher",)

    @property
    def flops_per_example(self) -> float:
        """Forward and backward at t (three forwards), a forward at r, the teacher's step."""
        evaluations = 4.0
        if self.teacher is not None:
            guided = 2 if self.teacher.guidance_scale != 1.0 else 1
            evaluations += guided * SOLVERS[self.solver].ode_order
        return evaluations * self.student.denoiser.network.flops_per_example

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> DistillState:
        """The student from `params`, a diffusion model's, or fresh."""
        return self.student.create_state(key, params)

    def weights(self, state: DistillState) -> dict[str, Any]:
        """'raw' and every average by its name."""
        return self.student.weights(state)

    def draw_examples(
        self,
        batch: Batch,
        key: Key[Array, ""],
        decrement: Float[Array, ""],
        frozen: Any = None,
    ) -> dict[str, Any]:
        """Times, noise, dropout and dropped labels of a whole batch, before it is split."""
        time_key, noise_key, label_key, dropout_key = jax.random.split(key, 4)
        x0 = batch["image"]
        n = x0.shape[0]
        return {
            "x0": x0,
            "pair": self.pairs(self.timesteps.sample(time_key, n), decrement),
            "eps": jax.random.normal(noise_key, x0.shape, jnp.float32),
            "conditions": self.student.draw_conditions(batch, label_key, frozen),
            "dropout_keys": jax.random.split(dropout_key, n),
        }

    def x_at_r(self, frozen: Any, x_t: Float[Array, "b h w c"], examples: dict[str, Any]):
        """x at time r on the trajectory through x_t: with the same noise, or by the teacher."""
        process, pair = self.student.denoiser.process, examples["pair"]
        if self.teacher is None:
            return process.add_noise(examples["x0"], examples["eps"], pair.r)
        params, conditions = frozen["teacher"], examples["conditions"]

        def predict(x, t, carry):
            request = Request(x, t, conditions)
            return self.teacher.predict(params, request, nulls_of(frozen)), carry

        order = SOLVERS[self.solver].ode_order
        x_r, _ = ode_step(process, predict, x_t, pair.t, pair.r, order=order)
        return jax.lax.stop_gradient(x_r)

    def x0_at_r(
        self, params: Any, frozen: Any, x_r: Float[Array, "b h w c"], examples: dict[str, Any]
    ) -> Float[Array, "b h w c"]:
        """The target's x0 at time r, under the dropout mask of the student at t."""
        request = Request(x_r, examples["pair"].r, examples["conditions"], examples["dropout_keys"])
        return self.student.denoiser.x0(params, request)

    def predictions(
        self, params: Any, target: Any, frozen: Any, examples: dict[str, Any]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """x0 of the student at t, differentiable, and x0 at r, which is not; clean data's is
        itself."""
        denoiser, (t, r, _) = self.student.denoiser, examples["pair"]
        x0 = examples["x0"]
        x_t = denoiser.process.add_noise(x0, examples["eps"], t)
        x_r = self.x_at_r(frozen, x_t, examples)
        request = Request(x_t, t, examples["conditions"], examples["dropout_keys"])
        x0_t = denoiser.x0(params, request)
        x0_r = self.x0_at_r(jax.lax.stop_gradient(target), frozen, x_r, examples)
        clean = expand(r, x0) <= denoiser.process.clean_time
        return x0_t, jax.lax.stop_gradient(jnp.where(clean, x0, x0_r))

    def losses(
        self, x0_t: Float[Array, "b h w c"], x0_r: Float[Array, "b h w c"], pair: TimePair
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """Weighted and unweighted loss of every example."""
        unweighted = self.criterion.unweighted(x0_t, x0_r)
        weight = self.criterion.weight(self.student.denoiser.process, pair)
        return weight * self.timesteps.weight(pair.t) * unweighted, unweighted

    def loss(
        self, params: Any, examples: dict[str, Any], target: Any = None, frozen: Any = None
    ) -> tuple[Array, Metrics]:
        """Mean loss over examples and what is logged of it.

        Args:
            params: the student's.
            examples: as `draw_examples` returns them.
            target: parameters of the target, by default the student's own.
            frozen: the teacher's, if there is one.
        """
        target = params if target is None else target
        x0_t, x0_r = self.predictions(params, target, frozen, examples)
        loss, unweighted = self.losses(x0_t, x0_r, examples["pair"])
        metrics = {"loss": loss.mean(), "unweighted_loss": unweighted.mean()}
        return metrics["loss"], {**metrics, **drift_metrics(x0_t)}

    def update(
        self,
        state: DistillState,
        batch: Batch,
        key: Key[Array, ""],
        frozen: Any = None,
        phase: str = "train",
    ) -> tuple[DistillState, Metrics]:
        """One optimizer step on the mean loss of `batch`, then the averages."""
        decrement = self.schedule.decrement(state.step, batch["image"].shape[0])
        examples = self.draw_examples(batch, key, decrement, frozen)
        target = None if self.target == "student" else state.ema[self.target]
        metrics, gradients = accumulated_gradients(
            lambda params, part: self.loss(params, part, target, frozen),
            state.params,
            examples,
            self.student.num_microbatches,
        )
        metrics["ratio"] = 1.0 - decrement
        metrics["gradient_norm"] = optax.global_norm(gradients)
        return self.student.apply_gradients(state, gradients), metrics


def build_criterion(config: ml_collections.ConfigDict) -> ConsistencyLoss:
    """Distance and weight of the chosen method's options.

    Raises:
        ConfigError: a constant that would do nothing.
    """
    name = config.method.name
    options = config.method[name]
    unset = StageOptions.huber_constant
    if options.distance != "pseudo_huber" and options.huber_constant != unset:
        raise ConfigError(
            f"config.method.{name}.huber_constant={options.huber_constant} would do nothing with "
            f"distance={options.distance!r}: leave it out, or set distance='pseudo_huber'"
        )
    return ConsistencyLoss(options.distance, options.huber_constant, options.weighting)


def require_one_time(config: ml_collections.ConfigDict) -> None:
    """Refuses networks with a second time, which consistency models do not have.

    Raises:
        ConfigError: with what to set.
    """
    if config.model.second_time != "none":
        raise ConfigError(
            f"config.model.second_time={config.model.second_time!r} would do nothing: the "
            f"networks of config.method.name={config.method.name!r} see one time. Set 'none'"
        )


def build(config: ml_collections.ConfigDict) -> Consistency:
    """The Method 'consistency'.

    Raises:
        ConfigError: options that would do nothing.
    """
    require_one_time(config)
    options = config.method.consistency
    if options.trajectory not in ("data", "teacher"):
        raise ConfigError(
            f"config.method.consistency.trajectory={options.trajectory!r}: expected 'data' "
            "(consistency training) or 'teacher' (distillation)"
        )
    distillation = options.trajectory == "teacher"
    if not distillation and options.solver != ConsistencyOptions.solver:
        raise ConfigError(
            f"config.method.consistency.solver={options.solver!r} would do nothing: it is of "
            "trajectory='teacher'"
        )
    student = build_student(config)
    return Consistency(
        student=student,
        timesteps=experiment.build_timesteps(config),
        pairs=TimePairs(student.denoiser.process, options.min_r, options.quantize),
        schedule=ECTSchedule(options.growth, options.ratio_limit, options.images_per_stage),
        criterion=build_criterion(config),
        teacher=build_teacher(config) if distillation else None,
        solver=options.solver,
        target=options.target,
    )
