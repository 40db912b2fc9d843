"""Training on images of several sizes: every bucket compiled once, resumed bit for bit, said."""

import json

import numpy as np
import pytest
from PIL import Image

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.launch import classifier_scores, loading, sample, training
from tests.launch.conftest import curve, tiny_config

SIZES = {(8, 16): 20, (12, 12): 30, (16, 8): 10}
FOLDER = "data.image_folder"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Grey images of three aspect ratios in two classes; wide ones are dark, tall ones bright."""
    root, number = tmp_path_factory.mktemp("images"), 0
    for (height, width), count in SIZES.items():
        for _ in range(count):
            path = root / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            rng = np.random.default_rng(number)
            pixels = rng.integers(0, 64, (3 * height, 3 * width)) + 8 * height
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            number += 1
    return root


def config_of(images, steps, **overrides):
    options = {f"{FOLDER}.path": str(images), f"{FOLDER}.buckets": "8x16,12x12,16x8"}
    options |= {"data.name": "image_folder", "model.image_size": 12, "model.num_classes": 2}
    options |= {"training.num_steps": steps, "training.log_every": 1, "training.keep_last": 9}
    options |= {"training.checkpoint_every": 3, "training.batch_size": 8}
    return tiny_config(**{**options, **overrides})


def test_a_run_is_resumed_bit_for_bit(images, tmp_path, capsys):
    training.run(config_of(images, 8), tmp_path / "whole")
    said = capsys.readouterr().out
    assert "images in 3 buckets (height x width):\n  8x16: 20 images, 33.3%\n" in said
    assert "  16x8: 10 images, 16.7%\n" in said
    assert [said.count(f"compiled the update of {size} in") for size in ("8x16", "12x12")] == [1, 1]
    training.run(config_of(images, 5), tmp_path / "parts")
    assert "compiled the update of 16x8" in capsys.readouterr().out
    training.run(config_of(images, 8), tmp_path / "parts")
    assert "continuing from step 5" in capsys.readouterr().out
    curves = [curve(tmp_path / name) for name in ("whole", "parts")]
    for name in ("loss", "gradient_norm"):
        assert [m[name] for m in curves[0].values()] == [m[name] for m in curves[1].values()]
    models = [loading.load_model(tmp_path / name) for name in ("whole", "parts")]
    assert models[0].weights_hash() == models[1].weights_hash()
    out = tmp_path / "wide.npz"
    sample.main([f"--workdir={tmp_path / 'parts'}", "--height=8", "--width=16", f"--out={out}"])
    assert json.loads(out.with_suffix(".json").read_text())["image_size"] == [8, 16]
    with pytest.raises(ValueError, match="several sizes, which the classifier cannot see"):
        classifier_scores.evaluate(models[0], tmp_path, num_images=10)


def test_microbatches_and_a_mesh_take_buckets(images, tmp_path):
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.sequence": 2}
    losses = []
    for name, overrides in (("one", {}), ("mesh", {**mesh, "training.num_microbatches": 2})):
        training.run(config_of(images, 3, **overrides), tmp_path / name)
        losses.append([m["loss"] for m in curve(tmp_path / name).values()])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_operations_are_those_of_the_buckets(images):
    config = experiment.resolve_config(config_of(images, 3))
    info = experiment.open_data(config, "train").info
    method = experiment.build_method(config)
    mean = training.mean_flops(config, info)
    assert 0.7 * method.flops_per_example < mean < method.flops_per_example
    small = "  16x8: 10 images, 16.7% (fewer than a batch of 16, which holds some more than once)"
    assert small in training.describe_sizes(info, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {f"{FOLDER}.buckets": "8x16,12x13"},
            r"bucket 12x13 \(height x width\), .* of 2: set --\S+.buckets=8x16,12x12$",
        ),
        ({f"{FOLDER}.buckets": "auto:3"}, r"of 2: set --config.data.image_folder.buckets=auto:6$"),
        ({f"{FOLDER}.buckets": "8,12"}, r"config.data.image_folder.buckets='8,12': expected heig"),
        ({f"{FOLDER}.resize": "none"}, "needs config.data.image_folder.resize='adm'"),
        (
            {"mesh.sequence": 8},
            r"config.mesh.sequence=8 does not divide images of 12 rows: use one",
        ),
    ],
)
def test_buckets_that_do_not_fit_are_refused(images, tmp_path, overrides, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        training.run(config_of(images, 3, **overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
