"""The one training loop, for every Method.

Reads top to bottom: place and restore the state, compile the update, then step, log, preview and
save until done, interrupted or diverged. The metrics of one step are fetched after the next one has
been dispatched, so the device never waits for the host.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from dit_jax.defaults import Training
from dit_jax.training import metrics as metrics_lib
from dit_jax.training.checkpoints import CheckpointError, Checkpoints
from dit_jax.training.interruption import Interruption
from dit_jax.training.method import Method
from dit_jax.training.progress import Progress
from dit_jax.training.updates import Updates


@runtime_checkable
class Placement(Protocol):
    """Where arrays live: the seam to the room `parallel`."""

    @property
    def num_devices(self) -> int:
        """Devices that share the work."""

    def state_shardings(self, abstract_state: Any) -> Any:
        """A sharding for every leaf of the state."""

    def put_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This process's part of a batch, onto its devices."""

    def put_flag(self, flag: bool) -> jax.Array:
        """A yes or no of every process, as one array whose maximum says whether any says yes."""

    def tracing(self) -> contextlib.AbstractContextManager:
        """A context in which the updates are traced."""


@runtime_checkable
class DataIterator(Protocol):
    """An endless iterator of host batches that can say and be told where it is.

    One whose images are of several sizes names them, `image_sizes`.
    """

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch."""

    def get_state(self) -> dict:
        """Where the iterator is, JSON-able."""

    def set_state(self, state: dict, *, strict: bool = True) -> None:
        """Goes there; `strict` refuses the state of another stream of data."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Lengths and periods of a run, in steps; a period of 0 means never.

    Attributes:
        num_steps: updates in all, those before a resume included.
        batch_size: examples a step over all devices, for the rates.
        log_every: period of metrics.
        preview_every: period of `preview`.
        checkpoint_every: period of checkpoints; the last step always has one.
        flops_per_example: operations of an update and example, where images are of several sizes;
            None for the method's own number.
    """

    num_steps: int
    batch_size: int
    log_every: int = Training.log_every
    preview_every: int = Training.preview_every
    checkpoint_every: int = Training.checkpoint_every
    flops_per_example: float | None = None

    def __post_init__(self):
        for name, least in (("num_steps", 1), ("batch_size", 1), ("log_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"training.{name}={getattr(self, name)}: expected >= {least}")
        for name in ("preview_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}={getattr(self, name)}: expected 0 or more")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        state: the Method's last state.
        step: its step.
        interrupted: whether a signal ended the run before `num_steps`.
        signal: which one; None where only another process was sent one.
        seconds: time spent on steps by this process, without compilation, previews, checkpoints.
        steps_per_second: mean over those seconds.
    """

    state: Any
    step: int
    interrupted: bool
    seconds: float
    steps_per_second: float
    signal: int | None = None


