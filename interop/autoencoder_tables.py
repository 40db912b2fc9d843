"""AutoencoderKL's parameters in the layouts of diffusers and of the original code.

diffusers: `AutoencoderKL`, with the attention names of today (to_q, ...) and of before (query,
...). The original: the names of latent-diffusion, which Black Forest Labs' `ae.safetensors` shares;
there the decoder's levels are numbered from the full resolution down.
"""

from collections.abc import Iterator

from dit_jax.interop.table import Row, Table, affine
from dit_jax.interop.transforms import conv, identity, linear_or_pointwise, pointwise_conv
from dit_jax.models.autoencoder_kl import AutoencoderKLConfig


def diffusers_table(config: AutoencoderKLConfig) -> Table:
    """The layout of diffusers' `AutoencoderKL`: today's names are written, older ones read too."""
    rows = []
    for half, levels, depth in _halves(config):
        rows += affine(f"{half}.conv_in", f"{half}.conv_in", conv())
        for i, (level, widths) in enumerate(_level_widths(config, half)):
            for j in range(depth):
                block = f"{half}.{levels}.{i}.resnets.{j}"
                rows += _resnet(block, block, widths[j], shortcut="conv_shortcut")
            if level:
                resampler = "downsamplers" if half == "encoder" else "upsamplers"
                ours, theirs = (f"{half}.{levels}.{i}.{n}" for n in ("resample", resampler))
                rows += affine(f"{ours}.conv", f"{theirs}.0.conv", conv())
        for j in range(2):
            block = f"{half}.mid_block.resnets.{j}"
            rows += _resnet(block, block, (1, 1), shortcut="")
        if config.mid_block_add_attention:
            ours, theirs = f"{half}.mid_block.attention", f"{half}.mid_block.attentions.0"
            rows += _norm(f"{ours}.group_norm", f"{theirs}.group_norm")
            for today, before in (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out", "proj_attn"),
            ):
                name = f"{theirs}.{today}" + (".0" if today == "to_out" else "")
                names = f"{name}|{theirs}.{before}"
                rows += affine(f"{ours}.{today}", names, linear_or_pointwise())
        rows += _norm(f"{half}.conv_norm_out", f"{half}.conv_norm_out")
        rows += affine(f"{half}.conv_out", f"{half}.conv_out", conv())
    return Table("AutoencoderKL in diffusers' layout", tuple(rows + _quant(config)))


def original_table(config: AutoencoderKLConfig) -> Table:
    """The layout of latent-diffusion and of Black Forest Labs, perhaps in a whole model's file."""
    prefix = "|first_stage_model."

    def both(name):
        return name + prefix + name

    count, rows = len(config.block_out_channels), []
    for half, levels, depth in _halves(config):
        side = "down" if half == "encoder" else "up"
        rows += affine(f"{half}.conv_in", both(f"{half}.conv_in"), conv())
        for i, (level, widths) in enumerate(_level_widths(config, half)):
            number = i if half == "encoder" else count - 1 - i
            for j in range(depth):
                rows += _resnet(
                    f"{half}.{levels}.{i}.resnets.{j}",
                    both(f"{half}.{side}.{number}.block.{j}"),
                    widths[j],
                    shortcut="nin_shortcut",
                )
            if level:
                theirs = both(f"{half}.{side}.{number}.{side}sample.conv")
                rows += affine(f"{half}.{levels}.{i}.resample.conv", theirs, conv())
        for j in range(2):
            theirs = both(f"{half}.mid.block_{j + 1}")
            rows += _resnet(f"{half}.mid_block.resnets.{j}", theirs, (1, 1), shortcut="")
        if config.mid_block_add_attention:
            ours, theirs = f"{half}.mid_block.attention", f"{half}.mid.attn_1"
            rows += _norm(f"{ours}.group_norm", both(f"{theirs}.norm"))
            for name in "qkv":
                rows += affine(f"{ours}.to_{name}", both(f"{theirs}.{name}"), pointwise_conv())
            rows += affine(f"{ours}.to_out", both(f"{theirs}.proj_out"), pointwise_conv())
        rows += _norm(f"{half}.conv_norm_out", both(f"{half}.norm_out"))
        rows += affine(f"{half}.conv_out", both(f"{half}.conv_out"), conv())
    rows += _quant(config, both)
    # What surrounds it in a whole model's file, and the loss of its own training.
    others = r"(?!encoder\.|decoder\.|quant_conv\.|post_quant_conv\.|first_stage_model\.).*"
    loss = r"first_stage_model\.loss\..*"
    return Table("AutoencoderKL in the original layout", tuple(rows), ignored=(others, loss))


def _halves(config: AutoencoderKLConfig) -> tuple[tuple[str, str, int], ...]:
    depth = config.layers_per_block
    return ("encoder", "down_blocks", depth), ("decoder", "up_blocks", depth + 1)


def _level_widths(
    config: AutoencoderKLConfig, half: str
) -> Iterator[tuple[bool, list[tuple[int, int]]]]:
    """For each level in our order: whether it resamples, and (in, out) of its residual blocks."""
    widths = config.block_out_channels
    widths = widths if half == "encoder" else tuple(reversed(widths))
    depth = config.layers_per_block + (half == "decoder")
    for i, width in enumerate(widths):
        before = widths[max(i - 1, 0)]
        yield i < len(widths) - 1, [(before, width)] + [(width, width)] * (depth - 1)


def _suffixed(theirs: str, suffix: str) -> str:
    return "|".join(f"{name}.{suffix}" for name in theirs.split("|"))


def _norm(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}.scale", (_suffixed(theirs, "weight"),), identity()),
        Row(f"{ours}.bias", (_suffixed(theirs, "bias"),), identity()),
    ]


def _resnet(ours: str, theirs: str, widths: tuple[int, int], *, shortcut: str) -> list[Row]:
    rows = []
    for i in (1, 2):
        rows += _norm(f"{ours}.norm{i}", _suffixed(theirs, f"norm{i}"))
        rows += affine(f"{ours}.conv{i}", _suffixed(theirs, f"conv{i}"), conv())
    if widths[0] != widths[1]:
        rows += affine(f"{ours}.conv_shortcut", _suffixed(theirs, shortcut), pointwise_conv())
    return rows


def _quant(config: AutoencoderKLConfig, named=lambda name: name) -> list[Row]:
    rows = []
    for name in ("quant_conv", "post_quant_conv"):
        if getattr(config, f"use_{name}"):
            rows += affine(name, named(name), pointwise_conv())
    return rows
