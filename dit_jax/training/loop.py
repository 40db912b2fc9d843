"""The one training loop, for every Method.

Reads top to bottom: place and restore the state, compile the update, then step, log, preview and
save until done, interrupted or diverged. The metrics of one step are fetched after the next one has
been dispatched, so the device never waits for the host.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.defaults import Training
from dit_jax.fp8_kernels import check_compiled
from dit_jax.quantities import counted
from dit_jax.training import metrics as metrics_lib
from dit_jax.training import remat_choice
from dit_jax.training.checkpoints import CheckpointError, Checkpoints
from dit_jax.training.interruption import Interruption
from dit_jax.training.method import Method


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


_STEPS_TO_ESTIMATE = 10  # after so many the time left is first announced
_STOP = "stop"  # among the metrics of several processes


class NonFiniteError(FloatingPointError):
    """A loss, gradient norm or other metric became NaN or infinite."""


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

    updates = _Updates(alternatives or {"": method}, shardings, frozen, announce, placement)
    host_batch = next(data)
    updates.compile(state, host_batch, key, getattr(data, "image_sizes", ()))
    on_start()
    with Interruption("step") as interruption:
        run = _Run(
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


class _Updates:
    """The compiled updates of a method, one program a phase and shape of batches.

    Of several processes any may be told to stop, and all have to at the same step: whether one was
    goes into the update, and comes out among the metrics as what all of them know.
    """

    def __init__(self, methods, shardings, frozen, announce, placement):
        self._methods, self._shardings, self._frozen = methods, shardings, frozen
        self._announce, self._placement = announce, placement
        self._compiled = {}
        self.agree = jax.process_count() > 1

    def compile(self, state, host_batch, key, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Compiles all phases, so that none interrupts the run later.

        Args:
            state: to update.
            host_batch: one batch.
            key: root key.
            sizes: (height, width) of all images to come, where they are of several sizes.

        Raises:
            memory.MemoryNeededError: no method's updates fit.
        """
        batches = {size: _of_size(host_batch, size) for size in sizes} or {None: host_batch}

        def lower_bound(method):
            devices, least = self._placement.num_devices, []
            for batch in batches.values():
                with self._placement.tracing():
                    inputs = state, self._inputs(batch, False)[0], key
                    least.append(remat_choice.least_bytes(method, *inputs, devices, self._frozen))
            return max(least)

        def disagrees(flag):
            return bool(jnp.max(self._placement.put_flag(flag))) if self.agree else flag

        choice = remat_choice.Choice(self._methods, self._announce, disagrees)
        self._method, self._compiled = choice.compiled(
            lambda method: self._compile(method, state, batches, key), lower_bound
        )

    def _compile(self, method, state, batches, key) -> dict[Any, Any]:
        """One method's updates by phase and shapes of the batch; `batches` are by size."""
        compiled = {}
        for phase in method.phases:

            def update(state, batch, key, frozen, stop=None, phase=phase):
                key = jax.random.fold_in(key, state.step)
                state, metrics = method.update(state, batch, key, frozen, phase)
                return state, metrics if stop is None else {**metrics, _STOP: jnp.max(stop)}

            jitted = jax.jit(update, donate_argnums=0, out_shardings=(self._shardings, None))
            for size, host_batch in batches.items():
                started = time.perf_counter()
                batch, *flag = self._inputs(host_batch, False)
                with self._placement.tracing():
                    lowered = jitted.lower(state, batch, key, self._frozen, *flag)
                compiled[phase, _shapes(host_batch)] = lowered.compile()
                check_compiled(lowered, compiled[phase, _shapes(host_batch)])
                name = "the update" if len(method.phases) == 1 else f"the {phase} update"
                name += f" of {size[0]}x{size[1]}" if size else ""
                self._announce(f"compiled {name} in {time.perf_counter() - started:.1f} s")
        return compiled

    def _inputs(self, host_batch, stop: bool) -> list:
        batch = self._placement.put_batch(host_batch)
        return [batch, self._placement.put_flag(stop)] if self.agree else [batch]

    def __call__(self, step: int, state, host_batch, key, stop: bool):
        """The update that follows `step` updates."""
        batch, *flag = self._inputs(host_batch, stop)
        compiled = self._compiled.get((self._method.phase(step), _shapes(host_batch)))
        if compiled is None:
            raise ValueError(
                f"the data gave a batch of shapes {_shapes(host_batch)}, which they had not "
                f"announced; there were {sorted({shapes for _, shapes in self._compiled})}"
            )
        return compiled(state, batch, key, self._frozen, *flag)


def _shapes(host_batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(host_batch))


