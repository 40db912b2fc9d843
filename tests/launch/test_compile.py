"""Compiled ahead of time, a fresh process samples without tracing or compiling."""

import subprocess
import sys

import numpy as np
import pytest

from dit_jax.evaluation import load_adm_npz
from tests.launch.conftest import ROOT, environment, run

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
