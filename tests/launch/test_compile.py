"""Compiled ahead of time, a fresh process samples without tracing or compiling."""

import subprocess
import sys

import numpy as np
import pytest

from dit_jax.evaluation import load_adm_npz
from dit_jax.programs import read_header
from tests.launch.conftest import ROOT, environment, run
from tests.plugin import needs_plugin

# Prints what JAX traces and compiles from the moment at which the command says what it will do.
WATCHED = """
import sys
import jax
from dit_jax.launch import sample, sampling

describe, events, started = sampling.describe, [], []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **__: started and events.append(name)
)
sampling.describe = lambda *args: started.append(1) or describe(*args)
sample.main(sys.argv[1:])
print("EVENTS", sorted({name for name in events if "compil" in name or "trac" in name}))
"""


@pytest.fixture(scope="module")
def trained(tiny_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    run("train", f"--config={tiny_file}", f"--workdir={workdir}", "--config.training.num_steps=4")
    return workdir


def watched(*arguments):
    """The output of sample.py, and the events while it samples."""
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "env": environment(), "cwd": ROOT}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    out, _, events = done.stdout.rpartition("EVENTS ")
    return out, events.strip()


def test_a_fresh_process_starts_at_once(trained, tmp_path):
    folder, chosen = tmp_path / "compiled programs", ("--num_images=6", "--guidance_scale=1.5")
    out, _ = run("compile", f"--workdir={trained}", *chosen, f"--programs={folder}")
    assert f"compiling 'sample': {folder} holds no program 'sample'" in out
    assert f"samples of 6 images at once start from {folder}" in out

    samples = tmp_path / "a.npz"
    model = (f"--workdir={trained}", f"--programs={folder}")
    out, events = watched(*model, *chosen, "--seed=3", f"--out={samples}")
    assert "'sample' is ready" in out and events == "[]"

    # The same images as without, and another scale, seed or labels need no other program.
    run("sample", f"--workdir={trained}", *chosen, "--seed=3", f"--out={tmp_path / 'b.npz'}")
    assert np.array_equal(load_adm_npz(samples)[0], load_adm_npz(tmp_path / "b.npz")[0])
    more = ("--labels", "7", "--num_images=6", "--guidance_scale=4", f"--out={tmp_path / 'c.png'}")
    out, events = watched(*model, *more)
    assert "'sample' is ready" in out and events == "[]"
    (path,) = folder.iterdir()

    out, events = watched(*model, *chosen, "--steps=4", f"--out={tmp_path / 'd.png'}")
    assert "is for times float32[4] instead of float32[5]" in out and "compile" in events

    path.write_bytes(path.read_bytes()[:-9])
    _, error = run("sample", *model, *chosen, f"--out={tmp_path / 'e.png'}", status=2)
    assert "is damaged" in error and not (tmp_path / "e.png").exists()
    _, error = run("sample", f"--workdir={trained}", f"--programs={path}", "--out=x.png", status=2)
    assert f"--programs={path} is a file: give a folder" in error


@needs_plugin
def test_for_gpus_that_are_not_here(trained, tmp_path):
    model = (f"--workdir={trained}", "--num_images=6", f"--programs={tmp_path}")
    shared = ("--parallel=synchronous", "--patch_devices=4", "--guidance_scale=1.5")
    out, _ = run("compile", *model, *shared, "--accelerator=h200", "--devices=4")
    assert "compiling 'sample' for 4 x NVIDIA H200" in out and "never run there" in out
    (path,) = tmp_path.iterdir()
    identity, _ = read_header(path)
    assert identity.accelerator["devices"] == "4"
    assert identity.accelerator["device"].startswith("NVIDIA H200")
    assert "ParallelTransformer" in identity.compiled_in["sampler"]
    out, _ = run("compile", *model, *shared, "--accelerator=h200", "--devices=4")
    assert f"'sample' is there: {path}" in out  # found by a process of its own
    out, _ = run("sample", *model, "--guidance_scale=1.5", f"--out={tmp_path / 'a.png'}")
    assert "is for device NVIDIA H200" in out and "instead of cpu" in out


def test_what_does_not_go_together(trained, tmp_path):
    model = (f"--workdir={trained}", f"--programs={tmp_path}")
    _, error = run("compile", *model, "--devices=2", status=2)
    assert "--devices=2 is of --accelerator" in error
    _, error = run("compile", *model, "--accelerator=h1000", status=2)
    assert "invalid choice: 'h1000'" in error