def train(
    method: Method,
    data: DataIterator,
    key: jax.Array,
    options: LoopOptions,
    *,
    placement: Placement,
    checkpoints: Checkpoints,
    writers: Callable[[int], list[metrics_lib.MetricWriter]],
    preview: Callable[[int, dict[str, Any]], None] | None = None,
    announce: Callable[[str], None] = lambda text: print(text, flush=True),
    strict: bool = True,
    initial_params: Callable[[], Any] | None = None,
    frozen: Any = None,
    alternatives: Mapping[str, Method] | None = None,
    on_start: Callable[[], None] = lambda: None,
    before_writing: Callable[[int], None] = lambda step: None,
) -> TrainResult:
    """Trains `method` up to `options.num_steps`, from the newest checkpoint if there is one.

    Args:
        method: the objective.
        data: endless iterator of this process's batches.
        key: root key; every step's key is derived from it and the step's number.
        options: lengths and periods.
        placement: puts states and batches on devices.
        checkpoints: where the run is saved and continued.
        writers: makes the metric writers, given the step the run starts at.
        preview: called with (step, weights) every `preview_every` steps.
        announce: prints a line for the person watching.
        strict: refuse to continue from a checkpoint made with another seed or other data.
        initial_params: reads the parameters to start from, if there is no checkpoint yet.
        frozen: what the method reads and never trains, on the devices already.
        alternatives: `method` by rematerialisation policy (`remat_choice.alternatives`), of which
            the first that fits is trained.
        on_start: called once the state is there and the updates are compiled: before that nothing
            of a run on disk changes, so that one that is refused stays what it was.
        before_writing: called with the step before metrics, pictures or a checkpoint are written.

    Raises:
        ValueError: the checkpoint is of another seed or other data, and `strict`; or of a later
            step than `options.num_steps`.
        CheckpointError: none can be read, or what was written last is not there in the end.
        NonFiniteError: naming the step, its batch's statistics and the last good checkpoint.
    """
    abstract = jax.eval_shape(method.init, key)
    shardings = placement.state_shardings(abstract)
    restored = _restore(checkpoints, abstract, shardings, placement, data, key, strict)
    if restored is None:
        given = initial_params() if initial_params else None
        init = jax.jit(method.init, out_shardings=shardings)
        with placement.tracing():
            state, step = init(key, given, frozen), 0
        del given
    else:
        state, step = restored.state["state"], restored.step
        announce(f"continuing from step {step} ({checkpoints.path(step)})")
        for note in restored.notes:
            announce(note)
    if step > options.num_steps:
        raise ValueError(
            f"config.training.num_steps={options.num_steps}: {checkpoints.directory} is at step "
            f"{step} already, and fewer steps than are done mean nothing. To train on set more "
            f"than {step}; to train anew use another --workdir"
        )
    if step == options.num_steps:
        on_start()
        announce(f"already at step {step} of {options.num_steps}: nothing to train")
        return TrainResult(state, step, False, 0.0, 0.0)

    updates = Updates(alternatives or {"": method}, shardings, frozen, announce, placement)
    host_batch = next(data)
    updates.compile(state, host_batch, key, getattr(data, "image_sizes", ()))
    on_start()
    with Interruption("step") as interruption:
        run = Progress(
            method,
            key,
            options,
            checkpoints,
            writers(step),
            preview,
            announce,
            placement,
            before_writing,
        )
        run.throughput.resume()
        while True:
            # Read once: a signal between two readings must not end the run unsaved.
            stops = interruption.signal is not None
            state, metrics = updates(step, state, host_batch, key, stops)
            step += 1
            run.stepped(step, metrics, host_batch)
            stops = run.stops if updates.agree else interruption.signal is not None
            ends = step == options.num_steps or stops
            if run.is_pause(step) or ends:
                run.pause(step, state, data, final=ends)
            if ends:
                break
            host_batch = next(data)
        checkpoints.wait()
    before_writing(step)
    if not checkpoints.path(step).is_dir():
        raise CheckpointError(
            f"{checkpoints.path(step)} was removed while it was written: the last step is lost; "
            "the same command trains again"
        )
    for writer in run.writers:
        writer.flush()
    seconds, rate = run.throughput.overall()
    interrupted = step < options.num_steps
    return TrainResult(state, step, interrupted, seconds, rate, interruption.signal)


def _restore(checkpoints, abstract, shardings, placement, data, key, strict):
    """The newest checkpoint, its arrays where they belong and the data wound forward; or None."""
    key_data = jax.eval_shape(jax.random.key_data, key)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"state": abstract, "key": key_data},
        {"state": shardings, "key": placement.state_shardings(key_data)},
    )
    restored = checkpoints.restore(target, set_aside=True)
    if restored is None:
        return None
    saved_key = np.asarray(restored.state["key"])
    if strict and (saved_key != np.asarray(jax.random.key_data(key))).any():
        raise ValueError(
            f"the checkpoints in {checkpoints.directory} were trained from another seed: set "
            "config.seed to the run's own"
        )
    data.set_state(restored.data, strict=strict)
    return restored
