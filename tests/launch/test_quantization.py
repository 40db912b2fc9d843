"""config.model.quantization, from training to samples, and what it is refused for."""

import json

import jax
import numpy as np
import pytest

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.evaluation import load_adm_npz
from dit_jax.launch import loading, sample, training
from dit_jax.models.network import is_quantized
from tests.launch.conftest import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained in fp8."""
    directory = tmp_path_factory.mktemp("fp8") / "run"
    config = tiny_config(
        **{
            "model.quantization": "fp8",
            "training.num_steps": 2,
            "training.checkpoint_every": 2,
            "training.preview_every": 2,
        }
    )
    training.run(config, directory)
    return directory


def drawn(run, out, *options):
    common = ["--steps=2", "--num_images=4", "--batch_size=4", f"--out={out}"]
    sample.main([f"--workdir={run}", *common, *options])
    return load_adm_npz(out)[0], json.loads(out.with_suffix(".json").read_text())


def test_a_run_is_sampled_as_it_was_trained_from_weights_quantised_once(run, tmp_path):
    images, record = drawn(run, tmp_path / "fp8.npz")
    assert record["model"]["quantization"] == "fp8"
    model, plain = (
        loading.load_model(run),
        loading.load_model(run, overrides={"model.quantization": "none"}),
    )
    assert is_quantized(model.params) and not is_quantized(plain.params)
    # Checkpoints hold what is trained: float32, of the same structure with or without.
    assert {leaf.dtype.name for leaf in jax.tree.leaves(plain.params)} == {"float32"}
    quantized = jax.jit(model.network.quantize)(plain.params)
    jax.tree.map(np.testing.assert_array_equal, model.params, quantized)
    # It is the same model by its hash, and makes about the same images: its gates hardly open.
    wide, wide_record = drawn(run, tmp_path / "none.npz", "--quantization=none")
    assert record["weights_hash"] == wide_record["weights_hash"] == plain.weights_hash()
    assert wide_record["model"]["quantization"] == "none"
    assert np.abs(images.astype(int) - wide).mean() < 8
    assert list((run / "previews").glob("*.png"))


def test_int8_is_for_sampling_alone(run, tmp_path):
    images, record = drawn(run, tmp_path / "int8.npz", "--quantization=int8")
    assert record["model"]["quantization"] == "int8" and images.shape[0] == 4
    config = tiny_config(**{"model.quantization": "int8"})
    with pytest.raises(ConfigError, match=r"'int8' is for sampling and evaluation.*Set 'fp8'"):
        training.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.quantization": "fp4"}, r"config.model.quantization='fp4': expected one of"),
        (
            {
                "model.name": "song_unet",
                "process.name": "edm",
                "model.quantization": "fp8",
                "model.dit.hidden_size": 1152,
                "model.dit.depth": 28,
                "model.dit.num_heads": 16,
                "model.dit.learn_sigma": True,
            },
            "a U-Net works in convolutions, which are not quantised; expected 'none'",
        ),
        (
            {
                "method.name": "mean_flow",
                "model.second_time": "t-r",
                "model.custom_gradients": "off",
                "model.quantization": "fp8_rowwise",
            },
            "has no forward mode, which config.method.name='mean_flow' needs: set config.model.qu",
        ),
    ],
)
def test_what_it_is_refused_for(overrides, message):
    with pytest.raises(ConfigError, match=message):
        experiment.resolve_config(tiny_config(**overrides))


def test_a_checkpoint_is_of_the_same_network_with_or_without():
    config = experiment.resolve_config(tiny_config())
    other = experiment.resolve_config(tiny_config(**{"model.quantization": "fp8"}))
    experiment.require_same_network(config, other, "a run")
