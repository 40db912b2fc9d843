"""Telling architectures by the names of their tensors, so that an error can say what a file is."""

import re
from collections.abc import Collection

from dit_jax.quantities import counted

ORIGINAL_DIT = "DiT or SiT in the original layout"
DIFFUSERS_DIT = "DiT in diffusers' layout"
ORIGINAL_FLUX = "FLUX in the original layout"
DIFFUSERS_FLUX = "FLUX in diffusers' layout"
EDM_UNET = "EDM U-Net"
AUTOENCODERS = ("AutoencoderKL in diffusers' layout", "AutoencoderKL in the original layout")

# Name in messages, and names of tensors that all have to be there.
_SIGNS = (
    (ORIGINAL_DIT, ("x_embedder.proj.weight", "final_layer.linear.weight")),
    (DIFFUSERS_DIT, ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight",)),
    ("DiT of dit-jax", ("blocks.attn.qkv.kernel", "final_layer.linear.kernel")),
    ("PixArt in diffusers' layout", ("adaln_single.linear.weight",)),
    (ORIGINAL_FLUX, ("double_blocks.0.img_attn.qkv.weight",)),
    (DIFFUSERS_FLUX, ("single_transformer_blocks.0.attn.to_q.weight",)),
    ("Stable Diffusion 3 (MMDiT)", ("joint_blocks.0.x_block.attn.qkv.weight",)),
    ("Stable Diffusion 3 in diffusers' layout", ("transformer_blocks.0.attn.add_q_proj.weight",)),
    (AUTOENCODERS[0], ("decoder.up_blocks.0.resnets.0.conv1.weight",)),
    (AUTOENCODERS[1], ("decoder.up.0.block.0.conv1.weight",)),
    ("whole Stable Diffusion checkpoint", ("model.diffusion_model.input_blocks.0.0.weight",)),
    ("U-Net in diffusers' layout", ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight")),
    ("ADM U-Net", ("input_blocks.0.0.weight", "out.2.weight")),
    ("Inception-V3", ("Mixed_5b.branch1x1.conv.weight",)),
    ("CLIP text encoder", ("text_model.embeddings.token_embedding.weight",)),
    ("CLIP text encoder", ("embeddings.token_embedding.weight", "final_layer_norm.weight")),
    ("T5 encoder", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    ("vision transformer", ("patch_embed.proj.weight", "cls_token")),
)
# 'model.' is how EDM's preconditioned network calls the network within.
_EDM_NAME = re.compile(r"(?P<prefix>|.*?\.)(model\.)?enc\.\d+x\d+_\w+\.")


def recognise(names: Collection[str]) -> str | None:
    """The architecture whose tensors these are, for messages; None if it is not known."""
    for architecture, signs in _SIGNS:
        if all(sign in names for sign in signs):
            return architecture
    if any(name.startswith(("enc.", "model.enc.")) for name in names):
        return EDM_UNET
    if any(name.startswith("unet.enc.") for name in names):
        return "EDM2 U-Net"
    if any("lora" in name.lower() for name in names):
        return "LoRA (a change of weights, not a model)"
    return None


def without_compiled(name: str) -> str:
    """A name without the parts '_orig_mod' that torch.compile adds, wherever they are."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _prefixes(names: Collection[str], sign: str) -> list[str]:
    """What stands before the names that end with `sign`."""
    return [name.removesuffix(sign) for name in names if name == sign or name.endswith(f".{sign}")]


def find_architectures(names: Collection[str]) -> dict[str, str]:
    """Architectures in a file by what stands before their tensors' names, '' for nothing."""
    names = dict.fromkeys(map(without_compiled, names))  # in the file's order
    found: dict[str, str] = {}
    for architecture, signs in _SIGNS:
        for prefix in _prefixes(names, signs[0]):
            if all(prefix + sign in names for sign in signs):
                found.setdefault(prefix, architecture)
    for name in names:
        match = _EDM_NAME.match(name)
        if match and match["prefix"] != "unet.":
            found.setdefault(match["prefix"], EDM_UNET)
    return found


def description(names: Collection[str]) -> str:
    """What to say of a file that is not what was expected."""
    architecture = recognise(names)
    if architecture:
        return f"it looks like {_with_article(architecture)}"
    for prefix, architecture in find_architectures(names).items():
        return f"it looks like {_with_article(architecture)} whose names begin with {prefix!r}"
    for architecture, signs in _SIGNS:
        prefixes = sorted({prefix for sign in signs for prefix in _prefixes(names, sign)})
        if len(prefixes) > 1 and all(_prefixes(names, sign) for sign in signs):
            return (
                f"it looks like {_with_article(architecture)}, but its names begin with different "
                f"prefixes ({', '.join(map(repr, prefixes[:6]))}): save it with one or none"
            )
    some = ", ".join(sorted(names)[:3])
    more, verb = ", ..." if len(names) > 3 else "", "is" if len(names) == 1 else "are"
    listed = f"{counted(len(names), 'tensor')} ({some}{more})"
    return f"its {listed} {verb} of no architecture known here"


def _with_article(architecture: str) -> str:
    article = "an" if architecture[0] in "AEFIL" and not architecture.startswith("FL") else "a"
    return f"{article} {architecture}"
