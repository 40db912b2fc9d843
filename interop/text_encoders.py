"""Text encoders in the folders of transformers: tables, configuration, reading, writing.

CLIP: `CLIPTextModel` and `CLIPTextModelWithProjection`. T5: `T5EncoderModel`, and the encoder of a
whole `T5ForConditionalGeneration`. Other options than those of our modules are refused by name.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.atomic import atomic_folder
from dit_jax.interop.claims import check_counts, check_types, read_object
from dit_jax.interop.parameters import abstract_params, flat_shapes, flatten
from dit_jax.interop.recognise import description
from dit_jax.interop.sharded import TRANSFORMERS_NAMES, find_weights
from dit_jax.interop.table import Row, Table, affine, export_arrays, export_specs, load_params
from dit_jax.interop.tensors import InteropError, TensorFile, open_tensors, write_safetensors
from dit_jax.interop.transforms import identity, linear
from dit_jax.models.linear import resolve_param_dtype
from dit_jax.models.text import CLIPTextConfig, T5Config, TextEncoder
from dit_jax.models.text.clip import ACTIVATIONS
from dit_jax.untrusted import shown

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CLIP, T5 = "clip_text_model", "t5"
TITLES = {CLIP: "CLIP text encoder", T5: "T5 encoder"}

_PROJECTION = "text_projection.weight"
_CLIP_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
    "eos_token_id",
)
_T5_KEYS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
)
# What transformers takes an absent key for.
_CLIP_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_CLIP_DEFAULTS |= {"projection_dim": 512, "eos_token_id": 49407}
_T5_DEFAULTS = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}


def clip_table(config: CLIPTextConfig) -> Table:
    """The layout of transformers' CLIP text models, whose names may begin with 'text_model.'."""

    def either(name: str) -> str:
        return f"text_model.{name}|{name}"

    def norm(ours: str, theirs: str) -> list[Row]:
        return [
            Row(f"{ours}.scale", (either(f"{theirs}.weight"),), identity()),
            Row(f"{ours}.bias", (either(f"{theirs}.bias"),), identity()),
        ]

    block = "encoder.layers.{layer}"
    qkv = tuple(either(f"{block}.self_attn.{part}_proj") for part in "qkv")
    embeddings = (("token", "token_embedding"), ("position", "position_embedding"))
    rows = [
        Row(f"{ours}_embedding.embedding", (either(f"embeddings.{theirs}.weight"),), identity())
        for ours, theirs in embeddings
    ]
    rows += norm("blocks.norm1", f"{block}.layer_norm1")
    rows += affine("blocks.attn.qkv", qkv, linear())
    rows += affine("blocks.attn.proj", either(f"{block}.self_attn.out_proj"), linear())
    rows += norm("blocks.norm2", f"{block}.layer_norm2")
    rows += affine("blocks.mlp.fc1", either(f"{block}.mlp.fc1"), linear())
    rows += affine("blocks.mlp.fc2", either(f"{block}.mlp.fc2"), linear())
    rows += norm("final_norm", "final_layer_norm")
    if config.with_projection:
        rows.append(Row("text_projection.kernel", (_PROJECTION,), linear()))
    ignored = (r"(text_model\.)?embeddings\.position_ids",)
    return Table(TITLES[CLIP], tuple(rows), ignored=ignored)


def t5_table(config: T5Config) -> Table:
    """The layout of transformers' T5; what is not of the encoder is left where it is."""
    block = "encoder.block.{layer}.layer"
    attention, mlp = f"{block}.0.SelfAttention", f"{block}.1.DenseReluDense"
    first = "encoder.block.0.layer.0.SelfAttention"
    shared = "shared.weight|encoder.embed_tokens.weight"
    qkv = tuple(f"{attention}.{part}.weight" for part in "qkv")
    rows = (
        Row("token_embedding.embedding", (shared,), identity()),
        Row("relative_bias.embedding", (f"{first}.relative_attention_bias.weight",), identity()),
        Row("blocks.norm1.scale", (f"{block}.0.layer_norm.weight",), identity()),
        Row("blocks.attn.qkv.kernel", qkv, linear()),
        Row("blocks.attn.proj.kernel", (f"{attention}.o.weight",), linear()),
        Row("blocks.norm2.scale", (f"{block}.1.layer_norm.weight",), identity()),
        Row("blocks.mlp.wi_0.kernel", (f"{mlp}.wi_0.weight",), linear()),
        Row("blocks.mlp.wi_1.kernel", (f"{mlp}.wi_1.weight",), linear()),
        Row("blocks.mlp.wo.kernel", (f"{mlp}.wo.weight",), linear()),
        Row("final_norm.scale", ("encoder.final_layer_norm.weight",), identity()),
    )
    # The embedding is tied: a second copy of it is the same.
    ignored = (r"encoder\.embed_tokens\.weight", r"decoder\..*", r"lm_head\.weight")
    return Table(TITLES[T5], rows, ignored=ignored)


