"""Measures this project against PyTorch: the same shapes, dtype and machine, in one run.

  python benchmarks/benchmark.py --out=docs/benchmarks/cpu.json
  python benchmarks/benchmark.py --case=train --model=DiT-XL/2 --batch_size=256 --dtype=bfloat16 \\
      --torch_compile --out=docs/benchmarks/h100.json

  python benchmarks/benchmark.py --case=distillation --fastgen=FASTGEN_CHECKOUT \\
      --out=docs/benchmarks/distillation.json

Cases: `train`, one training step (DDPM loss with learned variance, AdamW, EMA); `guided`, one
forward pass with classifier-free guidance; `compile`, how long XLA takes to compile a training
step, without running it; `flux`, one evaluation of a FLUX transformer of six blocks, beside
diffusers' (`benchmarks/benchmark_flux.py`); `products`, the matrix products of such blocks alone;
`distillation`, one update of every method of distillation beside one of denoising
(`benchmarks/benchmark_distillation.py`) and, with --fastgen, DMD2's student beside FastGen's. The
PyTorch side of the others is tests/references/torch_dit.py. Rounds alternate between the two sides,
each in a process of its own, whose peak memory is reported; compilation and warm-up are outside the
timed rounds. Without --case, the project's published CPU table is made.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import benchmark_distillation
import benchmark_fastgen
import benchmark_flux
import benchmark_parameters
import benchmark_products
import turns
from dit_jax import conditions as conditions_lib
from dit_jax import evaluation, experiment
from dit_jax.config import default_config
from dit_jax.diffusion import guided
from dit_jax.launch import argument_types, wiring
from dit_jax.models import Request
from dit_jax.models.dit import named_size
from dit_jax.training.metrics import peak_flops

SIDES = ("jax", "torch")
SHAPE = ("model", "batch_size", "image_size", "dtype", "layer_loop", "quantization")
# Of the options that describe a case, those that it takes.
TAKEN = {
    None: ("rounds",),
    "train": (*SHAPE, "remat", "torch_compile", "rounds"),
    "guided": (*SHAPE, "torch_compile", "rounds"),
    "compile": (*SHAPE, "remat"),
    "flux": ("batch_size", "rounds"),
    "products": ("batch_size", "rounds"),
    "distillation": ("batch_size", "rounds", "networks", "methods", "fastgen"),
}

# What is measured of the FLUX transformer of benchmark_flux, by JAX and by PyTorch.
OF_FLUX = {
    "flux": (benchmark_flux.jax_forward, benchmark_flux.torch_forward),
    "products": (benchmark_products.jax_products, benchmark_products.torch_products),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: 'train', 'guided', 'compile', 'flux', 'products' or 'dmd2_student'.
        model: as 'DiT-S/2'; for 'dmd2_student' EDM's network of CIFAR-10, for `OF_FLUX` 'FLUX'.
        batch_size: images; guidance doubles them inside.
        image_size: side of the latent, 32 for 256 pixels.
        dtype: of the matrix products, 'float32' or 'bfloat16' (PyTorch: autocast).
        remat: rematerialisation on the JAX side.
        layer_loop: 'auto', 'scan' or 'unroll' on the JAX side.
        quantization: of the JAX side's products.
        torch_compile: whether PyTorch is compiled.
        goal: time over PyTorch's (or seconds, for 'compile') aimed at; 0 for none.
        fastgen: for 'dmd2_student' FastGen's checkout.
    """

    name: str
    model: str
    batch_size: int
    image_size: int = 32
    dtype: str = "float32"
    remat: str = "none"
    layer_loop: str = "auto"
    quantization: str = "none"
    torch_compile: bool = False
    goal: float = 0.0
    fastgen: str = ""


PUBLISHED = (
    Case("train", "DiT-S/2", 16, goal=0.90),
    Case("guided", "DiT-B/2", 8, layer_loop="scan", goal=0.92),
    Case("compile", "DiT-XL/2", 16, layer_loop="scan", goal=30.0),
)


def method_of(case: Case):
    """The training Method of a case."""
    config = default_config()
    config.model.dit.update(named_size(case.model))
    config.model.image_size = case.image_size
    config.model.dtype = case.dtype
    config.model.remat = case.remat
    config.model.dit.layer_loop = case.layer_loop
    config.model.quantization = case.quantization
    return experiment.build_method(experiment.resolve_config(config))


