"""A plan as text for people; `dit_jax.parallel.planning.plan` makes it."""

from typing import Any

from dit_jax.parallel.planning import predicted_report
from dit_jax.quantities import table

_GIB, _MIB = 2**30, 2**20


def format_plan(plan: dict[str, Any]) -> str:
    """All sections: what is planned, memory, work, limits or prediction, verdict."""
    sections = [_what(plan), _memory(plan)]
    for name, program in plan["programs"].items():
        if program["predicted"]:
            sections.append(predicted_report.of_program(name, program))
        else:
            sections.append(_program(plan, name, program))
    speed = predicted_report.of_plan(plan) if "predicted" in plan else _bounds(plan)
    return "\n\n".join([*sections, speed, _verdict(plan)])


def _what(plan: dict[str, Any]) -> str:
    mesh = ", ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    run = "training update" if plan["what"] == "train" else "batch of samples"
    compiled = plan["compiled_for"]
    if compiled != "virtual CPU devices":
        compiled = plan["accelerator"]["title"] + ", which need not be there"
    height, width = plan["input_size"]
    lines = [
        f"{plan['name'] or 'experiment'}: one {run} of {plan['batch_size']} on {plan['devices']} x "
        f"{plan['accelerator']['title']} (mesh {mesh})",
        f"{plan['num_parameters']:,} parameters, inputs of {height} x {width}; "
        f"remat {plan['model']['remat']}, "
        f"{plan['num_microbatches']} microbatch(es); compiled for {compiled} "
        f"(jax {plan['versions']['jax']})",
    ]
    if plan["fallback"]:
        lines.append(f"not for {plan['accelerator']['title']} itself: {plan['fallback']}")
    if chosen := plan["chosen_for_target"]:
        listed = ", ".join(f"{key}={value}" for key, value in chosen.items())
        lines.append(f"'auto' on the target: {listed}")
    if tried := plan["remats_tried"]:
        listed = ", ".join(
            f"{name} {_gib(remat['total_bytes'])}{'' if remat['fits'] else ' (too much)'}"
            for name, remat in tried.items()
        )
        lines.append(f"config.model.remat=auto takes the first that fits, in GiB: {listed}")
    if plan["step_cache"]:
        lines.append(_step_cache(plan["step_cache"]))
    return "\n".join([*lines, *(f"note: {note}" for note in plan["notes"])])


def _step_cache(cache: dict[str, Any]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in cache["options"].items())
    head = f"step cache ({listed}) decides when the program runs. "
    if not cache["is_stated"]:
        return head + "Counted: all evaluations in full (--computed_share says otherwise)"
    share = cache["computed_share"]
    return head + (
        f"Assumed, not found out: {share:.1%} of the evaluations are computed in full, the others "
        "skip the blocks behind the first; MFU counts all of them as computed"
    )


def _memory(plan: dict[str, Any]) -> str:
    memory = plan["memory"]
    rows = [("memory of one device", "GiB", "of in all GiB")]
    for name, size in memory["held_bytes"].items():
        if name != "step":
            rows.append((name, _gib(size), _gib(memory["whole_bytes"][name])))
    rows.append(("temporaries: activations, gradients", _gib(memory["temporary_bytes"]), ""))
    rows.append(("total", _gib(memory["total_bytes"]), ""))
    kinds = memory["by_kind"]
    listed = ", ".join(f"{kind} {_gib(size)}" for kind, size in kinds.items() if size)
    text = f"{table(rows)}\nby XLA's own account, in GiB: {listed}"
    if "predicted" in plan or not plan["fallback"]:
        return text
    text += (
        "\nThe first rows are counted by hand from shapes and shardings; temporaries are those of "
        "the program\nfor CPUs, which holds some bfloat16 as float32 and has no fused attention: "
        "on GPUs expect less."
    )
    if scores := memory["score_bytes"]:
        text += (
            f"\nAttention probabilities kept for the backward pass are {_gib(scores)} GiB of them "
            "in each copy;\na fused kernel (cuDNN) keeps none."
        )
    return text


