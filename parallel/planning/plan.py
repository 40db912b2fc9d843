"""A plan: what an experiment needs of devices that are not there, and how fast it can be."""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from dit_jax import experiment
from dit_jax.models.linear import resolve_dtype
from dit_jax.parallel.planning import choices
from dit_jax.parallel.planning.accelerators import Accelerator, limits
from dit_jax.parallel.planning.advice import suggestions
from dit_jax.parallel.planning.compilers import Compiled, GpuCompiler, VirtualCompiler
from dit_jax.parallel.planning.gpu_targets import MEMORY_BYTES
from dit_jax.parallel.planning.programs import Needs, Planned
from dit_jax.parallel.planning.schedule import Schedule
from dit_jax.training.remat_choice import AUTOMATIC, POLICIES, with_remat

GIB = 2**30
# Of a GPU's memory: what is left beside CUDA's context, NCCL's buffers and the libraries'. JAX
# takes so much with XLA_PYTHON_CLIENT_MEM_FRACTION=.92; by itself it takes .75.
USABLE_SHARE = 0.92
DEFAULT_SHARE = 0.75
# Least time of a kernel, however small; what launching one costs on top is not known beforehand.
SHORTEST_KERNEL = 2e-6


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        config: the experiment as it is compiled, resolved.
        given: as it was given.
        what: 'train' or 'sample'.
        needs: its programs and what they hold, of a configuration like `config`.
        computed_share: of the evaluations with a step cache, those that run all blocks; None where
            nothing was said of it, and all are counted.
    """

    config: ml_collections.ConfigDict
    given: ml_collections.ConfigDict
    what: str
    needs: Callable[[ml_collections.ConfigDict], Needs]
    computed_share: float | None = None


def make_plan(
    subject: Subject,
    compiler: GpuCompiler | VirtualCompiler,
    hbm_gib: float | None = None,
    fallback: str = "",
) -> dict[str, Any]:
    """All there is to say of an experiment on devices that are not there, as plain values.

    Args:
        subject: the experiment.
        compiler: for which devices.
        hbm_gib: memory of one device that may be used, GiB; None for what is usable of its own.
        fallback: why virtual devices are compiled for in place of those meant.

    Raises:
        ConfigError: the configuration cannot work.
        ValueError: mesh, batch and devices do not go together.
    """
    if subject.what != "train" or subject.config.model.remat != "auto":
        return _plan(subject, compiler, hbm_gib, fallback, suggest_remats=True)
    tried = {}
    # As training chooses; programs for CPUs, which keep other things, tell nothing of the choice.
    for remat in AUTOMATIC if isinstance(compiler, GpuCompiler) else POLICIES[:1]:
        policy = dataclasses.replace(subject, config=with_remat(subject.config, remat))
        plan = _plan(policy, compiler, hbm_gib, fallback, suggest_remats=False)
        if not isinstance(compiler, GpuCompiler):
            return plan
        tried[remat] = {key: plan["memory"][key] for key in ("total_bytes", "fits")}
        if plan["memory"]["fits"]:
            break
    return {**plan, "remats_tried": tried}


def _plan(
    subject: Subject,
    compiler: GpuCompiler | VirtualCompiler,
    hbm_gib: float | None,
    fallback: str,
    *,
    suggest_remats: bool,
) -> dict[str, Any]:
    """The plan of an experiment whose policy of rematerialisation is settled."""
    config, device = subject.config, compiler.accelerator
    with compiler.targeting():
        needs = subject.needs(config)
        chosen = choices.made(config, subject.given)
        input_size = experiment.build_network(config).sample_shape[:2]
    count = len(compiler.devices())
    share = 1.0 if subject.computed_share is None else subject.computed_share
    compiled = {p.name: compiler.compile(p.lower, share) for p in needs.programs}
    predicted = isinstance(compiler, GpuCompiler)
    memory = _memory(needs, compiled, device, hbm_gib, compiler)
    if subject.what == "train" and not predicted:
        memory["score_bytes"] = attention_score_bytes(config, needs)
    plan = {
        "name": config.name,
        "what": subject.what,
        "devices": count,
        "accelerator": _figures(device),
        "compiled_for": compiler.name if predicted else "virtual CPU devices",
        "fallback": fallback,
        "versions": {"jax": jax.__version__},
        "mesh": needs.mesh,
        "chosen_for_target": chosen,
        "remats_tried": {},
        "notes": list(needs.notes),
        "model": {key: config.model[key] for key in ("name", "remat", "attention", "dtype")},
        "input_size": list(input_size),
        "num_parameters": needs.num_parameters,
        "batch_size": needs.batch_size,
        "batch_parts": needs.batch_parts,
        "num_microbatches": config.training.num_microbatches if subject.what == "train" else 1,
        "step_cache": _step_cache(subject, compiled, share),
        "memory": memory,
        "model_flops": needs.model_flops,
        "programs": {
            planned.name: _describe(
                planned, compiled[planned.name], device, share, config.model.quantization
            )
            for planned in needs.programs
        },
    }
    plan["bounds"] = _bounds(needs, plan["programs"], count, device)
    if predicted:
        plan["predicted"] = _predicted(needs, compiled, plan["bounds"], count, device)
    plan["remats"], plan["suggestions"] = {}, []
    if not memory["fits"]:
        if predicted and suggest_remats and subject.what == "train":
            plan["remats"] = _remats(subject, compiler, memory)
        plan["suggestions"] = suggestions(config, plan)
    return plan


def _step_cache(
    subject: Subject, compiled: dict[str, Compiled], share: float
) -> dict[str, Any] | None:
    """What is assumed of a step cache, which decides when the program runs; None without one.

    Raises:
        ValueError: the compiled programs do not show where it decides.
    """
    if subject.what != "sample" or subject.config.cache.name == "none":
        return None
    programs = [c.program for c in compiled.values()]
    if not any(p.decides_step_cache(i) for p in programs for i in p.instructions()):
        raise ValueError(
            "XLA's program does not show where the step cache decides: what it skips cannot "
            f"be counted: jax {jax.__version__} names its conditionals otherwise than 0.10 does"
        )
    options = subject.config.cache[subject.config.cache.name].to_dict()
    stated = subject.computed_share is not None
    return {"options": options, "computed_share": share, "is_stated": stated}


def _memory(
    needs: Needs,
    compiled: dict[str, Compiled],
    device: Accelerator,
    hbm_gib: float | None,
    compiler: GpuCompiler | VirtualCompiler,
) -> dict[str, Any]:
    """Of one device, in bytes: what is held, what XLA says by kind, and what there is."""
    largest = max(compiled.values(), key=lambda c: c.total)
    held = sum(needs.held.values())
    if isinstance(compiler, GpuCompiler):
        whole = MEMORY_BYTES[compiler.name]
        usable = whole * USABLE_SHARE if hbm_gib is None else hbm_gib * GIB
    else:
        # Virtual devices of one machine share its memory.
        shared_by = 1 if device.speed_is_known else len(compiler.devices())
        whole = device.memory_gib * GIB / shared_by
        usable = whole if hbm_gib is None else hbm_gib * GIB
    # Counted by hand, arguments are also of devices that XLA knows nothing of.
    total = held + largest.total - largest.memory["arguments"]
    return {
        "held_bytes": needs.held,
        "whole_bytes": needs.whole,
        "temporary_bytes": total - held,
        "total_bytes": total,
        "by_kind": dict(largest.memory),
        "device_bytes": whole,
        "capacity_bytes": usable,
        "fits": total <= usable,
        "fits_by_default": total <= whole * DEFAULT_SHARE,
        "score_bytes": 0,
    }


# What 8-bit products run as on a GPU. Which products these are is not asked: bounds stay bounds.
_UNITS = {"fp8": "f8", "fp8_rowwise": "f8", "te": "f8", "int8": "s8"}


def _describe(
    planned: Planned,
    compiled: Compiled,
    device: Accelerator,
    computed_share: float,
    quantization: str,
) -> dict[str, Any]:
    """One program as plain values."""
    work = compiled.program.work()
    traffic = planned.least_traffic * computed_share
    unit = _UNITS.get(quantization, "")
    bound = limits(device, work.flops, traffic, work.collectives, unit)
    kinds = collections.defaultdict(lambda: {"count": 0, "bytes_sent": 0.0, "seconds": 0.0})
    for collective in work.collectives:
        kind = "reduce-scatter" if collective.keeps_part else collective.kind
        entry = kinds[f"{kind} {collective.dtype} of {collective.group_size}"]
        entry["count"] += collective.count
        entry["bytes_sent"] += collective.bytes_sent * collective.count
        entry["seconds"] += device.seconds_of(collective) if device.speed_is_known else 0.0
    return {
        "share": planned.share,
        "flops_per_device": work.flops,
        "loops": {loop.name: loop.trip_count for loop in compiled.program.loops()},
        "loops_of_unknown_length": list(work.unknown_loops),
        "memory": dict(compiled.memory),
        "collectives": dict(kinds),
        "limits": {
            **dataclasses.asdict(bound),
            "overlapped": bound.overlapped,
            "in_turn": bound.in_turn,
            "bottleneck": bound.bottleneck,
        },
        "compile_seconds": compiled.seconds,
        "predicted": compiled.schedule and _of_schedule(compiled.schedule),
    }


def _figures(device: Accelerator) -> dict[str, Any]:
    """An accelerator as plain values, without those that are not known."""
    figures = {**dataclasses.asdict(device), "peak_flops": device.peak_flops}
    return {key: value for key, value in figures.items() if value != math.inf}


def _of_schedule(schedule: Schedule) -> dict[str, Any]:
    """A predicted schedule as plain values."""
    return {
        "seconds": schedule.seconds,
        "seconds_of_short_kernels": schedule.lengthening(SHORTEST_KERNEL),
        "kernel_seconds": schedule.kernel_seconds,
        "product_seconds": schedule.product_seconds,
        "exposed_seconds": schedule.exposed_seconds,
        "launches": schedule.launches,
        "kernels": schedule.by_kind(),
        "longest": [dataclasses.asdict(kernel) for kernel in schedule.longest()],
        "communication": [
            {
                "kind": c.collective.kind,
                "name": c.collective.name,
                "dtype": c.collective.dtype,
                "devices": c.collective.group_size,
                "bytes_sent": c.collective.bytes_sent,
                **{
                    field.name: getattr(c, field.name)
                    for field in dataclasses.fields(c)
                    if field.name != "collective"
                },
            }
            for c in schedule.communication
        ],
    }


def _bounds(
    needs: Needs, programs: dict[str, Any], count: int, device: Accelerator
) -> dict[str, float]:
    """The mean over phases of what each takes at least."""

    def mean(name: str) -> float:
        return sum(p.share * programs[p.name]["limits"][name] for p in needs.programs)

    if not device.speed_is_known:
        return {}
    arithmetic = needs.model_flops / count / device.peak_flops
    return {
        "seconds": mean("overlapped"),
        "seconds_in_turn": mean("in_turn"),
        "runs_per_second": 1 / mean("overlapped"),
        "mfu": arithmetic / mean("overlapped"),
        "mfu_in_turn": arithmetic / mean("in_turn"),
        "arithmetic_seconds": arithmetic,
    }


def _predicted(
    needs: Needs,
    compiled: dict[str, Compiled],
    bounds: dict[str, float],
    count: int,
    device: Accelerator,
) -> dict[str, float]:
    """The mean over phases of the predicted schedules."""

    def mean(value: Callable[[Schedule], float]) -> float:
        return sum(p.share * value(compiled[p.name].schedule) for p in needs.programs)

    seconds = mean(lambda schedule: schedule.seconds)
    slower = mean(lambda s: s.seconds + s.lengthening(SHORTEST_KERNEL))
    arithmetic = bounds["arithmetic_seconds"]
    return {
        "seconds": seconds,
        "runs_per_second": 1 / seconds,
        "mfu": arithmetic / seconds,
        "seconds_with_short_kernels": slower,
        "mfu_with_short_kernels": arithmetic / slower,
        "over_arithmetic": seconds / arithmetic,
    }


def _remats(
    subject: Subject, compiler: GpuCompiler, memory: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What the policies behind the experiment's own need, up to the first that fits."""
    found = {}
    own = subject.config.model.remat
    for remat in POLICIES[POLICIES.index(own) + 1 :]:
        config = with_remat(subject.config, remat)
        with compiler.targeting():
            needs = subject.needs(config)
        compiled = [compiler.compile(planned.lower) for planned in needs.programs]
        total = sum(needs.held.values()) + max(c.total - c.memory["arguments"] for c in compiled)
        found[remat] = {"total_bytes": total, "fits": total <= memory["capacity_bytes"]}
        if found[remat]["fits"]:
            break
    return found


def attention_score_bytes(config: ml_collections.ConfigDict, needs: Needs) -> int:
    """Bytes of attention probabilities that a transformer keeps for backward, on one device.

    In the compute dtype, batch x heads x length^2 a block; a fused kernel keeps none of them. 0 for
    other networks, and where blocks or scores are recomputed.
    """
    network = experiment.build_network(config).config
    if not hasattr(network, "num_heads") or config.model.remat != "none":
        return 0
    examples = needs.batch_size / needs.batch_parts / config.training.num_microbatches
    heads = network.num_heads / needs.mesh.get("tensor", 1)
    length = network.grid[0] * network.grid[1]
    itemsize = resolve_dtype(network.dtype).itemsize
    return int(network.depth * examples * heads * length**2 * itemsize)
