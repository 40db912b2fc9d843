"""diffusers pipelines of exported models, set to compute what the model computes."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.interop.dit import PIPELINE_NULL_CLASS
from dit_jax.interop.own_folders import read_card
from dit_jax.interop.tensors import InteropError
from dit_jax.models.layers import sincos_position_embedding


def load_pipeline(folder: str | Path, **options: Any) -> Any:
    """`diffusers.DiTPipeline.from_pretrained(folder)` that computes what the model computes.

    Its time frequencies are spaced as the model's, and its transformer takes latents of any height
    and width (`take_any_size`); the pipeline's own call goes on making squares.

    The pipeline of a model that knows no class for "none" raises an InteropError when guidance is
    asked of it, which is DiTPipeline's default: call it with guidance_scale=1.

    Args:
        folder: what `launch/convert.py --to=diffusers` wrote (`dit_jax.json` tells the spacing). A
            pipeline without that file is returned as diffusers loads it.
        options: for `from_pretrained`, for instance torch_dtype or vae.

    Raises:
        InteropError: no folder, or the pipeline's transformer is not the one known here.
    """
    from diffusers import DiTPipeline

    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise InteropError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    card = read_card(folder)
    pipeline = DiTPipeline.from_pretrained(folder, local_files_only=True, **options)
    if card:
        take_any_size(pipeline.transformer)
    if card.get("time_frequency_spacing") == "original":
        set_frequency_spacing(pipeline.transformer, "original")
    if not card.get("guidance", True):
        pipeline.transformer.register_forward_pre_hook(_refuse_null_class, with_kwargs=True)
    return pipeline


def take_any_size(transformer: Any) -> None:
    """Makes a diffusers `DiTTransformer2DModel` take inputs of any height and width.

    By itself it squeezes the positions of other grids than that of its sample_size into it, and
    puts its outputs together as squares. Here positions are those of the grid, as in
    `dit_jax.models.dit`, and outputs have the height and width of inputs.

    Args:
        transformer: the module, changed in place.

    Raises:
        InteropError: the module has not the parts known here.
    """
    parts = (("pos_embed", "pos_embed"), ("pos_embed", "height"), ("proj_out_2", "weight"))
    if not all(hasattr(getattr(transformer, part, None), name) for part, name in parts):
        raise InteropError(
            "this version of diffusers builds its DiT otherwise; it cannot be made to take other "
            "sizes"
        )
    patch = transformer.config.patch_size

    def set_positions(embedder: Any, arguments: tuple) -> None:
        rows, columns = (side // patch for side in arguments[0].shape[-2:])
        if (embedder.height, embedder.width) == (rows, columns):
            return
        old = embedder.pos_embed
        table = sincos_position_embedding(old.shape[-1], (rows, columns))
        embedder.pos_embed = old.new_tensor(np.asarray(table))[None]
        embedder.height, embedder.width = rows, columns

    transformer.pos_embed.register_forward_pre_hook(set_positions)
    transformer.proj_out_2.register_forward_hook(_fill_square)
    transformer.register_forward_hook(_from_square, with_kwargs=True)


def _fill_square(module: Any, arguments: tuple, tokens: Any) -> Any:
    """Tokens [b, l, d] with as many after them as make a square number, for diffusers' reshape."""
    length = tokens.shape[1]
    side = math.isqrt(length - 1) + 1
    filled = tokens.new_zeros(tokens.shape[0], side * side, tokens.shape[2])
    filled[:, :length] = tokens
    return filled


def _from_square(module: Any, arguments: tuple, keywords: dict[str, Any], output: Any) -> Any:
    """The output [b, c, h, w] of tokens that diffusers has laid out in a square."""
    given = arguments[0] if arguments else keywords["hidden_states"]
    patch = module.config.patch_size
    rows, columns = (side // patch for side in given.shape[-2:])
    if rows == columns:
        return output
    square = output[0]
    batch, channels, side, _ = square.shape
    tokens = square.reshape(batch, channels, side // patch, patch, side // patch, patch)
    tokens = tokens.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, : rows * columns]
    tokens = tokens.reshape(batch, rows, columns, channels, patch, patch)
    sample = tokens.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, *given.shape[-2:])
    return (sample,) if isinstance(output, tuple) else type(output)(sample=sample)


def _refuse_null_class(transformer: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
    labels = keywords.get("class_labels")
    if labels is not None and bool((labels == PIPELINE_NULL_CLASS).any()):
        raise InteropError(
            "this model was trained without label dropout and knows no class for 'none', which "
            "guidance needs: call the pipeline with guidance_scale=1"
        )


def set_frequency_spacing(transformer: Any, spacing: str) -> None:
    """Sets how a diffusers `DiTTransformer2DModel` spaces its time frequencies, in every block.

    Args:
        transformer: the module, changed in place.
        spacing: 'original' (1/128) or 'diffusers' (1/127).

    Raises:
        InteropError: the module has not the embedders known here.
    """
    shift = {"original": 0, "diffusers": 1}[spacing]
    for block in transformer.transformer_blocks:
        embedder = getattr(getattr(block.norm1, "emb", None), "time_proj", None)
        if not hasattr(embedder, "downscale_freq_shift"):
            raise InteropError(
                "this version of diffusers builds its time embedding otherwise; the spacing cannot "
                "be set"
            )
        embedder.downscale_freq_shift = shift
