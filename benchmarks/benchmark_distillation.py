"""Time and memory of one update of every method, beside a plain denoising update's.

Part of `benchmarks/benchmark.py --case=distillation`. A method's update is measured in turns with
that of denoising of the same network, batch and process, each compiled once beforehand. Beside it
stands the least that arithmetic allows: the number of the network's forward passes that the update
is worth, where a backward pass counts as two, a forward derivative (jvp) as one and gradients of
activations alone as one; denoising is worth 3. Optimizers, averages and losses count nothing.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax import experiment
from dit_jax.config import default_config
from dit_jax.configs import digits
from dit_jax.launch import wiring
from dit_jax.models.dit import named_size

JVP = {"model.custom_gradients": "off"}
FEW_STEPS = {"sampling.solver": "consistency", "sampling.steps": 1}
ADVERSARIAL = {**FEW_STEPS, "method.label_dropout": 0.0}


def _second_half(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Times of a truncated consistency model's second stage."""
    start = 0.5 if config.process.name == "flow" else 1.0
    return {
        "timesteps.name": "log_student_t",
        "timesteps.log_student_t.min_time": start,
        "method.tcm.transition": start,
        "method.tcm.stage1": "stage1",
    }


def _flow(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The process that average velocities are of, and a network that sees two times."""
    process = {} if config.process.name == "flow" else {"process.name": "flow"}
    return {**process, **JVP, "model.second_time": "r"}


# Names in the table: the method, and what differs from the network's configuration.
VARIANTS: dict[str, tuple[str, Any]] = {
    "kd": ("kd", {**FEW_STEPS, "data.name": "pairs", "timesteps.name": "uniform"}),
    "consistency training": ("consistency", {"method.consistency.trajectory": "data"}),
    "consistency distillation": ("consistency", {"method.consistency.trajectory": "teacher"}),
    "tcm, second stage": ("tcm", _second_half),
    "sCT": ("scm", {**JVP, "method.scm.velocity": "data"}),
    "sCD": ("scm", {**JVP, "method.scm.velocity": "teacher"}),
    "mean flow": ("mean_flow", _flow),
    "mean flow, teacher": (
        "mean_flow",
        lambda config: {**_flow(config), "method.mean_flow.velocity": "teacher"},
    ),
    "improved mean flow": (
        "mean_flow",
        lambda config: {**_flow(config), "method.mean_flow.direction": "network"},
    ),
    "dmd2": ("dmd2", ADVERSARIAL),
    "f_distill": ("f_distill", ADVERSARIAL),
    "ladd": ("ladd", ADVERSARIAL),
}


def digits_network() -> ml_collections.ConfigDict:
    """The digits experiment's DiT."""
    return digits.get_config()


def dit_s2_network() -> ml_collections.ConfigDict:
    """DiT-S/2 on latents of 256 pixels."""
    config = default_config()
    config.model.dit.update(named_size("DiT-S/2"))
    config.model.dit.learn_sigma = False
    config.process.name = "flow"
    config.sampling.solver = "heun"
    return config


def edm_cifar10_network() -> ml_collections.ConfigDict:
    """EDM's DDPM++ of CIFAR-10, class-conditional."""
    config = default_config()
    config.model.name = "song_unet"
    config.model.update(image_size=32, in_channels=3, num_classes=10)
    config.model.song_unet.dropout = 0.0
    config.process.name = "edm"
    config.timesteps.name = "log_normal"
    config.sampling.solver = "heun"
    return config


NETWORKS: dict[str, tuple[Callable[[], ml_collections.ConfigDict], int]] = {
    "digits": (digits_network, 128),
    "DiT-S/2": (dit_s2_network, 4),
    "EDM CIFAR-10": (edm_cifar10_network, 2),
}
"""Configuration and default batch size by name."""


def configure(network: str, variant: str = "denoising") -> ml_collections.ConfigDict:
    """The configuration of a method on a network."""
    config = NETWORKS[network][0]()
    name, changes = VARIANTS.get(variant, ("denoising", {}))
    changes = changes(config) if callable(changes) else changes
    changes = {"method.name": name, "sampling.guidance_scale": 1.0, **changes}
    return experiment.resolve_config(wiring.override(config.to_dict(), changes))


@dataclasses.dataclass
class Update:
    """One compiled update and what it works on.

    Attributes:
        name: of the method, and of the phase if it has several.
        passes: forward passes that it is worth.
        bytes: arguments, results and temporaries of the program.
        compile_seconds: spent on compiling it.
        run: makes one update to its end.
    """

    name: str
    passes: float
    bytes: int
    compile_seconds: float
    run: Callable[[], None]


def random_batch(config: ml_collections.ConfigDict, batch_size: int) -> dict[str, jax.Array]:
    """Data of the network's shape, with noise for those methods that need it."""
    rng, model = np.random.default_rng(0), config.model
    shape = (batch_size, model.image_size, model.image_size, model.in_channels)
    batch = {"image": rng.standard_normal(shape, np.float32)}
    if config.method.name == "kd":
        batch["noise"] = rng.standard_normal(shape, np.float32)
    label = rng.integers(0, max(model.num_classes, 1), batch_size).astype(np.int32)
    batch["conditions"] = {"label": label}
    return jax.device_put(batch)


def prepare(network: str, variant: str, batch_size: int) -> list[Update]:
    """The compiled updates of a method, one a phase; they share one state."""
    config = configure(network, variant)
    method, key = experiment.build_method(config), jax.random.key(0)
    single = config.copy_and_resolve_references()
    with single.unlocked():
        single.model.second_time = "none"
    known = experiment.build_network(single)
    frozen = {name: jax.jit(known.init)(key) for name in method.frozen_names}
    carried = [jax.jit(method.init)(key, None, frozen)]
    batch = random_batch(config, batch_size)

    def prepare_phase(phase: str) -> Update:
        def update(state, batch, key, frozen):
            return method.update(state, batch, key, frozen, phase)

        started = time.perf_counter()
        program = jax.jit(update, donate_argnums=0).lower(carried[0], batch, key, frozen).compile()
        seconds = time.perf_counter() - started

        def run() -> None:
            carried[0], metrics = program(carried[0], batch, key, frozen)
            jax.block_until_ready((carried[0], metrics))

        flops = method.flops_of(phase) if len(method.phases) > 1 else method.flops_per_example
        return Update(
            variant if len(method.phases) == 1 else f"{variant}, {phase}",
            flops / known.flops_per_example,
            program_bytes(program),
            seconds,
            run,
        )

    return [prepare_phase(phase) for phase in method.phases]


def program_bytes(program: Any) -> int:
    """Device memory that a compiled program needs while it runs, its arguments included."""
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def timed(run: Callable[[], None]) -> float:
    """Seconds of one run after one that is not timed, which gets memory back that others took."""
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure_network(
    network: str, rounds: int, batch_size: int | None = None, variants: list[str] | None = None
) -> list[dict[str, Any]]:
    """Every method on one network, each in turns with denoising."""
    batch_size = batch_size or NETWORKS[network][1]
    (plain,) = prepare(network, "denoising", batch_size)
    plain.run()
    rows = [_row(network, batch_size, plain, plain, [], [])]
    for variant in variants or list(VARIANTS):
        print(f"measuring {network}, {variant} ...", file=sys.stderr, flush=True)
        updates = prepare(network, variant, batch_size)
        seconds: dict[str, list[float]] = {update.name: [] for update in updates}
        baseline = []
        for _ in range(rounds):
            baseline.append(timed(plain.run))
            for update in updates:
                seconds[update.name].append(timed(update.run))
        rows += [
            _row(network, batch_size, update, plain, seconds[update.name], baseline)
            for update in updates
        ]
        rows[0]["seconds"] += baseline
        del updates
        gc.collect()
        jax.clear_caches()
    rows[0]["median_seconds"] = statistics.median(rows[0]["seconds"])
    return rows


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """`measure_network` of all that the command line asks for, printed as it is done."""
    rows = []
    for network in args.networks:
        rows += measure_network(network, args.rounds, args.batch_size, args.methods)
        chosen = [row for row in rows if row["network"] == network]
        print(table(chosen), flush=True)
    return rows


def save_table(path: Path, rows: list[dict[str, Any]], more: list[str]) -> None:
    """Writes the tables as Markdown beside the JSON file `path`."""
    path.with_suffix(".md").write_text("\n".join([table(rows), *more]) + "\n")


def _row(network, batch_size, update, plain, seconds, baseline) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
    return {
        "network": network,
        "batch_size": batch_size,
        "method": update.name,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds) if seconds else 0.0,
        "time_over_denoising": statistics.median(ratios) if ratios else 1.0,
        "passes": update.passes,
        "passes_over_denoising": update.passes / plain.passes,
        "gib": update.bytes / 2**30,
        "memory_over_denoising": update.bytes / plain.bytes,
        "compile_seconds": update.compile_seconds,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of --case=distillation."""
    group = parser.add_argument_group("--case=distillation")
    group.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    group.add_argument("--methods", nargs="+", choices=list(VARIANTS), help="default: all")
    group.add_argument("--fastgen", type=Path, help="checkout of NVlabs/FastGen to compare with")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, one table a network."""
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        chosen = [row for row in rows if row["network"] == network]
        lines += [
            f"{network}, batch {chosen[0]['batch_size']}:",
            "",
            "| update | s | over denoising | forward passes | least, over denoising "
            "| time over least | GiB | over denoising |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['method']} | {row['median_seconds']:.3g} | {row['time_over_denoising']:.2f} "
            f"| {row['passes']:.2f} | {row['passes_over_denoising']:.2f} "
            f"| {row['time_over_denoising'] / row['passes_over_denoising']:.2f} "
            f"| {row['gib']:.2f} | {row['memory_over_denoising']:.2f} |"
            for row in chosen
        ]
        lines.append("")
    return "\n".join(lines)


def dmd2_student(batch_size: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """DMD2's update of the student on EDM's CIFAR-10 network, configured as FastGen's."""
    changes = {"method.name": "dmd2", **ADVERSARIAL, "method.dmd2.feature_indices": (0, 1, 2)}
    changes["model.dtype"] = "float32"  # as FastGen's
    config = edm_cifar10_network()
    config = experiment.resolve_config(wiring.override(config.to_dict(), changes))
    method, key = experiment.build_method(config), jax.random.key(0)
    frozen = {"teacher": jax.jit(method.teacher.denoiser.network.init)(key)}
    carried = [jax.jit(method.init)(key, None, frozen)]
    batch = random_batch(config, batch_size)

    def update(state, batch, key, frozen):
        key = jax.random.fold_in(key, state.step)
        return method.update(state, batch, key, frozen, "student")

    started = time.perf_counter()
    program = jax.jit(update, donate_argnums=0).lower(carried[0], batch, key, frozen).compile()
    facts = {
        "compile_seconds": time.perf_counter() - started,
        "flops": method.flops_of("student") * batch_size,
    }

    def run() -> None:
        carried[0], metrics = program(carried[0], batch, key, frozen)
        jax.block_until_ready((carried[0], metrics))

    return run, facts
