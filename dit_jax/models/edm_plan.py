"""Which layers EDM's U-Nets consist of, in the order in which they run.

A plan is a tuple of `Layer` records, worked out from the configuration alone. The networks create
their modules from it, walk along it, and count their operations by it.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import nnx

from dit_jax.models import edm_layers
from dit_jax.models.convolution import Conv
from dit_jax.models.linear import Linear


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of an encoder or decoder.

    Attributes:
        name: its name in the released networks, '16x16_block0'.
        kind: 'conv', 'block', or one of the auxiliary ones that run beside the blocks: 'aux_down',
            'aux_skip' and 'aux_residual' (the image, or what became of it, joins every resolution
            of the encoder), 'aux_up', 'aux_norm' and 'aux_conv' (the output).
        in_channels: of its input, a concatenated skip included.
        out_channels: of its output.
        side: of its output, for an input of config.image_size (`UNetConfig.map_size`).
        resample: of blocks, 'none', 'up' or 'down'.
        attention: of blocks, whether they have it.
        concatenates: whether the input is joined by an output of the encoder.
        is_feature: whether it is the last of its resolution in the encoder.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    side: int
    resample: str = "none"
    attention: bool = False
    concatenates: bool = False
    is_feature: bool = False


@functools.lru_cache(maxsize=64)
def encoder(config: Any) -> tuple[Layer, ...]:
    """The encoder's layers."""
    encoder_type = getattr(config, "encoder_type", "standard")
    base = config.model_channels
    # DDPM++ starts at the base width whatever its first multiplier, ADM at that of the first level.
    first = base if hasattr(config, "encoder_type") else base * config.channel_mult[0]
    plan = [Layer(_name(config, 0, "conv"), "conv", config.in_channels, first, config.image_size)]
    width, aux_width = first, config.in_channels
    for level, multiplier in enumerate(config.channel_mult):
        side, name = config.image_size >> level, functools.partial(_name, config, level)
        if level:
            plan.append(Layer(name("down"), "block", width, width, side, resample="down"))
            if encoder_type == "skip":
                plan.append(Layer(name("aux_down"), "aux_down", aux_width, aux_width, side))
                plan.append(Layer(name("aux_skip"), "aux_skip", aux_width, width, side))
            if encoder_type == "residual":
                plan.append(Layer(name("aux_residual"), "aux_residual", aux_width, width, side))
                aux_width = width
        for i in range(config.num_blocks):
            plan.append(
                Layer(
                    name(f"block{i}"),
                    "block",
                    width,
                    base * multiplier,
                    side,
                    attention=side in config.attn_resolutions,
                    is_feature=i == config.num_blocks - 1,
                )
            )
            width = base * multiplier
    return tuple(plan)


@functools.lru_cache(maxsize=64)
def decoder(config: Any) -> tuple[Layer, ...]:
    """The decoder's layers."""
    is_song = hasattr(config, "decoder_type")
    skips = [layer.out_channels for layer in encoder(config) if layer.kind in ("conv", "block")]
    width, deepest, plan = skips[-1], len(config.channel_mult) - 1, []
    for level in range(deepest, -1, -1):
        side, name = config.image_size >> level, functools.partial(_name, config, level)
        if level == deepest:
            plan.append(Layer(name("in0"), "block", width, width, side, attention=True))
            plan.append(Layer(name("in1"), "block", width, width, side))
        else:
            plan.append(Layer(name("up"), "block", width, width, side, resample="up"))
        for i in range(config.num_blocks + 1):
            before, width = width + skips.pop(), config.model_channels * config.channel_mult[level]
            # DDPM++ attends in the last block of a resolution only, ADM in each.
            attention = side in config.attn_resolutions and (not is_song or i == config.num_blocks)
            plan.append(
                Layer(
                    name(f"block{i}"),
                    "block",
                    before,
                    width,
                    side,
                    attention=attention,
                    concatenates=True,
                )
            )
        if is_song and (level == 0 or config.decoder_type == "skip"):
            out = config.out_channels
            if config.decoder_type == "skip" and level < deepest:
                plan.append(Layer(name("aux_up"), "aux_up", out, out, side))
            plan.append(Layer(name("aux_norm"), "aux_norm", width, width, side))
            plan.append(Layer(name("aux_conv"), "aux_conv", width, out, side))
    return tuple(plan)