def _program(plan: dict[str, Any], name: str, program: dict[str, Any]) -> str:
    devices = plan["devices"]
    counted = program["flops_per_device"] * devices
    title = f"program '{name}'"
    if program["share"] < 1:
        title += f", {program['share']:.1%} of the runs"
    lines = [
        f"{title} (compiled in {program['compile_seconds']:.0f} s)",
        f"  matrix products: {counted:.4g} FLOP over all devices, "
        f"{program['flops_per_device']:.4g} a device",
    ]
    if program["loops_of_unknown_length"]:
        lines.append(
            "  loops of unknown length, counted once: "
            + ", ".join(program["loops_of_unknown_length"])
        )
    rows = [("collectives of one device", "count", "MiB sent", "ms at least")]
    for kind, entry in sorted(program["collectives"].items(), key=lambda e: -e[1]["bytes_sent"]):
        sent, ms = entry["bytes_sent"] / _MIB, entry["seconds"] * 1e3
        ms = f"{ms:.2f}" if plan["bounds"] else ""
        rows.append((kind, f"{entry['count']:.0f}", f"{sent:,.1f}", ms))
    if len(rows) == 1:
        rows.append(("none", "0", "0.0", "0.00"))
    lines.append(table(rows))
    limits = program["limits"]
    if not plan["bounds"]:
        return "\n".join(lines)
    lines.append(
        f"  at least: arithmetic {limits['arithmetic'] * 1e3:.2f} ms, own memory "
        f"{limits['memory'] * 1e3:.2f} ms, communication {limits['communication'] * 1e3:.2f} ms; "
        f"bound by {limits['bottleneck']}"
    )
    return "\n".join(lines)


def _bounds(plan: dict[str, Any]) -> str:
    bounds, run = plan["bounds"], "steps" if plan["what"] == "train" else "batches"
    if not bounds:
        return f"the model's own formula: {plan['model_flops']:.4g} FLOP a run; no times for CPUs"
    rate, cache, when = bounds["runs_per_second"], plan["step_cache"], ""
    if cache:  # decides when the program runs; a bound needs an assumption
        share = f"{cache['computed_share']:.1%} of the" if cache["is_stated"] else "all"
        when = f" if {share} evaluations are computed in full"
    peak = " of bfloat16's peak" if bounds["mfu"] > 1 else ""  # of 8-bit products
    return (
        f"the model's own formula: {plan['model_flops']:.4g} FLOP a run\n"
        f"upper bound{when}: {rate:.3g} {run}/s, {rate * plan['batch_size']:.4g} images/s, MFU "
        f"{bounds['mfu']:.1%}{peak} if communication hides behind arithmetic;\n"
        f"             {1 / bounds['seconds_in_turn']:.3g} {run}/s, MFU "
        f"{bounds['mfu_in_turn']:.1%} if it does not. Real programs stay below: no kernel reaches "
        "the peak."
    )


def _verdict(plan: dict[str, Any]) -> str:
    memory = plan["memory"]
    capacity, total = memory["capacity_bytes"], memory["total_bytes"]
    usable = ""
    if capacity < memory["device_bytes"]:
        share = capacity / memory["device_bytes"]
        usable = f" usable ({share:.0%} of {_gib(memory['device_bytes'])})"
    if memory["fits"]:
        text = f"fits: {_gib(total)} of {_gib(capacity)} GiB{usable} ({total / capacity:.0%})"
        if usable and not memory["fits_by_default"]:
            text += (
                "\nJAX takes 75 % of a GPU's memory by itself, which is not enough here: set "
                "XLA_PYTHON_CLIENT_MEM_FRACTION=.92"
            )
        return text
    lines = [f"does not fit, by {_gib(total - capacity)} GiB of {_gib(capacity)}{usable}; try"]
    tried = [
        f"(--config.model.remat={name} needs {_gib(remat['total_bytes'])} GiB in all: too much)"
        for name, remat in plan["remats"].items()
        if not remat["fits"]
    ]
    return "\n  ".join([*lines, *plan["suggestions"], *tried])


def _gib(size: float) -> str:
    return f"{size / _GIB:.3f}" if size < 10 * _GIB else f"{size / _GIB:.1f}"
