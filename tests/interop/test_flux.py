"""FLUX on disk: round trips bit for bit between the layouts, shards, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dit_jax.interop import flux
from dit_jax.interop.export import write_model
from dit_jax.interop.flux_files import load_flux, open_flux, save_flux, save_flux_original
from dit_jax.interop.models import open_model
from dit_jax.interop.parameters import flatten
from dit_jax.interop.table import export_arrays, export_specs
from dit_jax.interop.tensors import InteropError, TensorSpec, open_tensors, write_safetensors
from dit_jax.models import FluxConfig, Network
from tests.models.conftest import random_params
from tests.references import diffusers_flux

TINY = FluxConfig.from_name("flux_tiny")
DEV = dataclasses.replace(TINY, guidance_embedding=True)


def random_numbers(network, seed=0):
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    drawn = random_params(network, seed, 1.0)
    return jax.tree.map(lambda a, shape: np.array(a, shape.dtype), drawn, shapes)


def assert_same(found, wanted):
    found, wanted = dict(flatten(found)), dict(flatten(wanted))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(found[path], value, path)


def weights(folder):
    return (folder / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_round_trips_bit_for_bit_between_the_layouts(tmp_path, param_dtype):
    network = Network(dataclasses.replace(DEV, param_dtype=param_dtype))
    params = random_numbers(network)
    if param_dtype == "bfloat16":  # float32 parameters of a file in bfloat16 are no others
        params = jax.tree.map(lambda a: a.astype("bfloat16").astype(a.dtype), params)
    save_flux(tmp_path / "one", network, params)
    save_flux_original(tmp_path / "flux1.safetensors", *load_flux(tmp_path / "one"))
    again, found = load_flux(tmp_path / "flux1.safetensors")
    assert again.config == dataclasses.replace(network.config, image_size=128, text_length=512)
    assert_same(found, params)
    save_flux(tmp_path / "two", again, found)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    names = open_tensors(tmp_path / "flux1.safetensors").specs
    assert names["single_blocks.1.linear1.weight"].shape == (7 * 32, 32)
    assert names["double_blocks.0.txt_attn.norm.key_norm.scale"].shape == (16,)


@settings(max_examples=5, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 12, 16]),
    depths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 4),
    guidance=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tables_are_bijections(heads, head_dim, depths, channels, guidance, seed):
    config = FluxConfig(
        hidden_size=heads * head_dim,
        num_heads=heads,
        depth=depths[0],
        single_depth=depths[1],
        in_channels=channels,
        text_dim=5,
        pooled_dim=3,
        guidance_embedding=guidance,
    )
    params = dict(flatten(random_numbers(Network(config), seed)))
    shapes = {path: a.shape for path, a in params.items()}
    for layout in (flux.diffusers_table, flux.original_table):
        table = layout(config)
        names = list(export_specs(table, shapes))
        arrays = list(export_arrays(table, shapes, params.__getitem__))
        assert len(names) == len(set(names)) == len(arrays)
        assert sum(a.size for a in arrays) == sum(a.size for a in params.values())
    values = json.loads(json.dumps(flux.config_to_diffusers(config)))
    assert flux.config_from_diffusers(values) == config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """diffusers' model, and the folder where it saved itself in shards."""
    model = diffusers_flux.create_model(DEV)
    folder = tmp_path_factory.mktemp("saved") / "pipeline" / "transformer"
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").is_file()
    return model, folder


def test_shards_are_read_and_what_is_written_diffusers_loads(saved, tmp_path):
    from diffusers import FluxTransformer2DModel

    model, folder = saved
    network, params = load_flux(folder.parent)  # the pipeline's folder
    save_flux(tmp_path / "ours", network, params)
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "ours")
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys() and dict(again.config) == dict(
        again.config,
        **{key: value for key, value in model.config.items() if not key.startswith("_")},
    )
    assert all((theirs[name] == ours[name]).all() for name in theirs)


