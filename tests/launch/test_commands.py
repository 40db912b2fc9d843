"""Train, sample and evaluate end to end, as separate commands."""

import json
import shlex
import signal

import numpy as np
import pytest
from PIL import Image

from dit_jax.evaluation import load_adm_npz
from tests.launch.conftest import ROOT, curve, run, start


@pytest.fixture(scope="module")
def trained(tiny_file, tmp_path_factory):
    """A finished run's workdir and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "a tiny run's"
    out, _ = run(
        "train",
        f"--config={tiny_file}",
        f"--workdir={workdir}",
        "--config.training.preview_every=8",
        "--config.training.preview_images=20",
    )
    return workdir, out


def test_training_reports_and_leaves_everything_in_the_workdir(trained):
    workdir, out = trained
    assert "blocks/attn/qkv/kernel" in out and "1442 examples of digits" in out
    assert "step 12/12" in out and "steps/s" in out and "ETA" in out
    assert f"into {workdir}\n" in out and "on 1 x cpu, JAX" in out  # before anything long
    assert "done: step 12, " in out
    hint = out.splitlines()[-1].removeprefix("next: ")
    sample = ["python", "launch/sample.py", f"--workdir={workdir}", "--out=samples.png"]
    assert shlex.split(hint) == sample
    names = {path.name for path in workdir.iterdir()}
    files = {"config.json", "class_names.json", "metrics.jsonl"}
    assert names == {"checkpoints", "previews", *files}
    assert sorted(curve(workdir)) == [4, 8, 12]
    assert {"loss", "gradient_norm", "steps_per_second", "images_per_second"} < set(
        curve(workdir)[12]
    )
    previews = sorted(path.name for path in (workdir / "previews").iterdir())
    assert previews == ["step_00000008.png", "step_00000012.png"]
    assert Image.open(workdir / "previews" / previews[0]).size[0] >= 8
    assert f"samples of step 8: {workdir / 'previews' / previews[0]}\n" in out
    checkpoints = {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    assert checkpoints == {"8", "12"}


def test_training_again_has_nothing_to_do(trained, tiny_file):
    workdir, _ = trained
    before = (workdir / "metrics.jsonl").read_bytes()
    out, _ = run(
        "train",
        f"--config={tiny_file}",
        f"--workdir={workdir}",
        "--config.training.preview_every=8",
        "--config.training.preview_images=20",
    )
    assert "already at step 12 of 12" in out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_sample_and_evaluate_need_only_the_workdir(trained, tmp_path):
    workdir, _ = trained
    before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    out, _ = run("sample", f"--workdir={workdir}", "--num_images=20", f"--out={tmp_path / 'a.npz'}")
    assert "20 images of ema_0.9, step 12" in out
    images, labels = load_adm_npz(tmp_path / "a.npz")
    assert images.shape == (20, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 10
    np.testing.assert_array_equal(labels, np.arange(20) % 10)
    assert before == {
        path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")
    }

    record = tmp_path / "metrics.json"
    picture = tmp_path / "picture.png"
    out, _ = run(
        "evaluate",
        f"--workdir={workdir}",
        "--num_images=70",
        f"--out={record}",
        f"--picture={picture}",
        flags="--xla_backend_optimization_level=1",  # its classifier trains for thousands of steps
    )
    assert "Fréchet distance" in out and str(record) in out and picture.exists()
    scores = json.loads(record.read_text())
    assert scores["picture"] == str(picture) and f"picture: {picture}" in out
    assert scores["scores"]["frechet_distance"] > 0
    assert scores["scores"]["classifier_test_accuracy"] > 0.9
    assert scores["provenance"]["step"] == 12 if "provenance" in scores else True


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_help(command):
    out, err = run(command, "--help")
    text = out + err
    assert "--workdir" in text and f"python launch/{command}.py" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.model.dept=3"],
            "unknown key config.model.dept; did you mean config.model.dit.depth?",
        ),
        (["--noconfig.model.learn_sigm"], "did you mean config.model.dit.learn_sigma?"),
        (
            ["--config.model.dit.depth=deep"],
            "--config.model.dit.depth=deep: expected a whole number",
        ),
        (["--wrokdir=x"], "workdir"),
        (["extra"], "unexpected arguments: extra"),
    ],
)
def test_mistyped_options_end_with_a_message(tiny_file, tmp_path, arguments, message):
    _, err = run(
        "train", f"--config={tiny_file}", f"--workdir={tmp_path / 'run'}", *arguments, status=2
    )
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_missing_options_and_files(tiny_file, tmp_path):
    _, err = run("train", f"--workdir={tmp_path}", status=2)
    assert "--config is missing" in err and "Traceback" not in err
    # Without --workdir a run goes to one of the experiment's name; latents are explained.
    out, err = run("train", "--config=configs/dit_xl2.py", status=2)
    assert f"no --workdir given: {ROOT / 'runs/dit_xl2'}\n" in out
    assert "config.data.latents.path is empty" in err and "launch/extract_features.py" in err
    assert not (ROOT / "runs/dit_xl2").exists()
    _, err = run("train", "--config=configs/none.py", f"--workdir={tmp_path}", status=2)
    assert "--config=configs/none.py does not exist" in err and "Traceback" not in err


def test_a_signal_saves_and_says_how_to_continue(tiny_file, tmp_path):
    arguments = [f"--config={tiny_file}", f"--workdir={tmp_path}", "--config.training.log_every=1"]
    step = 0
    for number in (signal.SIGTERM, signal.SIGINT):  # the second in the middle of what it continues
        process = start("train", *arguments, "--config.training.num_steps=1000000")
        head = []
        for line in process.stdout:
            head.append(line)
            if line.startswith("step"):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + number, err
        assert f"{number.name}: saving" in out and "run the same command to continue" in out
        assert (f"continuing from step {step}" in "".join(head)) == (step > 0)
        step = int(out.split("saved step ")[1].split()[0])
        assert (tmp_path / "checkpoints" / str(step)).is_dir()
    # (number of steps may change: it matters to nothing but the end)
    out, _ = run("train", *arguments, f"--config.training.num_steps={step + 2}")
    assert f"continuing from step {step}" in out and f"done: step {step + 2}" in out
