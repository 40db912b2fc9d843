"""The study of step caches, end to end on a run of a few steps."""

import json

import study_step_cache
from dit_jax import evaluation
from dit_jax.launch import train
from tests.launch.conftest import tiny_config


def test_the_study_writes_numbers_and_a_table(tmp_path, monkeypatch):
    workdir, out = tmp_path / "run", tmp_path / "records" / "cache"
    train.run(tiny_config(**{"training.num_steps": 4}), workdir)
    # What the features are worth is not looked at here.
    settings = evaluation.ClassifierSettings(steps=10)
    monkeypatch.setattr(evaluation.ClassifierSettings, "for_images", lambda shape: settings)
    small = ("--num_images=100", "--batch_size=50", "--steps=10", "--repeats=1", "--orders", "0")
    options = (f"--workdir={workdir}", f"--out={out}", "--thresholds", "0.3", *small)
    study_step_cache.main([*map(str, options)])
    record = json.loads(out.with_suffix(".json").read_text())
    plain, cached = record["rows"]
    assert plain["computed"] == 1 and plain["psnr"] is None and plain["speed"] == 1
    assert 0.2 <= cached["computed"] < 1 and cached["seconds"] > 0
    assert cached["psnr"] is None or cached["psnr"] > 5
    assert "| 0.3 | 0 |" in out.with_suffix(".md").read_text()
