"""diffusers pipelines of exported models, set to compute what the model computes."""

from pathlib import Path
from typing import Any

from dit_jax.interop.dit import PIPELINE_NULL_CLASS
from dit_jax.interop.models import read_card
from dit_jax.interop.tensors import InteropError


def load_pipeline(folder: str | Path, **options: Any) -> Any:
    """`diffusers.DiTPipeline.from_pretrained(folder)` with the model's own spacing of frequencies.

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
    if card.get("time_frequency_spacing") == "original":
        set_frequency_spacing(pipeline.transformer, "original")
    if not card.get("guidance", True):
        pipeline.transformer.register_forward_pre_hook(_refuse_null_class, with_kwargs=True)
    return pipeline


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
