"""FLUX.1 in the layouts of diffusers and of the original code: tables and configurations.

diffusers: `FluxTransformer2DModel`, where projections that are one here are several. The original:
`flux1-*.safetensors` of Black Forest Labs. Both pack 2 x 2 latents as (channel, row, column).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.diffusion.process import RectifiedFlow
from dit_jax.interop.claims import check_counts, check_types
from dit_jax.interop.dit import mlp_ratio
from dit_jax.interop.schedulers import FLUX_SHIFT, FlowTimes
from dit_jax.interop.table import Row, Table, affine
from dit_jax.interop.tensors import InteropError, TensorFile
from dit_jax.interop.transforms import Transform, identity, linear, swap_halves
from dit_jax.models import FluxConfig
from dit_jax.untrusted import shown

FLUX_CLASS = "FluxTransformer2DModel"
_PACKED = 4  # latents of a token: 2 x 2
_STREAMS = ("image", "text")


def packed_patches(patch_size: int, axis: int) -> Transform:
    """Packed latents along an axis: theirs (channel, row, column), ours (row, column, channel)."""

    def reordered(a, shape, order):
        a = np.moveaxis(a, axis, 0)
        values = a.reshape(*shape, *a.shape[1:])
        rest = range(3, values.ndim)
        return np.moveaxis(values.transpose(*order, *rest).reshape(a.shape), 0, axis)

    size = (patch_size, patch_size)
    return Transform(
        lambda a: reordered(a, (-1, *size), (1, 2, 0)),
        lambda a: reordered(a, (*size, -1), (2, 0, 1)),
    )


def _norms(ours: str, queries: str, keys: str) -> list[Row]:
    return [
        Row(f"{ours}.query_norm.scale", (queries,), identity()),
        Row(f"{ours}.key_norm.scale", (keys,), identity()),
    ]


def _packed(config: FluxConfig, ours: str, theirs: str, *, inputs: bool) -> list[Row]:
    """The projection from (or to) patches: of its kernel the input (or output) is reordered."""
    kernel = linear().then(packed_patches(config.patch_size, 0 if inputs else 1))
    bias = identity() if inputs else packed_patches(config.patch_size, 0)
    return [
        Row(f"{ours}.kernel", (f"{theirs}.weight",), kernel),
        Row(f"{ours}.bias", (f"{theirs}.bias",), bias),
    ]


def diffusers_table(config: FluxConfig) -> Table:
    """The layout of diffusers' `FluxTransformer2DModel`."""
    embedders = "time_text_embed"
    rows = _packed(config, "x_embedder", "x_embedder", inputs=True)
    rows += affine("text_embedder", "context_embedder", linear())
    named = {"t_embedder": "timestep_embedder", "pooled_embedder": "text_embedder"}
    if config.guidance_embedding:
        named["guidance_embedder"] = "guidance_embedder"
    for ours, theirs in named.items():
        for i in (1, 2):
            rows += affine(f"{ours}.fc{i}", f"{embedders}.{theirs}.linear_{i}", linear())
    for stream in _STREAMS:
        rows += _diffusers_stream(stream)
    block, ours = "single_transformer_blocks.{layer}", "single_blocks"
    parts = tuple(f"{block}.attn.to_{part}" for part in "qkv")
    sizes = (config.hidden_size,) * 3 + (config.mlp_hidden,)
    rows += affine(f"{ours}.linear1", (*parts, f"{block}.proj_mlp"), linear(), sizes=sizes)
    rows += affine(f"{ours}.linear2", f"{block}.proj_out", linear())
    rows += affine(f"{ours}.adaLN_modulation", f"{block}.norm.linear", linear())
    rows += _norms(f"{ours}.norm", f"{block}.attn.norm_q.weight", f"{block}.attn.norm_k.weight")
    # (scale, shift) there, (shift, scale) here.
    modulation = "final_layer.adaLN_modulation"
    swapped = linear().then(swap_halves(-1))
    rows += [
        Row(f"{modulation}.kernel", ("norm_out.linear.weight",), swapped),
        Row(f"{modulation}.bias", ("norm_out.linear.bias",), swap_halves(-1)),
    ]
    rows += _packed(config, "final_layer.linear", "proj_out", inputs=False)
    return Table("FLUX in diffusers' layout", tuple(rows))


def _diffusers_stream(stream: str) -> list[Row]:
    """The rows of one stream of the double blocks."""
    block, ours = "transformer_blocks.{layer}", f"double_blocks.{stream}"
    context = "_context" if stream == "text" else ""
    if context:
        parts = tuple(f"add_{part}_proj" for part in "qkv")
        out, norm = "to_add_out", "norm_added"
    else:
        parts, out, norm = tuple(f"to_{part}" for part in "qkv"), "to_out.0", "norm"
    rows = affine(f"{ours}.attn.qkv", tuple(f"{block}.attn.{part}" for part in parts), linear())
    rows += affine(f"{ours}.attn.proj", f"{block}.attn.{out}", linear())
    norms = (f"{block}.attn.{norm}_{part}.weight" for part in "qk")
    rows += _norms(f"{ours}.attn.norm", *norms)
    rows += affine(f"{ours}.mlp.fc1", f"{block}.ff{context}.net.0.proj", linear())
    rows += affine(f"{ours}.mlp.fc2", f"{block}.ff{context}.net.2", linear())
    rows += affine(f"{ours}.adaLN_modulation", f"{block}.norm1{context}.linear", linear())
    return rows