def random_batch(case: Case) -> dict[str, np.ndarray]:
    """Inputs, the same for both sides."""
    rng = np.random.default_rng(0)
    shape = (case.batch_size, case.image_size, case.image_size, 4)
    label = rng.integers(0, 1000, case.batch_size).astype(np.int32)
    image = rng.standard_normal(shape, np.float32)
    return {"image": image, "conditions": {"label": label}}


def jax_train(case: Case) -> tuple[Callable[[], None], dict[str, Any]]:
    """A function that runs one training step to its end, and facts about it."""
    method, batch, key = method_of(case), random_batch(case), jax.random.key(0)
    state = jax.jit(method.init)(key)
    batch = jax.device_put(batch)
    started = time.perf_counter()
    update = jax.jit(method.update, donate_argnums=0).lower(state, batch, key).compile()
    facts = {
        "compile_seconds": time.perf_counter() - started,
        "flops": method.flops_per_example * case.batch_size,
    }
    carried = [state]

    def run() -> None:
        carried[0], metrics = update(carried[0], batch, key)
        jax.block_until_ready((carried[0], metrics))

    return run, facts


def jax_guided(case: Case) -> tuple[Callable[[], None], dict[str, Any]]:
    """A function that runs one guided forward pass to its end, and facts about it."""
    denoiser, batch = method_of(case).denoiser, random_batch(case)
    params = benchmark_parameters.random(denoiser.network)
    conditions = jax.tree.map(jnp.asarray, batch["conditions"])
    nulls = conditions_lib.null_values(denoiser.network.conditions)
    x, t, scale = jnp.asarray(batch["image"]), jnp.float32(500), jnp.float32(1.5)

    def forward(params, x, t, conditions, scale):
        def raw(x, t, conditions, carry):
            request = Request(x, jnp.broadcast_to(t, x.shape[:1]), conditions)
            return denoiser.raw(params, request).out, carry

        null = conditions_lib.without(conditions, nulls)
        return guided(raw, null, scale, channels="first3")(x, t, conditions, None)[0]

    started = time.perf_counter()
    compiled = jax.jit(forward).lower(params, x, t, conditions, scale).compile()
    facts = {
        "compile_seconds": time.perf_counter() - started,
        "flops": 2 * denoiser.network.flops_per_example * case.batch_size,
    }
    return lambda: jax.block_until_ready(compiled(params, x, t, conditions, scale)), facts


def torch_side(case: Case) -> tuple[Callable[[], None], dict[str, Any]]:
    """The same work in PyTorch."""
    import torch

    from tests.references import torch_dit

    device = turns.torch_device()
    size = named_size(case.model)
    model = torch_dit.DiT(
        depth=size["depth"],
        hidden_size=size["hidden_size"],
        num_heads=size["num_heads"],
        patch_size=size["patch_size"],
        input_size=case.image_size,
        in_channels=4,
        num_classes=1000,
        learn_sigma=True,
    ).to(device)
    batch = random_batch(case)
    x = torch.tensor(batch["image"]).permute(0, 3, 1, 2).contiguous().to(device)
    y = torch.tensor(batch["conditions"]["label"]).long().to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")
    training = torch_dit.DDPMTraining(model) if case.name == "train" else None
    if case.torch_compile:
        model.compile()
    t = torch.full((case.batch_size,), 500, device=device)

    def run() -> None:
        with autocast:
            if training:
                training.step(x, y)
            else:
                with torch.no_grad():
                    model.guided(x, t, y, 1.5)
        if device.type == "cuda":
            torch.cuda.synchronize()

    started = time.perf_counter()
    run()
    return run, {"compile_seconds": time.perf_counter() - started if case.torch_compile else 0.0}


