"""A plan as text for people; `parallel.planning.plan` makes it."""

from typing import Any

from dit_jax.quantities import table

_GIB, _MIB = 2**30, 2**20


def format_plan(plan: dict[str, Any]) -> str:
    """All sections: what is planned, memory, work, limits, verdict."""
    sections = [_what(plan), _memory(plan)]
    for name, program in plan["programs"].items():
        sections.append(_program(plan, name, program))
    return "\n\n".join([*sections, _bounds(plan), _verdict(plan)])


def _what(plan: dict[str, Any]) -> str:
    mesh = ", ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    run = "training update" if plan["what"] == "train" else "batch of samples"
    lines = [
        f"{plan['name'] or 'experiment'}: one {run} of {plan['batch_size']} on {plan['devices']} x "
        f"{plan['accelerator']['title']} (mesh {mesh})",
        f"{plan['num_parameters']:,} parameters; remat {plan['model']['remat']}, dtype "
        f"{plan['model']['dtype']}, {plan['num_microbatches']} microbatch(es)",
    ]
    if chosen := plan["set_as_on_accelerators"]:
        listed = ", ".join(f"{key}={value}" for key, value in chosen.items())
        lines.append(f"set as on accelerators, since 'auto' goes by the backend: {listed}")
    return "\n".join(lines)


def _memory(plan: dict[str, Any]) -> str:
    memory = plan["memory"]
    rows = [("memory of one device", "GiB", "of in all GiB")]
    for name, size in memory["held_bytes"].items():
        if name != "step":
            rows.append((name, _gib(size), _gib(memory["whole_bytes"][name])))
    rows.append(("temporaries: activations, gradients", _gib(memory["temporary_bytes"]), ""))
    rows.append(("total", _gib(memory["total_bytes"]), ""))
    text = table(rows)
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
        rows.append((kind, f"{entry['count']}", f"{sent:,.1f}", f"{ms:.2f}"))
    if len(rows) == 1:
        rows.append(("none", "0", "0.0", "0.00"))
    lines.append(table(rows))
    limits = program["limits"]
    lines.append(
        f"  at least: arithmetic {limits['arithmetic'] * 1e3:.2f} ms, own memory "
        f"{limits['memory'] * 1e3:.2f} ms, communication {limits['communication'] * 1e3:.2f} ms; "
        f"bound by {limits['bottleneck']}"
    )
    return "\n".join(lines)


def _bounds(plan: dict[str, Any]) -> str:
    bounds, run = plan["bounds"], "steps" if plan["what"] == "train" else "batches"
    rate = bounds["runs_per_second"]
    return (
        f"the model's own formula: {plan['model_flops']:.4g} FLOP a run\n"
        f"upper bound: {rate:.3g} {run}/s, {rate * plan['batch_size']:.4g} images/s, MFU "
        f"{bounds['mfu']:.1%} if communication hides behind arithmetic;\n"
        f"             {1 / bounds['seconds_in_turn']:.3g} {run}/s, MFU "
        f"{bounds['mfu_in_turn']:.1%} if it does not. Real programs stay below: no kernel reaches "
        "the peak."
    )


def _verdict(plan: dict[str, Any]) -> str:
    memory = plan["memory"]
    capacity, total = memory["capacity_bytes"], memory["total_bytes"]
    if memory["fits"]:
        return f"fits: {_gib(total)} of {_gib(capacity)} GiB ({total / capacity:.0%})"
    lines = [f"does not fit, by {_gib(total - capacity)} GiB of {_gib(capacity)}; try"]
    return "\n  ".join([*lines, *plan["suggestions"]])


def _gib(size: float) -> str:
    return f"{size / _GIB:.3f}" if size < 10 * _GIB else f"{size / _GIB:.1f}"
