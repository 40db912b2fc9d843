"""Names of classes: from folders of images into the workdir, to --labels, through conversions."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from dit_jax import class_names
from dit_jax.evaluation import load_adm_npz
from dit_jax.interop.models import open_model
from dit_jax.launch import convert, sample, train
from dit_jax.launch.sampling import choose_labels
from tests.launch.conftest import tiny_config
from tests.launch.test_interop_commands import refusal

ANIMALS = ("Katze", "dog", "große Eule")


def test_folders_names_become_labels_and_pass_through_conversions(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ANIMALS:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = generator.integers(0, 256, (8, 8), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    config = tiny_config(
        **{
            "data.name": "image_folder",
            "data.image_folder.path": str(tmp_path / "images"),
            "model.num_classes": 3,
            "process.name": "ddpm",
            "sampling.solver": "ddim",
            "training.num_steps": 1,
            "training.batch_size": 8,
        }
    )
    train.run(config, tmp_path / "run")
    run, few = f"--workdir={tmp_path / 'run'}", ["--steps=2", "--batch_size=2"]
    names = tuple(sorted(ANIMALS))
    assert class_names.load(tmp_path / "run", 3) == names

    out = tmp_path / "x.npz"
    sample.main([run, *few, "--labels", "DOG", "0", "große eule", f"--out={out}"])
    wanted = [names.index("dog"), 0, names.index("große Eule")]
    np.testing.assert_array_equal(load_adm_npz(out)[1], wanted)
    error = refusal(capsys, sample.main, run, "--labels", "dogg", f"--out={tmp_path / 'y.npz'}")
    assert "no class is called so; the nearest names are dog" in error
    assert not (tmp_path / "y.npz").exists()

    convert.main(["--to=diffusers", str(tmp_path / "run"), str(tmp_path / "pipeline")])
    index = json.loads((tmp_path / "pipeline/model_index.json").read_text())
    assert index["id2label"] == {str(i): name for i, name in enumerate(names)}
    (tmp_path / "pipeline/dit_jax.json").unlink()
    index["id2label"] = {str(i): names[i % 3] if i < 3 else f"class {i}" for i in range(1000)}
    (tmp_path / "pipeline/model_index.json").write_text(json.dumps(index))
    assert open_model(tmp_path / "pipeline").class_names[:4] == (*names, "class 3")
    convert.main(["--to=dit_jax", str(tmp_path / "run"), str(tmp_path / "folder")])
    assert open_model(tmp_path / "folder").class_names == names


def choose(*labels, names):
    arguments = argparse.Namespace(labels=list(labels), num_images=None)
    return choose_labels(arguments, 3, names).tolist()


def test_any_of_a_classs_words_is_a_label_error():
    names = ("tench, Tinca tinca", "crane", "crane, lifting gear")
    assert choose("tinca TINCA", "tench, Tinca tinca", 2, "lifting gear", names=names) == [
        0,
        0,
        2,
        2,
    ]
    with pytest.raises(ValueError, match=r"several classes are called so, 1 \(crane\), 2"):
        choose("crane", names=names)
    with pytest.raises(ValueError, match="the model's classes are 0 to 2"):
        choose(3, names=names)
    with pytest.raises(ValueError, match="names of this model's classes are not known"):
        choose("tench", names=())
