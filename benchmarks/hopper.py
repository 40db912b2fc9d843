"""Everything that is to be measured on one Hopper GPU, by one command, in ten minutes at most.

  python benchmarks/hopper.py --out=docs/benchmarks/hopper
  python benchmarks/hopper.py --suite=cifar10 --out=docs/benchmarks/hopper_cifar10 \\
      --data='data/cifar10_jpeg_{split}.npz'

  python -m pip download -r requirements.txt -d wheels    # for a machine without a network:
  python benchmarks/hopper.py --wheels=wheels --out=docs/benchmarks/hopper

Suites: `speed`, training of DiT-XL/2 beside compiled PyTorch, in bfloat16 and 8 bits, and the
ladder of sampling; `cifar10`, a DiT of CIFAR-10 trained with uniform times and with SpeeD, then
distilled to one step, all scored. Each measurement is a command of this project, printed before it
runs; what it writes is kept in the folder OUT, and OUT.json is brought up to date after each, so
that a run that is cut off loses one measurement. One that would begin too late is left out, and
said so.

Beside the times stand those that docs/benchmarks/plans predicts for the same program (--predicted:
a JSON of launch/plan.py by measurement). Nothing has been measured yet: no GPU was at hand.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600.0


@dataclass(frozen=True)
class Measurement:
    """One command.

    Attributes:
        name: of its record.
        command: what follows `python`.
        record: the JSON file it writes, in the folder of the suite; '' for none.
        predicted: the plan's file of the same program in docs/benchmarks/plans, or ''.
    """

    name: str
    command: tuple[str, ...]
    record: str = ""
    predicted: str = ""


def speed(folder: Path, small: bool) -> Iterator[Measurement]:
    """Training and sampling of DiT-XL/2; `small` is for machines without a GPU."""
    model, batch = ("DiT-S/8", "2") if small else ("DiT-XL/2", "256")
    config = "configs/digits.py" if small else "configs/dit_xl2.py"
    dtype = ("--dtype=bfloat16", "--remat=activations")
    train = (
        "benchmarks/benchmark.py",
        "--case=train",
        f"--model={model}",
        f"--batch_size={batch}",
        *dtype,
        f"--rounds={1 if small else 5}",
    )
    compiled = () if small else ("--torch_compile",)
    for name, more in (
        ("train_bf16", compiled),
        ("train_fp8", ("--quantization=fp8", *compiled)),
    ):
        out = folder / f"{name}.json"
        yield Measurement(name, (*train, *more, f"--out={out}", "--overwrite"), out.name, name)
    out = folder / "ladder"
    sampled = ("--steps=8", "--batch_size=2", "--runs=1") if small else ("--steps=50",)
    ladder = ("benchmarks/ladder.py", f"--config={config}", *sampled, "--groups", "ladder")
    yield Measurement("ladder", (*ladder, f"--out={out}", "--overwrite"), "ladder.json")


def cifar10(folder: Path, small: bool, data: str, steps: int) -> Iterator[Measurement]:
    """A DiT of CIFAR-10, uniform times and SpeeD's, and a student of one step."""
    shared = ("--config.data.name=jpeg_npz", f"--config.data.jpeg_npz.path={data}")
    shared += ("--config.training.preview_every=0", "--config.training.tensorboard=False")
    if small:
        shared += ("--config.model.dit.depth=1", "--config.model.dit.hidden_size=32")
        shared += ("--config.model.dit.num_heads=2", "--config.training.batch_size=8")
        shared += ("--config.optimizer.warmup_steps=1",)
        # The classifier of larger images trains for hours on a CPU.
        shared += ("--config.data.jpeg_npz.resize=adm", "--config.model.image_size=8")
    images = "200" if small else "10000"
    length = f"--config.training.num_steps={steps}"
    teacher = folder / "uniform"
    runs = {
        "uniform": ("cifar10_dit", "--config.timesteps.name=uniform"),
        "speed": ("cifar10_dit", "--config.timesteps.name=speed"),
        "student": ("cifar10_dit_cm", f"--config.teacher.path={teacher}"),
    }
    for name, (config, more) in runs.items():
        options = (f"--config=configs/{config}.py", f"--workdir={folder / name}", length, more)
        yield Measurement(f"train {name}", ("launch/train.py", *options, *shared))
        scores = {f"evaluate {name}": (f"{name}.json", ())}
        if name == "student":
            scores["evaluate student, 4 steps"] = ("student_4.json", ("--steps=4",))
        for score, (out, how) in scores.items():
            what = (f"--workdir={folder / name}", f"--num_images={images}", *how)
            options = (*what, f"--out={folder / out}", "--overwrite")
            yield Measurement(score, ("launch/evaluate.py", *options), out)


