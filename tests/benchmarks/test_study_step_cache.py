"""Studies of one model on the same noise, end to end on a run of a few steps."""

import json

import numpy as np
import pytest

import same_noise
import study_quantization
import study_step_cache
from dit_jax import evaluation
from dit_jax.launch import train
from tests.launch.conftest import tiny_config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies") / "run"
    train.run(tiny_config(**{"training.num_steps": 4}), path)
    return path


@pytest.fixture(autouse=True)
def quick_judge(monkeypatch):
    # What the features are worth is not looked at here.
    settings = evaluation.ClassifierSettings(steps=10)
    monkeypatch.setattr(evaluation.ClassifierSettings, "for_images", lambda shape: settings)


SMALL = ("--num_images=100", "--batch_size=50")


def test_the_study_of_step_caches_writes_numbers_a_table_and_a_picture(workdir, tmp_path):
    out, kept = tmp_path / "records" / "cache", tmp_path / "kept"
    options = ("--thresholds", "0.3", "--orders", "0", "--timed", "4", "--steps=10", "--repeats=1")
    options += (f"--workdir={workdir}", f"--keep={kept}", f"--out={out}")
    study_step_cache.main([*SMALL, *options])
    record = json.loads(out.with_suffix(".json").read_text())
    plain, cached = record["rows"]
    assert plain["computed"] == 1 and plain["psnr"] is None and plain["speed"]["4"] == 1
    assert 0.2 <= cached["computed"] < 1 and len(cached["seconds"]["4"]) == 1
    assert cached["psnr"] is None or cached["psnr"] > 5
    assert "| 0.3 | 0 |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
    assert len(list(kept.glob("*/0-*.npz"))) == 4  # two ways, two batches


def test_the_study_of_quantisation_takes_a_trained_run(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_quantization, "STORED", ("fp8",))
    out = tmp_path / "fp8"
    options = (f"--workdir={workdir}", "--solver=euler", "--sampling_steps=2", f"--out={out}")
    study_quantization.main([*SMALL, *options])
    record = json.loads(out.with_suffix(".json").read_text())
    assert "training" not in record and set(record["sampling"]) == {"none", "fp8"}
    assert abs(record["sampling"]["fp8"]["frechet_change"]) < 0.1
    assert "| fp8 |" in out.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        study_quantization.main([f"--workdir={workdir}", "--steps=3", f"--out={out}"])
    assert "nothing is trained" in capsys.readouterr().err


def test_the_change_of_a_distance_and_its_error_are_those_of_pairs():
    class Classifier:
        fingerprint, dim = "x", 4
        definition = type("Definition", (), {"num_classes": 2})

    draw = np.random.default_rng(0).normal
    judge = same_noise.Judge(Classifier(), draw(size=(4000, 4)), 0.0)
    base = draw(0.5, 1, (1000, 4))
    assert judge.change(base, base) == (0.0, 0.0)
    changes = []
    for _ in range(30):
        noise = draw(size=(1000, 4))
        changes.append(judge.change(0.5 + 1.02 * noise, 0.5 + noise))
    found, errors = np.transpose(changes)
    assert 0.5 < np.mean(errors) / np.std(found) < 2
    other = judge.change(base + 0.2, base)
    assert other[0] > 10 * other[1] > 0