def _name(config: Any, level: int, what: str) -> str:
    side = config.image_size >> level
    return f"{side}x{side}_{what}"


def create(layer: Layer, config: Any, rngs: nnx.Rngs) -> nnx.Module | None:
    """The layer's module, with fresh parameters; None for those without any."""
    style = config.style
    options = {"rngs": rngs, "precision": config.precision}
    widths = (layer.in_channels, layer.out_channels)
    if layer.kind == "conv":
        return Conv(*widths, init=style.init, role="embedding", **options)
    if layer.kind == "aux_residual":
        return Conv(*widths, init=style.init, **options)
    if layer.kind == "aux_skip":
        return Linear(*widths, init=style.init, **options)
    if layer.kind == "aux_norm":
        return edm_layers.GroupNorm(layer.in_channels, style.epsilon)
    if layer.kind == "aux_conv":
        return Conv(*widths, init=style.init_zero, role="output", **options)
    if layer.kind in ("aux_down", "aux_up"):
        return None
    return edm_layers.UNetBlock(
        *widths,
        config.emb_channels,
        style,
        resample=layer.resample,
        attention=layer.attention,
        **options,
    )


def attention_layers(config: Any) -> tuple[Layer, ...]:
    """The blocks with attention, in the order in which they run."""
    return tuple(layer for layer in (*encoder(config), *decoder(config)) if layer.attention)


def require_group_width(layer: Layer) -> None:
    """Refuses widths that group normalisation cannot divide into its groups.

    Raises:
        ValueError: with the width.
    """
    normalised = {
        "block": (layer.in_channels, layer.out_channels),
        "aux_norm": (layer.in_channels,),
    }
    for width in normalised.get(layer.kind, ()):
        if width < 4 or width % min(32, width // 4):
            raise ValueError(
                f"{layer.name} normalises {width} channels, which do not divide into "
                f"{max(1, min(32, width // 4))} groups: choose model_channels and channel_mult "
                "such that all widths are multiples of 32, or multiples of 4 below 128"
            )


def require_heads(layer: Layer, style: edm_layers.BlockStyle) -> None:
    """Refuses widths that do not divide into attention heads.

    Raises:
        ValueError: with the width.
    """
    if not layer.attention:
        return
    heads, width = style.num_heads(layer.out_channels), layer.out_channels
    if heads < 1 or width % heads:
        raise ValueError(
            f"{layer.name} attends over {width} channels, which do not divide into heads of "
            f"{style.channels_per_head}: choose model_channels and channel_mult accordingly"
        )


def flops_per_example(config: Any) -> float:
    """Floating-point operations of one forward pass of one example, a multiply-add being two.

    Convolutions, matrix products and attention's two products; normalisation, resampling and
    activations are left out. The backward pass costs twice as much.
    """
    pixels = sum(_weights_per_pixel(layer, config) for layer in (*config.encoder, *config.decoder))
    if config.decoder[-1].kind == "block":  # ADM's output convolution
        area = math.prod(config.input_size)
        pixels += 9 * config.decoder[-1].out_channels * config.out_channels * area
    emb = config.emb_channels
    mapping = emb * (config.noise_channels * (1 + (config.second_time != "none")) + emb)
    attention = sum(
        2 * math.prod(config.map_size(layer.side)) ** 2 * layer.out_channels
        for layer in attention_layers(config)
    )
    return 2.0 * (pixels + mapping + attention)


def _weights_per_pixel(layer: Layer, config: Any) -> int:
    """Multiply-adds of a layer, those of attention's products with each other left out."""
    area = math.prod(config.map_size(layer.side))
    before, after = layer.in_channels, layer.out_channels
    if layer.kind in ("conv", "aux_conv"):
        return 9 * before * after * area
    if layer.kind == "aux_skip":
        return before * after * area
    if layer.kind == "aux_residual":  # convolves before it downsamples
        return 9 * before * after * 4 * area
    if layer.kind != "block":
        return 0
    style = config.style
    projects = before != after or (layer.resample != "none" and style.resample_proj)
    per_pixel = 9 * after * (before + after) + before * after * projects
    per_pixel += 4 * after**2 if layer.attention else 0
    return per_pixel * area + config.emb_channels * after * (1 + style.adaptive_scale)
