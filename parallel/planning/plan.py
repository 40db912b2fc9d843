"""A plan: what an experiment needs of devices that are not there, and its speed at most."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax import experiment
from dit_jax.parallel.mesh import DataParallel
from dit_jax.parallel.planning.accelerators import Accelerator, Limits, limits
from dit_jax.parallel.planning.advice import suggestions
from dit_jax.parallel.planning.programs import Compiled, Needs, plan_sampling, plan_training
from dit_jax.training.method import Method

GIB = 2**30


def make_plan(
    config: ml_collections.ConfigDict,
    placement: DataParallel,
    method: Method | None,
    device: Accelerator,
    hbm_gib: float,
    programs: Path,
    chosen: dict[str, str],
) -> dict[str, Any]:
    """All there is to say of an experiment on `jax.device_count()` devices, as plain values.

    Args:
        config: the experiment, of `programs.accelerator_config`, resolved.
        placement: over the virtual devices.
        method: that trains, None to plan sampling.
        device: the accelerator meant.
        hbm_gib: memory of one device, GiB.
        programs: where XLA writes.
        chosen: what `accelerator_config` has set.

    Raises:
        ValueError: mesh, batch and devices do not go together.
    """
    what = "train" if method else "sample"
    if method:
        needs = plan_training(config, placement, method, programs)
    else:
        needs = plan_sampling(config, placement, programs)
    count, programs = jax.device_count(), needs.programs
    found = {p.name: _describe(p, device) for p in programs}
    bounds = [found[p.name]["limits"] for p in programs]

    def mean(name: str) -> float:
        return sum(p.share * bound[name] for p, bound in zip(programs, bounds, strict=True))

    temporaries = max(p.temporaries for p in programs)
    total = sum(needs.held.values()) + temporaries
    plan = {
        "name": config.name,
        "what": what,
        "devices": count,
        "accelerator": dataclasses.asdict(device),
        "mesh": dict(needs.placement.mesh.shape),
        "set_as_on_accelerators": chosen,
        "model": {key: config.model[key] for key in ("name", "remat", "attention", "dtype")},
        "num_parameters": needs.num_parameters,
        "batch_size": needs.batch_size,
        "batch_parts": needs.placement.batch_parts,
        "num_microbatches": config.training.num_microbatches if what == "train" else 1,
        "memory": {
            "held_bytes": needs.held,
            "whole_bytes": needs.whole,
            "temporary_bytes": temporaries,
            "total_bytes": total,
            "capacity_bytes": hbm_gib * GIB,
            "fits": total <= hbm_gib * GIB,
            "score_bytes": attention_score_bytes(config, needs) if what == "train" else 0,
        },
        "model_flops": needs.model_flops,
        "programs": found,
        "bounds": {
            "seconds": mean("overlapped"),
            "seconds_in_turn": mean("in_turn"),
            "runs_per_second": 1 / mean("overlapped"),
            "mfu": needs.model_flops / count / device.peak_flops / mean("overlapped"),
            "mfu_in_turn": needs.model_flops / count / device.peak_flops / mean("in_turn"),
        },
    }
    return {
        **plan,
        "suggestions": [] if plan["memory"]["fits"] else suggestions(config, plan),
    }


def _describe(compiled: Compiled, device: Accelerator) -> dict[str, Any]:
    """One program as plain values."""
    work = compiled.program.work()
    bound: Limits = limits(device, work.flops, compiled.least_traffic, work.collectives)
    kinds = collections.defaultdict(lambda: {"count": 0, "bytes_sent": 0.0, "seconds": 0.0})
    for collective in work.collectives:
        kind = "reduce-scatter" if collective.keeps_part else collective.kind
        entry = kinds[f"{kind} {collective.dtype} of {collective.group_size}"]
        entry["count"] += collective.count
        entry["bytes_sent"] += collective.bytes_sent * collective.count
        entry["seconds"] += device.seconds_of(collective)
    return {
        "share": compiled.share,
        "flops_per_device": work.flops,
        "loops": {loop.name: loop.trip_count for loop in compiled.program.loops()},
        "loops_of_unknown_length": list(work.unknown_loops),
        "temporary_bytes": compiled.temporaries,
        "collectives": dict(kinds),
        "limits": {
            **dataclasses.asdict(bound),
            "overlapped": bound.overlapped,
            "in_turn": bound.in_turn,
            "bottleneck": bound.bottleneck,
        },
        "compile_seconds": compiled.compile_seconds,
    }


def attention_score_bytes(config: ml_collections.ConfigDict, needs: Needs) -> int:
    """Bytes of attention probabilities that a transformer keeps for backward, on one device.

    In the compute dtype, batch x heads x length^2 a block; a fused kernel keeps none of them. 0 for
    other networks, and where blocks or scores are recomputed.
    """
    network = experiment.build_network(config).config
    if not hasattr(network, "num_heads") or config.model.remat != "none":
        return 0
    shape = needs.placement.mesh.shape
    examples = needs.batch_size / needs.placement.batch_parts / config.training.num_microbatches
    heads = network.num_heads / shape.get("tensor", 1)
    length = network.grid[0] * network.grid[1]
    itemsize = np.dtype(jax.numpy.dtype(network.dtype)).itemsize
    return int(network.depth * examples * heads * length**2 * itemsize)
