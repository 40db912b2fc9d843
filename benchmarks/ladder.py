"""What makes sampling fast, rung by rung: time, start, memory, and what it does to the images.

  python benchmarks/ladder.py --workdir=runs/digits --out=docs/benchmarks/ladder_digits
  python benchmarks/ladder.py --config=configs/dit_xl2.py --batch_size=8 --steps=50 \\
      --out=docs/benchmarks/ladder_xl2
  python benchmarks/ladder.py --pretrained=FOLDER --batch_size=1 --guidance_scale=1 \\
      --out=docs/benchmarks/ladder_flux
  python benchmarks/ladder.py --config=configs/dit_xl2.py --batch_size=8 --steps=50 \\
      --predict=h100 --out=docs/benchmarks/ladder_xl2_h100

Each rung is added to those before it; then each alone on the compiled sampler, and all but each.
Every row is a process of its own, so that memory is its own and a start is one from nothing;
those of a group take turns. Writes OUT.json (all seconds), OUT.md (the table) and OUT.png. With
--config the parameters are drawn at random: times are right, PSNR says little. --pretrained is a
checkpoint as launch/sample.py takes it, of a FLUX pipeline the transformer, which is told arrays
drawn at random instead of a text's. --config.KEY=VALUE changes what the rungs leave alone.

--predict measures nothing: launch/plan.py compiles the ladder for a GPU that is not there (the
extra 'plan') and says what it would take at least. The step cache decides when the program runs:
its rung is predicted with the share of evaluations that --computed_share states, or left out.

Not among the rungs: fused projections. Queries, keys and values are one product in all networks
that are sampled here, and their weights are stored so.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rungs
import turns
from dit_jax import evaluation
from dit_jax.launch import argument_types, planning, wiring
from dit_jax.models.quantization import QUANTIZATIONS, require_quantization
from dit_jax.named_options import options_named
from dit_jax.quantities import counted

ROOT = Path(__file__).resolve().parents[1]
# What configurations and functions call what the command line calls otherwise.
OPTIONS = {
    "config.sampling.guidance_scale": "--guidance_scale",
    "guidance_scale": "--guidance_scale",
    "config.sampling.solver": "--solver",
    "model.quantization": "--quantization",
    "quantization": "--quantization",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--workdir", default="", help="a trained run")
    source.add_argument("--config", default="", help="a file of configs/, for random parameters")
    source.add_argument("--pretrained", default="", help="a checkpoint, or a pipeline's folder")
    parser.add_argument("--solver", default="euler")
    parser.add_argument("--steps", type=argument_types.solver_steps, default=28)
    parser.add_argument("--batch_size", type=argument_types.count, default=16)
    parser.add_argument(
        "--guidance_scale",
        type=argument_types.guidance_scale,
        help="by two evaluations; default: 1.5, of FLUX 1",
    )
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS[1:], help="default: fp8, on a CPU int8"
    )
    parser.add_argument(
        "--threshold", type=argument_types.share_below_one, help="of the step cache; default: 0.1"
    )
    parser.add_argument("--runs", type=argument_types.count, help="timed, of each row; default: 10")
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=["ladder", "alone", "off"],
        help="default: all three",
    )
    parser.add_argument("--without", nargs="+", default=[], choices=list(rungs.SWITCHES)[1:])
    parser.add_argument("--predict", choices=["h100", "h200", "a100"], help="measure nothing")
    parser.add_argument(
        "--computed_share",
        type=float,
        help="with --predict: of the step cache's evaluations, those to count as computed in full",
    )
    parser.add_argument(
        "--trace", type=Path, help="a folder: a Perfetto trace of one batch of each row"
    )
    parser.add_argument("--out", type=Path, help="without a suffix")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.json and the rest")
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args, others = parser.parse_known_args(argv)
    if args.serve:
        return args
    args.changes = {}
    for other in others:
        key, equals, value = other.partition("=")
        if not key.startswith("--config.") or not equals:
            parser.error(f"unrecognized argument: {other}")
        with contextlib.suppress(json.JSONDecodeError):  # of a word
            value = json.loads(value)
        args.changes[key.removeprefix("--config.")] = value
    if not args.out:
        parser.error("--out is missing: for instance --out=runs/ladder")
    if args.out.suffix:
        parser.error(
            f"--out={args.out}: expected a name without a suffix, as {args.out.with_suffix('')}, "
            "to which .json, .md and .png are added"
        )
    if not (args.workdir or args.config or args.pretrained):
        parser.error(
            "what is sampled? Give --workdir=RUN, --config=configs/dit_xl2.py, or "
            "--pretrained=FOLDER"
        )
    if args.predict and not args.config:
        parser.error(
            "--predict: weights do not change what is predicted. Give --config=configs/..."
        )
    idle = [name for name in ("trace", "runs", "groups", "threshold") if getattr(args, name)]
    if args.predict and idle:
        parser.error(f"--{idle[0]} would do nothing with --predict: nothing runs")
    if args.computed_share is not None and not args.predict:
        parser.error("--computed_share would do nothing without --predict: the share is measured")
    if args.computed_share is not None and "step cache" in args.without:
        parser.error("--computed_share would do nothing without the step cache")
    args.runs, args.threshold = args.runs or 10, args.threshold or 0.1
    return args


def workload(args: argparse.Namespace, programs: str) -> rungs.Workload:
    """What the command line asks for; `programs` is a folder for compiled ones."""
    on_cpu = not args.predict and jax.default_backend() == "cpu"
    work = rungs.Workload(
        workdir=args.workdir,
        config=args.config,
        pretrained=args.pretrained,
        network="",
        changes=args.changes,
        solver=args.solver,
        steps=args.steps,
        batch_size=args.batch_size,
        guidance_scale=args.guidance_scale or 1.0,
        quantization=args.quantization or ("int8" if on_cpu else "fp8"),
        threshold=args.threshold,
        programs=programs,
    )
    network = rungs.source_config(work).model.name
    if network == "flux" and work.guidance_scale != 1:
        raise ValueError(
            f"--guidance_scale={work.guidance_scale:g}: the ladder guides by two evaluations, for "
            "which FLUX is not trained (dev is told its scale): leave it out"
        )
    scale = args.guidance_scale or (1.0 if network == "flux" else 1.5)
    return dataclasses.replace(work, network=network, guidance_scale=scale)


def serve(description: str) -> None:
    """A row's process: makes a batch, says so, and makes more when its turn comes."""
    described = json.loads(description)
    work, on = rungs.Workload(**described["work"]), tuple(described["on"])
    draw, computed = rungs.sampler(work, on)
    jax.block_until_ready(draw())

    def turn(line: str) -> dict[str, Any]:
        what, _, path = line.partition(" ")
        if what == "images":
            np.save(path, np.asarray(draw()))
            return {"computed": computed()}
        if what == "trace":
            with jax.profiler.trace(path, create_perfetto_trace=True):
                jax.block_until_ready(draw())
            return {}
        return {"seconds": rungs.timed(draw), "peak_bytes": turns.peak_bytes()}

    turns.serve({"device": jax.devices()[0].device_kind}, turn)


