"""What the methods of distillation share: the student, the teacher, and players beside them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Key

from dit_jax import conditions as conditions_lib
from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import guidance
from dit_jax.diffusion.process import Prediction
from dit_jax.diffusion.solvers import SOLVERS
from dit_jax.models.call import Request
from dit_jax.models.linear import resolve_dtype
from dit_jax.options import option, register_section
from dit_jax.ranges import GUIDANCE, NOT_NEGATIVE
from dit_jax.target import target_platform
from dit_jax.training import ema as ema_lib
from dit_jax.training.learner import Learner
from dit_jax.training.method import Metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Player:
    """A network trained beside the student: a fake score, a discriminator, a weight.

    Attributes:
        params: its parameters, float32.
        optimizer: optax's state.
    """

    params: Any
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillState:
    """State of a Method with several players; trees of shapes or shardings are of it as well.

    Attributes:
        step: updates made so far, of all players, an int32 scalar.
        params: the student's parameters.
        ema: averages of them by name.
        optimizer: optax's state of the student.
        players: the others, a dictionary by name (an empty one is a leaf of its own to orbax).
    """

    step: Any
    params: Any
    ema: dict[str, Any]
    optimizer: Any
    players: Any


def create_player(optimizer: optax.GradientTransformation, params: Any) -> Player:
    """A player before its first update."""
    return Player(params, optimizer.init(params))


def update_player(
    optimizer: optax.GradientTransformation, player: Player, gradients: Any
) -> Player:
    """A player after one update."""
    updates, state = optimizer.update(gradients, player.optimizer, player.params)
    return Player(optax.apply_updates(player.params, updates), state)


def merge_params(fresh: Any, given: Any, path: str = "") -> Any:
    """`fresh` parameters with those of `given` in their places.

    What `given` lacks stays fresh: a second time or labels of augmentation, whose parameters make
    no difference at first.

    Raises:
        ValueError: `given` has a parameter that `fresh` has not, or of another shape.
    """
    if not isinstance(fresh, dict):
        if fresh.shape != given.shape:
            raise ValueError(f"parameter {path} is {given.shape}, expected {fresh.shape}")
        return given
    unknown = sorted(set(given) - set(fresh))
    if unknown:
        raise ValueError(f"parameters that the student has not: {path}/{unknown[0]}")
    return {
        name: merge_params(value, given[name], f"{path}/{name}") if name in given else value
        for name, value in fresh.items()
    }


@dataclasses.dataclass(frozen=True)
class Student(Learner):
    """The network being distilled and how it is trained.

    Attributes:
        denoiser: network and process.
        optimizer: an optax transformation.
        averages: EMAs to keep.
        label_dropout: probability of dropping an example's conditions.
        num_microbatches: gradient accumulation, the batch in so many parts.
    """

    denoiser: Denoiser
    optimizer: optax.GradientTransformation
    averages: tuple[ema_lib.EMA, ...] = ()
    label_dropout: float = 0.0
    num_microbatches: int = 1

    def start(self, key: Key[Array, ""], params: Any = None) -> Any:
        """Fresh parameters, with those of `params` in their places."""
        if params is None:
            return self.denoiser.network.init(key)
        fresh = jax.eval_shape(self.denoiser.network.init, key)
        if jax.tree.structure(fresh) == jax.tree.structure(params):
            return merge_params(fresh, params)
        return merge_params(self.denoiser.network.init(key), params)

    def create_state(
        self, key: Key[Array, ""], params: Any = None, players: dict[str, Any] | None = None
    ) -> DistillState:
        """The state before the first update."""
        params = self.start(key, params)
        return DistillState(
            step=jnp.int32(0),
            params=params,
            ema=ema_lib.init(self.averages, params),
            optimizer=self.optimizer.init(params),
            players=players or {},
        )


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """Keys of config.teacher."""

    path: str = option("", "[KIND:]SRC as for --init_from: workdir, .pt, folder, hub:...")
    weights: str = option("ema", "ema: the first average; or raw, or an average's own name")
    initialize_student: bool = option(True, "start from it (unless --init_from says otherwise)")
    guidance_scale: float = option(1.0, "of the teacher's answers; 1: none", GUIDANCE)
    guidance_interval: tuple[float, ...] = option(
        (), "(low, high) in process time; empty: always", NOT_NEGATIVE, interval=True
    )


register_section("teacher", TeacherOptions)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network whose answers, guidance included, the student learns from.

    Attributes:
        denoiser: network and process.
        guidance_scale: of classifier-free guidance; 1 for none, which costs half as much.
        guidance_interval: (low, high) in process time outside which there is no guidance.
    """

    denoiser: Denoiser
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self):
        if self.guidance_scale != 1.0:
            reason = f"teacher.guidance_scale={self.guidance_scale}"
            conditions_lib.require_guidance(self.denoiser.network.conditions, reason)
        if self.guidance_interval is not None and self.guidance_scale == 1.0:
            raise ValueError("teacher.guidance_interval would do nothing with guidance_scale=1.0")

    def raw(
        self, params: Any, request: Request, nulls: Mapping[str, Any] | None = None
    ) -> Float[Array, "b h w _c"]:
        """The raw output, guided.

        Args:
            params: the teacher's.
            request: in process time.
            nulls: "no condition" where the network does not know it by itself
                (`training.learner.nulls_of`).
        """

        def evaluate(x, t, conditions, carry):
            return self.denoiser.raw(params, Request(x, t, conditions)).out, carry

        if self.guidance_scale != 1.0:
            nulls = conditions_lib.null_values(self.denoiser.network.conditions, nulls)
            evaluate = guidance.guided(
                evaluate,
                lambda conditions: conditions_lib.without(conditions, nulls),
                self.guidance_scale,
                interval=self.guidance_interval,
            )
        return evaluate(request.x, request.t, request.conditions, None)[0]

    def predict(
        self, params: Any, request: Request, nulls: Mapping[str, Any] | None = None
    ) -> Prediction:
        """The guided prediction of x0 and eps."""
        raw = self.raw(params, request, nulls)
        return self.denoiser.process.interpret(raw, request.x, request.t)

    def velocity(
        self, params: Any, request: Request, nulls: Mapping[str, Any] | None = None
    ) -> Float[Array, "b h w c"]:
        """The guided velocity, in the process's convention."""
        prediction = self.predict(params, request, nulls)
        return self.denoiser.process.velocity(prediction.x0, prediction.eps, request.t)

    def predict_with_features(
        self, params: Any, request: Request, nulls: Mapping[str, Any] | None = None
    ) -> tuple[Prediction, tuple[Float[Array, "b _h _w _c"], ...]]:
        """The guided prediction, and the feature maps of the conditional evaluation."""
        denoiser, process = self.denoiser, self.denoiser.process
        if self.guidance_scale == 1.0:
            return denoiser.predict_with_features(params, request)
        x, t = request.x, request.t
        conditional = denoiser.raw(params, request)
        # Apart from the conditional half, not in one batch with it: gradients pass through the
        # features back to x, and would pass through both halves of a doubled batch.
        nulls = conditions_lib.null_values(denoiser.network.conditions, nulls)
        null = denoiser.raw(
            params,
            Request(jax.lax.stop_gradient(x), t, conditions_lib.without(request.conditions, nulls)),
        )
        scale = guidance.strength(self.guidance_scale, t, self.guidance_interval)
        raw = guidance.combine(conditional.out, null.out, scale, x.shape[-1])
        return process.interpret(raw, x, t), conditional.features


