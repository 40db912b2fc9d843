"""Knowledge distillation (Luhman & Luhman 2021): regression on what the teacher made of noise.

The pairs are made beforehand (launch/write_pairs.py) and read as data: x0, the end of the teacher's
deterministic sampler, with the noise it started from or, for a student of several steps, with the
states it passed at the times of the student's schedule. With D the student and t_i a time of its
schedule, drawn for each example,

    loss = 1/2 mean (D(x_{t_i}, t_i, label) - x0)^2
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.distill.student import (
    DistillState,
    Student,
    build_student,
    drift_metrics,
    require_few_step_solver,
)
from dit_jax.models.call import Request
from dit_jax.nearest import one_of
from dit_jax.options import option
from dit_jax.ranges import NOT_NEGATIVE
from dit_jax.training.method import Batch, Metrics, OnePhase, accumulated_gradients

LOSSES = ("mse", "pseudo_huber")


def default_huber_c(shape: tuple[int, ...]) -> float:
    """0.00054 sqrt(d) for examples of d values (Song & Dhariwal 2023, section 3.3)."""
    return 0.00054 * float(np.sqrt(np.prod(shape)))


@dataclasses.dataclass(frozen=True)
class KDOptions:
    """Keys of config.method.kd."""

    loss: str = option("mse", "mse: half the mean square | pseudo_huber")
    huber_c: float = option(
        0.0, "of pseudo_huber; 0: 0.00054 sqrt(values of an example)", NOT_NEGATIVE
    )


@dataclasses.dataclass(frozen=True)
class KnowledgeDistillation(OnePhase):
    """The Method 'kd'.

    Attributes:
        student: the network and how it is trained.
        times: where the student's steps start, in process time, from noise; the clean end left out.
        loss: 'mse', half the mean square; or 'pseudo_huber', sqrt(|difference|^2 + c^2) - c of the
            difference's norm over an example.
        huber_c: that c, above 0; 'pseudo_huber' only.
        teacher_given: whether the teacher is at hand besides its pairs: to start from, and to see
            its samples beside the student's. The updates do not need it.
    """

    student: Student
    times: tuple[float, ...]
    loss: str = KDOptions.loss
    huber_c: float = KDOptions.huber_c
    teacher_given: bool = False

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"method.kd.loss={self.loss!r}: {one_of(self.loss, LOSSES)}")
        if (self.huber_c > 0) != (self.loss == "pseudo_huber"):
            raise ValueError(
                f"method.kd.huber_c={self.huber_c} with loss={self.loss!r}: expected a positive "
                "number with 'pseudo_huber', 0 with 'mse'"
            )
        if not self.times or any(a <= b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"times={self.times}: expected one or more that decrease")

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """'teacher' if there is one."""
        return ("teacher",) if self.teacher_given else ()

    @property
    def flops_per_example(self) -> float:
        """Forward and backward pass, the backward counted as two forwards."""
        return 3 * self.student.denoiser.network.flops_per_example

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> DistillState:
        """Fresh parameters (or `params`), their averages and the optimizer's state."""
        return self.student.create_state(key, params)

    def weights(self, state: DistillState) -> dict[str, Any]:
        """'raw' and every average by its name."""
        return self.student.weights(state)

    def draw_examples(
        self, batch: Batch, key: Key[Array, ""], frozen: Any = None
    ) -> dict[str, Any]:
        """Inputs, their times and targets of a whole batch, before it is split in any way."""
        step_key, label_key, dropout_key = jax.random.split(key, 3)
        x0 = batch["image"]
        states, n = self._states(batch), x0.shape[0]
        step = jax.random.randint(step_key, (n,), 0, len(self.times))
        return {
            "x_t": jax.vmap(lambda path, i: path[i])(states, step),
            "t": jnp.asarray(self.times, jnp.float32)[step],
            "x0": x0,
            "conditions": self.student.draw_conditions(batch, label_key, frozen),
            "dropout_keys": jax.random.split(dropout_key, n),
        }

    def _states(self, batch: Batch) -> Float[Array, "b steps h w c"]:
        """The teacher's states at the student's times."""
        if "path" in batch:
            states = batch["path"]
        elif "noise" in batch:
            scale = self.student.denoiser.process.start_scale(jnp.float32(self.times[0]))
            states = (scale * batch["noise"])[:, None]
        else:
            raise ValueError(
                f"a batch of pairs has 'noise' or 'path'; this one has {', '.join(batch)}: set "
                "config.data.name='pairs'"
            )
        if states.shape[1] != len(self.times):
            raise ValueError(
                f"the pairs have {states.shape[1]} states an example, the student "
                f"{len(self.times)} steps: open them with the student's times"
            )
        return states

    def loss_and_metrics(self, params: Any, examples: dict[str, Any]) -> tuple[Array, Metrics]:
        """Mean loss over examples and what to watch."""
        inputs = (examples[name] for name in ("x_t", "t", "conditions", "dropout_keys"))
        x0 = self.student.denoiser.x0(params, Request(*inputs))
        loss = distance(x0, examples["x0"], self.loss, self.huber_c).mean()
        return loss, {"loss": loss, **drift_metrics(x0)}

    def update(
        self,
        state: DistillState,
        batch: Batch,
        key: Key[Array, ""],
        frozen: Any = None,
        phase: str = "train",
    ) -> tuple[DistillState, Metrics]:
        """One optimizer step on the mean loss of `batch`, then the averages."""
        examples = self.draw_examples(batch, key, frozen)
        metrics, gradients = accumulated_gradients(
            self.loss_and_metrics, state.params, examples, self.student.num_microbatches
        )
        metrics["gradient_norm"] = optax.global_norm(gradients)
        return self.student.apply_gradients(state, gradients), metrics


