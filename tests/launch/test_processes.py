"""Several processes on one machine: trained, killed, resumed, stopped and disagreeing."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.launch.conftest import ROOT, curve, environment, run

OPTIONS = [
    "--config.mesh.fsdp=8",
    "--config.training.log_every=1",
    "--config.training.checkpoint_every=2",
]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start_two(tiny_file, workdir, *arguments, of_each=((), ())):
    """Two processes of four devices each."""
    address = f"localhost:{free_port()}"
    return [
        subprocess.Popen(
            [
                *(sys.executable, "launch/train.py", f"--config={tiny_file}"),
                *(f"--workdir={workdir}", *OPTIONS, *arguments, *of_each[i]),
                *(f"--coordinator_address={address}", "--num_processes=2", f"--process_id={i}"),
            ],
            cwd=ROOT,
            env=environment(4),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def finish(processes, timeout=120):
    """What they printed; none may be left."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}:\n{''.join(lines[-40:])}")


def saved(workdir, step, devices=None):
    """The arrays of a checkpoint, restored by this process, on so many devices if told."""
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        if devices is None:
            return jax.tree.map(np.asarray, checkpointer.restore(path))
        mesh = jax.make_mesh((devices,), ("fsdp",), devices=jax.devices()[:devices])

        def placed(leaf):
            divides = leaf.shape and leaf.shape[-1] % devices == 0 and leaf.dtype == np.float32
            axes = (*[None] * (len(leaf.shape) - 1), "fsdp") if divides else ()
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        target = jax.tree.map(placed, checkpointer.metadata(path).item_metadata.tree)
        return jax.tree.map(np.asarray, checkpointer.restore(path, target))


@pytest.fixture(scope="module")
def killed_and_resumed(tiny_file, tmp_path_factory):
    """A workdir of two processes: one was killed, the other ended; both resumed and finished."""
    workdir = tmp_path_factory.mktemp("processes")
    long = "--config.training.num_steps=10000"
    processes = start_two(tiny_file, workdir, long)
    read_until(processes[0], "step     4/")
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    first, _ = finish(processes)
    seconds = time.monotonic() - killed
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    end = steps[-1] + 4
    previews = (f"--config.training.preview_every={end}", "--config.training.preview_images=8")
    processes = start_two(tiny_file, workdir, f"--config.training.num_steps={end}", *previews)
    texts = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], texts
    return workdir, end, (processes[0].returncode, first, seconds), texts


def test_when_one_process_is_killed_the_other_ends_with_a_message(killed_and_resumed):
    _, _, (_, text, seconds), _ = killed_and_resumed
    assert seconds < 60
    assert "process 0 of 2 ends because" in text or "another task died" in text, text[-3000:]


def test_both_resume_and_only_the_first_writes_and_tells(killed_and_resumed):
    workdir, end, _, (first, second) = killed_and_resumed
    assert "continuing from step" in first and "8 x cpu" in first and "done: step" in first
    assert "step" not in second.replace("Gloo", "")
    lines = curve(workdir)
    assert sorted(lines) == list(range(1, end + 1))
    assert (workdir / "previews" / f"step_{end:08d}.png").exists()
    assert "12.5% (on 8 devices" in (workdir / "placement.txt").read_text()


def test_its_checkpoint_is_the_same_bits_on_one_device_and_on_eight(killed_and_resumed):
    workdir, end, _, _ = killed_and_resumed
    one, eight = saved(workdir, end, 1), saved(workdir, end, 8)
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_one_process_samples_and_goes_on_with_the_checkpoint_of_two(
    tiny_file, killed_and_resumed, tmp_path
):
    workdir, end, _, _ = killed_and_resumed
    out, _ = run("sample", f"--workdir={workdir}", "--num_images=2", f"--out={tmp_path / 'x.png'}")
    assert f"step {end}" in out
    out, _ = run(
        "train",
        *(f"--config={tiny_file}", f"--workdir={workdir}"),
        *("--config.training.log_every=1", f"--config.training.num_steps={end + 2}"),
    )
    assert f"continuing from step {end}" in out and sorted(curve(workdir))[-1] == end + 2


def test_sigterm_on_one_process_stops_both_at_the_same_step(tiny_file, tmp_path):
    processes = start_two(tiny_file, tmp_path, "--config.training.num_steps=10000")
    read_until(processes[0], "step     2/")
    os.kill(processes[1].pid, signal.SIGTERM)
    texts = finish(processes)
    assert [process.returncode for process in processes] == [143, 143], texts
    last = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert f"saved step {last} in" in texts[0] and "SIGTERM" in texts[1]


def test_processes_that_disagree_are_an_error_in_both_with_both_hashes(tiny_file, tmp_path):
    differ = (("--config.seed=1",), ("--config.seed=2",))
    processes = start_two(tiny_file, tmp_path / "run", of_each=differ)
    texts = finish(processes)
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 2
        assert "error: the processes do not agree on the configuration" in text
        assert "  process 0: " in text and "  process 1: " in text
    assert not (tmp_path / "run").exists()


def test_half_of_the_flags_of_several_processes_is_an_error(tiny_file, tmp_path):
    _, err = run(
        "train",
        *(f"--config={tiny_file}", f"--workdir={tmp_path}", "--num_processes=2"),
        status=2,
    )
    assert "--coordinator_address and --process_id missing" in err
