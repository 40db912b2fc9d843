"""Runs that are sent a signal at a moment of their life, and what must be left of them."""

import dataclasses
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.launch.conftest import ROOT, assert_same_curve, curve, environment
from tests.long import LONG

# Importing and opening; compiling; between steps; while a checkpoint is written; after the last.
PHASES = ("start", "compile", "step", "save", "exit")
CHECKPOINT_EVERY = 3


def draw_moments(few: int = 2, many: int = 10) -> tuple[random.Random, list[str]]:
    """Dice and the phases to interrupt, the last of them the run's end; the seed is printed."""
    seed = int(os.environ.get("DIT_JAX_SEED", time.time_ns() % 10_000))
    moments, count = random.Random(seed), many if LONG else few
    rounds = [moments.sample(PHASES[:-1], len(PHASES) - 1) for _ in range(count)]
    phases = [*itertools.chain.from_iterable(rounds)][: count - 1]
    phases.append("exit")
    print(f"DIT_JAX_SEED={seed}: interrupted in {', '.join(phases)}")
    return moments, phases


def num_steps(few: int = 2, many: int = 10) -> int:
    """So long that no run comes to its end before it is interrupted."""
    return 30 * (1 + (many if LONG else few))


def arguments(config_file, workdir, steps: int) -> list[str]:
    """A run of many short steps and many checkpoints, with everything random in it."""
    return [
        f"--config={config_file}",
        f"--workdir={workdir}",
        f"--config.training.num_steps={steps}",
        f"--config.training.checkpoint_every={CHECKPOINT_EVERY}",
        "--config.training.log_every=1",
        "--config.data.horizontal_flip=True",
        "--config.training.num_microbatches=2",
    ]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How an interrupted command ended."""

    status: int
    out: str
    err: str


def interrupt(
    command: list[str], phase: str, number: signal.Signals, moments: random.Random, steps: int
) -> Ended:
    """Starts launch/train.py, waits for a phase and a random moment in it, and sends a signal.

    Args:
        command: arguments of launch/train.py.
        phase: one of `PHASES`.
        number: the signal.
        moments: the dice.
        steps: of the whole run.
    """
    process = subprocess.Popen(
        [sys.executable, "launch/train.py", *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    printed = []
    if phase == "start":
        if number != signal.SIGKILL:
            wait_until_it_listens(process.pid)
        time.sleep(moments.uniform(0.05, 3))
    else:
        _wait(process.stdout, printed, phase, moments, steps)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return Ended(process.returncode, "".join(printed) + out, err)


def wait_until_it_listens(pid: int) -> None:
    """Returns when a command has its handlers: before, while Python itself starts, it cannot."""
    status, caught = pathlib.Path(f"/proc/{pid}/status"), 0
    while not caught >> (signal.SIGTERM - 1) & 1:  # which Python leaves alone
        time.sleep(0.01)
        lines = status.read_text().splitlines()
        caught = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)


def _wait(stdout, printed: list[str], phase: str, moments: random.Random, steps: int) -> None:
    """Reads lines until `phase` has come, then lets a random part of it pass."""
    wanted, delay = None, {"compile": 0.8, "step": 0.05, "save": 0.01, "exit": 0.5}[phase]
    for line in stdout:
        printed.append(line)
        if phase == "compile" and "workdir" in line:
            break
        if not line.startswith("step"):
            continue
        step = int(line.split("/")[0].split()[1])
        if wanted is None:
            wanted = steps if phase == "exit" else step + moments.randint(0, 12)
        if step >= wanted and (phase != "save" or step % CHECKPOINT_EVERY == 0):
            break
    time.sleep(moments.uniform(0, delay))


def saved_arrays(workdir, step: int):
    """Everything in a checkpoint: parameters, averages, optimizer, step and key."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / str(step) / "state")


def assert_same_run(workdir, uninterrupted, steps: int) -> None:
    """Both ended with the same bits and the same metrics, and nothing half-written is left."""
    expected, found = saved_arrays(uninterrupted, steps), saved_arrays(workdir, steps)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert_same_curve(curve(uninterrupted), curve(workdir), 0)
    left = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in left), left
