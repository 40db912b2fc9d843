import json
import time

import pytest

from dit_jax.training import metrics
from dit_jax.training.metrics import JsonLinesWriter, Throughput, format_duration, peak_flops


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_are_appended_and_trimmed_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    for step in (2, 4, 6):
        writer.write_scalars(step, {"loss": step / 2})
    assert read(path)[1] == {"step": 4, "loss": 2.0}  # on disk at once
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    resumed = JsonLinesWriter(path, resumed_at=4)
    resumed.write_scalars(6, {"loss": -1.0, "mfu": float("nan")})
    assert read(path) == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 2.0},
        {"step": 6, "loss": -1.0},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLinesWriter(path).write_scalars(2, {"loss": 1.0})
    JsonLinesWriter(path).write_scalars(1, {"loss": 3.0})
    assert read(path) == [{"step": 1, "loss": 3.0}]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3599, "59m59s"), (8000, "2h13m"), (-1, "0s")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_peaks_are_found_by_the_longest_name():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("cpu") is None and peak_flops() is None


def test_throughput_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e4)
    clock = Throughput(batch_size=8, flops_per_example=100, num_devices=2)
    now[0] = 50.0  # compiling
    clock.resume()
    for _ in range(4):
        now[0] += 0.5
        clock.step()
    assert clock.window() == {
        "steps_per_second": 2.0,
        "images_per_second": 16.0,
        "model_tflops_per_second": 1600 / 1e12,
        "mfu": 0.08,
    }
    clock.step()
    now[0] += 0.25
    clock.pause()
    now[0] += 100.0  # saving
    clock.resume()
    assert clock.window() == {}
    now[0] += 1.0
    clock.step()
    assert clock.window()["steps_per_second"] == 1.0
    assert clock.overall() == (3.25, 6 / 3.25)


def test_create_writers_makes_what_is_asked(tmp_path, monkeypatch):
    writers = metrics.create_writers(tmp_path, tensorboard=False)
    assert [type(writer) for writer in writers] == [JsonLinesWriter]
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        metrics.create_writers(tmp_path, tensorboard=False, wandb=True)