def prepare(case: Case, side: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """The function to time and facts about it."""
    if case.name == "dmd2_student":
        if side == "jax":
            return benchmark_distillation.dmd2_student(case.batch_size)
        run = benchmark_fastgen.student_step(Path(case.fastgen), case.batch_size)
        return run, {"compile_seconds": 0.0}
    if case.name in OF_FLUX:
        return OF_FLUX[case.name][SIDES.index(side)](case.batch_size)
    if side == "torch":
        return torch_side(case)
    return {"train": jax_train, "guided": jax_guided}[case.name](case)


def peak_bytes(side: str) -> int:
    """Peak memory of this process: of the GPU if there is one, else resident."""
    if side == "jax" or jax.default_backend() != "gpu":
        return turns.peak_bytes()
    import torch

    return torch.cuda.max_memory_allocated()


def serve(case: Case, side: str) -> None:
    """One side's process: prepares, then takes a turn for each line it reads, answering in JSON.

    A turn is one run that is not timed and two that are: memory that a process gave back while the
    other had its turn is expensive to get again, which steady work does not see.
    """
    run, facts = prepare(case, side)
    run(), run()

    def turn(_: str) -> dict[str, Any]:
        run()
        started = time.perf_counter()
        run(), run()
        seconds = (time.perf_counter() - started) / 2
        return {"seconds": seconds, "peak_bytes": peak_bytes(side)}

    turns.serve(facts, turn)


def process_of(case: Case, side: str, *, traceback: bool = False) -> turns.Turns:
    """The process of one side."""
    description = json.dumps(dataclasses.asdict(case))
    options = ["--serve", side, "--describe", description, *["--traceback"] * traceback]
    return turns.Turns(__file__, options)


def compare(case: Case, rounds: int, *, traceback: bool = False) -> dict[str, Any]:
    """Times both sides, turn by turn, each in its own process."""
    sides = {side: process_of(case, side, traceback=traceback) for side in SIDES}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for name, side in sides.items():
            runs[name].append(side.run())
    for side in sides.values():
        side.close()
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["jax"], seconds["torch"], strict=True)]
    flops = sides["jax"].facts["flops"]
    result = {
        "case": dataclasses.asdict(case),
        "rounds": rounds,
        "seconds": seconds,
        "median_seconds": medians,
        "ratio_of_medians": medians["jax"] / medians["torch"],
        "median_of_ratios": statistics.median(ratios),
        "quartiles_of_ratios": statistics.quantiles(ratios, n=4)[::2] if rounds > 1 else ratios * 2,
        "compile_seconds": {name: side.facts["compile_seconds"] for name, side in sides.items()},
        "model_tflops_per_second": {n: flops / m / 1e12 for n, m in medians.items()},
        "peak_memory_gib": {n: found[-1]["peak_bytes"] / 2**30 for n, found in runs.items()},
        "goal": case.goal,
    }
    if peak := peak_flops():
        result["mfu"] = {name: flops / m / peak for name, m in medians.items()}
    return result


def measure_compilation(case: Case) -> dict[str, Any]:
    """Seconds to lower and compile a training step from shapes alone."""
    method, key = method_of(case), jax.random.key(0)
    state = jax.eval_shape(method.init, key)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), random_batch(case))
    started = time.perf_counter()
    jax.jit(method.update, donate_argnums=0).lower(state, batch, key).compile()
    seconds = time.perf_counter() - started
    return {"case": dataclasses.asdict(case), "compile_seconds": seconds, "goal": case.goal}


