"""What the commands share: placing on devices, opening a workdir, ending on errors politely."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.sampling import generate
from dit_jax.training import metrics, workdir
from dit_jax.training.checkpoints import CheckpointError, Checkpoints
from dit_jax.training.loop import NonFiniteError
from parallel.mesh import DataParallel, create_mesh

# What a user can cause and mend: shown as a message without a stack trace.
USER_ERRORS = (ConfigError, ValueError, OSError, CheckpointError, NonFiniteError)
USER_ERRORS += (workdir.WorkdirError, ImportError)


@contextlib.contextmanager
def readable_errors(*, traceback: bool = False) -> Iterator[None]:
    """Ends the process with a message and status 2 on errors a user can mend.

    Args:
        traceback: let them through with their stack trace (the flag --traceback).
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except USER_ERRORS as error:
        if traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        print("(--traceback shows where it came from)", file=sys.stderr)
        sys.exit(2)


def create_placement(config: ml_collections.ConfigDict) -> DataParallel:
    """Placement over the mesh of `config.mesh`."""
    return DataParallel(create_mesh(**config.mesh.to_dict()))


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A run's configuration and one set of its weights.

    Attributes:
        config: the run's resolved configuration.
        params: the network's parameters.
        weights: their name, 'raw' or an average's.
        step: updates they have seen.
    """

    config: ml_collections.ConfigDict
    params: Any
    weights: str
    step: int


def load_model(
    directory: Path, *, weights: str = "", step: int | None = None, overrides: dict | None = None
) -> TrainedModel:
    """Restores what a workdir's newest checkpoint (or that of `step`) holds for sampling.

    Args:
        directory: the workdir.
        weights: 'raw', 'ema' (the first average), or an average's name; empty: as configured.
        step: which checkpoint.
        overrides: configuration values to change, as {'sampling.steps': 50}.

    Raises:
        WorkdirError: it is no workdir.
        CheckpointError: it has no such checkpoint or no such weights.
    """
    config = workdir.load_config(directory).copy_and_resolve_references()
    config = experiment.resolve_config(_override(config.to_dict(), overrides or {}))
    method = experiment.build_method(config)
    placement = create_placement(config)
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(method.init, key)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.replicated),
        {"state": abstract, "key": jax.eval_shape(jax.random.key_data, key)},
    )
    saved = Path(directory) / workdir.CHECKPOINTS
    restored = None
    if saved.is_dir():
        checkpoints = Checkpoints(saved, read_only=True)
        restored = checkpoints.restore(target, step)
        checkpoints.close()
    if restored is None:
        raise CheckpointError(f"{directory} has no checkpoint yet: train first")
    available = method.weights(restored.state["state"])
    name = choose_weights(available, weights or config.sampling.weights)
    return TrainedModel(config, available[name], name, restored.step)


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for path, value in overrides.items():
        section = values
        *parents, leaf = path.split(".")
        for part in parents:
            section = section[part]
        section[leaf] = value
    if "sampling.solver" in overrides:  # options of the run's own solver no longer apply
        solver = overrides["sampling.solver"]
        sampling = values["sampling"]
        values["sampling"] = {
            key: value
            for key, value in sampling.items()
            if not isinstance(value, dict) or key == solver
        }
    return values


def choose_weights(available: Mapping[str, Any], wanted: str) -> str:
    """The name in `available` (`Method.weights`) that `wanted` means; 'ema' is the first average.

    Raises:
        CheckpointError: there are no such weights, with those there are.
    """
    averages = [name for name in available if name != "raw"]
    name = averages[0] if wanted == "ema" and averages else wanted
    if name not in available:
        raise CheckpointError(f"no weights {wanted!r}; there are {', '.join(available)}")
    return name


def sample_images(
    plan: experiment.SamplingPlan,
    params: Any,
    labels: np.ndarray,
    *,
    seed: int,
    placement: DataParallel,
    batch_size: int,
    announce: bool = True,
) -> np.ndarray:
    """Samples one image a label, in batches over all devices.

    Returns:
        float32 [n, h, w, c].
    """
    batch_size = -(-min(batch_size, len(labels)) // placement.num_devices) * placement.num_devices
    draw = plan.bind(params)

    def sample(keys, labels):
        keys = jax.device_put(keys, placement.split)
        return draw(keys, labels)

    def progress(done: int, seconds: float) -> None:
        left = metrics.format_duration((len(labels) - done) * seconds / done)
        print(
            f"sampled {done}/{len(labels)}  {done / seconds:.4g} images/s  ETA {left}", flush=True
        )

    batches = generate(
        sample, labels, seed=seed, batch_size=batch_size, progress=progress if announce else None
    )
    return np.concatenate(list(batches))


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, 1, ...: every class as often as every other."""
    return np.arange(count, dtype=np.int32) % max(num_classes, 1)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose a trained model and how to sample it; by default as it was configured."""
    model = parser.add_argument_group("model")
    model.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
    model.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    model.add_argument("--weights", default="", help="raw, ema (the first average) or its name")
    group = parser.add_argument_group("sampling (defaults: the run's config.sampling)")
    group.add_argument("--solver", help="ddpm, ddim, euler, heun or dpmpp_2m")
    group.add_argument("--steps", type=int, help="solver steps")
    group.add_argument("--spacing", help="of the solver's times, see dit_jax.diffusion.schedules")
    group.add_argument("--guidance_scale", type=float, help="1 for no guidance")
    group.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only at process times between these",
    )
    group.add_argument(
        "--guidance_channels", help="all, or first3 as the original DiT", choices=["all", "first3"]
    )
    group.add_argument("--batch_size", type=int, help="images sampled at once, over all devices")
    group.add_argument("--seed", type=int, default=0, help="image i depends on seed and i only")
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")


def sampling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration values that `add_sampling_arguments`' options replace."""
    names = ("solver", "steps", "spacing", "guidance_scale", "guidance_channels", "batch_size")
    overrides = {f"sampling.{n}": getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.guidance_interval:
        overrides["sampling.guidance_interval"] = tuple(args.guidance_interval)
    elif args.guidance_scale == 1.0:  # no guidance: then not the run's interval and channels either
        overrides["sampling.guidance_interval"] = ()
        overrides.setdefault("sampling.guidance_channels", "all")
    return overrides


def provenance(model: TrainedModel, directory: Path) -> dict[str, Any]:
    """How images were made, for records: run, checkpoint, weights and sampling settings."""
    return {
        "experiment": model.config.name,
        "workdir": str(directory),
        "step": model.step,
        "weights": model.weights,
        "sampling": model.config.sampling.to_dict(),
    }
