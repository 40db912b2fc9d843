"""What a run keeps account of between its steps: metrics, rates, checkpoints, previews."""

import time
from typing import Any

import jax
import numpy as np

from dit_jax.quantities import counted
from dit_jax.training import metrics as metrics_lib
from dit_jax.training.updates import STOP

_STEPS_TO_ESTIMATE = 10  # after so many the time left is first announced


class NonFiniteError(FloatingPointError):
    """A loss, gradient norm or other metric became NaN or infinite."""


class Progress:
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

    def pause(self, step: int, state: Any, data: Any, *, final: bool) -> None:
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
        self.stops |= metrics.pop(STOP, 0.0) > 0
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