def _of_size(host_batch: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """A batch like another, of images of another (height, width)."""
    image = host_batch["image"]
    empty = np.zeros((image.shape[0], *size, image.shape[-1]), image.dtype)
    return {**host_batch, "image": empty}


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


class _Run:
    """Bookkeeping between steps: metrics one step behind, windows, pauses."""

    def __init__(
        self,
        method,
        key,
        options,
        checkpoints,
        writers,
        preview,
        announce,
        placement,
        before_writing,
    ):
        self.method, self.options, self.checkpoints = method, options, checkpoints
        self.writers, self.preview, self.announce = writers, preview, announce
        self.before_writing = before_writing
        self._key_data = jax.random.key_data(key)
        if jax.process_count() > 1:  # only arrays that lie on the devices of all can be saved
            host = np.asarray(self._key_data)
            sharding = placement.state_shardings(jax.ShapeDtypeStruct(host.shape, host.dtype))
            self._key_data = jax.make_array_from_callback(
                host.shape, sharding, lambda index: host[index]
            )
        flops = options.flops_per_example or method.flops_per_example
        self.throughput = metrics_lib.Throughput(options.batch_size, flops, placement.num_devices)
        self._pending: tuple[int, Any, Any] | None = None
        self._window: list[dict[str, float]] = []
        self._steps, self._begun = 0, 0.0
        self.stops = False  # whether a process was told to, as of the last metrics fetched

    def stepped(self, step: int, metrics: Any, host_batch: Any) -> None:
        """Takes the dispatched step's metrics and checks those of the step before it."""
        self.throughput.step()
        self._collect()
        self._pending = (step, metrics, host_batch)
        if step % self.options.log_every == 0 or step == self.options.num_steps:
            self._collect()
            self._log(step)
        self._steps += 1
        if self._steps == 2:  # the first has ended
            self._begun = time.perf_counter()
        elif self._steps == _STEPS_TO_ESTIMATE and self.options.log_every > _STEPS_TO_ESTIMATE:
            rate = (self._steps - 2) / (time.perf_counter() - self._begun)
            left = self.options.num_steps - step
            duration = metrics_lib.format_duration(left / rate)
            if left:
                steps = counted(left, "step")
                self.announce(f"{rate:.3g} steps/s: about {duration} for the {steps} left")

    def is_pause(self, step: int) -> bool:
        """Whether a preview or a checkpoint is due after `step`."""
        periods = (self.options.preview_every, self.options.checkpoint_every)
        return any(period and step % period == 0 for period in periods)

    def pause(self, step: int, state: Any, data: DataIterator, *, final: bool) -> None:
        """Saves and previews, with the clock stopped and every metric known to be finite."""
        self._collect()
        self.throughput.pause()
        self.before_writing(step)
        every = self.options.checkpoint_every
        if final or (every and step % every == 0):
            tree = {"state": state, "key": self._key_data}
            self.checkpoints.save(step, tree, data.get_state())
        every = self.options.preview_every
        if self.preview and every and (step % every == 0 or step == self.options.num_steps):
            self.preview(step, self.method.weights(state))
        self.throughput.resume()

    def _collect(self) -> None:
        if self._pending is None:
            return
        step, metrics, host_batch = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.stops |= metrics.pop(_STOP, 0.0) > 0
        bad = [name for name in ("loss", *metrics) if not np.isfinite(metrics[name])]
        if bad:
            self.checkpoints.wait()
            raise NonFiniteError(self._non_finite_message(step, bad, metrics, host_batch))
        self._window.append(metrics)

    def _non_finite_message(self, step, bad, metrics, host_batch) -> str:
        image, label = host_batch["image"], host_batch.get("conditions", {}).get("label")
        steps = self.checkpoints.steps()
        lines = [
            f"{bad[0]} is {metrics[bad[0]]} at step {step}; training stopped.",
            f"  metrics: {metrics}",
            f"  batch: image {image.shape}, min {image.min():.4g}, max {image.max():.4g}, mean "
            f"{image.mean():.4g}, std {image.std():.4g}, non-finite {(~np.isfinite(image)).sum()}",
        ]
        if label is not None:
            lines.append(f"  labels: {label.min()} to {label.max()}")
        remedies = (
            "a lower --config.optimizer.learning_rate, --config.optimizer.gradient_clip_norm=1.0 "
            "or --config.model.dtype=float32"
        )
        if steps:
            lines.append(f"  last good checkpoint: {self.checkpoints.path(steps[-1])}")
            lines.append(f"  to continue from it: the same command with --force and {remedies}")
        else:
            lines.append("  no checkpoint was written yet")
            lines.append(f"  to start again: the same command with {remedies}")
        return "\n".join(lines)

    def _log(self, step: int) -> None:
        # Phases differ in their metrics: each name is averaged over the steps that have it.
        names = dict.fromkeys(name for metrics in self._window for name in metrics)
        scalars = {
            name: float(np.mean([m[name] for m in self._window if name in m])) for name in names
        }
        self._window = []
        scalars.update(self.throughput.window())
        self.before_writing(step)
        for writer in self.writers:
            writer.write_scalars(step, scalars)
        if jax.process_index() == 0:
            self.announce(self._line(step, scalars))

    def _line(self, step: int, scalars: dict[str, float]) -> str:
        total = self.options.num_steps
        rate = scalars.get("steps_per_second", 0.0)
        parts = [f"step {step:>{len(str(total))}}/{total}", f"loss {scalars['loss']:.4f}"]
        if rate:
            eta = metrics_lib.format_duration((total - step) / rate)
            parts += [f"{rate:.3g} steps/s", f"{scalars['images_per_second']:.4g} images/s"]
            parts += [f"{scalars['model_tflops_per_second']:.3g} TFLOP/s"]
            if "mfu" in scalars:
                parts += [f"MFU {scalars['mfu']:.1%}"]
            parts += [f"ETA {eta}"]
        return "  ".join(parts)