def drift_metrics(x0: Float[Array, "b h w c"]) -> Metrics:
    """Mean and standard deviation of what the student generates: the first things to drift."""
    return {"student_mean": jnp.mean(x0), "student_std": jnp.std(x0)}


def build_student(config: ml_collections.ConfigDict) -> Student:
    """The student of `config`: its network, process, optimizer and averages."""
    denoiser = experiment.build_denoiser(config)
    drops = conditions_lib.can_guide(denoiser.network.conditions)
    return Student(
        denoiser=denoiser,
        optimizer=experiment.build_optimizer(config),
        averages=experiment.build_averages(config),
        label_dropout=config.method.label_dropout if drops else 0.0,
        num_microbatches=config.training.num_microbatches,
    )


def build_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """The teacher of `config.teacher`: the student's architecture and process, one time only."""
    interval = tuple(config.teacher.guidance_interval)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        # A teacher is never differentiated forwards, and sees one time.
        config.model.second_time = "none"
        config.model.custom_gradients = "auto"
    return Teacher(
        experiment.build_denoiser(config), config.teacher.guidance_scale, interval or None
    )


def require_forward_mode(config: ml_collections.ConfigDict, dtype: str = "") -> None:
    """Refuses networks that `jax.jvp` cannot go through.

    Args:
        config: of the student.
        dtype: that the derivative is computed in; by default `config.model.dtype`.

    Raises:
        ConfigError: with what to set.
    """
    model, method = config.model, config.method.name
    if model.custom_gradients != "off":
        raise ConfigError(
            f"config.method.name={method!r} differentiates the network forwards, which the "
            "hand-written backward passes do not have: set config.model.custom_gradients='off'"
        )
    if model.quantization != "none":
        raise ConfigError(
            f"config.model.quantization={model.quantization!r} has no forward mode, which "
            f"config.method.name={method!r} needs: set config.model.quantization='none'"
        )
    half = resolve_dtype(dtype or model.dtype) != jnp.float32
    if model.attention == "auto" and target_platform() == "gpu" and half:
        raise ConfigError(
            "config.model.attention='auto' is cuDNN's here, which cannot be differentiated "
            f"forwards, as config.method.name={method!r} does: set config.model.attention='xla'"
        )
    if model.attention not in ("auto", "einsum", "xla"):
        raise ConfigError(
            f"config.model.attention={model.attention!r} cannot be differentiated forwards, as "
            f"config.method.name={method!r} does: set 'einsum' or 'xla'"
        )


def require_few_step_solver(config: ml_collections.ConfigDict) -> None:
    """Refuses solvers that students of few steps are not trained for.

    Raises:
        ConfigError: with those they are.
    """
    chosen = config.sampling.solver
    fitting = [repr(name) for name, solver in SOLVERS.items() if solver.few_steps]
    if repr(chosen) not in fitting:
        raise ConfigError(
            f"config.sampling.solver={chosen!r}: the student of config.method.name="
            f"{config.method.name!r} is trained for the steps it is sampled with, by "
            f"{' or '.join(fitting)}"
        )
