"""The predicted part of a plan as text: kernels, collectives, time; see `schedule`."""

import collections
from typing import Any

from dit_jax.quantities import table

_MIB, _GIB = 2**20, 2**30
_LONGEST = 48
_ELSEWHERE = "outside of named functions"


def of_program(name: str, program: dict[str, Any]) -> str:
    """Kernels by kind, collectives, the longest kernels, and the loops."""
    found = program["predicted"]
    title = f"program '{name}'"
    if program["share"] < 1:
        title += f", {program['share']:.1%} of the runs"
    loops = ", ".join(
        f"{count} x {loop}" if count is not None else f"{loop} (length unknown, counted once)"
        for loop, count in program["loops"].items()
    )
    lines = [
        f"{title} (compiled in {program['compile_seconds']:.0f} s); all times are *predicted*",
        f"loops: {loops or 'none'}",
        _kernels(found),
        _collectives(found),
        _longest(found),
    ]
    return "\n".join(lines)


def _kernels(found: dict[str, Any]) -> str:
    rows = [("kernels by kind", "places", "runs", "TFLOP", "GiB moved", "ms predicted", "share")]
    for kind, entry in found["kernels"].items():
        rows.append(
            (
                kind,
                f"{entry['places']:.0f}",
                f"{entry['count']:,.0f}",
                f"{entry['flops'] / 1e12:.3f}" if entry["flops"] else "",
                f"{entry['bytes'] / _GIB:.2f}",
                _ms(entry["seconds"]),
                f"{entry['seconds'] / found['kernel_seconds']:.1%}",
            )
        )
    return table(rows)


def _collectives(found: dict[str, Any]) -> str:
    """Those of one kind, size and surroundings in a row."""
    if not found["communication"]:
        return "collectives: none"
    rows = [
        (
            "collectives (each time, µs predicted)",
            *("places", "runs", "MiB sent", "takes", "products beside", "other", "waited for"),
        )
    ]
    alike = collections.defaultdict(list)
    for entry in found["communication"]:
        beside = "none" if entry["is_synchronous"] else f"{entry['products']:.0f}"
        key = (
            f"{entry['kind']} {entry['dtype']} of {entry['devices']}, {_place(entry['source'])}",
            f"{entry['bytes_sent'] / _MIB:.3f}",
            _us(entry["seconds"]),
            f"{beside}: {_us(entry['product_seconds'])}",
            _us(entry["other_seconds"]),
            _us(entry["exposed"]),
        )
        alike[key].append(entry["count"])
    ordered = sorted(alike.items(), key=lambda item: -float(item[0][2]) * sum(item[1]))
    for (what, *figures), counts in ordered[:20]:
        rows.append((what, f"{len(counts)}", f"{sum(counts):,.0f}", *figures))
    text = table(rows)
    if len(ordered) > 20:
        text += f"\n({len(ordered) - 20} more kinds of small ones)"
    return text


def _longest(found: dict[str, Any]) -> str:
    columns = ("result", "runs", "µs each", "ms predicted", "bound by", "from")
    rows = [("longest kernels in all", *columns)]
    for kernel in found["longest"]:
        rows.append(
            (
                f"{kernel['kind']} ({kernel['name']})",
                kernel["result"],
                f"{kernel['count']:,.0f}",
                _us(kernel["seconds"]),
                _ms(kernel["seconds"] * kernel["count"]),
                kernel["bound"],
                _place(kernel["source"]),
            )
        )
    return table(rows)


def of_plan(plan: dict[str, Any]) -> str:
    """Time of a run, MFU and the distance from the arithmetic limit."""
    predicted, bounds = plan["predicted"], plan["bounds"]
    run = "step" if plan["what"] == "train" else "batch"
    rate = predicted["runs_per_second"]
    device = plan["accelerator"]
    launches = sum(p["predicted"]["launches"] * p["share"] for p in plan["programs"].values())
    return "\n".join(
        [
            f"the model's own formula: {plan['model_flops']:.4g} FLOP a {run}, "
            f"{bounds['arithmetic_seconds'] * 1e3:.2f} ms at {device['peak_flops'] / 1e12:.0f} "
            "TFLOP/s of bfloat16",
            f"*predicted*, every kernel at the device's peak: {predicted['seconds'] * 1e3:.2f} ms "
            f"a {run}, {rate:.3g} /s, {rate * plan['batch_size']:.4g} images/s, MFU "
            f"{predicted['mfu']:.1%}, {predicted['over_arithmetic']:.2f} times the arithmetic",
            f"*predicted*, no kernel of {launches:,.0f} shorter than 2 µs: "
            f"{predicted['seconds_with_short_kernels'] * 1e3:.2f} ms, MFU "
            f"{predicted['mfu_with_short_kernels']:.1%}",
            "Nothing of it was measured. Kernels reach less than the peak (products often 60 to "
            "80 %): expect more.",
        ]
    )


def _place(source: str) -> str:
    """The last names of where something comes from, without the program's own."""
    parts = [part for part in source.split("/") if part not in ("while", "body", "closed_call")]
    known = [part for part in parts if not part.startswith(("jit(planned", "shard_map"))]
    place = "/".join(known[-2:]) or _ELSEWHERE
    # Of what XLA has merged it lists all sources.
    return place if len(place) <= _LONGEST else f"{place[: _LONGEST - 3]}..."


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"
