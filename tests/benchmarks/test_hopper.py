"""The suite for a GPU: which commands there are, and what is kept of them."""

import json
import sys

import pytest

import hopper
from tests.data.test_jpeg_npz import noise, write_npz
from tests.long import only_long


def commands(*options, capsys):
    hopper.main([*options, "--list"])
    return capsys.readouterr().out.splitlines()


def test_the_commands_are_known_before_anything_runs(tmp_path, capsys):
    out = f"--out={tmp_path / 'h'}"
    lines = commands(out, capsys=capsys)
    assert ["fp8" in line for line in lines] == [False, True, False]
    assert all("--torch_compile" in line for line in lines[:2])
    lines = commands(out, "--suite=cifar10", "--data=x_{split}.npz", capsys=capsys)
    assert sum("launch/train.py" in line for line in lines) == 3
    outs = [line.split("--out=")[1] for line in lines if "launch/evaluate.py" in line]
    assert len(set(outs)) == 4  # none takes another's place
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite=cifar10"], "belong together"),
        (["--data=x_{split}.npz"], "belong together"),
        (["--suite=cifar10", "--data=x.npz"], "expected {split}"),
        (["--steps=3"], "is of --suite=cifar10"),
        (["--suite=cifar10", "--data=x_{split}.npz", "--predicted=p"], "is of --suite=speed"),
        (["--wheels=nowhere"], "holds no .whl"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        hopper.parse_arguments([f"--out={tmp_path / 'h'}", *options])
    assert message in capsys.readouterr().err


def test_a_record_is_kept_after_every_measurement(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "h"
    result = {"results": [{"median_seconds": {"jax": 0.5}}]}
    write = f"open({str(folder / 'a.json')!r}, 'w').write({json.dumps(result)!r})"
    measurements = [
        hopper.Measurement("train", ("-c", write), "a.json", "train"),
        hopper.Measurement("broken", ("-c", "raise SystemExit(3)")),
    ]
    monkeypatch.setattr(hopper, "speed", lambda folder, small: measurements)
    (tmp_path / "train.json").write_text(json.dumps({"predicted": {"seconds": 0.4}}))
    with pytest.raises(SystemExit, match="broken"):
        hopper.main([f"--out={folder}", f"--predicted={tmp_path}"])
    found = json.loads((tmp_path / "h.json").read_text())
    assert found["device"]["python"] == sys.version.split()[0]
    assert found["measurements"]["train"]["error"] == pytest.approx(0.2)
    assert found["measurements"]["broken"]["status"] == 3
    with pytest.raises(SystemExit, match="train, broken"):
        hopper.main([f"--out={folder}", "--limit=1"])
    found = json.loads((tmp_path / "h.json").read_text())
    assert "left out" in found["measurements"]["train"]["status"]


@only_long
def test_both_suites_run_in_small(tmp_path):
    hopper.main([f"--out={tmp_path / 'h'}", "--small"])
    for split, count in (("train", 400), ("test", 200)):
        labels = [n % 10 for n in range(count)]
        write_npz(tmp_path / f"c_{split}.npz", noise(count, 32), labels)
    data = f"--data={tmp_path}/c_{{split}}.npz"
    small = ["--suite=cifar10", "--small", "--steps=2", data]
    hopper.main([f"--out={tmp_path / 'c'}", *small])
    found = json.loads((tmp_path / "c.json").read_text())["measurements"]
    for name in ("uniform", "speed", "student", "student, 4 steps"):
        assert found[f"evaluate {name}"]["record"]["scores"]["frechet_distance"] > 0
