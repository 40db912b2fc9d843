"""How long a fresh process takes to its first images: cold, with XLA's cache, with a kept program.

  python launch/demo.py
  python benchmarks/benchmark_start.py --sampler digits --workdir=runs/demo/teacher
  python benchmarks/benchmark_start.py --sampler DiT-S/2
  python benchmarks/benchmark_start.py --sampler DiT-XL/2 --steps=2
  python benchmarks/benchmark_start.py --sampler FLUX --size=8x16 \\
      --pretrained=runs/demo_flux/pipeline

A start is what launch/sample.py does (of a pipeline: `FluxPipeline.from_pretrained` and a call):
imports, reading weights, then the sampler, which is compiled or found, and a batch. Each is a
process of its own; the three ways take turns. In a start with a kept program nothing may be
compiled, and nothing traced once the weights are read: JAX's monitoring events say so, or it is an
error. DiT-S/2 and DiT-XL/2 have random weights, and make pictures of 32x32 pixels, which are as
many tokens as the latents of 256x256. What is needed before (weights, programs, caches)
is made in --folder if it is not there; --rounds=0 makes only that. Rows are added to OUT.json and
OUT.md, those of the same sampler replaced.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import turns

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "cold": "nothing kept",
    "cache": "XLA's cache",
    "program": "a kept program",
}
RANDOM = ("DiT-S/2", "DiT-XL/2")
PROMPT = "a red seven"
_TRACED, _COMPILED = "jaxpr_trace_duration", "backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Start:
    """What a process starts.

    Attributes:
        options: of launch/sample.py but for --programs; of a pipeline nothing.
        pipeline: its folder, or ''.
        steps: of a pipeline.
        size: (height, width) of its pictures; () for its default.
        programs: the folder of kept programs, or ''.
    """

    options: tuple[str, ...]
    pipeline: str = ""
    steps: int = 4
    size: tuple[int, ...] = ()
    programs: str = ""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from dit_jax.launch import argument_types

    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--sampler", choices=["digits", *RANDOM, "FLUX"], required=True)
    parser.add_argument("--workdir", type=Path, help="of digits: a trained run")
    parser.add_argument("--pretrained", type=Path, help="of FLUX: a pipeline's folder")
    parser.add_argument(
        "--size", type=argument_types.image_size, help="of FLUX's pictures; default: its own"
    )
    parser.add_argument("--steps", type=argument_types.solver_steps, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="0: make only what is needed before")
    parser.add_argument("--folder", type=Path, default=Path("runs/start"))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/start/start"), help="default: %(default)s"
    )
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    args = parser.parse_args(argv)
    needed = {"digits": "workdir", "FLUX": "pretrained"}.get(args.sampler, "")
    for name in ("workdir", "pretrained"):
        if (name == needed) != bool(getattr(args, name)):
            verb = "is missing" if name == needed else "would do nothing"
            parser.error(f"--{name} {verb} with --sampler={args.sampler}")
    if args.size and not args.pretrained:
        parser.error(f"--size would do nothing with --sampler={args.sampler}: it is of FLUX")
    if args.rounds < 0:
        parser.error(f"--rounds={args.rounds}: expected 0 or more")
    return args


class Watch:
    """Counts what JAX traces and compiles from now on."""

    def __init__(self):
        import jax

        self.counts: Counter[str] = Counter()
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **more: Any) -> None:
        self.counts[event.rsplit("/", 1)[-1]] += 1


def serve(description: str) -> None:
    """A start: the facts say how long its parts took. Later turns make another batch each."""
    began = time.perf_counter()
    start = Start(**json.loads(description))
    watch = Watch()
    imported, loaded, draw = (pipeline_of if start.pipeline else sampler_of)(start)
    before = watch.counts.copy()
    draw()
    ended = time.perf_counter()
    sampler = watch.counts - before
    facts = {
        "weights_seconds": loaded - imported,
        "sampler_seconds": ended - loaded,
        "imports_seconds": imported - began,
        "traced": sampler[_TRACED],
        "compiled": sampler[_COMPILED],
        "compiled_before": before[_COMPILED],
    }

    def turn(_: str) -> dict[str, Any]:
        started = time.perf_counter()
        draw()
        return {"seconds": time.perf_counter() - started}

    turns.serve(facts, turn)


def sampler_of(start: Start):
    """(time after imports, time after weights, what makes a batch) of launch/sample.py."""
    from dit_jax.launch import sample

    more = (f"--programs={start.programs}",) if start.programs else ()
    args = sample.parse_arguments([*start.options, *more, "--out=x.npz"])
    import jax

    from dit_jax.launch import sampling

    imported = time.perf_counter()
    ready = sampling.prepare(args)
    jax.block_until_ready(ready.params)
    loaded = time.perf_counter()
    stream = sampling.stream_of(args, ready)
    return imported, loaded, lambda: next(iter(stream(0)))


def pipeline_of(start: Start):
    """The same of a pipeline."""
    import jax

    from dit_jax import FluxPipeline

    imported = time.perf_counter()
    pipe = FluxPipeline.from_pretrained(start.pipeline, programs=start.programs or None)
    jax.block_until_ready(pipe.parts.params)
    loaded = time.perf_counter()
    options = dict(zip(("height", "width"), start.size, strict=False))
    options |= {"num_inference_steps": start.steps, "output_type": "np"}
    return imported, loaded, lambda: pipe(PROMPT, **options).images


def environment(way: str, folder: Path) -> dict[str, str]:
    """Of a process that starts one way."""
    cached = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **(cached if way == "cache" else {"JAX_ENABLE_COMPILATION_CACHE": "false"}),
    }


def run(start: Start, way: str, folder: Path, *, traceback: bool = False) -> dict[str, Any]:
    """One start in a process of its own.

    Args:
        start: what is started.
        way: of `WAYS`.
        folder: of caches and programs.
        traceback: show the process's errors with their stack traces.

    Raises:
        RuntimeError: a kept program was compiled, or traced, all the same.
    """
    if way == "program":
        start = dataclasses.replace(start, programs=str(folder / "programs"))
    description = json.dumps(dataclasses.asdict(start))
    options = ["--serve", description, *["--traceback"] * traceback]
    process = turns.Turns(__file__, options, environment(way, folder))
    batch = process.run()["seconds"]
    process.close()
    return {"whole_seconds": process.start_seconds, "batch_seconds": batch, **process.facts}


def check(found: dict[str, Any]) -> None:
    """Refuses a start with a kept program that compiled or traced.

    Raises:
        RuntimeError: with how many programs.
    """
    if found["traced"] or found["compiled"] or found["compiled_before"]:
        raise RuntimeError(
            f"a start with a kept program compiled {found['compiled_before']} programs before the "
            f"sampler and {found['compiled']} of it, and traced {found['traced']} functions"
        )


def write_random(name: str, folder: Path) -> Path:
    """A folder with a network's random weights, as launch/convert.py writes one."""
    import numpy as np

    from dit_jax import experiment
    from dit_jax.configs import cifar10_dit
    from dit_jax.interop.export import write_model
    from dit_jax.interop.found_model import FoundModel
    from dit_jax.interop.parameters import parameter_shapes
    from dit_jax.models.dit import named_size

    out = folder / name.replace("/", "_") / "weights"
    if out.exists():
        return out
    config = cifar10_dit.get_config()  # of 32 x 32 pixels: as many as a 256-pixel image's latents
    config.model.dit.update(named_size(name))
    config = experiment.resolve_config(config)
    shapes = parameter_shapes(experiment.build_network(config))
    generator = np.random.default_rng(0)
    noise = (0.02 * generator.standard_normal(2**20)).astype(np.float32)

    def read(path: str, dtype: Any = np.float32) -> np.ndarray:
        return np.resize(noise, shapes[path]).astype(dtype, copy=False)

    model = FoundModel("dit_jax", out, config, read, tuple(shapes))
    write_model(model, "dit_jax", out)
    return out


