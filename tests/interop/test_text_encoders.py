import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from dit_jax.interop.parameters import abstract_params
from dit_jax.interop.tensors import InteropError
from dit_jax.interop.text_encoders import (
    CLIP,
    CONFIG,
    T5,
    WEIGHTS,
    load_text_encoder,
    save_text_encoder,
)
from dit_jax.models.text import CLIPTextConfig, T5Config, TextEncoder
from dit_jax.models.text.t5 import relative_buckets
from tests.compilations import OPTIMIZED
from tests.references import transformers_text as reference

CLIP_IDS = np.array(
    [[0, 5, 9, 69, 69, 69, 69, 69, 69], [0, 7, 31, 40, 12, 22, 3, 69, 69], [0, 69] + [69] * 7]
)
CLIP_MASK = np.arange(9)[None] < np.array([4, 8, 2])[:, None]
T5_IDS = np.random.default_rng(0).integers(3, 60, (2, 41))
T5_IDS[0, 30:], T5_IDS[1, 9:] = 0, 0


def torch_ids(ids):
    return torch.from_numpy(ids).long()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that transformers saved, by name."""
    root = tmp_path_factory.mktemp("transformers")
    models = {
        "clip_largest": reference.clip(2),
        "clip_first": reference.clip(69, "gelu", projection=True),
        "t5": reference.t5(),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root, models


@pytest.mark.parametrize(
    ("name", "layer_loop"), [("clip_largest", "scan"), ("clip_first", "unroll")]
)
def test_clip_is_that_of_transformers(folders, name, layer_loop):
    root, models = folders
    encoder, params = load_text_encoder(root / name, kind=CLIP, layer_loop=layer_loop)
    encode = jax.jit(encoder.encode, static_argnames="hidden")
    model = models[name]
    for ids, mask in ((CLIP_IDS, None), (np.roll(CLIP_IDS, 1, 0), CLIP_MASK[[2, 0, 1]])):
        with torch.no_grad():
            attend = None if mask is None else torch_ids(mask)
            wanted = model(torch_ids(ids), attention_mask=attend, output_hidden_states=True)
        found = encode(params, jnp.asarray(ids), mask, hidden=(-2,))
        assert_close(found.tokens, wanted.last_hidden_state)
        assert_close(found.hidden[0], wanted.hidden_states[-2])
        if name == "clip_first":
            assert_close(found.projected, wanted.text_embeds)
        else:
            assert_close(found.pooled, wanted.pooler_output)


def assert_close(found, wanted):
    assert np.abs(wanted.numpy()).max() > 0.5
    np.testing.assert_allclose(np.asarray(found), wanted.numpy(), rtol=0, atol=1e-4)


def test_where_a_prompt_is_pooled_follows_the_config(folders):
    encoder, params = load_text_encoder(folders[0] / "clip_largest")
    ids = jnp.asarray([[0, 40, 5, 69, 5]])
    # The largest id (2) is what the comparison above pools at, here the first of a smaller one.
    config = dataclasses.replace(encoder.config, eos_token_id=5)
    encode = jax.jit(TextEncoder(config).encode, compiler_options=OPTIMIZED)
    states = encode(params, ids)
    np.testing.assert_array_equal(states.pooled, states.tokens[:, 2])


def test_t5_is_that_of_transformers(folders):
    root, models = folders
    with torch.no_grad():
        wanted = [
            models["t5"](torch_ids(T5_IDS), attention_mask=mask, output_hidden_states=True)
            for mask in (None, torch_ids(T5_IDS > 0))
        ]
    for loop, masks in (("scan", (None, T5_IDS > 0)), ("unroll", (None,))):
        encoder, params = load_text_encoder(root / "t5", kind=T5, layer_loop=loop)
        encode = jax.jit(encoder.encode, static_argnames="hidden")
        for mask, states in zip(masks, wanted, strict=False):
            found = encode(params, jnp.asarray(T5_IDS), mask, hidden=(0,))
            assert_close(found.tokens, states.last_hidden_state)
            assert_close(found.hidden[0], states.hidden_states[1])


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (64, 250)])
def test_distances_are_told_apart_as_in_transformers(buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = torch.arange(600)
    wanted = T5Attention._relative_position_bucket(
        positions[None] - positions[:, None], True, buckets, distance
    )
    np.testing.assert_array_equal(relative_buckets(600, buckets, distance), wanted.numpy())


@pytest.mark.parametrize(
    ("name", "other"), [("clip_largest", "text_model."), ("clip_first", ""), ("t5", "shards")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_read_is_written_bit_for_bit_and_read_by_transformers(
    folders, tmp_path, name, other, dtype
):
    _, models = folders
    model = type(models[name])(models[name].config)
    model.load_state_dict(models[name].state_dict())
    model = model.to(getattr(torch, dtype)).eval()
    options = {"max_shard_size": "6KB"} if other == "shards" else {}
    model.save_pretrained(tmp_path / "theirs", **options)
    if other == "text_model.":
        tensors = safetensors.torch.load_file(tmp_path / "theirs" / WEIGHTS)
        renamed = {f"{other}{key}": value for key, value in tensors.items()}
        renamed["text_model.embeddings.position_ids"] = torch.arange(12)[None]
        safetensors.torch.save_file(renamed, tmp_path / "theirs" / WEIGHTS, {"format": "pt"})
    if other == "shards":
        assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    encoder, params = load_text_encoder(tmp_path / "theirs")
    kernel = np.dtype(params["blocks"]["attn"]["qkv"]["kernel"].dtype)
    assert kernel.name == encoder.config.param_dtype == dtype
    save_text_encoder(tmp_path / "ours", encoder, params)
    again = type(model).from_pretrained(tmp_path / "ours")
    assert again.dtype == getattr(torch, dtype)
    state = again.state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)
    with torch.no_grad():
        ids = torch_ids(T5_IDS if name == "t5" else CLIP_IDS)
        torch.testing.assert_close(again(ids)[0], model(ids)[0], rtol=0, atol=0)


def test_bfloat16_is_near_float32(folders):
    folder, ids = folders[0] / "t5", jnp.asarray(T5_IDS)
    encoder, params = load_text_encoder(folder)
    wanted = jax.jit(encoder.encode)(params, ids).tokens
    encoder, params = load_text_encoder(folder, dtype="bfloat16", param_dtype="bfloat16")
    assert params["blocks"]["attn"]["proj"]["kernel"].dtype == ml_dtypes.bfloat16
    assert params["blocks"]["norm1"]["scale"].dtype == np.float32
    found = jax.jit(encoder.encode)(params, ids).tokens
    assert found.dtype == np.float32 and 0 < float(jnp.abs(found - wanted).mean()) < 0.04


def rewritten(folder, tmp_path, **changes):
    values = json.loads((folder / CONFIG).read_text())
    tmp_path.joinpath("other").mkdir(exist_ok=True)
    (tmp_path / "other" / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (tmp_path / "other" / CONFIG).write_text(json.dumps(values | changes))
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5", {"feed_forward_proj": "relu"}, "version 1.1's, with 'gated-gelu'"),
        ("t5", {"model_type": "umt5"}, "describes 'umt5'"),
        ("t5", {"num_layers": 4}, "missing: encoder.block.3.layer.0.layer_norm.weight"),
        ("t5", {"num_layers": 10**9}, "holds only"),
        ("t5", {"d_ff": 41}, "wi_0.weight is [40, 32], expected [41, 32]"),
        ("t5", {"d_kv": "x"}, "d_kv='x'; expected an integer of at least 1"),
        ("t5", {"model_type": "clip_text_model"}, "holds no CLIP text encoder: it looks like a T5"),
        ("clip_largest", {"hidden_act": "relu"}, "expected one of quick_gelu, gelu"),
        ("clip_largest", {"num_attention_heads": 5}, "must divide hidden_size=32"),
        ("clip_largest", {"eos_token_id": [3, 4]}, "eos_token_id="),
        ("clip_largest", {"num_hidden_layers": 2}, "unexpected: encoder.layers.2."),
    ],
)
def test_other_encoders_are_refused_by_name(folders, tmp_path, name, changes, message):
    with pytest.raises(InteropError) as caught:
        load_text_encoder(rewritten(folders[0] / name, tmp_path, **changes))
    assert message in str(caught.value)


def test_folders_without_an_encoder_are_refused(folders, tmp_path):
    with pytest.raises(InteropError, match=r"expected a T5 encoder \(t5\)"):
        load_text_encoder(folders[0] / "clip_first", kind=T5)
    with pytest.raises(InteropError, match=r"has no config.json"):
        load_text_encoder(tmp_path)


def test_calls_that_cannot_be_answered_are_errors():
    encoder = TextEncoder(
        CLIPTextConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=4,
        )
    )
    params = abstract_params(encoder)

    def call(ids, mask=None, hidden=()):
        jax.eval_shape(lambda p: encoder.encode(p, ids, mask, hidden=hidden), params)

    ids = jnp.zeros((2, 4), jnp.int32)
    call(ids)
    for arguments, message in (
        ((ids.astype(jnp.float32),), "expected integers"),
        ((jnp.zeros((2, 5), jnp.int32),), "prompts of 5 tokens: this CLIP has positions for 4"),
        ((ids, ids), "expected bool"),
        ((ids, None, (-3,)), "numbers of blocks, 0 to 1"),
        ((ids, None, (1, 0)), "ascending"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(ValueError, match="can exceed float16's range"):
        T5Config(dtype="float16")
    with pytest.raises(ValueError, match="a multiple of 4"):
        T5Config(relative_attention_num_buckets=6)