def table_of(config: CLIPTextConfig | T5Config) -> Table:
    """transformers' layout of an encoder."""
    return clip_table(config) if isinstance(config, CLIPTextConfig) else t5_table(config)


def config_from_transformers(
    values: Mapping[str, Any], *, with_projection: bool = False, where: str = CONFIG
) -> CLIPTextConfig | T5Config:
    """A config.json of a text encoder as ours.

    Args:
        values: the JSON's; absent ones have transformers' defaults.
        with_projection: of a CLIP, which only the weights tell.
        where: for errors.

    Raises:
        InteropError: another model, an option our modules do not have, or a value out of range.
    """
    kind = values.get("model_type")
    if kind not in TITLES:
        raise InteropError(
            f"{where} describes {shown(kind)} (model_type); expected one of {', '.join(TITLES)}"
        )
    keys, defaults = (_CLIP_KEYS, _CLIP_DEFAULTS) if kind == CLIP else (_T5_KEYS, _T5_DEFAULTS)
    numbers, texts = ("layer_norm_eps", "layer_norm_epsilon"), ("hidden_act",)
    counts = [key for key in keys if key not in (*numbers, *texts, "eos_token_id")]
    integers = ("eos_token_id",) if kind == CLIP else ()
    check_types(where, values, counts=counts, integers=integers, numbers=numbers, texts=texts)
    if kind == T5 and values.get("feed_forward_proj", "relu") != "gated-gelu":
        raise InteropError(
            f"{where}: feed_forward_proj={shown(values.get('feed_forward_proj', 'relu'))}; this T5 "
            "is version 1.1's, with 'gated-gelu' and nothing else"
        )
    activation = values.get("hidden_act", "quick_gelu")
    if kind == CLIP and activation not in ACTIVATIONS:
        raise InteropError(
            f"{where}: hidden_act={shown(activation)}; expected one of {', '.join(ACTIVATIONS)}"
        )
    chosen = {key: values[key] for key in keys if key in values}
    try:
        if kind == T5:
            return T5Config(**{**defaults, **chosen})
        return CLIPTextConfig(**{**defaults, **chosen}, with_projection=with_projection)
    except ValueError as error:
        raise InteropError(f"{where}: {error}") from error


def config_to_transformers(config: CLIPTextConfig | T5Config, dtype: Any) -> dict[str, Any]:
    """The config.json with which transformers loads an encoder whose tensors have `dtype`."""
    named = {"torch_dtype": np.dtype(dtype).name, "vocab_size": config.vocab_size}
    if isinstance(config, T5Config):
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": T5,
            **{key: getattr(config, key) for key in _T5_KEYS},
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            **named,
        }
    name = "CLIPTextModelWithProjection" if config.with_projection else "CLIPTextModel"
    return {
        "architectures": [name],
        "model_type": CLIP,
        **{key: getattr(config, key) for key in _CLIP_KEYS},
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        **named,
    }