def environment() -> dict[str, Any]:
    """The machine and the versions that made the numbers."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "numpy"):
        versions[package] = importlib.metadata.version(package)
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    return {
        "device": jax.devices()[0].device_kind,
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "command": shlex.join(["python", "benchmarks/benchmark.py", *sys.argv[1:]]),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| case | JAX, s | PyTorch, s | JAX / PyTorch | goal | peak GiB | compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case = result["case"]
        name = f"{case['name']} {case['model']}, batch {case['batch_size']}, {case['dtype']}"
        name += "" if case["quantization"] == "none" else f", {case['quantization']}"
        if case["name"] == "compile":
            goal = f"<= {result['goal']:.0f} s" if result["goal"] else ""
            lines.append(f"| {name} | | | | {goal} | | {result['compile_seconds']:.1f} |")
            continue
        seconds, memory = result["median_seconds"], result["peak_memory_gib"]
        low, high = result["quartiles_of_ratios"]
        goal = f"<= {result['goal']:.2f}" if result["goal"] else ""
        lines.append(
            f"| {name} | {seconds['jax']:.3f} | {seconds['torch']:.3f} "
            f"| {result['median_of_ratios']:.3f} ({low:.3f} to {high:.3f}) | {goal} "
            f"| {memory['jax']:.2f} vs {memory['torch']:.2f} "
            f"| {result['compile_seconds']['jax']:.1f} |"
        )
    return "\n".join(lines)


def measure_distillation(args: argparse.Namespace) -> dict[str, Any]:
    """All methods on all networks; DMD2's student against FastGen's where there is one."""
    compared = []
    if args.fastgen:  # first: it takes two processes, and the memory is still free
        case = Case("dmd2_student", "EDM CIFAR-10", args.batch_size or 2, fastgen=str(args.fastgen))
        print(f"measuring {case} ...", file=sys.stderr, flush=True)
        compared = [compare(case, args.rounds, traceback=args.traceback)]
        print(table(compared), flush=True)
    rows = benchmark_distillation.measure(args)
    if args.out:
        benchmark_distillation.save_table(args.out, rows, [table(compared)] * bool(compared))
    return {"rows": rows, "fastgen": compared}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--case", choices=[case for case in TAKEN if case])
    parser.add_argument("--model", default="DiT-S/2", help="DiT-{S,B,L,XL}/{2,4,8}")
    parser.add_argument(
        "--batch_size", type=argument_types.count, help="default: 16; of distillation, by network"
    )
    parser.add_argument(
        "--image_size", type=argument_types.count, default=32, help="side of the latent"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", default="none", choices=["none", "activations", "dots", "block"])
    parser.add_argument("--layer_loop", default="auto", choices=["auto", "scan", "unroll"])
    parser.add_argument(
        "--quantization",
        default="none",
        choices=["none", "fp8", "fp8_rowwise", "te"],
        help="of JAX's",
    )
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--rounds", type=argument_types.count, default=11)
    benchmark_distillation.add_arguments(parser)
    parser.add_argument("--out", type=argument_types.json_file, help="JSON file for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--describe", help=argparse.SUPPRESS)
    not_given = object()  # argparse leaves what is set: a default that is given tells itself
    names = dict.fromkeys(name for taken in TAKEN.values() for name in taken)
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, not_given)))
    for name in names:
        if getattr(args, name) is not_given:
            setattr(args, name, parser.get_default(name))
        elif name not in TAKEN[args.case]:
            case = f"--case={args.case}" if args.case else "the published cases: give --case"
            parser.error(f"--{name} would do nothing with {case}")
    if args.fastgen:
        try:
            benchmark_fastgen.require_checkout(args.fastgen)
        except FileNotFoundError as error:
            parser.error(f"--fastgen: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with wiring.readable_errors(traceback=args.traceback):
        if args.serve:
            serve(Case(**json.loads(args.describe)), args.serve)
            return
        if args.out:
            evaluation.check_destination(args.out, overwrite=args.overwrite)
        if args.case == "distillation":
            record = {"environment": environment(), **measure_distillation(args)}
            if args.out:
                evaluation.save_json(args.out, record, overwrite=args.overwrite)
            return
        cases = PUBLISHED
        if args.case:
            args.batch_size = args.batch_size or (1 if args.case in OF_FLUX else 16)
            fields = [field.name for field in dataclasses.fields(Case)]
            options = {name: getattr(args, name) for name in fields if hasattr(args, name)}
            if args.case in OF_FLUX:
                shape = {"model": "FLUX", "image_size": benchmark_flux.SIDE}
                options |= {**shape, "layer_loop": benchmark_flux.CONFIG.layer_loop}
                options["goal"] = 0.85 if args.case == "flux" else 0.0
            cases = (Case(name=args.case, **options),)
        results = []
        for case in cases:
            if case.name in ("train", "guided", "compile"):
                method_of(case)  # what cannot be built is said here, not by a side's process
            print(f"measuring {case} ...", file=sys.stderr, flush=True)
            if case.name == "compile":
                results.append(measure_compilation(case))
            else:
                results.append(compare(case, args.rounds, traceback=args.traceback))
        print(table(results))
        if args.out:
            record = {"environment": environment(), "results": results}
            evaluation.save_json(args.out, record, overwrite=args.overwrite)


if __name__ == "__main__":
    # Both sides share a GPU: neither may claim it whole.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
