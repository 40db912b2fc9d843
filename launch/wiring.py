"""What the commands share: placing on devices and sampling over them."""

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax import experiment
from dit_jax.launch import arguments
from dit_jax.launch.command import readable_errors as readable_errors  # part of this module's face
from dit_jax.named_options import options_named
from dit_jax.parallel.distributed import gathered
from dit_jax.parallel.mesh import DataParallel, create_mesh, put_whole
from dit_jax.parallel.partitioning import ShardedPlacement, rules_for
from dit_jax.parallel.sampling import ImageParallel, ImagePlacement
from dit_jax.programs import Programs
from dit_jax.quantities import counted
from dit_jax.sampling import generate, image_keys
from dit_jax.training import memory, metrics

# Names of `ImageParallel`'s options, in its errors, on the command line.
PARALLEL_FLAGS = {
    name: f"--{name}"
    for name in ("parallel", "patch_devices", "warmup_steps", "split_guidance", "ulysses_devices")
}
DEFAULT_SHARD = 4096  # examples of a written file, made a multiple of the batch


def create_placement(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> DataParallel:
    """Placement over the mesh of `config.mesh`: whole states, unless an axis divides them.

    Args:
        config: the experiment.
        devices: of the mesh, None for all there are.
    """
    mesh = create_mesh(**config.mesh.to_dict(), devices=devices)
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return DataParallel(mesh)
    return ShardedPlacement(mesh, rules_for(config.model.name))


def choose_shard_size(shard_size: int | None, batch_size: int) -> int:
    """Examples of a written shard: as asked for, or about `DEFAULT_SHARD` in whole batches.

    Raises:
        ValueError: a shard would split a batch.
    """
    if shard_size is None:
        return -(-DEFAULT_SHARD // batch_size) * batch_size
    if shard_size < 1 or shard_size % batch_size:
        raise ValueError(
            f"--shard_size={shard_size}: expected a multiple of the batch size, {batch_size}"
        )
    return shard_size


def override(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's values with some replaced, as {'sampling.steps': 50}."""
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


def stream_images(
    plan: experiment.SamplingPlan,
    params: Any,
    conditions: Any,
    *,
    seed: int,
    placement: DataParallel | ImagePlacement,
    batch_size: int,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
    start: int = 0,
    announce: bool = True,
    nulls: Mapping[str, Any] | None = None,
    programs: Programs | None = None,
) -> Iterator[np.ndarray]:
    """Samples images, in batches over all devices; every process gets all images.

    Args:
        plan: how.
        params: the network's.
        conditions: of every image: labels, or arrays by name.
        seed: image i depends on it and i only.
        placement: the devices.
        batch_size: images at once, rounded up to a multiple of the devices.
        decode: from samples to pictures (`loading.Decoder`).
        start: number of the first image wanted.
        announce: print progress.
        nulls: "no condition" where the network does not know it by itself.
        programs: where the compiled sampler is found or kept; None: it is compiled here.

    Yields:
        float32 [b, h, w, c], images `start` to the last.
    """
    batch_size = whole_batch(conditions, batch_size, placement)
    count = len(jax.tree.leaves(conditions)[0])
    draw, shares = plan.bind(params, nulls), []
    if plan.has_cache and not programs:
        counting = plan.bind_counted(params, nulls)

        def draw(keys, conditions):
            images, share = counting(keys, conditions)
            shares.append(share)
            return images

    def sample(keys, conditions):
        with placement.tracing():
            if programs:
                program = plan.program(params, *keys, conditions, nulls)
                samples = gathered(programs.call(program))
            else:
                samples = gathered(draw(placement.put_keys(keys), conditions))
        return decode(samples) if decode else samples

    def progress(done: int, seconds: float) -> None:
        rate = (done - start) / seconds
        left = metrics.format_duration((count - done) / rate)
        computed = f"  {gathered(shares[-1]).mean():.0%} computed" if shares else ""
        print(f"sampled {done}/{count}  {rate:.4g} images/s{computed}  ETA {left}", flush=True)

    with sampling_memory(batch_size):
        yield from generate(
            sample,
            conditions,
            seed=seed,
            batch_size=batch_size,
            start=start,
            progress=progress if announce else None,
            keys=functools.partial(numbers, placement) if programs else image_keys,
        )


def whole_batch(conditions: Any, batch_size: int, placement: DataParallel | ImagePlacement) -> int:
    """Images at once: a multiple of the devices."""
    count = len(jax.tree.leaves(conditions)[0])
    return -(-min(batch_size, count) // placement.num_devices) * placement.num_devices


def numbers(placement: DataParallel | ImagePlacement, seed: int, indices: np.ndarray) -> Any:
    """Seed and numbers of images as `SamplingPlan.program` takes them."""
    return seed, put_whole(indices.astype(np.uint32), placement.split)


def sampling_memory(batch_size: int) -> contextlib.AbstractContextManager:
    """Names the batch size where memory runs out while so many images are sampled at once."""
    return memory.exhaustion_explained(
        f"sampling {counted(batch_size, 'image')} at once",
        f"lower --batch_size={batch_size} (in training: config.sampling.batch_size)",
    )


def sample_images(plan, params, conditions: Any, **options: Any) -> np.ndarray:
    """All of `stream_images` as one array, float32 [n, h, w, c]."""
    return np.concatenate(list(stream_images(plan, params, conditions, **options)))


def sampling_rate(config: ml_collections.ConfigDict, plan, params: Any) -> float:
    """Images a second of the compiled sampler, the median of three batches."""
    batch = config.sampling.batch_size
    labels = balanced_labels(batch, config.model.num_classes)
    draw = plan.bind(params)
    seconds = []
    for repeat in range(4):
        keys = image_keys(repeat, np.arange(batch))
        started = time.perf_counter()
        np.asarray(draw(keys, labels))
        seconds.append(time.perf_counter() - started)
    return batch / float(np.median(seconds[1:]))


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, 1, ...: every class as often as every other."""
    return np.arange(count, dtype=np.int32) % max(num_classes, 1)


def image_parallel(args: argparse.Namespace) -> ImageParallel | None:
    """What `add_parallel_arguments`' options choose; None for one device an image.

    Raises:
        ValueError: options that do nothing, or not together.
    """
    arguments.check_parallel(args)
    if args.parallel is None:
        return None
    with options_named(PARALLEL_FLAGS):
        return ImageParallel(
            args.parallel,
            1 if args.patch_devices is None else args.patch_devices,
            warmup_steps=args.warmup_steps,
            split_guidance=args.split_guidance,
            ulysses=args.ulysses_devices,
        )


def first_screen(what: str, out: Path, time_left: str) -> str:
    """What a command says before its long part.

    Args:
        what: it does.
        out: where it writes.
        time_left: when that will be known, or what it is.
    """
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, JAX {jax.__version__}"
    return f"{what}\n  on {devices}\n  into {out}\n  {time_left}"