def load_text_encoder(
    folder: str | os.PathLike,
    *,
    kind: str = "",
    dtype: str = "auto",
    param_dtype: str = "auto",
    layer_loop: str = "auto",
    attention: str = "auto",
    put: Callable[[str, np.ndarray], Any] | None = None,
    within: str | os.PathLike | None = None,
) -> tuple[TextEncoder, dict[str, Any]]:
    """Reads a text encoder that transformers, or `save_text_encoder`, saved.

    Args:
        folder: config.json, and model.safetensors or an index of its shards.
        kind: `CLIP` or `T5`, if nothing else will do.
        dtype: of the computation.
        param_dtype: what parameters are stored in; 'auto' is bfloat16 for a file that holds
            nothing else, and float32 for any other.
        layer_loop: see `CLIPTextConfig`.
        attention: see `CLIPTextConfig`.
        put: (path, array) -> leaf, for instance onto sharded devices, one parameter at a time;
            default: the first device.
        within: a folder that links may not lead out of, by default `folder`.

    Returns:
        The encoder and its parameters.

    Raises:
        InteropError: no text encoder there, another one, or weights that differ from the
            configuration (one error with all differences).
    """
    config, file = _open(folder, kind, within)
    # Older CLIPs hold positions besides, which are integers.
    weights = {s.dtype for s in file.specs.values() if jnp.issubdtype(s.dtype, jnp.floating)}
    stored = "bfloat16" if weights == {np.dtype(jnp.bfloat16)} else "float32"
    stored = resolve_param_dtype(param_dtype, stored)
    execution = {"dtype": dtype, "layer_loop": layer_loop, "attention": attention}
    encoder = TextEncoder(dataclasses.replace(config, param_dtype=stored, **execution))
    put = put or (lambda path, array: jax.device_put(array))
    return encoder, load_params(table_of(config), abstract_params(encoder), file, put=put)


def read_text_config(
    folder: str | os.PathLike, *, kind: str = "", within: str | os.PathLike | None = None
) -> CLIPTextConfig | T5Config:
    """The configuration of a text encoder, without reading its weights.

    Raises:
        InteropError: as `load_text_encoder`.
    """
    return _open(folder, kind, within)[0]


def _open(folder: Any, kind: str, within: Any) -> tuple[CLIPTextConfig | T5Config, TensorFile]:
    """Configuration and tensors of what `load_text_encoder` is to read."""
    folder = Path(folder).expanduser()
    within = within or folder
    if not (folder / CONFIG).is_file():
        raise InteropError(f"{folder} has no {CONFIG}: it is no text encoder saved by transformers")
    values = read_object(folder / CONFIG, within)
    where = str(folder / CONFIG)
    if kind and values.get("model_type") != kind:
        found = shown(values.get("model_type"))
        raise InteropError(f"{where} describes {found}; expected a {TITLES[kind]} ({kind})")
    file = open_tensors(find_weights(folder, TRANSFORMERS_NAMES), within=within)
    projection = _PROJECTION in file.specs
    config = config_from_transformers(values, with_projection=projection, where=where)
    _require_kind(file, config)
    check_counts(where, {name: values.get(name) for name in (*_CLIP_KEYS, *_T5_KEYS)}, file)
    return config, file


def _require_kind(file: TensorFile, config: CLIPTextConfig | T5Config) -> None:
    """Another architecture is told as such, not as a hundred differences."""
    is_clip = isinstance(config, CLIPTextConfig)
    sign = "token_embedding.weight" if is_clip else "SelfAttention.q.weight"
    if not any(name.endswith(sign) for name in file.specs):
        title = TITLES[CLIP if is_clip else T5]
        raise InteropError(f"{file.path} holds no {title}: {description(file.specs)}")


def save_text_encoder(
    folder: str | os.PathLike,
    encoder: TextEncoder,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
) -> str:
    """Writes an encoder for transformers' `from_pretrained(folder)`.

    Args:
        folder: must not exist; it appears complete or not at all.
        encoder: what to write.
        params: its parameters.
        dtype: of the tensors; default: what the encoder stores its kernels in.

    Returns:
        The SHA-256 of the weights file.

    Raises:
        FileExistsError: `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: delete it or choose another folder")
    config = encoder.config
    dtype = np.dtype(jnp.dtype(resolve_param_dtype(config.param_dtype)) if dtype is None else dtype)
    table, shapes, leaves = table_of(config), flat_shapes(params), dict(flatten(params))
    with atomic_folder(folder) as temporary:
        arrays = export_arrays(table, shapes, lambda path: np.asarray(leaves[path]), dtype)
        specs = export_specs(table, shapes, dtype)
        path = temporary / WEIGHTS
        digest = write_safetensors(path, specs, arrays, metadata={"format": "pt"})
        text = json.dumps(config_to_transformers(config, dtype), indent=2)
        (temporary / CONFIG).write_text(text + "\n")
    return digest
