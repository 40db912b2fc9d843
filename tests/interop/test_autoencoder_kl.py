import dataclasses
import json
import re

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.interop.autoencoder_kl import (
    CONFIG,
    KNOWN,
    WEIGHTS,
    config_from_diffusers,
    config_to_diffusers,
    load_autoencoder,
    save_autoencoder,
)
from dit_jax.interop.autoencoder_tables import original_table
from dit_jax.interop.parameters import abstract_params, flat_shapes
from dit_jax.interop.table import export_specs
from dit_jax.interop.tensors import InteropError
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from tests.models.conftest import random_params
from tests.references import diffusers_autoencoder as reference

SMALL = AutoencoderKLConfig(
    scaling_factor=0.5,
    shift_factor=0.25,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
)


def random_numbers(config, seed=0):
    """Every parameter random, with values that float32 rounding of any kind would change."""
    return jax.tree.map(np.asarray, random_params(AutoencoderKL(config), seed, 1.0))


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), found, expected)


def flat_leaves(tree):
    """(names from the root, leaf) of nested dictionaries."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(entry.key for entry in path), leaf


def saved_tensors(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def rewritten(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture
def saved(tmp_path):
    """A saved small autoencoder: (folder, parameters)."""
    params = random_numbers(SMALL)
    save_autoencoder(tmp_path / "vae", AutoencoderKL(SMALL), params)
    return tmp_path / "vae", params


configurations = st.fixed_dictionaries(
    {
        "scaling_factor": st.floats(0.01, 2.0),
        "shift_factor": st.sampled_from([0.0, 0.1159, -1.5]),
        "in_channels": st.integers(1, 4),
        "out_channels": st.integers(1, 4),
        "latent_channels": st.integers(1, 5),
        "block_out_channels": st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=4).map(
            tuple
        ),
        "layers_per_block": st.integers(1, 3),
        "norm_num_groups": st.sampled_from([1, 2, 4]),
        "sample_size": st.integers(8, 512),
        "use_quant_conv": st.booleans(),
        "use_post_quant_conv": st.booleans(),
        "mid_block_add_attention": st.booleans(),
        "force_upcast": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None)
@given(values=configurations, layout=st.sampled_from(["diffusers", "original"]))
def test_round_trips_are_the_identity_bit_for_bit(tmp_path_factory, values, layout):
    config = AutoencoderKLConfig(**values)
    folder = tmp_path_factory.mktemp("round") / "vae"
    params = random_numbers(config)
    sha256 = save_autoencoder(folder, AutoencoderKL(config), params, layout=layout)
    autoencoder, found, read_sha256 = load_autoencoder(folder)
    assert autoencoder.config == config and read_sha256 == sha256
    assert_identical(found, params)
    again = folder.with_name("again")
    assert save_autoencoder(again, autoencoder, found, layout=layout) == sha256
    assert (again / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, use_post_quant_conv=False)])
def test_diffusers_loads_an_export_and_decodes_the_same(tmp_path, config):
    model = reference.create(config)
    autoencoder, params = reference.ours(config, model)
    save_autoencoder(tmp_path / "vae", autoencoder, params)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert loaded.config.scaling_factor == 0.5 and loaded.config.shift_factor == 0.25
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    z = jax.random.normal(jax.random.key(0), (1, 6, 4, 4))
    with torch.no_grad():
        expected = reference.to_numpy(loaded.decode(reference.to_torch(z)).sample)
    found = jax.jit(autoencoder.decode)(params, z)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_what_diffusers_saves_is_loaded_alone_and_in_a_pipeline(tmp_path):
    model = reference.create(SMALL)
    _, expected = reference.ours(SMALL, model)
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        autoencoder, params, sha256 = load_autoencoder(path)
        assert autoencoder.config == SMALL and re.fullmatch("[0-9a-f]{64}", sha256)
        assert_identical(params, expected)
    model.save_pretrained(tmp_path / "pt", safe_serialization=False)
    assert_identical(load_autoencoder(tmp_path / "pt")[1], expected)


def test_bfloat16_files_are_stored_as_bfloat16_to_the_same_bits(tmp_path):
    params = random_numbers(SMALL)
    save_autoencoder(tmp_path / "vae", AutoencoderKL(SMALL), params, dtype=ml_dtypes.bfloat16)
    assert diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.bfloat16)
    wide, found, _ = load_autoencoder(tmp_path / "vae", dtype="bfloat16", param_dtype="float32")
    rounded = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    assert_identical(found, rounded)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    narrow, stored, _ = load_autoencoder(tmp_path / "vae", dtype="bfloat16")
    assert_identical(stored, rounded)
    dtypes = {path[-2:]: leaf.dtype.name for path, leaf in flat_leaves(stored)}
    assert set(dtypes.values()) == {"float32", "bfloat16"}
    assert dtypes["norm1", "scale"] == "float32" and dtypes["conv1", "kernel"] == "bfloat16"
    z = jax.random.normal(jax.random.key(1), (1, 4, 4, SMALL.latent_channels))
    np.testing.assert_array_equal(narrow.decode(stored, z), wide.decode(found, z))


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_attention_names_are_read(saved, convolutions):
    folder, params = saved
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, array in saved_tensors(folder).items():
        for today, before in old.items():
            if f"attentions.0.{today}." in name:
                name = name.replace(today, before)
                if convolutions and array.ndim == 2:
                    array = array[:, :, None, None]
        tensors[name] = array
    assert sum("attentions.0.proj_attn" in name for name in tensors) == 4
    assert_identical(load_autoencoder(rewritten(folder, tensors))[1], params)


def test_the_published_files_have_the_original_names():
    config = KNOWN["sd"]
    shapes = flat_shapes(abstract_params(AutoencoderKL(config)))
    specs = export_specs(original_table(config), shapes)
    assert len(specs) == 248 and sum(spec.size for spec in specs.values()) == 83_653_863
    assert specs["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert specs["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert specs["decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    assert "encoder.down.3.downsample.conv.weight" not in specs
    assert "decoder.up.0.upsample.conv.weight" not in specs


def test_bare_weights_are_read_alone_and_inside_a_whole_model(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, block_out_channels=(8, 8, 16, 12), layers_per_block=2)
    monkeypatch.setitem(KNOWN, "sd", config)
    params = random_numbers(config)
    save_autoencoder(tmp_path / "vae", AutoencoderKL(config), params, layout="original")
    tensors = saved_tensors(tmp_path / "vae")
    whole = {f"first_stage_model.{name}": array for name, array in tensors.items()}
    whole["model.diffusion_model.out.0.weight"] = np.ones(3, np.float32)
    path = tmp_path / "sd.safetensors"
    safetensors.numpy.save_file(whole, path)
    with pytest.warns(UserWarning, match=r"taken for the 'sd' autoencoder, scaling factor 0.5"):
        autoencoder, found, _ = load_autoencoder(path)
    assert autoencoder.config == config
    assert_identical(found, params)
    assert_identical(load_autoencoder(tmp_path / "vae" / WEIGHTS, which="sd")[1], params)


def test_the_original_layout_means_the_same_to_diffusers(tmp_path):
    # diffusers converts the original's names by code of its own.
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = dataclasses.replace(SMALL, block_out_channels=(8, 16, 12), layers_per_block=2)
    params = random_numbers(config)
    for layout in ("original", "diffusers"):
        save_autoencoder(tmp_path / layout, AutoencoderKL(config), params, layout=layout)
    original = {k: torch.tensor(v) for k, v in saved_tensors(tmp_path / "original").items()}
    values = config_to_diffusers(config)
    converted = convert_ldm_vae_checkpoint(original, values)
    expected = saved_tensors(tmp_path / "diffusers")
    assert converted.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(converted[name].numpy().reshape(array.shape), array)


def test_configurations_of_the_published_autoencoders():
    # sd-vae-ft-mse's file is older than scaling_factor and shift_factor.
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    }
    sd = {"_class_name": "AutoencoderKL", "act_fn": "silu", "sample_size": 256, **blocks}
    flux = {
        **sd,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latents_mean": None,
    }
    assert config_from_diffusers(sd) == KNOWN["sd"]
    assert config_from_diffusers(flux) == KNOWN["flux"]
    for name in KNOWN:
        assert config_from_diffusers(config_to_diffusers(KNOWN[name])) == KNOWN[name]


def test_a_mismatch_is_refused_in_one_error(saved):
    folder, _ = saved
    tensors = saved_tensors(folder)
    del tensors["quant_conv.bias"]
    tensors["decoder.conv_in.weight"] = np.zeros((16, 5, 3, 3), np.float32)
    tensors["encoder.surprise"] = np.zeros(3, np.float32)
    with pytest.raises(InteropError) as error:
        load_autoencoder(rewritten(folder, tensors))
    for part in ("missing: quant_conv.bias", "decoder.conv_in.weight", "encoder.surprise"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, "describes a AutoencoderDC; expected an AutoencoderKL"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types="),
        ({"latents_mean": [0.0] * 4}, "latents_mean="),
        ({"norm_num_groups": 5}, "norm_num_groups=5 must divide"),
        ({"block_out_channels": [8, 16, 16]}, "down_block_types="),
        ({"layers_per_block": 2}, "differences"),
    ],
)
def test_other_configurations_are_refused(saved, change, message):
    folder, _ = saved
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **change}))
    with pytest.raises(InteropError, match=re.escape(message)):
        load_autoencoder(folder)


def test_other_files_are_refused(saved, tmp_path):
    folder, params = saved
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    with pytest.raises(FileExistsError, match="exists"):
        save_autoencoder(folder, AutoencoderKL(SMALL), params)
    with pytest.raises(InteropError, match="no autoencoder at"):
        load_autoencoder(tmp_path / "nowhere")
    with pytest.raises(InteropError, match=f"has no {CONFIG}"):
        load_autoencoder(empty)
    with pytest.raises(InteropError, match="which='sd' is for bare weights"):
        load_autoencoder(folder, which="sd")
    with pytest.raises(InteropError, match="expected one of sd, flux"):
        load_autoencoder(folder / WEIGHTS, which="sd3")
    with pytest.raises(InteropError, match="differences"):  # 4 channels, but not the known widths
        load_autoencoder(folder / WEIGHTS, which="sd")
    other = tmp_path / "dit.safetensors"
    names = ("x_embedder.proj.weight", "final_layer.linear.weight")
    safetensors.numpy.save_file({name: np.zeros(3, np.float32) for name in names}, other)
    with pytest.raises(InteropError, match="holds no AutoencoderKL: it looks like a DiT or SiT"):
        load_autoencoder(other)
    other.replace(tmp_path / "other" / WEIGHTS)
    with pytest.raises(InteropError, match="it looks like a DiT or SiT"):
        load_autoencoder(tmp_path / "other")
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InteropError):
        load_autoencoder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InteropError, match="found none"):
        load_autoencoder(folder)


def test_a_failed_export_leaves_nothing(tmp_path):
    params = random_numbers(SMALL)
    params["decoder"]["conv_out"]["bias"] = object()
    with pytest.raises(Exception):  # noqa: B017
        save_autoencoder(tmp_path / "vae", AutoencoderKL(SMALL), params)
    assert not list(tmp_path.iterdir())


def test_parameters_are_put_where_asked(saved):
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, params, _ = load_autoencoder(saved[0], sharding=sharding)
    leaves = jax.tree.leaves(params)
    assert all(leaf.sharding == sharding and leaf.dtype == jnp.float32 for leaf in leaves)
