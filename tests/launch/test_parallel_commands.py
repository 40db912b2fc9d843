"""`launch/sample.py --parallel=...`, and the options it refuses."""

import json

import numpy as np
import pytest

from dit_jax.evaluation import load_adm_npz
from dit_jax.launch import sample
from tests.launch.conftest import run


@pytest.fixture(scope="module")
def workdir(tiny_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel") / "tiny"
    run("train", f"--config={tiny_file}", f"--workdir={path}")
    return path


def images(out):
    return load_adm_npz(out)[0].astype(np.int32)


def test_one_command_samples_on_many_devices(workdir, tmp_path):
    common = [f"--workdir={workdir}", "--num_images=3", "--guidance_scale=2", "--steps=3"]
    sample.main([*common, f"--out={tmp_path / 'one.npz'}"])
    ring = ["--parallel=ring", "--patch_devices=4", "--ulysses_devices=2", "--split_guidance"]
    sample.main([*common, f"--out={tmp_path / 'ring.npz'}", *ring])
    difference = np.abs(images(tmp_path / "ring.npz") - images(tmp_path / "one.npz"))
    assert difference.max() <= 1  # rounding to 8 bits
    record = json.loads((tmp_path / "ring.json").read_text())["parallel"]
    assert record["mode"] == "ring" and record["devices"] == 8 and record["split_guidance"]
    displaced = ["--parallel=displaced", "--patch_devices=4", "--warmup_steps=1", "--steps=4"]
    displaced += [f"--out={tmp_path / 'displaced'}", "--num_images=1"]
    out, err = run(
        "sample",
        *common,
        *displaced,
        devices=8,
    )
    assert "displaced: ring 4" in out and "4 of 8 devices are not used" in out
    assert "warning: displaced patches: 1 of 4 steps (25%) are synchronous" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warmup_steps=4"], "--warmup_steps would do nothing without --parallel=displaced"),
        (["--split_guidance"], "--split_guidance would do nothing without --parallel="),
        (["--parallel=naive"], "--parallel=naive needs --patch_devices"),
        (["--parallel=ring", "--patch_devices=2", "--warmup_steps=4"], "warmup_steps=4 would do "),
        (["--parallel=naive", "--patch_devices=3"], "4 rows of patches do not go over 3 devices"),
        (["--parallel=ring", "--patch_devices=16"], "needs 16 devices; there are 8"),
        (["--parallel=ulysses", "--patch_devices=4"], "2 attention heads cannot be split over 4"),
    ],
)
def test_options_that_cannot_work_are_refused(workdir, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        sample.main([f"--workdir={workdir}", f"--out={tmp_path / 'x.png'}", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
