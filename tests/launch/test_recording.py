"""The loop that computes records: interrupted it saves, several processes write as one does."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.data.records import Field, Header
from dit_jax.interop.autoencoder_kl import save_autoencoder
from dit_jax.launch import extract_features, extraction, pairs, recording, train, write_pairs
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from tests.launch.conftest import ROOT, environment, tiny_config
from tests.launch.test_processes import finish, free_port
from tests.long import only_long

HEADER = Header("squares", {"x": Field((2,), "float32")}, {}, shard_size=6)
TOTAL = 23


def record(folder, *, on_batch=lambda number: None, total=TOTAL, header=HEADER):
    def batches(start):
        for first in range(start, total, 2):
            on_batch(first)
            yield jnp.arange(first, first + 2)

    def compute(numbers):
        return {"x": jnp.stack([numbers, numbers**2], axis=1)}

    return recording.record(
        folder,
        header,
        batches,
        compute,
        what="squaring",
        done="squared",
        unit="number",
        total=total,
        batch_size=2,
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_record_is_computed_and_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recording, "SECONDS_BETWEEN_REPORTS", 0.0)
    assert record(tmp_path).count == TOTAL
    x = np.concatenate([np.load(file) for file in sorted(tmp_path.glob("shard-*"))])
    np.testing.assert_array_equal(x, [[i, i**2] for i in range(TOTAL)])
    out = capsys.readouterr().out
    assert out.startswith("squaring\n  on ") and "ETA" in out and "numbers/s" in out
    assert "squared 4/23" in out and "squared 23/23" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [2, 8])
def test_a_signal_saves_and_the_same_call_goes_on(tmp_path, capsys, number, at):
    record(tmp_path / "whole")

    def interrupt(first):
        if first == at:
            os.kill(os.getpid(), number)

    with pytest.raises(recording.StoppedError) as stopped:
        record(tmp_path / "cut", on_batch=interrupt)
    assert stopped.value.signal == number
    out = capsys.readouterr().out
    # The batch under way is finished; all that was computed is kept, full shard or not.
    assert f"saved {at + 2}/{TOTAL}" in out
    seen = []
    record(tmp_path / "cut", on_batch=seen.append)
    assert f"continuing after {at + 2} numbers" in capsys.readouterr().out
    assert seen[0] == at + 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_signal_in_the_last_batch_is_too_late(tmp_path):
    def interrupt(first):
        if first == TOTAL - 1:
            os.kill(os.getpid(), signal.SIGINT)

    assert record(tmp_path, on_batch=interrupt).count == TOTAL


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    record(tmp_path / "a", total=8)
    (tmp_path / "a" / "header.json").rename(tmp_path / "a" / "unfinished.json")
    with pytest.raises(ValueError, match="has 8 numbers already, written for another number"):
        record(tmp_path / "a", total=6)
    usage = dataclasses.make_dataclass("Usage", ["free"])(100)
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"100 bytes free; 23 numbers need 184 bytes"):
        record(tmp_path / "b")


def start_two(command, *arguments):
    """Two processes of four devices each."""
    address = f"localhost:{free_port()}"
    return [
        subprocess.Popen(
            [
                *(sys.executable, f"launch/{command}.py", *map(str, arguments)),
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


def finished(processes):
    texts = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], texts
    return texts


@only_long  # as latents are extracted, below
def test_two_processes_write_the_pairs_of_one(tmp_path):
    teacher = tmp_path / "teacher"
    train.run(tiny_config(**{"training.num_steps": 2}), teacher)
    arguments = [f"--workdir={teacher}", "--solver=euler", "--steps=2", "--num_pairs=1001"]
    arguments += ["--batch_size=8", "--shard_size=16"]
    whole, two = tmp_path / "whole", tmp_path / "two"
    pairs.run(write_pairs.parse_arguments([*arguments, f"--out={whole}"]))
    arguments.append(f"--out={two}")
    processes = start_two("write_pairs", *arguments)
    deadline = time.monotonic() + 120
    while not list(two.glob("shard-00001.*")) and processes[0].poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    processes[1].send_signal(signal.SIGTERM)
    texts = finish(processes)
    assert [process.returncode for process in processes] == [143, 143], texts
    assert "saved" in texts[0] and "SIGTERM" in texts[1] and "saved" not in texts[1]
    first, second = finished(start_two("write_pairs", *arguments))
    assert "continuing after" in first and "done: 1001 pairs" in first and "done" not in second
    assert contents(two) == contents(whole)


def test_two_processes_extract_the_latents_of_one(tmp_path):
    config = AutoencoderKLConfig(
        in_channels=1,
        scaling_factor=1.0,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    autoencoder = AutoencoderKL(config)
    save_autoencoder(tmp_path / "vae", autoencoder, autoencoder.init(jax.random.key(0)))
    arguments = ["--data=digits", "--split=test", f"--vae={tmp_path / 'vae'}"]
    arguments += ["--kind=samples", "--batch_size=64", "--shard_size=128"]
    given = [*arguments, f"--out={tmp_path / 'whole'}"]
    extraction.run(extract_features.parse_arguments(given))
    first, second = finished(start_two("extract_features", *arguments, f"--out={tmp_path / 'two'}"))
    assert "encoded 355/355" in first and "encoded" not in second
    assert contents(tmp_path / "two" / "test") == contents(tmp_path / "whole" / "test")
