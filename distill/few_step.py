"""Students of one or a few steps that learn from critics: their inputs, and the turns they take.

What DMD2, f-distill and LADD have in common: a student that generates in exactly the steps it will
be sampled with, and two kinds of updates on two time scales, one of the student and one of all its
critics (fake score, discriminator), each a program of its own.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Key

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.diffusion.process import Prediction, Process
from dit_jax.diffusion.solvers import Solver, Step
from dit_jax.diffusion.timesteps import TimeDistribution
from dit_jax.distill.student import (
    DistillState,
    Student,
    Teacher,
    create_player,
    require_few_step_solver,
    update_player,
)
from dit_jax.models.call import Request
from dit_jax.nearest import one_of
from dit_jax.options import option
from dit_jax.ranges import COUNT
from dit_jax.training import ema as ema_lib
from dit_jax.training.method import Batch, Metrics, accumulated_gradients

INPUTS = ("data", "simulation")


@dataclasses.dataclass(frozen=True)
class FewStepOptions:
    """Keys that the methods with critics have."""

    student_update_frequency: int = option(
        5, "updates of a round: one of the student, the rest its critics'", COUNT
    )
    student_input: str = option(
        "data", "data (renoised) | simulation (the student's own), of several steps"
    )


@dataclasses.dataclass(frozen=True)
class FewSteps:
    """The steps a student generates in, and what it is trained on at the start of each.

    Attributes:
        process: of the student.
        solver: by which it is sampled.
        times: its schedule in process time, from noise to clean, steps + 1 of them.
        inputs: for several steps, 'data': data with noise added to the step's time; 'simulation':
            what the student itself makes of noise in the steps before, as it will at sampling
            (DMD2, section 4.5). One step starts from noise.
    """

    process: Process
    solver: Solver
    times: tuple[float, ...]
    inputs: str = FewStepOptions.student_input

    def __post_init__(self):
        if self.inputs not in INPUTS:
            raise ValueError(f"student_input={self.inputs!r}: {one_of(self.inputs, INPUTS)}")
        if len(self.times) < 2 or any(a <= b for a, b in zip(self.times, self.times[1:])):  # noqa: B905
            raise ValueError(f"times={self.times}: expected two or more that decrease")
        if self.times[-1] != self.process.clean_time:
            raise ValueError(
                f"times={self.times} end before clean data, time {self.process.clean_time}: the "
                "student's last step is to predict clean data"
            )

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.times) - 1

    @property
    def simulated_evaluations(self) -> float:
        """Evaluations of the student that simulation takes, on average."""
        return (self.count - 1) / 2 if self.inputs == "simulation" else 0.0

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> dict[str, Array]:
        """What is random in the inputs of a whole batch.

        Every example has a step of its own where data are renoised. In a simulation all have the
        same one, so that no step is computed that is not used.
        """
        noise_key, step_key, solver_key = jax.random.split(key, 3)
        drawn = {"student_noise": jax.random.normal(noise_key, shape, jnp.float32)}
        if self.count == 1:
            return drawn
        n = shape[0]
        if self.inputs == "data":
            drawn["student_step"] = jax.random.randint(step_key, (n,), 0, self.count)
        else:
            step = jax.random.randint(step_key, (), 0, self.count)
            drawn["student_step"] = jnp.broadcast_to(step, (n,))
            drawn["solver_keys"] = jax.random.split(solver_key, n)
        return drawn

    def start(
        self,
        predict: Callable[[Array, Array], Prediction],
        examples: dict[str, Any],
    ) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
        """(x, t) that the student is to turn into clean data.

        Args:
            predict: (x, t) -> the student's prediction, without gradients.
            examples: of `draw`, with data "x0".
        """
        noise, times = examples["student_noise"], jnp.asarray(self.times, jnp.float32)
        prior = self.process.start_scale(times[0]) * noise
        if self.count == 1:
            return prior, jnp.full(noise.shape[:1], times[0])
        t = times[examples["student_step"]]
        if self.inputs == "data":
            return self.process.add_noise(examples["x0"], noise, t), t
        return self._simulate(predict, prior, times, examples), t

    def _simulate(self, predict, x, times, examples):
        def denoise(x, t, carry):
            return predict(x, jnp.broadcast_to(t, x.shape[:1])), carry

        def body(index, carry):
            x, solver_state = carry
            keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(examples["solver_keys"])
            step = Step(times[index], times[index + 1], keys, self.count)
            x, solver_state, _ = self.solver.step(
                self.process, denoise, x, step, solver_state, None
            )
            return x, solver_state

        # A loop of as many steps as were drawn: the mean cost is half that of the whole schedule.
        last = examples["student_step"][0]
        return jax.lax.fori_loop(0, last, body, (x, self.solver.init(self.process, x)))[0]


@dataclasses.dataclass(frozen=True)
class FewStepMethod(abc.ABC):
    """A student and its critics in turns: one update of the student, then some of the critics.

    Attributes:
        student: the network and how it is trained.
        teacher: what it learns from.
        steps: the steps it generates in.
        timesteps: distribution of the times to which generated data are renoised.
        student_update_frequency: updates of a round, the first of which is the student's.
    """

    student: Student
    teacher: Teacher
    steps: FewSteps
    timesteps: TimeDistribution
    student_update_frequency: int = FewStepOptions.student_update_frequency

    def __post_init__(self):
        if self.student_update_frequency < 2:
            raise ValueError(
                f"student_update_frequency={self.student_update_frequency}: expected 2 or more, "
                "one update of the student and at least one of its critics"
            )

    # -- what a method defines --------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def critics(self) -> dict[str, optax.GradientTransformation]:
        """The players trained in the phase 'critic', and their optimizers."""

    @abc.abstractmethod
    def start_players(self, key: Key[Array, ""], frozen: Any) -> dict[str, Any]:
        """Parameters of the critics before the first update."""

    @abc.abstractmethod
    def student_loss(
        self, params: Any, examples: dict[str, Any], frozen: Any, players: dict[str, Any]
    ) -> tuple[Array, Metrics]:
        """Mean loss of the student over examples and its parts."""

    @abc.abstractmethod
    def critic_loss(
        self, params: dict[str, Any], examples: dict[str, Any], frozen: Any, student_params: Any
    ) -> tuple[Array, Metrics]:
        """Mean loss of the critics together and its parts; `params` are theirs by name."""

    @abc.abstractmethod
    def flops_of(self, phase: str) -> float:
        """Floating-point operations an update of a phase spends on an example."""

    def draw_more(self, key: Key[Array, ""], batch: Batch, phase: str) -> dict[str, Any]:
        """What a method draws beyond `draw_examples`'s own."""
        return {}

    def finish_student(self, state: DistillState, metrics: Metrics) -> tuple[DistillState, Metrics]:
        """Where a student's update leaves more than gradients behind."""
        return state, metrics

    # -- what follows from it ---------------------------------------------------------------------

    @property
    def phases(self) -> tuple[str, ...]:
        """'student' and 'critic'."""
        return ("student", "critic")

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The teacher."""
        return ("teacher",)

    def phase(self, step: int) -> str:
        """The student's turn is the first of every round."""
        return "student" if step % self.student_update_frequency == 0 else "critic"

    @property
    def flops_per_example(self) -> float:
        """Mean over a round. See the methods' `flops_of`."""
        n = self.student_update_frequency
        return (self.flops_of("student") + (n - 1) * self.flops_of("critic")) / n

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> DistillState:
        """The student from `params` (or fresh), its critics and everybody's optimizers."""
        student_key, players_key = jax.random.split(key)
        params_of = self.start_players(players_key, frozen)
        players = {
            name: create_player(optimizer, params_of[name])
            for name, optimizer in self.critics.items()
        }
        return self.student.create_state(student_key, params, players)

    def weights(self, state: DistillState) -> dict[str, Any]:
        """'raw' and every average by its name, of the student."""
        return self.student.weights(state)

    def draw_examples(
        self, batch: Batch, key: Key[Array, ""], phase: str, frozen: Any = None
    ) -> dict[str, Any]:
        """All that is random in a batch's update, before the batch is split in any way."""
        step_key, time_key, noise_key, label_key, dropout_key, more_key = jax.random.split(key, 6)
        x0 = batch["image"]
        n = x0.shape[0]
        return {
            "x0": x0,
            "conditions": self.student.draw_conditions(batch, label_key, frozen),
            "t": self.timesteps.sample(time_key, n),
            "eps": jax.random.normal(noise_key, x0.shape, jnp.float32),
            "dropout_keys": jax.random.split(dropout_key, n),
            **self.steps.draw(step_key, x0.shape),
            **self.draw_more(more_key, batch, phase),
        }

    def generate(self, params: Any, examples: dict[str, Any]) -> Float[Array, "b h w c"]:
        """What the student makes of its inputs: clean data, by one evaluation with gradients."""
        denoiser, conditions = self.student.denoiser, examples["conditions"]
        fixed = jax.lax.stop_gradient(params)

        def predict(x: Array, t: Array) -> Prediction:
            return denoiser.predict(fixed, Request(x, t, conditions))

        x, t = self.steps.start(predict, examples)
        return denoiser.x0(params, Request(x, t, conditions, examples["dropout_keys"]))

    def update(
        self,
        state: DistillState,
        batch: Batch,
        key: Key[Array, ""],
        frozen: Any = None,
        phase: str = "student",
    ) -> tuple[DistillState, Metrics]:
        """One optimizer step of the student, or of each of its critics; then the averages.

        Averages are taken at every update, also those of the critics, as FastGen does: their decay
        counts updates of the run.
        """
        examples = self.draw_examples(batch, key, phase, frozen)
        if phase == "student":
            return self._update_student(state, examples, frozen)
        if phase == "critic":
            return self._update_critics(state, examples, frozen)
        raise ValueError(f"phase {phase!r}: {one_of(phase, self.phases)}")

    def _update_student(self, state, examples, frozen):
        players = {name: player.params for name, player in state.players.items()}
        metrics, gradients = accumulated_gradients(
            lambda params, part: self.student_loss(params, part, frozen, players),
            state.params,
            examples,
            self.student.num_microbatches,
        )
        state, metrics = self.finish_student(state, metrics)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        return self.student.apply_gradients(state, gradients), metrics

    def _update_critics(self, state, examples, frozen):
        metrics, gradients = accumulated_gradients(
            lambda params, part: self.critic_loss(params, part, frozen, state.params),
            {name: state.players[name].params for name in self.critics},
            examples,
            self.student.num_microbatches,
        )
        players = dict(state.players)
        for name, optimizer in self.critics.items():
            metrics[f"{name}_gradient_norm"] = optax.global_norm(gradients[name])
            players[name] = update_player(optimizer, players[name], gradients[name])
        step = state.step + 1
        ema = ema_lib.update(self.student.averages, state.ema, state.params, step)
        return dataclasses.replace(state, step=step, ema=ema, players=players), metrics


