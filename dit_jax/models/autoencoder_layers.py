"""Layers of the convolutional autoencoder: convolution, group normalisation, the U-shaped halves.

Everything that looks beyond one pixel goes through `convolve`, `group_statistics` or the attention
seam, the three places that have to know when an image is spread over devices. Parameters, group
statistics and the softmax are float32; `dtype` is what convolutions are computed in.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_jax.models import attention as attention_lib
from dit_jax.models import layers

# ((before, after) rows, (before, after) columns) of zeros.
Padding = tuple[tuple[int, int], tuple[int, int]]
SAME_3X3: Padding = ((1, 1), (1, 1))
# Downsampling pads only below and to the right, as the original does: with stride 2 this places
# the samples differently from symmetric padding.
DOWNSAMPLING: Padding = ((0, 1), (0, 1))

EPSILON = 1e-6  # of every group normalisation


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: Padding = SAME_3X3,
) -> Float[Array, "b h2 w2 o"]:
    """Cross-correlation of channels-last images, zeros around them."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def group_statistics(
    x: Float[Array, "b h w c"], num_groups: int
) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
    """Mean and variance of each channel's group, repeated for its channels, in float32."""
    c = x.shape[-1]
    x = x.astype(jnp.float32)

    def mean_in_group(values):  # sums over pixels first: no transposition of the image
        means = values.mean(axis=(1, 2)).reshape(-1, num_groups, c // num_groups).mean(axis=-1)
        return jnp.repeat(means, c // num_groups, axis=-1)[:, None, None]

    mean = mean_in_group(x)
    return mean, mean_in_group(jnp.square(x - mean))


class Conv(nnx.Module):
    """A 3x3 convolution with bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        stride: int = 1,
        padding: Padding = SAME_3X3,
    ):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Convolves in `self.dtype`."""
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        y = convolve(x.astype(self.dtype), kernel, stride=self.stride, padding=self.padding)
        return y + bias[None, None, None]


class GroupNorm(nnx.Module):
    """Normalisation over pixels and the channels of a group, with learned scale and shift."""

    def __init__(self, channels: int, num_groups: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.num_groups = num_groups

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalises in float32; the result has the input's dtype."""
        mean, variance = group_statistics(x, self.num_groups)
        scale = jax.lax.rsqrt(variance + EPSILON) * self.scale[...][None, None, None]
        y = (x.astype(jnp.float32) - mean) * scale + self.bias[...][None, None, None]
        return y.astype(x.dtype)


class ResnetBlock(nnx.Module):
    """Two times normalise, SiLU, convolve, around a shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_groups: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
    ):
        self.norm1 = GroupNorm(in_channels, num_groups)
        self.conv1 = Conv(in_channels, out_channels, rngs=rngs, dtype=dtype)
        self.norm2 = GroupNorm(out_channels, num_groups)
        self.conv2 = Conv(out_channels, out_channels, rngs=rngs, dtype=dtype)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = layers.Linear(in_channels, out_channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """Applies the block."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if self.has_shortcut else x) + h


class AttentionBlock(nnx.Module):
    """Single-head self-attention over all pixels, around a shortcut."""

    def __init__(self, channels: int, num_groups: int, *, rngs: nnx.Rngs, dtype: Any):
        self.group_norm = GroupNorm(channels, num_groups)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            layers.Linear(channels, channels, rngs=rngs, dtype=dtype) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the block."""
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, 1, c)
        attention = attention_lib.LocalAttention()
        out, _ = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out(out).reshape(b, h, w, c)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(
        self, channels: int, num_groups: int, add_attention: bool, *, rngs: nnx.Rngs, dtype: Any
    ):
        self.resnets = numbered(
            ResnetBlock(channels, channels, num_groups, rngs=rngs, dtype=dtype) for _ in range(2)
        )
        self.add_attention = add_attention
        if add_attention:
            self.attention = AttentionBlock(channels, num_groups, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the three."""
        x = self.resnets["0"](x)
        x = self.attention(x) if self.add_attention else x
        return self.resnets["1"](x)


class Downsample(nnx.Module):
    """Half the resolution by a convolution of stride 2."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: Any):
        self.conv = Conv(channels, channels, rngs=rngs, dtype=dtype, stride=2, padding=DOWNSAMPLING)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Applies the layer."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the resolution by repeating pixels, then a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: Any):
        self.conv = Conv(channels, channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Applies the layer."""
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return self.conv(x.reshape(b, 2 * h, 2 * w, c))


class Level(nnx.Module):
    """The residual blocks of one resolution, then the layer that changes it (none at the end)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        num_groups: int,
        resample: type[Downsample] | type[Upsample] | None,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
    ):
        widths = [in_channels] + [out_channels] * depth
        self.resnets = numbered(
            ResnetBlock(before, after, num_groups, rngs=rngs, dtype=dtype)
            for before, after in itertools.pairwise(widths)
        )
        self.has_resample = resample is not None
        if resample:
            self.resample = resample(out_channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Applies the level."""
        x = in_turn(self.resnets, x)
        return self.resample(x) if self.has_resample else x


class Encoder(nnx.Module):
    """Images to features at the lowest resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        depth: int,
        num_groups: int,
        add_attention: bool,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
    ):
        options = {"rngs": rngs, "dtype": dtype}
        self.conv_in = Conv(in_channels, widths[0], **options)
        steps = list(zip((widths[0], *widths[:-1]), widths, strict=True))
        resamples = [Downsample] * (len(widths) - 1) + [None]
        self.down_blocks = numbered(
            Level(*step, depth, num_groups, resample, **options)
            for step, resample in zip(steps, resamples, strict=True)
        )
        self.mid_block = MidBlock(widths[-1], num_groups, add_attention, **options)
        self.conv_norm_out = GroupNorm(widths[-1], num_groups)
        self.conv_out = Conv(widths[-1], out_channels, **options)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Encodes."""
        x = self.mid_block(in_turn(self.down_blocks, self.conv_in(x)))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents to images; each level has one residual block more than the encoder's."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        depth: int,
        num_groups: int,
        add_attention: bool,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
    ):
        options = {"rngs": rngs, "dtype": dtype}
        upwards = tuple(reversed(widths))
        self.conv_in = Conv(in_channels, upwards[0], **options)
        self.mid_block = MidBlock(upwards[0], num_groups, add_attention, **options)
        steps = list(zip((upwards[0], *upwards[:-1]), upwards, strict=True))
        resamples = [Upsample] * (len(widths) - 1) + [None]
        self.up_blocks = numbered(
            Level(*step, depth + 1, num_groups, resample, **options)
            for step, resample in zip(steps, resamples, strict=True)
        )
        self.conv_norm_out = GroupNorm(upwards[-1], num_groups)
        self.conv_out = Conv(upwards[-1], out_channels, **options)

    def __call__(self, z: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Decodes."""
        x = in_turn(self.up_blocks, self.mid_block(self.conv_in(z)))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


def numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    """Modules under the keys '0', '1', ...: strings, as every key of a parameter tree."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def in_turn(modules: nnx.Dict, x: Array) -> Array:
    """Applies numbered modules one after the other."""
    for i in range(len(modules)):
        x = modules[str(i)](x)
    return x
