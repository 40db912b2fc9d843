"""Inputs that are not square: trained, sampled, spread over devices, by the commands' functions."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from dit_jax import experiment
from dit_jax.evaluation import load_adm_npz
from dit_jax.launch import evaluate, loading, sample, sizes, training, write_pairs
from dit_jax.training import memory
from tests.launch.conftest import curve, tiny_config
from tests.long import long

RECTANGLE = {"model.input_size": (8, 12), "data.digits.resize": "adm"}
FEW = {"training.num_steps": 2, "training.checkpoint_every": 0, "training.log_every": 1}
PREVIEWS = {"training.preview_every": 2, "training.preview_images": 4}
UNET = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
UNET |= {"channel_mult_emb": 2, "dropout": 0.0}


def unet_config(**overrides):
    config = tiny_config(**{"model.name": "song_unet", **overrides})
    config.model.dit.update(hidden_size=1152, depth=28, num_heads=16, learn_sigma=True)
    config.model.song_unet.update(UNET)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a DiT and of a U-Net trained on 8 x 12 pixels, with previews."""
    folder = tmp_path_factory.mktemp("rectangles")
    for name, create in (("dit", tiny_config), ("unet", unet_config)):
        training.run(create(**RECTANGLE, **FEW, **PREVIEWS), folder / name)
    return folder


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_training_takes_the_size_of_the_configuration(runs, name):
    losses = curve(runs / name)
    assert sorted(losses) == [1, 2] and np.isfinite([m["loss"] for m in losses.values()]).all()
    model = loading.load_model(runs / name)
    assert model.network.sample_shape == (8, 12, 1)
    source = experiment.open_data(model.config, "train")
    assert source.info.image_shape == (8, 12, 1)
    with Image.open(runs / name / "previews" / "step_00000002.png") as picture:
        width, height = picture.size
    # Two columns and two rows, every pixel six times, captions under them.
    assert width == 2 * 16 + 2 * 12 * 6 + 4 and height > 2 * 16 + 2 * 8 * 6 + 4


@pytest.mark.parametrize(("name", "sizes_of_calls"), [("dit", 2), ("unet", 1)])
def test_sampling_takes_the_size_of_the_call(runs, tmp_path, name, sizes_of_calls):
    common = [f"--workdir={runs / name}", "--num_images=2", "--steps=4"]
    calls = (["--height=16"], (2, 16, 12, 1)), (["--width=8"], (2, 8, 8, 1))
    for options, shape in calls[:sizes_of_calls]:
        out = tmp_path / f"{shape[1]}.npz"
        sample.main([*common, *options, f"--out={out}"])
        assert load_adm_npz(out)[0].shape == shape
        record = json.loads(out.with_suffix(".json").read_text())
        assert record["image_size"] == (8 if shape[1] == shape[2] else list(shape[1:3]))
    sample.main([*common, "--height=16", f"--out={tmp_path / 'grid.png'}"])
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size[0] == 2 * 16 + 2 * 12 * 4 + 4


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("synchronous", "dit"),
        ("displaced", "dit"),
        ("synchronous", "unet"),
        long("displaced", "unet"),  # tests/parallel/test_unet.py has its modes, on squares
    ],
)
def test_rows_of_a_rectangle_go_over_devices(runs, tmp_path, name, mode):
    common = [f"--workdir={runs / name}", "--num_images=2", "--steps=4", "--height=12"]
    common += ["--width=16"]
    outs = tmp_path / "one.npz", tmp_path / "many.npz"
    sample.main([*common, f"--out={outs[0]}"])
    devices = [f"--parallel={mode}", "--patch_devices=3"]
    devices += ["--warmup_steps=2"] if mode == "displaced" else []
    sample.main([*common, *devices, f"--out={outs[1]}"])
    one, many = (load_adm_npz(out)[0].astype(int) for out in outs)
    assert one.shape == many.shape == (2, 12, 16, 1)
    difference = np.abs(one - many)
    assert difference.max() <= 1 if mode == "synchronous" else difference.mean() < 20


def test_pairs_are_of_the_size_asked_for(runs, tmp_path, capsys):
    out = tmp_path / "pairs"
    options = [f"--workdir={runs / 'dit'}", "--num_pairs=4", "--batch_size=8", "--height=4"]
    write_pairs.main([*options, f"--out={out}"])
    assert "--config.model.input_size=4,12" in capsys.readouterr().out
    config = tiny_config(**{"data.name": "pairs", "data.pairs.path": str(out)})
    config.model.input_size = (4, 12)
    source = experiment.open_data(config, "train")
    assert source.info.image_shape == (4, 12, 1)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (sample, ["--height=9"], r"--height=9: DiT .* multiples of 2 pixels: give 8 or 10"),
        (sample, ["--width=1"], r"--width=1: .* multiples of 2 pixels: give 2"),
        (sample, ["--width=0"], "argument --width: '0': expected at least 1"),
        (sample, ["--height=8.5"], "argument --height: '8.5': expected at least 1"),
        (sample, ["--height=2000000", "--width=2000000"], "of memory, and"),
        (
            sample,
            ["--height=4", "--parallel=displaced", "--patch_devices=3"],
            "2 rows of patches do not go over 3 devices",
        ),
        (evaluate, ["--height=16"], "--height needs --reference"),
    ],
)
def test_sizes_that_cannot_be_are_refused(runs, tmp_path, capsys, command, options, message):
    out = tmp_path / ("x.npz" if command is sample else "x.json")
    with pytest.raises(SystemExit) as error:
        command.main([f"--workdir={runs / 'dit'}", f"--out={out}", *options])
    assert error.value.code == 2 and not out.exists()
    assert re.search(message, capsys.readouterr().err)


def test_a_unet_halves_its_rectangle_or_refuses_it(runs):
    with pytest.raises(ValueError, match=r"--height=10: .* multiples of 4|--height=9: .* 8 or 10"):
        loading.load_model(runs / "unet", size=(9, None))


def test_latents_are_smaller_than_pictures_by_the_vaes_factor(capsys):
    config = tiny_config(**{"model.in_channels": 4, "model.image_size": 32})
    config = experiment.resolve_config(config)
    assert sizes.size_overrides(config, 512, None) == {"model.input_size": (64, 32)}
    assert "no VAE was named: taking 8 x 8 pixels for a latent" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--width=500.* of 8 pixels a latent .*give 496 or 512"):
        sizes.size_overrides(config, None, 500)
    assert sizes.size_overrides(config, None, None) == {}
    assert sizes.at_size(config, 256, 384).model.input_size == (32, 48)


def test_memory_is_estimated_from_the_size(monkeypatch, runs, tmp_path, capsys):
    monkeypatch.setattr(memory, "available_host_memory", lambda: 10_000)
    small = [f"--workdir={runs / 'dit'}", "--num_images=4", f"--out={tmp_path / 'x.png'}"]
    with pytest.raises(SystemExit):
        sample.main([*small, "--height=64", "--width=64"])
    assert "4 images need at least 144" in capsys.readouterr().err