def start_of(args: argparse.Namespace) -> Start:
    """What the command line asks for."""
    if args.sampler == "FLUX":
        size = args.size if isinstance(args.size, tuple) else (args.size,) * 2
        return Start((), str(args.pretrained), args.steps, size if args.size else ())
    if args.sampler == "digits":
        return Start((f"--workdir={args.workdir}", "--num_images=16", f"--steps={args.steps}"))
    source = write_random(args.sampler, args.folder)
    how = ("--num_images=1", "--solver=euler", "--guidance_scale=1", f"--steps={args.steps}")
    return Start((f"--init_from={source}", *how))


def measure(start: Start, args: argparse.Namespace) -> dict[str, Any]:
    """All starts of a sampler, by way."""
    folder = args.folder / args.sampler.replace("/", "_")
    for way in ("cache", "program"):  # as an earlier process leaves them; what is there is found
        run(start, way, folder, traceback=args.traceback)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way, starts in found.items():
            starts.append(run(start, way, folder, traceback=args.traceback))
            whole = starts[-1]["whole_seconds"]
            print(f"{args.sampler}, {way}, round {number + 1}: {whole:.2f} s", flush=True)
        check(found["program"][-1])
    kept = sorted((folder / "programs").glob("*.program"))
    return {
        "sampler": args.sampler,
        "command": " ".join(["python", "benchmarks/benchmark_start.py", *sys.argv[1:]]),
        "steps": args.steps,
        "options": list(start.options),
        "programs_bytes": [path.stat().st_size for path in kept],
        "starts": found,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, in Markdown."""
    lines = [
        "| sampler | start | whole process, s | times faster | imports, s | weights, s "
        "| sampler and batch, s | times faster | sampler alone, s | times faster |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        cold = _parts(row["starts"]["cold"])
        for way, starts in row["starts"].items():
            parts = _parts(starts)
            cells = [row["sampler"], WAYS[way]]
            for name, seconds in parts.items():
                cells.append(f"{seconds:.2f}")
                if name not in ("imports", "weights"):
                    cells.append(f"{cold[name] / seconds:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parts(starts: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of a way's starts; imports are all before the weights, Python's own start, too."""

    def median(seconds: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(seconds, starts))

    return {
        "whole": median(lambda s: s["whole_seconds"]),
        "imports": median(
            lambda s: s["whole_seconds"] - s["weights_seconds"] - s["sampler_seconds"]
        ),
        "weights": median(lambda s: s["weights_seconds"]),
        "sampler and batch": median(lambda s: s["sampler_seconds"]),
        "sampler": median(lambda s: s["sampler_seconds"] - s["batch_seconds"]),
    }


def save(out: Path, row: dict[str, Any]) -> str:
    """Adds a sampler to the record, and writes the page; returns the table."""
    import jax

    from dit_jax import evaluation

    path, rows = out.with_suffix(".json"), []
    if path.exists():
        rows = json.loads(path.read_text())["rows"]
    order = ["digits", *RANDOM, "FLUX"]
    rows = [old for old in rows if old["sampler"] != row["sampler"]] + [row]
    rows.sort(key=lambda each: order.index(each["sampler"]))
    device = f"{os.cpu_count()} x {jax.devices()[0].device_kind}"
    record = {"device": device, "jax": jax.__version__, "rows": rows}
    evaluation.save_json(path, record, overwrite=True)
    commands = "\n".join(each["command"] for each in rows)
    head = f"# From nothing to the first images\n\n```\n{commands}\n```\n\n"
    head += f"{device}, jax {jax.__version__}; medians of fresh processes that took turns. "
    head += "Sampler: traced and compiled, or found; alone: less what the next batch took.\n\n"
    text = table(rows)
    out.with_suffix(".md").write_text(head + text + "\n")
    return text


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    argv = sys.argv[1:] if argv is None else argv
    # Not of `wiring`, whose imports are part of the starts that are timed.
    from dit_jax.launch.command import readable_errors

    if argv[:1] == ["--serve"]:
        with readable_errors(traceback="--traceback" in argv), redirect_stdout(sys.stderr):
            serve(argv[1])  # answers alone go to the other end
        return
    args = parse_arguments(argv)
    with readable_errors(traceback=args.traceback):
        args.folder.mkdir(parents=True, exist_ok=True)
        row = measure(start_of(args), args)
        if args.rounds:
            print(save(args.out, row))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
