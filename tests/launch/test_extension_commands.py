"""Commands in processes of their own know what the environment names."""

import json

from tests.launch.conftest import TINY, run


def test_a_run_with_a_solver_from_outside(tmp_path, monkeypatch):
    config, workdir = tmp_path / "mine.py", tmp_path / "run"
    config.write_text(TINY.replace('solver="euler"', 'solver="overshoot"'))
    train = ("train", f"--config={config}", f"--workdir={workdir}", "--config.training.num_steps=2")
    module = "tests.toy.overshoot:register"
    monkeypatch.setenv("DIT_JAX_EXTENSIONS", module)
    out, _ = run(*train, "--config.sampling.overshoot.factor=1.5")
    assert f"next: DIT_JAX_EXTENSIONS={module} python launch/sample.py" in out
    assert json.loads((workdir / "extensions.json").read_text()) == [module]
    sample = ("sample", f"--workdir={workdir}", "--num_images=2")
    out, _ = run(*sample, f"--out={tmp_path / 'a.png'}")
    assert "by overshoot, 3 steps" in out
    _, error = run(*train, "--config.sampling.overshoot.factor=-1", status=2)
    assert "config.sampling.overshoot.factor=-1.0: expected above 0" in error

    monkeypatch.delenv("DIT_JAX_EXTENSIONS")
    _, error = run(*sample, f"--out={tmp_path / 'b.png'}", status=2)
    assert "unknown key config.sampling.overshoot.factor" in error
    assert f"set DIT_JAX_EXTENSIONS={module}" in error
    monkeypatch.setenv("DIT_JAX_EXTENSIONS", "tests.toy.nothing")
    _, error = run(*sample, f"--out={tmp_path / 'b.png'}", status=2)
    assert "there is no module tests.toy.nothing; is its folder on PYTHONPATH?" in error
