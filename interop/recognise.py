"""Telling architectures by the names of their tensors, so that an error can say what a file is."""

from collections.abc import Collection

# Name for people, and names of tensors that all have to be there.
_SIGNS = (
    ("DiT or SiT in the original layout", ("x_embedder.proj.weight", "final_layer.linear.weight")),
    (
        "DiT in diffusers' layout",
        ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight",),
    ),
    ("DiT of dit-jax", ("blocks.attn.qkv.kernel", "final_layer.linear.kernel")),
    ("PixArt in diffusers' layout", ("adaln_single.linear.weight",)),
    ("FLUX in the original layout", ("double_blocks.0.img_attn.qkv.weight",)),
    ("FLUX in diffusers' layout", ("single_transformer_blocks.0.attn.to_q.weight",)),
    ("Stable Diffusion 3 (MMDiT)", ("joint_blocks.0.x_block.attn.qkv.weight",)),
    ("Stable Diffusion 3 in diffusers' layout", ("transformer_blocks.0.attn.add_q_proj.weight",)),
    ("AutoencoderKL in diffusers' layout", ("decoder.up_blocks.0.resnets.0.conv1.weight",)),
    ("AutoencoderKL in the original layout", ("decoder.up.0.block.0.conv1.weight",)),
    ("whole Stable Diffusion checkpoint", ("model.diffusion_model.input_blocks.0.0.weight",)),
    ("U-Net in diffusers' layout", ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight")),
    ("ADM U-Net", ("input_blocks.0.0.weight", "out.2.weight")),
    ("Inception-V3", ("Mixed_5b.branch1x1.conv.weight",)),
    ("CLIP text encoder", ("text_model.embeddings.token_embedding.weight",)),
    ("T5 encoder", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    ("vision transformer", ("patch_embed.proj.weight", "cls_token")),
)


def recognise(names: Collection[str]) -> str | None:
    """The architecture whose tensors these are, for people; None if it is not known."""
    for architecture, signs in _SIGNS:
        if all(sign in names for sign in signs):
            return architecture
    if any(name.startswith(("enc.", "model.enc.")) for name in names):
        return "EDM U-Net"
    if any(name.startswith("unet.enc.") for name in names):
        return "EDM2 U-Net"
    if any("lora" in name.lower() for name in names):
        return "LoRA (a change of weights, not a model)"
    return None


def description(names: Collection[str]) -> str:
    """What to say of a file that is not what was expected."""
    architecture = recognise(names)
    if architecture:
        article = "an" if architecture[0] in "AEFIL" and not architecture.startswith("FL") else "a"
        return f"it looks like {article} {architecture}"
    some = ", ".join(sorted(names)[:3])
    return f"its {len(names)} tensors ({some}, ...) are of no architecture known here"
