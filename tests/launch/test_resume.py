"""Interrupted at any moment, training ends with the very bits of the uninterrupted run."""

import os
import random
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.launch.conftest import assert_same_curve, curve, run, start

NUM_KILLS = int(os.environ.get("DIT_JAX_KILLS", "3"))
STEPS = 30 * (NUM_KILLS + 1)  # none may come to its end before it is killed


def arguments(tiny_file, workdir):
    return [
        f"--config={tiny_file}",
        f"--workdir={workdir}",
        f"--config.training.num_steps={STEPS}",
        "--config.training.checkpoint_every=3",
        "--config.training.log_every=1",
        "--config.data.horizontal_flip=True",
        "--config.training.num_microbatches=2",
    ]


def saved_arrays(workdir):
    """Everything in the last checkpoint: parameters, averages, optimizer, step and key."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / str(STEPS) / "state")


@pytest.fixture(scope="module")
def uninterrupted(tiny_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    run("train", *arguments(tiny_file, workdir))
    return workdir


def test_killed_at_random_moments_training_gives_the_same_bits(
    tiny_file, uninterrupted, tmp_path, record_property
):
    seed = int(os.environ.get("DIT_JAX_KILL_SEED", time.time_ns() % 10_000))
    record_property("seed", seed)
    print("seed", seed)
    moments = random.Random(seed)
    command = arguments(tiny_file, tmp_path)
    reached = 0
    for _ in range(NUM_KILLS):
        # From right after compilation on; one checkpoint or another is nearly always being written.
        wait_for = moments.randint(reached, reached + 15)
        process = start("train", *command)
        for line in process.stdout:
            if line.startswith("compiled"):
                step = reached
            elif line.startswith("step"):
                step = int(line.split("/")[0].split()[1])
            else:
                continue
            if step >= wait_for:
                time.sleep(moments.uniform(0, 0.05))
                break
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        names = (path.name for path in (tmp_path / "checkpoints").iterdir())
        reached = max((int(name) for name in names if name.isdigit()), default=0)
    run("train", *command)

    expected, found = saved_arrays(uninterrupted), saved_arrays(tmp_path)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert_same_curve(curve(uninterrupted), curve(tmp_path), 0)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]


def test_eight_devices_give_the_curve_of_one(tiny_file, uninterrupted, tmp_path):
    out, _ = run("train", *arguments(tiny_file, tmp_path), devices=8)
    assert "8 x cpu" in out
    assert_same_curve(curve(uninterrupted), curve(tmp_path), 1e-5)
    expected, found = saved_arrays(uninterrupted), saved_arrays(tmp_path)
    np.testing.assert_array_equal(found["key"], expected["key"])
    assert int(found["state"]["step"]) == STEPS


def test_a_run_goes_on_and_is_sampled_on_another_number_of_devices(
    tiny_file, uninterrupted, tmp_path
):
    one, eight = tmp_path / "one.npz", tmp_path / "eight.npz"
    options = [f"--workdir={uninterrupted}", "--num_images=12", "--guidance_scale=2"]
    run("sample", *options, f"--out={one}")
    run("sample", *options, f"--out={eight}", devices=8)
    with np.load(one) as first, np.load(eight) as second:
        difference = np.abs(first["arr_0"].astype(int) - second["arr_0"])
    assert difference.max() <= 1
