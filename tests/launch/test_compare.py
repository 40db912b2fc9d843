"""launch/compare.py, on files and on a model under two ways of sampling."""

import json
import os

import numpy as np
import pytest

from dit_jax import evaluation
from dit_jax.launch import compare, train
from tests.launch.conftest import tiny_config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A trained run; few steps, as only sampling is looked at."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny_config(**{"training.num_steps": 2, "training.checkpoint_every": 2})
    train.run(config, directory)
    return directory


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """Paths of 80 images of digit size and of the same with noise."""
    folder = tmp_path_factory.mktemp("sets")
    random = np.random.default_rng(0)
    a = random.integers(0, 256, (80, 8, 8, 1), dtype=np.uint8)
    b = np.clip(a + random.normal(0, 4, a.shape), 0, 255).astype(np.uint8)
    evaluation.save_adm_npz(folder / "a.npz", a)
    evaluation.save_png_folder(folder / "b", b)
    return folder / "a.npz", folder / "b"


@pytest.fixture(scope="module", autouse=True)
def _short_training_of_the_classifier():
    """What the features are worth is not looked at here."""
    settings = evaluation.ClassifierSettings(steps=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.ClassifierSettings, "for_images", lambda shape: settings)
        yield


def test_a_pipe_is_told_from_a_file_that_is_not_there(two_sets, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.npz")
    for name, message in (("pipe", "pipe.npz is not a regular file: it is a"), ("x", "no images ")):
        with pytest.raises(SystemExit):
            compare.main([str(two_sets[0]), f"{tmp_path / name}.npz", f"--out={tmp_path}/o.html"])
        assert message in capsys.readouterr().err


def test_files_are_compared_by_all_that_can_be_computed(two_sets, workdir, tmp_path, capsys):
    compare.main(
        [
            *map(str, two_sets),
            f"--classifier={workdir}",
            f"--out={tmp_path / 'out.html'}",
            f"--picture={tmp_path / 'out.png'}",
            f"--json={tmp_path / 'out.json'}",
            "--lpips=none",
        ]
    )
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["num_pairs"] == 80 and 33 < record["psnr_of_mean_square_error"] < 38
    assert record["frechet_distance"] > 0 and record["features"] == "small-image-classifier"
    assert set(record["left_out"]) == {"SSIM", "LPIPS"}
    assert "left out: --lpips=none" in capsys.readouterr().out
    assert (tmp_path / "out.html").read_text().count("data:image/png") == 96
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_two_settings_sample_the_same_noise(workdir, tmp_path, capsys):
    options = [f"--workdir={workdir}", "--num_images=16", f"--json={tmp_path / 'out.json'}"]
    options += [f"--out={tmp_path / 'out.html'}", "--lpips=none", "--traceback"]
    compare.main([*options, "--a=", "--b=parallel=synchronous patch_devices=2"])
    # The same but for rounding, which may turn a byte.
    assert json.loads((tmp_path / "out.json").read_text())["largest_difference"] <= 1
    compare.main([*options, "--a=seed=3", "--b=steps=2 guidance_scale=2", "--overwrite"])
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["equal_pairs"] == 0 and record["b"] == "steps=2 guidance_scale=2"
    assert "16 images are too few" in record["left_out"]["Fréchet distance"]
    assert "A: seed=3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give two sets of images, A B, or a model"),
        (["one.npz"], "expected two sets of images, A and B, got 1"),
        (["one.npz", "two.npz"], "no images one.npz"),
        (["one.npz", "two.npz", "--a=steps=2"], "--a is for a model"),
        (["--workdir=run"], "say the two ways of sampling"),
        (["--workdir=run", "--a=out=x", "--b="], "--out is the same for A and B"),
        (["one", "two", "--inception=x", "--classifier=y"], "one of --inception and --classifier"),
        (["one", "two", "--lpips=none", "--lpips_weights=x"], "nothing with --lpips=none"),
    ],
)
def test_errors_say_what_to_give(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        compare.main(options)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_errors_for_counts_names_and_existing_results(two_sets, tmp_path, capsys):
    fewer = tmp_path / "fewer.npz"
    evaluation.save_adm_npz(fewer, np.zeros((3, 8, 8, 1), np.uint8))
    out = tmp_path / "out.html"
    with pytest.raises(SystemExit):
        compare.main([str(two_sets[0]), str(fewer), f"--out={out}"])
    assert "has 80 images" in capsys.readouterr().err and not out.exists()
    out.write_text("precious")
    with pytest.raises(SystemExit):
        compare.main([*map(str, two_sets), f"--out={out}"])
    assert "--overwrite" in capsys.readouterr().err and out.read_text() == "precious"
    options = ["--workdir=run", "--a=", f"--out={tmp_path / 'x.html'}"]
    for setting, message in (
        ("stepz=2", "--stepz=2"),  # by the parser of launch/sample.py
        ("patch_devices=2", "--patch_devices would do nothing without --parallel"),
    ):
        with pytest.raises(SystemExit):
            compare.main([*options, f"--b={setting}"])
        assert message in capsys.readouterr().err