def original_table(config: FluxConfig) -> Table:
    """The layout of the original `flux1-*.safetensors`."""
    rows = _packed(config, "x_embedder", "img_in", inputs=True)
    rows += affine("text_embedder", "txt_in", linear())
    named = {"t_embedder": "time_in", "pooled_embedder": "vector_in"}
    if config.guidance_embedding:
        named["guidance_embedder"] = "guidance_in"
    for ours, theirs in named.items():
        rows += affine(f"{ours}.fc1", f"{theirs}.in_layer", linear())
        rows += affine(f"{ours}.fc2", f"{theirs}.out_layer", linear())
    for stream, short in zip(_STREAMS, ("img", "txt"), strict=True):
        block, ours = f"double_blocks.{{layer}}.{short}", f"double_blocks.{stream}"
        rows += affine(f"{ours}.attn.qkv", f"{block}_attn.qkv", linear())
        rows += affine(f"{ours}.attn.proj", f"{block}_attn.proj", linear())
        norms = (f"{block}_attn.norm.{part}_norm.scale" for part in ("query", "key"))
        rows += _norms(f"{ours}.attn.norm", *norms)
        rows += affine(f"{ours}.mlp.fc1", f"{block}_mlp.0", linear())
        rows += affine(f"{ours}.mlp.fc2", f"{block}_mlp.2", linear())
        rows += affine(f"{ours}.adaLN_modulation", f"{block}_mod.lin", linear())
    block, ours = "single_blocks.{layer}", "single_blocks"
    rows += affine(f"{ours}.linear1", f"{block}.linear1", linear())
    rows += affine(f"{ours}.linear2", f"{block}.linear2", linear())
    rows += affine(f"{ours}.adaLN_modulation", f"{block}.modulation.lin", linear())
    norms = (f"{block}.norm.{part}_norm.scale" for part in ("query", "key"))
    rows += _norms(f"{ours}.norm", *norms)
    modulation = "final_layer.adaLN_modulation"
    rows += affine(modulation, f"{modulation}.1", linear())
    rows += _packed(config, "final_layer.linear", "final_layer.linear", inputs=False)
    return Table("FLUX in the original layout", tuple(rows))


_COUNTS = (
    "in_channels",
    "out_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "patch_size",
)


def check_diffusers_types(values: Mapping[str, Any], where: str | Path) -> None:
    """Refuses a config.json whose entries have other types than diffusers writes.

    Raises:
        InteropError: one has; says which.
    """
    check_types(
        where,
        values,
        counts=_COUNTS,
        texts=("_class_name",),
        truths=("guidance_embeds",),
        nullable=("out_channels", "_class_name"),
    )
    axes = values.get("axes_dims_rope", [16, 56, 56])
    is_list = isinstance(axes, list) and len(axes) == 3
    if not (is_list and all(type(size) is int and 0 < size < 2**16 for size in axes)):
        raise InteropError(f"{where}: axes_dims_rope={shown(axes)}; expected three integers")


def config_from_diffusers(
    values: Mapping[str, Any], *, where: str | Path = "config.json"
) -> FluxConfig:
    """A `FluxTransformer2DModel`'s config.json as ours.

    Args:
        values: the JSON's values; absent ones have diffusers' defaults.
        where: for errors.

    Raises:
        InteropError: a model class or shape that this network does not have.
    """
    if values.get("_class_name", FLUX_CLASS) != FLUX_CLASS:
        found = shown(values.get("_class_name")).strip("'")
        raise InteropError(f"{where} describes a {found}; expected a {FLUX_CLASS}")
    if values.get("patch_size", 1) != 1:
        raise InteropError(
            f"{where}: patch_size={values['patch_size']}; a FLUX transformer is given packed "
            "latents, patch_size=1"
        )
    in_channels = values.get("in_channels", 64)
    out_channels = values.get("out_channels") or in_channels
    _check_channels(where, in_channels, out_channels)
    heads, head_dim = values.get("num_attention_heads", 24), values.get("attention_head_dim", 128)
    try:
        return FluxConfig(
            in_channels=in_channels // _PACKED,
            hidden_size=heads * head_dim,
            depth=values.get("num_layers", 19),
            single_depth=values.get("num_single_layers", 38),
            num_heads=heads,
            text_dim=values.get("joint_attention_dim", 4096),
            pooled_dim=values.get("pooled_projection_dim", 768),
            guidance_embedding=values.get("guidance_embeds", False),
            rotary_channels=_own_channels(head_dim, values.get("axes_dims_rope", (16, 56, 56))),
        )
    except ValueError as error:
        raise InteropError(f"{where}: {error}") from error


