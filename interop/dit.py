"""DiT and SiT in the layouts of the original code and of diffusers: tables and configurations.

The original: Peebles and Xie's `DiT`, whose names fast-DiT and SiT share. diffusers:
`DiTTransformer2DModel`, where every block holds a copy of both embedders.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.interop.claims import check_counts, check_types
from dit_jax.interop.table import Constant, Row, Table, affine
from dit_jax.interop.tensors import InteropError, TensorFile
from dit_jax.interop.transforms import identity, linear, padded_rows, patch_conv
from dit_jax.models import DiTConfig
from dit_jax.models.dit import SIZES
from dit_jax.models.layers import sincos_position_embedding
from dit_jax.untrusted import shown

# The null class of diffusers' DiTPipeline, whatever the number of classes.
PIPELINE_NULL_CLASS = 1000

_HEADS = {hidden_size: num_heads for _, hidden_size, num_heads in SIZES.values()}


def original_table(config: DiTConfig) -> Table:
    """The layout of facebookresearch/DiT, fast-DiT and SiT state dicts."""
    rows = affine("x_embedder", "x_embedder.proj", patch_conv(config.patch_size))
    rows += affine("t_embedder.fc1", "t_embedder.mlp.0", linear())
    rows += affine("t_embedder.fc2", "t_embedder.mlp.2", linear())
    if config.num_classes:
        rows.append(Row("y_embedder.embedding", ("y_embedder.embedding_table.weight",), identity()))
    rows += affine("blocks.attn.qkv", "blocks.{layer}.attn.qkv", linear())
    rows += affine("blocks.attn.proj", "blocks.{layer}.attn.proj", linear())
    rows += affine("blocks.mlp.fc1", "blocks.{layer}.mlp.fc1", linear())
    rows += affine("blocks.mlp.fc2", "blocks.{layer}.mlp.fc2", linear())
    modulation = "blocks.{layer}.adaLN_modulation.1"
    rows += affine("blocks.adaLN_modulation", modulation, linear())
    rows += affine("final_layer.adaLN_modulation", "final_layer.adaLN_modulation.1", linear())
    rows += affine("final_layer.linear", "final_layer.linear", linear())
    positions = Constant("pos_embed", lambda: _positions(config))
    return Table("DiT in the original layout", tuple(rows), (positions,))


def _positions(config: DiTConfig) -> np.ndarray:
    return sincos_position_embedding(config.hidden_size, config.grid)[None]


def diffusers_table(config: DiTConfig, num_embeds: int | None = None) -> Table:
    """The layout of diffusers' `DiTTransformer2DModel`.

    Args:
        config: of the network.
        num_embeds: classes that the foreign table has room for (`num_embeds_ada_norm`), if more
            than ours: those between ours and the null class are zeros.
    """
    block, depth = "transformer_blocks.{layer}", config.depth
    embedders = f"{block}.norm1.emb"
    shared = {"copies": depth}
    rows = affine("x_embedder", "pos_embed.proj", patch_conv(config.patch_size))
    timestep = f"{embedders}.timestep_embedder"
    rows += affine("t_embedder.fc1", f"{timestep}.linear_1", linear(), **shared)
    rows += affine("t_embedder.fc2", f"{timestep}.linear_2", linear(), **shared)
    classes = identity()
    room = config.num_classes if num_embeds is None else num_embeds
    if config.null_class and room != config.num_classes:
        classes = padded_rows((*range(config.num_classes), room), room + 1)
    elif not config.null_class:  # a row that diffusers always has, and the model has never seen
        classes = padded_rows(tuple(range(config.num_classes)), room + 1)
    embedding = f"{embedders}.class_embedder.embedding_table.weight"
    rows.append(Row("y_embedder.embedding", (embedding,), classes, **shared))
    attention = f"{block}.attn1"
    qkv = tuple(f"{attention}.to_{part}" for part in "qkv")
    rows += affine("blocks.attn.qkv", qkv, linear())
    rows += affine("blocks.attn.proj", f"{attention}.to_out.0", linear())
    rows += affine("blocks.mlp.fc1", f"{block}.ff.net.0.proj", linear())
    rows += affine("blocks.mlp.fc2", f"{block}.ff.net.2", linear())
    rows += affine("blocks.adaLN_modulation", f"{block}.norm1.linear", linear())
    rows += affine("final_layer.adaLN_modulation", "proj_out_1", linear())
    rows += affine("final_layer.linear", "proj_out_2", linear())
    return Table("DiT in diffusers' layout", tuple(rows), ignored=(r"pos_embed\.pos_embed",))


def config_from_original(
    file: TensorFile,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    learn_sigma: bool | None = None,
    like: Any = None,
) -> tuple[DiTConfig, tuple[str, ...]]:
    """What a state dict in the original layout says about its network.

    Args:
        file: the state dict.
        num_heads: no tensor shows it; by default the paper's for the file's width, or what the
            training arguments in a fast-DiT checkpoint name.
        num_classes: without the null class; by default what the training arguments name, else one
            less than the class table has rows (`_classes`).
        learn_sigma: to assert; by default twice as many output as input channels mean it.
        like: what has the attributes of a `DiTConfig`, for instance config.model of an experiment:
            decides where neither the file nor the arguments above do.

    Returns:
        The configuration, and what had to be assumed.

    Raises:
        InteropError: the number of heads cannot be known, or shapes contradict each other.
    """
    shapes = {name: spec.shape for name, spec in file.specs.items()}
    try:
        hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        depth = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks."))
        out_channels = shapes["final_layer.linear.weight"][0] // patch_size**2
        rows = shapes.get("y_embedder.embedding_table.weight", (0,))[0]
        mlp_hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise InteropError(f"{file.path} is no DiT in the original layout: {error}") from error
    check_counts(file.path, {"depth": depth}, file)
    length = shapes["pos_embed"][1] if "pos_embed" in shapes else None
    side = _side(file, length)
    if out_channels not in (in_channels, 2 * in_channels):
        raise InteropError(
            f"{file.path}: {in_channels} channels in and {out_channels} out; a DiT has as many, or "
            "twice as many where it learns the variance"
        )
    classes, null_class, assumed = _classes(file, rows, num_classes, like)
    learned = out_channels == 2 * in_channels
    if learn_sigma is not None and learn_sigma != learned:
        raise InteropError(
            f"{file.path}: learn_sigma is {learned} by its {out_channels} output channels"
        )
    config = DiTConfig(
        image_size=side * patch_size,
        in_channels=in_channels,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads or _heads(file, hidden_size, like),
        mlp_ratio=mlp_ratio(hidden_size, mlp_hidden),
        num_classes=classes,
        null_class=null_class,
        learn_sigma=learned,
        time_frequency_spacing="original",
    )
    return config, assumed


_IMAGENET_CLASSES = 1000


def _classes(
    file: TensorFile, rows: int, num_classes: int | None, like: Any
) -> tuple[int, bool, tuple[str, ...]]:
    """(classes, whether the last row is a null class, what was assumed) of a table of `rows`.

    The original adds a row for "no class" if it trains with label dropout, else not: a shape does
    not tell one case from the other.
    """
    known = (file.metadata.get("args") or {}).get("num_classes")
    if num_classes is None and type(known) is int:
        num_classes = known
    if num_classes is None and like is not None and like.num_classes in (rows, rows - 1):
        num_classes = like.num_classes or None
    if rows == 0:
        if num_classes:
            raise InteropError(
                f"{file.path} has no class table (y_embedder.embedding_table.weight): it is "
                f"unconditional, not of {num_classes} classes"
            )
        return 0, True, ()
    if num_classes is not None:
        if num_classes not in (rows - 1, rows) or num_classes < 1:
            size = f"{rows} {'rows' if rows > 1 else 'row'}"
            raise InteropError(
                f"{file.path}: its class table has {size}, which is not {num_classes} classes: "
                f"{_readings(rows)}"
            )
        return num_classes, num_classes == rows - 1, ()
    if rows == 1:
        note = (
            "its class table has one row: taken as one class without a null class, as an "
            "unconditional model of the original code has it. All images have label 0, and "
            "guidance is not possible"
        )
        return 1, False, (note,)
    if rows == _IMAGENET_CLASSES + 1:
        return _IMAGENET_CLASSES, True, ()
    null_class = rows != _IMAGENET_CLASSES
    classes = rows - null_class
    taken = f"{classes} classes and the null class of guidance"
    other = f"of {rows} classes without a null class (trained without label dropout)"
    if not null_class:
        taken = f"{classes} classes without a null class, trained without label dropout"
        other = f"of {rows - 1} classes and a null class"
    note = (
        f"its class table has {rows} rows, taken as {taken}. The tensors do not tell: if the model "
        f"is {other}, say so with --num_classes={rows if null_class else rows - 1}"
    )
    return classes, null_class, (note,)


def _readings(rows: int) -> str:
    without = f"{rows} {'class' if rows == 1 else 'classes'} without (--num_classes={rows})"
    if rows == 1:
        return f"it can only be {without.replace('without', 'without a null class')}"
    return f"it can be {rows - 1} classes and a null class (--num_classes={rows - 1}), or {without}"


def _side(file: TensorFile, length: int | None) -> int:
    if length is None:
        raise InteropError(
            f"{file.path} has no pos_embed, which tells the image size: it is not a complete DiT "
            "state dict"
        )
    side = math.isqrt(length)
    if side * side != length:
        raise InteropError(
            f"{file.path}: pos_embed has {length} positions; the original DiT is square"
        )
    return side


def mlp_ratio(hidden_size: int, mlp_hidden: int) -> float:
    """The ratio of which a network of this width has an MLP of that width."""
    ratio = mlp_hidden / hidden_size
    if int(hidden_size * ratio) != mlp_hidden:  # rounded down: the network truncates the product
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _heads(file: TensorFile, hidden_size: int, like: Any) -> int:
    arguments = file.metadata.get("args") or {}
    if isinstance(arguments.get("num_heads"), int):
        return arguments["num_heads"]
    size = str(arguments.get("model", "")).partition("-")[2].partition("/")[0]
    if size in SIZES and SIZES[size][1] == hidden_size:
        return SIZES[size][2]
    own = getattr(like, "dit", like)
    if hidden_size not in _HEADS and own is not None and own.hidden_size == hidden_size:
        return own.num_heads
    if hidden_size not in _HEADS:
        raise InteropError(
            f"{file.path}: no tensor tells the number of attention heads, and the width "
            f"{hidden_size} is not one of the paper's ({', '.join(map(str, _HEADS))}): give it, "
            "--num_heads=..."
        )
    return _HEADS[hidden_size]


# What diffusers' DiT can be configured to and ours is: anything else would be another function.
_DIFFUSERS_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


def check_diffusers_types(values: Mapping[str, Any], where: str | Path) -> None:
    """Refuses a config.json whose entries have other types than diffusers writes.

    Raises:
        InteropError: one has; says which.
    """
    check_types(
        where,
        values,
        counts=(
            "sample_size",
            "in_channels",
            "out_channels",
            "patch_size",
            "num_attention_heads",
            "attention_head_dim",
            "num_layers",
            "num_embeds_ada_norm",
        ),
        numbers=("norm_eps", "dropout"),
        texts=("_class_name", *(n for n, v in _DIFFUSERS_FIXED.items() if isinstance(v, str))),
        truths=[n for n, v in _DIFFUSERS_FIXED.items() if isinstance(v, bool)],
        nullable=("out_channels", "num_embeds_ada_norm", "_class_name"),
    )


def config_from_diffusers(
    values: Mapping[str, Any],
    *,
    num_classes: int | None = None,
    null_class: bool = True,
    time_frequency_spacing: str = "diffusers",
    where: str = "config.json",
) -> DiTConfig:
    """A `DiTTransformer2DModel`'s config.json as ours.

    Args:
        values: the JSON's values; absent ones have diffusers' defaults.
        num_classes: ours, if fewer than the foreign table has room for.
        null_class: whether the row of the null class means anything.
        time_frequency_spacing: 'diffusers' unless the weights are known to be of another origin.
        where: for errors.

    Raises:
        InteropError: a model class or option that this network does not have.
    """
    if values.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        found = shown(values.get("_class_name")).strip("'")
        raise InteropError(f"{where} describes a {found}; expected a DiTTransformer2DModel")
    for name, wanted in _DIFFUSERS_FIXED.items():
        if values.get(name, wanted) != wanted:
            raise InteropError(
                f"{where}: {name}={shown(values[name])}; a DiT has {wanted!r} and nothing else here"
            )
    if values.get("dropout", 0.0):
        raise InteropError(f"{where}: dropout={values['dropout']}; this DiT has none")
    heads = values.get("num_attention_heads", 16)
    in_channels = values.get("in_channels", 4)
    out_channels = values.get("out_channels") or in_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise InteropError(
            f"{where}: in_channels={in_channels}, out_channels={out_channels}; expected as many "
            "or, where the variance is learned, twice as many"
        )
    try:
        return DiTConfig(
            image_size=values.get("sample_size", 32),
            in_channels=in_channels,
            patch_size=values.get("patch_size", 2),
            hidden_size=heads * values.get("attention_head_dim", 72),
            depth=values.get("num_layers", 28),
            num_heads=heads,
            num_classes=num_classes or values.get("num_embeds_ada_norm") or 1000,
            null_class=null_class,
            learn_sigma=out_channels == 2 * in_channels,
            time_frequency_spacing=time_frequency_spacing,
            mlp_norm_epsilon=values.get("norm_eps", 1e-5),
        )
    except ValueError as error:
        raise InteropError(f"{where}: {error}") from error


def config_to_diffusers(
    config: DiTConfig, num_embeds: int | None = None, *, sample_size: int | None = None
) -> dict[str, Any]:
    """The config.json of the `DiTTransformer2DModel` with the network's shape.

    Args:
        config: of the network.
        num_embeds: see `diffusers_table`.
        sample_size: side of the squares that a pipeline makes, and for which diffusers computes
            its table of positions; those of the network are the same there, whatever its own size.
            By default the network's own, which must be square.

    Raises:
        InteropError: the network has a shape that diffusers' class cannot have.
    """
    height, width = config.input_size
    if sample_size is None and height != width:
        raise InteropError(f"diffusers' DiT is square; the model takes {height}x{width}")
    if not config.num_classes:
        raise InteropError("diffusers' DiT is class-conditional; the model has no classes")
    if int(config.hidden_size * config.mlp_ratio) != 4 * config.hidden_size:
        raise InteropError(
            f"diffusers' DiT has an MLP four times as wide; the model's ratio is {config.mlp_ratio}"
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        **_DIFFUSERS_FIXED,
        "attention_head_dim": config.head_dim,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_eps": config.mlp_norm_epsilon,
        "norm_num_groups": 32,
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": num_embeds or config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": sample_size or height,
        "upcast_attention": False,
    }
