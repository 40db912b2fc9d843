"""Metrics: a line a person can follow, a JSON-lines file, TensorBoard by clu and, if asked, W&B."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from dit_jax.atomic import save_text

# Dense peaks of one device, bfloat16, FLOP/s (vendors' data sheets), by JAX's device kind.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str | None = None) -> float | None:
    """Dense bfloat16 peak of one device in FLOP/s, or None where it is not known (CPUs)."""
    kind = device_kind or jax.devices()[0].device_kind
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if kind.startswith(name):
            return PEAK_FLOPS[name]
    return None


@runtime_checkable
class MetricWriter(Protocol):
    """The part of clu's MetricWriter that the loop uses."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records scalars of one step."""

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Records float images [n, h, w, c] in [0, 1], each a picture to look at: a grid, say."""

    def flush(self) -> None:
        """Makes sure that everything recorded is on disk."""


class JsonLinesWriter:
    """Appends {'step': ..., 'loss': ...} lines to a file; after a resume, overtaken lines go."""

    def __init__(self, path: Path, *, resumed_at: int = 0):
        self._path = path
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= resumed_at]
            save_text(path, "".join(line + "\n" for line in lines))
        self._file = path.open("a")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line."""
        finite = {k: float(v) for k, v in scalars.items() if math.isfinite(float(v))}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Images are PNG files in the workdir already."""

    def flush(self) -> None:
        """Every line is flushed as it is written."""


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off by a kill: drop the line
        return 1 << 62


class WandbWriter:
    """Sends scalars and images to Weights & Biases."""

    def __init__(self, config: Mapping[str, Any], *, name: str, directory: Path):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "config.training.wandb=True needs the package wandb: pip install wandb"
            ) from error
        self._wandb = wandb
        self._run = wandb.init(
            project="dit-jax", name=name or None, dir=directory, config=dict(config), resume="allow"
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs scalars."""
        self._run.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Logs images."""
        logged = {name: [self._wandb.Image(i) for i in batch] for name, batch in images.items()}
        self._run.log(logged, step=step)

    def flush(self) -> None:
        """W&B flushes by itself."""


def create_writers(
    workdir: Path,
    *,
    resumed_at: int = 0,
    tensorboard: bool = True,
    wandb: bool = False,
    config: Mapping[str, Any] | None = None,
    name: str = "",
) -> list[MetricWriter]:
    """The writers of one run. Only the first process of several writes."""
    if jax.process_index() != 0:
        return []
    writers: list[MetricWriter] = [
        JsonLinesWriter(workdir / "metrics.jsonl", resumed_at=resumed_at)
    ]
    if tensorboard:
        _keep_tensorflow_off_accelerators()
        from clu import metric_writers

        writers.append(metric_writers.SummaryWriter(str(workdir / "tensorboard")))
    if wandb:
        writers.append(WandbWriter(config or {}, name=name, directory=workdir))
    return writers


def _keep_tensorflow_off_accelerators() -> None:
    # Its start-up notices on the CPU it found would drown ours.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)


def format_duration(seconds: float) -> str:
    """75 -> '1m15s', 8000 -> '2h13m'."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Throughput:
    """Steps and operations per second, leaving out pauses (compilation, previews, checkpoints).

    Args:
        batch_size: examples a step.
        flops_per_example: model operations one step spends on one example.
        num_devices: devices that share them.
    """

    def __init__(self, batch_size: int, flops_per_example: float, num_devices: int):
        self._batch_size = batch_size
        self._step_flops = flops_per_example * batch_size
        self._num_devices = num_devices
        self._peak = peak_flops()
        self._started = time.perf_counter()
        self._steps = self._window_steps = 0
        self._total = 0.0

    def step(self) -> None:
        """Counts one step."""
        self._window_steps += 1

    def pause(self) -> None:
        """Stops the clock."""
        self._total += time.perf_counter() - self._started
        self._steps += self._window_steps

    def resume(self) -> None:
        """Starts the clock again, with an empty window."""
        self._started, self._window_steps = time.perf_counter(), 0

    def window(self) -> dict[str, float]:
        """Rates since the last call (or resumption); starts a new window."""
        seconds, steps = time.perf_counter() - self._started, self._window_steps
        self.pause()
        self.resume()
        if not steps:
            return {}
        rates = {
            "steps_per_second": steps / seconds,
            "images_per_second": steps * self._batch_size / seconds,
            "model_tflops_per_second": steps * self._step_flops / seconds / 1e12,
        }
        if self._peak:
            rates["mfu"] = steps * self._step_flops / seconds / (self._peak * self._num_devices)
        return rates

    def overall(self) -> tuple[float, float]:
        """(seconds on the clock, steps per second over them)."""
        return self._total, self._steps / self._total if self._total else 0.0