def build_few_steps(config: ml_collections.ConfigDict) -> FewSteps:
    """The steps of `config.sampling`, with inputs as the chosen method's `student_input`.

    Raises:
        ConfigError: a solver or inputs that do not go with a student of few steps.
    """
    method = config.method.name
    inputs = config.method[method].student_input
    require_few_step_solver(config)
    if config.model.second_time != "none":
        raise ConfigError(
            f"config.model.second_time={config.model.second_time!r} would do nothing: the student "
            f"of {method} sees one time. Leave it 'none'"
        )
    plan = experiment.build_sampling(config)
    if inputs != "data" and len(plan.times) == 2:
        raise ConfigError(
            f"config.method.{method}.student_input={inputs!r} would do nothing: with "
            "config.sampling.steps=1 the student starts from noise"
        )
    try:
        return FewSteps(
            plan.sampler.denoiser.process,
            plan.sampler.solver,
            tuple(float(time) for time in plan.times),
            inputs,
        )
    except ValueError as error:
        raise ConfigError(f"config.sampling or config.method.{method}: {error}") from error


def counted_config(
    config: ml_collections.ConfigDict, player: str, learning_rate: float = 0.0
) -> ml_collections.ConfigDict:
    """`config` with the run as long as one player sees it, for its learning-rate schedule.

    Args:
        config: of the experiment.
        player: 'student' or 'critic'.
        learning_rate: instead of `config.optimizer`'s; 0 for that.
    """
    frequency = config.method[config.method.name].student_update_frequency
    total = config.training.num_steps
    student_updates = -(-total // frequency) if frequency > 0 else total
    config = config.copy_and_resolve_references()
    with config.unlocked():
        updates = student_updates if player == "student" else total - student_updates
        config.training.num_steps = max(1, updates)
        config.optimizer.learning_rate = learning_rate or config.optimizer.learning_rate
    return config