def distance(
    x0: Float[Array, "b h w c"], target: Float[Array, "b h w c"], loss: str, huber_c: float = 0.0
) -> Float[Array, " b"]:
    """The loss of every example; see `KnowledgeDistillation`."""
    squares = (x0 - target) ** 2
    if loss == "mse":
        return 0.5 * squares.mean(axis=(1, 2, 3))
    return jnp.sqrt(squares.sum(axis=(1, 2, 3)) + huber_c**2) - huber_c


def build(config: ml_collections.ConfigDict) -> KnowledgeDistillation:
    """The Method 'kd' of a configuration.

    Raises:
        ConfigError: options that do not fit each other.
    """
    options = config.method.kd
    if config.data.name != "pairs":
        raise ConfigError(
            f"config.method.name='kd' learns from pairs; config.data.name is {config.data.name!r}: "
            "write them with launch/write_pairs.py and set config.data.name='pairs'"
        )
    require_few_step_solver(config)
    if options.loss == "mse" and options.huber_c:
        raise ConfigError(
            f"config.method.kd.huber_c={options.huber_c} would do nothing: config.method.kd.loss "
            "is 'mse'. Set 'pseudo_huber' or leave it out"
        )
    teacher = config.teacher
    if teacher.guidance_scale != 1.0 or tuple(teacher.guidance_interval):
        raise ConfigError(
            "config.teacher.guidance_scale and guidance_interval would do nothing with "
            "config.method.name='kd': the pairs were made with the guidance that "
            "launch/write_pairs.py was given"
        )
    student = build_student(config)
    huber_c = options.huber_c
    if options.loss == "pseudo_huber" and not huber_c:
        huber_c = default_huber_c(student.denoiser.network.sample_shape)
    times = experiment.build_sampling(config).times[:-1]
    return KnowledgeDistillation(
        student=student,
        times=tuple(float(time) for time in times),
        loss=options.loss,
        huber_c=huber_c,
        teacher_given=bool(config.teacher.path),
    )
