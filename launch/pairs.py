"""Sampling a teacher into a folder of pairs: the work of launch/write_pairs.py."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dit_jax import conditions as conditions_lib
from dit_jax import data as data_lib
from dit_jax import experiment
from dit_jax.data.records import check_destination
from dit_jax.data.records.header import LABEL
from dit_jax.data.source import fingerprint
from dit_jax.diffusion.samplers import SOLVERS, insert_times
from dit_jax.launch import arguments, loading, recording, sampling, wiring
from dit_jax.sampling import image_keys


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
        others = [key for key, solver in SOLVERS.items() if not solver().is_stochastic]
        raise ValueError(
            f"pairs need a solver that adds no noise on its way, which {name} as configured does: "
            f"give --solver={', '.join(others)}, with options that add none"
        )
    try:
        return insert_times(plan.times, path_times)
    except ValueError as error:
        raise ValueError(f"--path_times: {error}") from error


@dataclasses.dataclass(frozen=True)
class Told:
    """What the teacher is told of each pair.

    Attributes:
        fields: what is stored of it.
        of: numbers of pairs [b] -> arrays by name, the batch leading.
        nulls: "no condition", where the network does not know it by itself.
        fingerprint: of the records it comes from; "" for classes in turn.
    """

    fields: dict[str, data_lib.Field]
    of: Callable[[np.ndarray], dict[str, np.ndarray]]
    nulls: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""


def told(args: argparse.Namespace, model: loading.TrainedModel) -> Told:
    """Classes in turn, or what the records of --conditions hold, in turn.

    Raises:
        ValueError: the teacher is not told such things, or more than these.
    """
    declared, num_classes = model.network.conditions, model.config.model.num_classes
    if args.conditions is None:
        needed = [name for name, c in declared.items() if c.required and name != "label"]
        if needed:
            raise ValueError(
                f"the teacher has to be told {', '.join(needed)}: give --conditions=DIR, records "
                f"of {conditions_lib.describe(declared)} (docs/data.md)"
            )
        count = max(num_classes, 1)
        return Told({"label": LABEL}, lambda numbers: {"label": (numbers % count).astype(np.int32)})
    records = data_lib.open_records(
        args.conditions,
        "embeddings",
        how="docs/data.md shows how they are written",
        command="write them again",
    )
    first, fields = {}, {}
    for name, field in records.header.fields.items():
        shapes = list(records.shapes(name))
        if not field.condition or len(shapes) != 1:
            raise ValueError(
                f"--conditions={args.conditions}: {name} is no condition of one shape, but of "
                f"{len(shapes)}: {shapes[:8]}"
            )
        first[name] = records.read(name, np.array([0]))
        fields[name] = data_lib.Field(shapes[0], field.dtype, condition=True)
    conditions_lib.check(declared, first)
    return Told(
        fields,
        lambda numbers: {name: records.read(name, numbers % len(records)) for name in fields},
        {name: records.null(name) for name in records.header.nulls},
        fingerprint("conditions", records.text),
    )


def make_header(
    args: argparse.Namespace,
    model: loading.TrainedModel,
    times: np.ndarray,
    kept: tuple[int, ...],
    conditions: Told,
    batch_size: int,
    shard_size: int,
) -> data_lib.Header:
    """What the pairs will be."""
    config, process = model.config, experiment.build_process(model.config)
    sampling = config.sampling.to_dict()
    # Of the solvers' own options those of the one used; what decides no bits is left out.
    solver = {
        k: v for k, v in sampling.items() if not isinstance(v, dict) or k == config.sampling.solver
    }
    for name in ("batch_size", "weights"):
        solver.pop(name)
    if config.cache.name != "none":
        solver["cache"] = config.cache[config.cache.name].to_dict()
    teaching = data_lib.Teaching(
        teacher_source=f"{model.source} ({model.weights}, step {model.step})",
        teacher_hash=model.weights_hash(),
        process={"name": config.process.name, **config.process[config.process.name].to_dict()},
        sampling=solver,
        times=tuple(times.tolist()),
        path_times=tuple(times[[0, *kept]].tolist()),
        start_scale=float(process.start_scale(jax.numpy.float32(times[0]))),
        seed=args.seed,
        batch_size=batch_size,
        conditions=conditions.fingerprint,
    )
    return data_lib.pairs_header(
        model.network.sample_shape,
        teaching,
        dtype=args.dtype,
        conditions=conditions.fields,
        num_classes=config.model.num_classes,
        shard_size=shard_size,
    )


def pair_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """Keys of pairs; others than those of images of the same seed.

    Otherwise a student would be shown, and scored, on the very noise that it was trained on.
    """
    return jax.vmap(lambda key: jax.random.fold_in(key, 2))(image_keys(seed, indices))


def run(args: argparse.Namespace) -> data_lib.Header:
    """Writes a set of pairs; returns what it is."""
    if args.vae:
        raise ValueError("--vae does nothing: pairs are kept as the model makes them, undecoded")
    folder = args.out.expanduser()
    check_destination(folder, "pairs", "another --out")
    model = loading.load_from_arguments(
        args, arguments.sampling_overrides(args), functools.partial(sampling.require_labels, args)
    )
    placement = wiring.create_placement(model.config)
    batch_size, shard_size = choose_sizes(
        model.config.sampling.batch_size, args.shard_size, args.num_pairs, placement.num_devices
    )
    plan = experiment.build_sampling(model.config)
    times, kept = plan_path(plan, args.path_times)
    conditions = told(args, model)
    header = make_header(args, model, times, kept, conditions, batch_size, shard_size)

    def batches(start: int) -> Iterator[np.ndarray]:
        for first in range(start, args.num_pairs, batch_size):
            yield np.arange(first, first + batch_size)

    def compute(indices: np.ndarray) -> dict[str, Any]:
        keys, given = placement.put_keys(pair_keys(args.seed, indices)), conditions.of(indices)
        noise, x0, path = plan.sampler.path(
            model.params,
            keys,
            given if args.conditions else given["label"],
            times,
            kept,
            plan.guidance_scale,
            plan.guidance_interval,
            conditions.nulls,
        )
        states = {"path": path} if kept else {}
        return {"noise": noise, "x0": x0, **given, **states}

    with wiring.sampling_memory(batch_size):
        return recording.record(
            folder,
            header,
            batches,
            compute,
            what=f"sampling {args.num_pairs} pairs of {header.provenance['teacher_source']}",
            done="sampled",
            unit="pair",
            total=args.num_pairs,
            batch_size=batch_size,
            nulls=conditions.nulls,
            remedy="--dtype=float16 halves that",
        )


def student_times(header: data_lib.Header) -> list[str]:
    """The flags of a student that takes a step at every stored time; none for one step."""
    made = header.provenance
    if len(made["path_times"]) == 1:
        return []
    listed = ",".join(f"{time:g}" for time in (*made["path_times"], made["times"][-1]))
    steps = len(made["path_times"])
    return [f"--config.sampling.steps={steps}", f"--config.sampling.times=({listed})"]
