"""What the training loop trains: a Method, two pure functions on a state.

Plain denoising is one Method, each distillation objective another. The loop, the checkpoints, the
logs and the sampler know nothing else of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

Batch = dict[str, Any]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a Method that trains one network; trees of shapes or shardings are of it as well.

    Attributes:
        step: updates made so far, an int32 scalar.
        params: the network's parameters, float32.
        ema: averages of the parameters by name (`training.ema`).
        optimizer: optax's state.
    """

    step: Any
    params: Any
    ema: dict[str, Any]
    optimizer: Any


@runtime_checkable
class Method(Protocol):
    """An objective. `init` and `update` are pure; the loop jits them and places their arrays.

    A method whose players take turns (a student, then its critics) has several phases, each
    compiled as a program of its own. What it reads but never trains, such as a teacher's
    parameters, is handed to it as `frozen`: on the devices, but in no checkpoint.
    """

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the different updates."""
        ...

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Names of the parameter trees that `frozen` has to hold."""
        ...

    def phase(self, step: int) -> str:
        """Which update comes after `step` updates."""
        ...

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> Any:
        """The state before the first update; it has an int32 leaf `step`, here 0.

        Args:
            key: of everything random in it.
            params: the trained network's parameters to start from, instead of fresh ones.
            frozen: as `update`; None where only shapes matter.
        """
        ...

    def update(
        self,
        state: Any,
        batch: Batch,
        key: Key[Array, ""],
        frozen: Any = None,
        phase: str = "train",
    ) -> tuple[Any, Metrics]:
        """One update. `metrics` are float32 scalars and include 'loss'."""
        ...

    def weights(self, state: Any) -> dict[str, Any]:
        """Parameters one can sample with, by name; 'raw' are the ones being trained."""
        ...

    @property
    def flops_per_example(self) -> float:
        """Floating-point operations an update spends on an example, on average over the phases
        (a multiply-add is two)."""
        ...


class OnePhase:
    """What methods of one player and without frozen parameters have in common."""

    @property
    def phases(self) -> tuple[str, ...]:
        """The only one."""
        return ("train",)

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """None."""
        return ()

    def phase(self, step: int) -> str:
        """The only one."""
        return "train"


def accumulated_gradients(
    loss: Callable[[Any, Any], tuple[Array, Metrics]],
    params: Any,
    examples: Any,
    num_microbatches: int,
    as_computed: Callable[[Any], Any] = lambda params: params,
) -> tuple[Metrics, Any]:
    """Metrics and gradients of a batch's mean loss, computed in parts.

    Everything random (noise, times, dropped labels) is in `examples` already, so the result is that
    of the unsplit batch up to the order of summation.

    Args:
        loss: (params, examples) -> (mean loss, mean metrics).
        params: differentiated.
        examples: a tree whose leaves have the batch as leading axis.
        num_microbatches: how many parts, one after the other; divides the batch.
        as_computed: converts parameters to what they are used in (`Network.as_computed`): done once
            for all parts. Gradients are summed in the dtypes of `params` all the same.

    Returns:
        The mean metrics and the gradients.
    """
    gradient = jax.grad(loss, has_aux=True)
    if num_microbatches == 1:
        gradients, metrics = gradient(params, examples)
        return metrics, gradients

    # Part i takes every num_microbatches-th example: on a batch sharded over devices each part
    # then again covers all devices evenly, without moving data.
    def split(leaf):
        parts = leaf.reshape(-1, num_microbatches, *leaf.shape[1:])
        return jnp.moveaxis(parts, 1, 0)

    used = as_computed(params)

    def add(total, part):
        gradients, metrics = gradient(used, part)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (metrics, gradients)), None

    parts = jax.tree.map(split, examples)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[1], shapes[0]))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda a: a / num_microbatches, total)