def _check_channels(where: str | Path, in_channels: int, out_channels: int) -> None:
    if in_channels % _PACKED:
        raise InteropError(
            f"{where}: in_channels={in_channels}; expected a multiple of {_PACKED}, the channels "
            "of 2 x 2 latents"
        )
    if in_channels != out_channels:
        raise InteropError(
            f"{where}: {in_channels} channels in and {out_channels} out: a FLUX that is given a "
            "mask or a control image beside the latents (Fill, Depth, Canny) is not known here; "
            "those with as many in as out are (dev, schnell, Kontext, Krea)"
        )


def _own_channels(head_dim: int, axes: Any) -> tuple[int, ...]:
    """The rotary channels, () where they are those that a head of this size has by itself."""
    axes = tuple(axes)
    if head_dim % 4 == 0 and head_dim >= 8:
        usual = FluxConfig(hidden_size=head_dim, num_heads=1).axes_channels
        return () if axes == usual else axes
    return axes


def config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """The config.json of the `FluxTransformer2DModel` with the network's shape.

    Raises:
        InteropError: the network has a shape that diffusers' class cannot have.
    """
    if config.mlp_hidden != 4 * config.hidden_size:
        raise InteropError(
            "diffusers' FLUX has an MLP four times as wide; the model's ratio is "
            f"{config.mlp_ratio}"
        )
    return {
        "_class_name": FLUX_CLASS,
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.axes_channels),
        "guidance_embeds": config.guidance_embedding,
        "in_channels": config.in_channels * _PACKED,
        "joint_attention_dim": config.text_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "num_single_layers": config.single_depth,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": config.pooled_dim,
    }


def config_from_original(file: TensorFile) -> tuple[FluxConfig, tuple[str, ...]]:
    """What an original state dict says about its network.

    Returns:
        The configuration, and what had to be assumed.

    Raises:
        InteropError: tensors that tell it are missing or contradict each other.
    """
    shapes = {name: spec.shape for name, spec in file.specs.items()}
    try:
        hidden_size, in_channels = shapes["img_in.weight"]
        (head_dim,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
        mlp_hidden = shapes["double_blocks.0.img_mlp.0.weight"][0]
        text_dim, pooled_dim = (
            shapes[f"{name}.weight"][1] for name in ("txt_in", "vector_in.in_layer")
        )
        out_channels = shapes["final_layer.linear.weight"][0]
        depth, single_depth = (
            1 + max(int(n.split(".")[1]) for n in shapes if n.startswith(f"{blocks}."))
            for blocks in ("double_blocks", "single_blocks")
        )
    except KeyError as error:
        raise InteropError(
            f"{file.path} has no tensor {error}: it is no whole FLUX in the original layout"
        ) from error
    except (ValueError, IndexError) as error:
        raise InteropError(f"{file.path} is no FLUX in the original layout: {error}") from error
    check_counts(file.path, {"depth": depth, "single_depth": single_depth}, file)
    _check_channels(file.path, in_channels, out_channels)
    if head_dim < 1 or hidden_size < 1 or hidden_size % head_dim:
        raise InteropError(
            f"{file.path}: heads of {head_dim} channels do not go into a width of {hidden_size}"
        )
    try:
        config = FluxConfig(
            in_channels=in_channels // _PACKED,
            hidden_size=hidden_size,
            depth=depth,
            single_depth=single_depth,
            num_heads=hidden_size // head_dim,
            mlp_ratio=mlp_ratio(hidden_size, mlp_hidden),
            text_dim=text_dim,
            pooled_dim=pooled_dim,
            guidance_embedding="guidance_in.in_layer.weight" in shapes,
        )
    except ValueError as error:
        raise InteropError(f"{file.path}: {error}") from error
    if head_dim == 128:
        return config, ()
    note = (
        f"no tensor tells how the {head_dim} channels of a head are shared out among image, row "
        f"and column: taken as {config.axes_channels}"
    )
    return config, (note,)


def default_flow_times(config: FluxConfig) -> FlowTimes:
    """At which times the published networks are sampled: shifted by size, schnell as they are."""
    return FlowTimes(points=FLUX_SHIFT) if config.guidance_embedding else FlowTimes()


def flux_sections(config: FluxConfig, times: FlowTimes) -> dict[str, dict[str, Any]]:
    """The sections of a configuration, beside config.model, of a network read from outside."""
    return {
        "process": {"name": "flow", "flow": {"network_convention": "flux", "time_scale": 1e3}},
        "method": {"label_dropout": 0.0},
        "sampling": {
            "solver": "euler",
            "steps": 28 if config.guidance_embedding else 4,
            "shift": 1.0 if times.points else times.shift,
            "shift_by_tokens": times.points,
        },
    }


def differences(config: FluxConfig, process: Any) -> list[str]:
    """What others would compute differently with a network's weights, [] for nothing."""
    published = RectifiedFlow(network_convention="flux", time_scale=1000.0)
    if process == published:
        return []
    return [f"it denoises {process}, FLUX {published}"]