def test_layers_apart_are_read_and_written_as_stacked_ones(saved, tmp_path):
    network, params = load_flux(saved[1], layer_loop="unroll")
    stacked = load_flux(saved[1])[1]
    kernel = params["double_blocks"]["text"]["mlp"]["fc1"]["kernel"]
    assert len(kernel.layers) == 2 and isinstance(stacked["x_embedder"]["kernel"], jax.Array)
    for name, held in (("one", params), ("two", stacked)):
        save_flux(tmp_path / name, network, held)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_the_original_layout_is_the_one_that_diffusers_reads(saved, tmp_path):
    from diffusers.loaders.single_file_utils import (
        convert_flux_transformer_checkpoint_to_diffusers as convert,
    )
    from safetensors.torch import load_file

    # diffusers converts it for a width of 3072 alone: parts of linear1 are compared here.
    model, folder = saved
    file = tmp_path / "flux1-dev.safetensors"
    save_flux_original(file, *load_flux(folder))
    state = load_file(file)
    kept = {n: state.pop(n) for n in list(state) if ".linear1." in n}
    assert len(kept) == 4
    for name in kept:  # of the width that is expected
        shape = (7 * 3072, *kept[name].shape[1:])
        state[name] = kept[name].new_zeros(shape)
    found, wanted = convert(state), model.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if "single" in name and any(part in name for part in ("to_q", "to_k", "to_v", "proj_mlp")):
            continue
        assert (found[name] == value).all(), name
    parts = [
        f"single_transformer_blocks.1.{n}.weight"
        for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    joined = np.concatenate([wanted[name].numpy() for name in parts])
    np.testing.assert_array_equal(kept["single_blocks.1.linear1.weight"].numpy(), joined)


def test_prefixed_names_are_read(saved, tmp_path):
    network, params = load_flux(saved[1])
    save_flux_original(tmp_path / "a.safetensors", network, params)
    file = open_tensors(tmp_path / "a.safetensors")
    specs = {f"model.diffusion_model.{name}": spec for name, spec in file.specs.items()}
    write_safetensors(tmp_path / "b.safetensors", specs, file.read(list(file.specs)))
    assert "left out" in open_flux(tmp_path / "b.safetensors").notes[0]
    assert_same(load_flux(tmp_path / "b.safetensors")[1], params)


def test_errors_name_what_is_there(saved, tmp_path):
    folder = saved[1]
    with pytest.raises(InteropError, match="does not exist"):
        load_flux(tmp_path / "nowhere")
    with pytest.raises(InteropError, match="expected a pipeline's folder with transformer/"):
        load_flux(tmp_path)
    values = json.loads((folder / "config.json").read_text())

    def with_config(name, **changes):
        other = tmp_path / name
        other.mkdir()
        for file in folder.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        (other / "config.json").write_text(json.dumps(values | changes))
        return other

    for changes, message in (
        ({"_class_name": "SD3Transformer2DModel"}, "describes a SD3Transformer2DModel"),
        ({"in_channels": 384, "out_channels": 64}, "Fill, Depth, Canny"),
        ({"in_channels": 18}, "expected a multiple of 4"),
        ({"patch_size": 2}, "packed latents"),
        ({"axes_dims_rope": [2, 2]}, "expected three integers"),
        ({"axes_dims_rope": [2, 2, 2]}, "whose sum is the 16"),
        ({"num_layers": 10**6}, "not of the same network"),
        ({"num_layers": 0}, "an integer of at least 1"),
        ({"joint_attention_dim": 17}, "context_embedder.weight is"),
        ({"guidance_embeds": False}, "unexpected: time_text_embed.guidance_embedder"),
    ):
        with pytest.raises(InteropError, match=message):
            load_flux(with_config(f"changed{len(list(tmp_path.iterdir()))}", **changes))


def test_a_block_far_beyond_the_others_is_refused_before_any_is_looked_for(saved, tmp_path):
    file = tmp_path / "flux1.safetensors"
    save_flux_original(file, *load_flux(saved[1]))
    tensors = load_file(file) | {"double_blocks.1000000.x": np.zeros(1, np.float32)}
    save_file(tensors, file)
    with pytest.raises(InteropError, match=r"depth=1000001, but .* holds only .* tensors"):
        open_flux(file)


def test_errors_of_other_families_name_them(saved, tmp_path):
    sign = {"transformer_blocks.0.attn.add_q_proj.weight": np.zeros((2, 2), np.float32)}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((saved[1] / "config.json").read_bytes())
    file = other / "diffusion_pytorch_model.safetensors"
    specs = {name: TensorSpec(a.shape, a.dtype) for name, a in sign.items()}
    write_safetensors(file, specs, list(sign.values()))
    for path in (other, file):
        with pytest.raises(InteropError, match="it looks like a Stable Diffusion 3"):
            load_flux(path)
    with pytest.raises(InteropError, match="MLP four times as wide"):
        save_flux(tmp_path / "wide", Network(dataclasses.replace(TINY, mlp_ratio=2.0)), {})
    nan = random_numbers(Network(TINY))
    nan["x_embedder"]["bias"][0] = np.nan
    with pytest.raises(InteropError, match="NaN"):
        save_flux(tmp_path / "nan", Network(TINY), nan)
    assert not (tmp_path / "nan").exists() and not (tmp_path / "wide").exists()


def test_models_are_opened_and_written_as_all_others(saved, tmp_path):
    folder = saved[1]
    (folder.parent / "scheduler").mkdir()
    values = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    file = folder.parent / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(values | {"max_shift": 1.0}))
    model = open_model(folder.parent)
    assert model.kind == "diffusers" and model.network.config.guidance_embedding
    assert model.config.sampling.shift_by_tokens == (256, 0.5, 4096, 1.0)
    assert model.config.process.flow.time_scale == 1000
    params = model.load()
    write_model(model, "flux_pt", tmp_path / "flux1.safetensors")
    original = open_model(tmp_path / "flux1.safetensors")
    assert original.kind == "flux_pt" and original.config.sampling.steps == 28
    assert "no tensor tells" in original.notes[0]
    assert_same(original.load(), params)
    for kind in ("diffusers", "dit_jax"):
        write_model(original, kind, tmp_path / kind, dtype="bfloat16")
        again = open_model(tmp_path / kind)
        assert again.kind == kind and again.param_dtype == "bfloat16"
        assert again.network.config == original.network.config
        assert_same(
            again.load(), jax.tree.map(lambda a: a.astype("bfloat16").astype("float32"), params)
        )
    assert "text-to-image" in (tmp_path / "diffusers" / "README.md").read_text()
    card = json.loads((tmp_path / "diffusers" / "dit_jax.json").read_text())
    card["config"]["model"]["flux"]["depth"] = 1
    (tmp_path / "diffusers" / "dit_jax.json").write_text(json.dumps(card))
    with pytest.raises(InteropError, match=r"model\.flux\.depth=1, transformer/config.json 2"):
        open_model(tmp_path / "diffusers")
    with pytest.raises(InteropError, match="can be written as dit_jax, flux_pt, diffusers"):
        write_model(original, "dit_pt", tmp_path / "other.pt")
    other = dataclasses.replace(original, config=original.config.copy_and_resolve_references())
    other.config.process.flow.network_convention = "sit"
    with pytest.raises(InteropError, match="others would compute something else"):
        write_model(other, "flux_pt", tmp_path / "other.safetensors")
    assert write_model(other, "flux_pt", tmp_path / "o.safetensors", allow_inexact=True).sha256
