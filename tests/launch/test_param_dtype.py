"""What a model's parameters are stored in, from the flag to the record."""

import json

import jax
import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.evaluation import load_adm_npz
from dit_jax.interop.models import open_model
from dit_jax.launch import convert, loading, sample, training
from tests.launch.conftest import tiny_config


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A run, and its model converted to a file of bfloat16."""
    folder = tmp_path_factory.mktemp("param_dtype")
    config = tiny_config(**{"training.num_steps": 2, "training.checkpoint_every": 2})
    training.run(config, folder / "run")
    convert.main(
        ["--to=dit_jax", "--dtype=bfloat16", str(folder / "run"), str(folder / "bfloat16")]
    )
    return folder


def drawn(source, out, *options):
    """Samples, and the record beside them."""
    common = ["--steps=2", "--num_images=4", "--batch_size=4", f"--out={out}"]
    sample.main([*source, *common, *options])
    record = json.loads(out.with_suffix(".json").read_text())
    return load_adm_npz(out)[0], record


def test_a_file_is_sampled_as_it_is_stored_and_to_the_same_images(sources, tmp_path):
    source = [f"--init_from={sources / 'bfloat16'}"]
    images, record = drawn(source, tmp_path / "auto.npz")
    wide_images, wide_record = drawn(source, tmp_path / "wide.npz", "--param_dtype=float32")
    assert record["model"]["param_dtype"] == "bfloat16"
    assert wide_record["model"]["param_dtype"] == "float32"
    np.testing.assert_array_equal(images, wide_images)
    assert record["weights_hash"] == wide_record["weights_hash"]
    model = loading.load_found(open_model(sources / "bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params["blocks"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params["t_embedder"])} == {"float32"}


def test_a_run_is_float32_unless_asked_otherwise(sources):
    model = loading.load_model(sources / "run")
    assert model.config.model.param_dtype == "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}
    narrow = loading.load_model(sources / "run", overrides={"model.param_dtype": "bfloat16"})
    for wide, leaf in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(narrow.params), strict=True
    ):
        np.testing.assert_array_equal(leaf, wide.astype(leaf.dtype))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow.params["blocks"])} == {"bfloat16"}


def test_training_in_bfloat16_parameters_is_refused_before_anything_is_written(tmp_path):
    config = tiny_config(**{"model.param_dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"param_dtype='bfloat16'.*config.model.param_dtype=auto"):
        training.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
