"""Interrupted at any moment, training ends with the very bits of the uninterrupted run."""

import signal

import numpy as np
import pytest

from tests.launch import interruptions
from tests.launch.conftest import assert_same_curve, curve, run

STEPS = interruptions.num_steps()


@pytest.fixture(scope="module")
def uninterrupted(tiny_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    run("train", *interruptions.arguments(tiny_file, workdir, STEPS))
    return workdir


def test_killed_at_random_moments_training_gives_the_same_bits(tiny_file, uninterrupted, tmp_path):
    moments, phases = interruptions.draw_moments()
    command = interruptions.arguments(tiny_file, tmp_path, STEPS)
    for phase in phases:
        ended = interruptions.interrupt(command, phase, signal.SIGKILL, moments, STEPS)
        # After the last step it may have come to its end by itself.
        allowed = (-signal.SIGKILL, 0) if phase == "exit" else (-signal.SIGKILL,)
        assert ended.status in allowed, f"{phase}: {ended}"
        assert "Traceback" not in ended.err, f"{phase}: {ended}"
    run("train", *command)  # no lock of the killed keeps it out
    interruptions.assert_same_run(tmp_path, uninterrupted, STEPS)


def test_interrupted_at_random_moments_it_ends_with_130_and_the_same_bits(
    tiny_file, uninterrupted, tmp_path
):
    moments, phases = interruptions.draw_moments()
    command = interruptions.arguments(tiny_file, tmp_path, STEPS)
    for phase in phases:
        ended = interruptions.interrupt(command, phase, signal.SIGINT, moments, STEPS)
        done = phase == "exit" and "done: " in ended.out  # it may have come to its end by itself
        assert ended.status == 130 or (done and ended.status == 0), f"{phase}: {ended}"
        assert ended.err in ("interrupted\n", ""), f"{phase}: {ended}"
        if phase in ("step", "save"):
            assert "saved step" in ended.out and not ended.err, f"{phase}: {ended}"
    run("train", *command)
    interruptions.assert_same_run(tmp_path, uninterrupted, STEPS)


def test_eight_devices_give_the_curve_of_one(tiny_file, uninterrupted, tmp_path):
    steps = STEPS // 3
    out, _ = run("train", *interruptions.arguments(tiny_file, tmp_path, steps), devices=8)
    assert "8 x cpu" in out
    expected = {step: metrics for step, metrics in curve(uninterrupted).items() if step <= steps}
    # Devices sum over their part of a batch first, one device over all of it: every step rounds
    # otherwise, and the next begins from there. Allowed is float32's rounding once a step.
    assert_same_curve(expected, curve(tmp_path), steps * float(np.finfo(np.float32).eps))
    found = interruptions.saved_arrays(tmp_path, steps)
    key = interruptions.saved_arrays(uninterrupted, STEPS)["key"]
    np.testing.assert_array_equal(found["key"], key)
    assert int(found["state"]["step"]) == steps


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
