"""Sampling a teacher into a folder of pairs: the work of launch/write_pairs.py."""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import data as data_lib
from dit_jax import experiment
from dit_jax.data import pairs_writer
from dit_jax.diffusion.samplers import insert_times
from dit_jax.launch import arguments, loading, wiring
from dit_jax.quantities import counted, format_bytes
from dit_jax.sampling import image_keys
from dit_jax.training import memory
from dit_jax.training.metrics import format_duration

DETERMINISTIC = "ddim with eta=0, euler, heun without churn, dpmpp_2m or mean_flow"


def choose_sizes(
    batch_size: int, shard_size: int | None, num_pairs: int, num_devices: int
) -> tuple[int, int]:
    """Batch and shard size; a shard holds whole batches, so that resuming cuts none differently.

    Raises:
        ValueError: nothing to write, or a shard would split a batch.
    """
    if num_pairs < 1:
        raise ValueError(f"--num_pairs={num_pairs}: expected at least 1")
    batch_size = -(-batch_size // num_devices) * num_devices
    return batch_size, wiring.choose_shard_size(shard_size, batch_size)


def plan_path(
    plan: experiment.SamplingPlan, path_times: list[float]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The solver's times with those of `path_times`, and which of them are kept.

    Raises:
        ValueError: the solver draws noise on its way, so that its end does not follow from its
            beginning; a time outside the schedule.
    """
    if plan.sampler.solver.is_stochastic:
        name = type(plan.sampler.solver).__name__
        raise ValueError(
            f"pairs need a solver that adds no noise on its way, which {name} as configured does: "
            f"give --solver={DETERMINISTIC}"
        )
    try:
        return insert_times(plan.times, path_times)
    except ValueError as error:
        raise ValueError(f"--path_times: {error}") from error


def make_header(
    args: argparse.Namespace,
    model: loading.TrainedModel,
    times: np.ndarray,
    kept: tuple[int, ...],
    batch_size: int,
) -> data_lib.PairsHeader:
    """What the pairs will be."""
    config, process = model.config, experiment.build_process(model.config)
    sampling = config.sampling.to_dict()
    # Of the solvers' own options those of the one used; what decides no bits is left out.
    solver = {
        k: v for k, v in sampling.items() if not isinstance(v, dict) or k == config.sampling.solver
    }
    for name in ("batch_size", "weights"):
        solver.pop(name)
    return data_lib.PairsHeader(
        teacher_source=f"{model.source} ({model.weights}, step {model.step})",
        teacher_hash=model.weights_hash(),
        process={"name": config.process.name, **config.process[config.process.name].to_dict()},
        sampling=solver,
        times=tuple(times.tolist()),
        path_times=tuple(times[[0, *kept]].tolist()),
        start_scale=float(process.start_scale(jax.numpy.float32(times[0]))),
        seed=args.seed,
        batch_size=batch_size,
        sample_shape=model.network.sample_shape,
        num_classes=config.model.num_classes,
        dtype=args.dtype,
    )


def require_space(folder: Path, header: data_lib.PairsHeader, missing: int) -> None:
    """Refuses a disk that the pairs do not fit.

    Raises:
        OSError: how much there is, and how much is needed.
    """
    arrays = header.arrays(missing).values()
    wanted = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise OSError(
            f"{folder} has {format_bytes(free)} free; {counted(missing, 'pair')} need "
            f"{format_bytes(wanted)} (--dtype=float16 halves that)"
        )


def pair_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """Keys of pairs; others than those of images of the same seed.

    Otherwise a student would be shown, and scored, on the very noise that it was trained on.
    """
    return jax.vmap(lambda key: jax.random.fold_in(key, 2))(image_keys(seed, indices))


def write(
    sample: Callable[[Any, np.ndarray], tuple[jax.Array, jax.Array, jax.Array]],
    writer: data_lib.PairsWriter,
    *,
    seed: int,
    num_pairs: int,
    num_classes: int,
    batch_size: int,
    seconds_between_reports: float = 10.0,
) -> None:
    """Samples and writes what `writer` lacks; the devices sample while the last batch is written.

    Args:
        sample: (keys, labels) -> (noise, samples, states).
        writer: has the first examples already.
        seed: example i depends on it and i only.
        num_pairs: examples in all.
        num_classes: labels are 0, 1, ... in turn.
        batch_size: examples a call of `sample`, the last one filled up.
        seconds_between_reports: of progress.
    """
    first = writer.count
    labels = wiring.balanced_labels(num_pairs + batch_size, num_classes)
    begun = reported = time.perf_counter()
    pending: tuple[int, Any] | None = None

    def store() -> int:
        start, arrays = pending
        rows = slice(start, min(start + batch_size, num_pairs))
        noise, x0, path = (np.asarray(array)[: rows.stop - start] for array in arrays)
        writer.add(noise, x0, labels[rows], path if path.shape[1] else None)
        return rows.stop

    for start in range(first, num_pairs, batch_size):
        indices = np.arange(start, start + batch_size)
        arrays = sample(pair_keys(seed, indices), labels[indices])
        if pending:
            done, now = store(), time.perf_counter()
            if now - reported >= seconds_between_reports:
                rate = (done - first) / (now - begun)
                left = format_duration((num_pairs - done) / rate)
                print(f"sampled {done}/{num_pairs}  {rate:.4g} pairs/s  ETA {left}", flush=True)
                reported = now
        pending = start, arrays
    if pending:
        store()
    seconds = time.perf_counter() - begun
    print(
        f"sampled {num_pairs}/{num_pairs}  {(num_pairs - first) / seconds:.4g} pairs/s", flush=True
    )


def run(args: argparse.Namespace) -> data_lib.PairsHeader:
    """Writes a set of pairs; returns what it is."""
    if jax.process_count() > 1:
        raise ValueError("pairs are written in one process, over all of its devices")
    if args.vae:
        raise ValueError("--vae does nothing: pairs are kept as the model makes them, undecoded")
    folder = args.out.expanduser()
    pairs_writer.check_destination(folder)
    model = loading.load_from_arguments(args, arguments.sampling_overrides(args))
    placement = wiring.create_placement(model.config)
    batch_size, shard_size = choose_sizes(
        model.config.sampling.batch_size, args.shard_size, args.num_pairs, placement.num_devices
    )
    plan = experiment.build_sampling(model.config)
    times, kept = plan_path(plan, args.path_times)
    header = make_header(args, model, times, kept, batch_size)
    labels = 8 * args.num_pairs
    memory.require_host_memory(labels, f"{args.num_pairs} pairs", "lower --num_pairs")
    writer = data_lib.PairsWriter(folder, header, shard_size=shard_size)
    if writer.count > args.num_pairs or (
        writer.count % batch_size and writer.count < args.num_pairs
    ):
        raise ValueError(
            f"{folder} has {writer.count} pairs already, written for another --num_pairs than "
            f"{args.num_pairs}: give that one, or another --out"
        )
    require_space(folder, header, args.num_pairs - writer.count)
    what = f"sampling {args.num_pairs} pairs of {header.teacher_source}"
    print(wiring.first_screen(what, folder, "time left: every 10 seconds"), flush=True)
    if writer.count:
        print(f"continuing after {writer.count} pairs", flush=True)

    def sample(keys, labels):
        keys = jax.device_put(keys, placement.split)
        return plan.sampler.path(
            model.params, keys, labels, times, kept, plan.guidance_scale, plan.guidance_interval
        )

    with wiring.sampling_memory(batch_size):
        write(
            sample,
            writer,
            seed=args.seed,
            num_pairs=args.num_pairs,
            num_classes=model.config.model.num_classes,
            batch_size=batch_size,
        )
    return writer.finish()


def student_times(header: data_lib.PairsHeader) -> list[str]:
    """The flags of a student that takes a step at every stored time; none for one step."""
    if len(header.path_times) == 1:
        return []
    listed = ",".join(f"{time:g}" for time in (*header.path_times, header.times[-1]))
    steps = len(header.path_times)
    return [f"--config.sampling.steps={steps}", f"--config.sampling.times=({listed})"]