def install(wheels: Path) -> None:
    """Installs from wheels brought along what this Python lacks; JAX and PyTorch stay as they are.

    Raises:
        SystemExit: pip failed; its message is above.
    """
    names = sorted({path.name.split("-")[0] for path in wheels.glob("*.whl")})
    present = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=json"], capture_output=True, check=True
    )
    have = {package["name"].lower().replace("-", "_") for package in json.loads(present.stdout)}
    missing = [name for name in names if name.lower().replace("-", "_") not in have]
    if missing:
        print(f"installing {', '.join(missing)}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        done = subprocess.run([*pip, f"--find-links={wheels}", *missing], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)


def device() -> dict[str, str]:
    """GPU, driver and versions, as text."""
    found = {"python": sys.version.split()[0]}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        found["gpu"] = subprocess.run(
            query, capture_output=True, text=True, check=False
        ).stdout.strip()
    from importlib.metadata import PackageNotFoundError, version

    for package in ("jax", "jaxlib", "flax", "torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run(measurement: Measurement, folder: Path, seconds: float) -> dict[str, Any]:
    """What came of one command, which is ended after `seconds`."""
    command = [sys.executable, *measurement.command]
    print(f"\n== {measurement.name}: {shlex.join(['python', *measurement.command])}", flush=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    began = time.perf_counter()
    found: dict[str, Any] = {"command": shlex.join(["python", *measurement.command])}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=max(seconds, 1), check=False
        )
        found["status"] = done.returncode
    except subprocess.TimeoutExpired:
        found["status"] = "ended: the time of the suite was over"
    found["seconds"] = round(time.perf_counter() - began, 1)
    record = folder / measurement.record
    if measurement.record and record.is_file():
        found["record"] = json.loads(record.read_text())
    return found


def compared(found: dict[str, Any], predicted: Path) -> dict[str, Any]:
    """A training step's time beside the plan's, where there are both."""
    results = found.get("record", {}).get("results") if predicted.is_file() else None
    if not results:
        return {}
    expected = json.loads(predicted.read_text())["predicted"]["seconds"]
    measured = results[0]["median_seconds"]["jax"]
    return {
        "predicted_seconds": expected,
        "measured_seconds": measured,
        "error": (measured - expected) / measured,
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["speed", "cifar10"], default="speed")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, and a folder OUT")
    parser.add_argument("--data", help="with --suite=cifar10: .npz of JPEGs, with {split} in it")
    parser.add_argument("--steps", type=int, help="with --suite=cifar10: of training; default 4000")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of it all")
    parser.add_argument("--wheels", type=Path, help="a folder; what is missing is installed")
    parser.add_argument(
        "--predicted",
        type=Path,
        help="with --suite=speed: a folder of JSONs of launch/plan.py, by the measurement's name; "
        "default: docs/benchmarks/plans",
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try it on a CPU")
    parser.add_argument("--list", action="store_true", help="print the commands and end")
    args = parser.parse_args(argv)
    if (args.suite == "cifar10") != bool(args.data):
        parser.error("--data and --suite=cifar10 belong together")
    if args.steps is not None and args.suite != "cifar10":
        parser.error("--steps is of --suite=cifar10: give that, or leave it out")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps={args.steps}: expected at least 1")
    if args.predicted and args.suite != "speed":
        parser.error("--predicted is of --suite=speed: nothing is predicted of the others")
    args.steps = args.steps or 4000
    args.predicted = args.predicted or ROOT / "docs/benchmarks/plans"
    if args.data and "{split}" not in args.data:
        parser.error(f"--data={args.data}: expected {{split}} in it, for train and test")
    if args.wheels and not any(args.wheels.glob("*.whl")):
        parser.error(f"--wheels={args.wheels} holds no .whl")
    return args


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    began, folder = time.perf_counter(), args.out.absolute()
    if args.suite == "speed":
        measurements = list(speed(folder, args.small))
    else:
        data = str(Path(args.data).absolute())
        measurements = list(cifar10(folder, args.small, data, args.steps))
    if args.list:
        print("\n".join(shlex.join(["python", *m.command]) for m in measurements))
        return
    if args.wheels:
        install(args.wheels)
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"suite": args.suite, "device": device(), "measurements": {}}
    out = folder.with_name(f"{folder.name}.json")
    for measurement in measurements:
        left = args.limit - (time.perf_counter() - began)
        if left < 5:
            found = {"status": "left out: the time of the suite was over"}
            print(f"{measurement.name}: {found['status']}", flush=True)
        else:
            found = run(measurement, folder, left)
            if measurement.predicted:
                found |= compared(found, args.predicted / f"{measurement.predicted}.json")
        record["measurements"][measurement.name] = found
        out.write_text(json.dumps(record, indent=1) + "\n")
    failed = [n for n, found in record["measurements"].items() if found["status"] != 0]
    seconds = time.perf_counter() - began
    print(f"\n{len(measurements) - len(failed)} of {len(measurements)} in {seconds:.0f} s: {out}")
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