def start(work: rungs.Workload, setting: rungs.Setting, *, traceback: bool = False) -> turns.Turns:
    """The process of a row; nothing is found compiled but by the switch that is for it."""
    description = json.dumps({"work": dataclasses.asdict(work), "on": setting.on})
    options = ["--serve", description, *["--traceback"] * traceback]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if "kept program" in setting.on:  # as an earlier process would have left it
        turns.Turns(__file__, options, environment).close()
    return turns.Turns(__file__, options, environment)


def measure(
    work: rungs.Workload, group: list[rungs.Setting], args: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """The rows of a group, which take turns; images are kept in `folder`."""
    processes = []
    for setting in group:
        processes.append(start(work, setting, traceback=args.traceback))
        print(f"{setting.name}: started in {processes[-1].start_seconds:.1f} s", flush=True)
    answers = [[process.run() for process in processes] for _ in range(args.runs)]
    rows = []
    for number, (setting, process) in enumerate(zip(group, processes, strict=True)):
        seconds = [turn[number]["seconds"] for turn in answers]
        path = folder / f"{setting.group}-{number}.npy"
        row = {
            "name": setting.name,
            "group": setting.group,
            "on": list(setting.on),
            "device": process.facts["device"],
            "seconds": seconds,
            "mean_seconds": statistics.fmean(seconds),
            "variance": statistics.variance(seconds) if len(seconds) > 1 else 0.0,
            "median_seconds": statistics.median(seconds),
            "start_seconds": process.start_seconds,
            "peak_bytes": answers[-1][number]["peak_bytes"],
            **process.run(f"images {path}"),
            "psnr": psnr(np.load(path), np.load(folder / "ladder-0.npy"))
            if (folder / "ladder-0.npy").exists()
            else None,
        }
        if args.trace:
            process.run(f"trace {args.trace / setting.name.replace(' ', '_')}")
        process.close()
        rows.append(row)
        row["speed"] = rows[0]["median_seconds"] / row["median_seconds"]
    return rows


def psnr(images: np.ndarray, reference: np.ndarray) -> float | None:
    """Mean over images that differ, clipped to [-1, 1], dB; None where all are the same."""
    return evaluation.mean_psnr(np.clip(images, -1, 1), np.clip(reference, -1, 1))


def predicted_rows(group: list[rungs.Setting], computed_share: float | None) -> list[rungs.Setting]:
    """Those that a compiled program says something of, without being told more."""
    silent = ["kept program"] + ["step cache"] * (computed_share is None)
    return [row for row in group if "compiled" in row.on and row.on[-1] not in silent]


def predict(
    work: rungs.Workload,
    group: list[rungs.Setting],
    accelerator: str,
    computed_share: float | None = None,
) -> list[dict[str, Any]]:
    """The rows of `predicted_rows` as launch/plan.py predicts them.

    Raises:
        ValueError: the GPU's compiler is not there.
        ChildProcessError: launch/plan.py failed.
    """
    if reason := planning.why_virtual(accelerator):
        raise ValueError(f"--predict={accelerator}: {reason}")
    rows: list[dict[str, Any]] = []
    for setting in group:
        share = computed_share if "step cache" in setting.on else None
        found = plan(work, setting, accelerator, share)
        rows.append(
            {
                "name": setting.name,
                "on": list(setting.on),
                "predicted_seconds": found["predicted"]["seconds"],
                "predicted_mfu": found["predicted"]["mfu"],
                "memory_bytes": found["memory"]["total_bytes"],
                "compiled_for": found["compiled_for"],
                "jax": found["versions"]["jax"],
            }
        )
        row = rows[-1]
        row["speed"] = rows[0]["predicted_seconds"] / row["predicted_seconds"]
        print(f"{setting.name}: {row['predicted_seconds']:.4f} s, predicted", flush=True)
    return rows


def plan(
    work: rungs.Workload, setting: rungs.Setting, accelerator: str, computed_share: float | None
) -> dict[str, Any]:
    """What launch/plan.py writes of a row.

    Raises:
        ChildProcessError: it failed.
    """
    values = rungs.overrides(work, setting.on)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "plan.json")
        options = [f"--config={work.config}", "--devices=1", "--what=sample", f"--out={out}"]
        options += [f"--accelerator={accelerator}"]
        options += [] if computed_share is None else [f"--computed_share={computed_share}"]
        options += [f"--config.{key}={value}" for key, value in values.items()]
        command = [sys.executable, str(ROOT / "launch/plan.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ChildProcessError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
        return json.loads(out.read_text())


def measured_table(rows: list[dict[str, Any]]) -> str:
    """Rows that were measured, in Markdown."""
    lines = [
        "| | median, s | mean, s | variance, s² | speed-up | start, s | peak, GiB | PSNR, dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        quality = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
        lines.append(
            f"| {row['name']} | {row['median_seconds']:.3f} | {row['mean_seconds']:.3f} "
            f"| {row['variance']:.1e} | {row['speed']:.2f} | {row['start_seconds']:.1f} "
            f"| {row['peak_bytes'] / 2**30:.2f} | {quality} |"
        )
    return "\n".join(lines)


def predicted_table(rows: list[dict[str, Any]]) -> str:
    """Rows that were predicted, in Markdown."""
    lines = [
        "| | *predicted*, ms | speed-up | *predicted* MFU, of bfloat16's peak | memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {1e3 * row['predicted_seconds']:.1f} | {row['speed']:.2f} "
            f"| {row['predicted_mfu']:.0%} | {row['memory_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines)


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """A bar a row, as long as a batch takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    key = "median_seconds" if "median_seconds" in rows[0] else "predicted_seconds"
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.34 * len(rows)), layout="constrained")
    colours = {"ladder": "#3465a4", "alone": "#75a05a", "off": "#b08050"}
    places = np.arange(len(rows)) + [0.5 * _groups_before(rows, n) for n in range(len(rows))]
    values = [row[key] for row in rows]
    axes.barh(
        places, values, color=[colours[row.get("group", "ladder")] for row in rows], height=0.72
    )
    for place, row in zip(places, rows, strict=True):
        quality = f", {row['psnr']:.0f} dB" if row.get("psnr") is not None else ""
        axes.text(
            row[key], place, f" {row[key]:.3g} s, {row['speed']:.2f}x{quality}", va="center", size=8
        )
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(values))
    axes.set_xlabel(
        "seconds a batch" + (", median" if key == "median_seconds" else ", predicted, at least")
    )
    axes.set_title(title, size=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _groups_before(rows: list[dict[str, Any]], number: int) -> int:
    return len({row.get("group") for row in rows[: number + 1]}) - 1


def save(args: argparse.Namespace, work: rungs.Workload, rows: list[dict[str, Any]]) -> str:
    """Writes the record, the table and the picture; returns the table."""
    command = shlex.join(["python", "benchmarks/ladder.py", *sys.argv[1:]])
    what = f"{counted(work.batch_size, 'image')} by {work.solver}, {work.steps} steps"
    what += f", guidance {work.guidance_scale:g}" if work.guidance_scale != 1 else ""
    if args.predict:
        text, device = predicted_table(rows), f"{rows[0]['compiled_for']}, compiled without one"
    else:
        text, device = measured_table(rows), rows[0]["device"]
    name = Path(args.workdir or args.config or args.pretrained).stem
    record = {"command": command, "device": device, "jax": jax.__version__, "rows": rows}
    record["workload"] = {
        key: value for key, value in dataclasses.asdict(work).items() if key != "programs"
    }
    evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=args.overwrite)
    head = f"# The ladder: {name}, {what}\n\n`{command}`\n({device}, jax {jax.__version__}; "
    head += f"8 bits: `{work.quantization}`"
    cache = f"step cache at {work.threshold:g}"
    if args.predict:
        share = args.computed_share
        cache = share and f"step cache assumed to compute {share:.0%} of the evaluations"
    head += f", {cache}" if cache else ""
    head += "; MFU counts all of them)\n\n" if args.predict and cache else ")\n\n"
    args.out.with_suffix(".md").write_text(head + text + "\n")
    title = f"{name}: {what}\n{device}" + (f"; {cache}" if args.predict and cache else "")
    plot(args.out.with_suffix(".png"), rows, title)
    return text


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with wiring.readable_errors(traceback=args.traceback):
        if args.serve:
            with contextlib.redirect_stdout(sys.stderr):  # answers alone go to the other end
                serve(args.serve)
            return
        for suffix in (".json", ".md", ".png"):
            evaluation.check_destination(args.out.with_suffix(suffix), overwrite=args.overwrite)
        switches = tuple(name for name in rungs.SWITCHES if name not in args.without)
        groups = rungs.settings(switches)
        if args.predict:
            groups = {"ladder": predicted_rows(groups["ladder"], args.computed_share)}
        chosen = [groups[name] for name in groups if name in (args.groups or groups)]
        with tempfile.TemporaryDirectory() as folder:
            work = workload(args, str(Path(folder, "programs")))
            with options_named(OPTIONS):
                rungs.check(work, [setting for group in chosen for setting in group])
                if not args.predict and "quantized" in switches:
                    require_quantization(work.quantization)
            if args.predict:
                rows = predict(work, groups["ladder"], args.predict, args.computed_share)
            else:
                images = Path(folder)
                rows = [row for group in chosen for row in measure(work, group, args, images)]
        print(save(args, work, rows))


if __name__ == "__main__":
    # The rows of a group share a GPU: none may claim it whole.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.path.insert(0, str(ROOT))
    main()
