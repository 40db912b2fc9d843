"""Layers of the convolutional autoencoder: convolution, group normalisation, the U-shaped halves.

Everything that looks beyond one pixel goes through a `Spatial` object, which knows when an image is
spread over devices. Group statistics and the softmax are float32; what products are computed in is
told by a `linear.Precision`.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_jax.models import attention as attention_lib
from dit_jax.models import convolution
from dit_jax.models.linear import Initialization, Linear, Precision
from dit_jax.models.spatial import LOCAL, Padding, Spatial

# Downsampling pads only below and to the right, as the original does: with stride 2 this places
# the samples differently from symmetric padding.
DOWNSAMPLING: Padding = ((0, 1), (0, 1))

EPSILON = 1e-6  # of every group normalisation

# Of fresh autoencoders: LeCun's normal numbers.
_LECUN = Initialization("fan_in", distribution="truncated_normal")
Conv = functools.partial(convolution.Conv, init=_LECUN)


class GroupNorm(nnx.Module):
    """Normalisation over pixels and the channels of a group, with learned scale and shift."""

    def __init__(self, channels: int, num_groups: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.num_groups = num_groups

    def __call__(
        self, x: Float[Array, "b h w c"], spatial: Spatial = LOCAL
    ) -> Float[Array, "b h w c"]:
        """Normalises in float32; the result has the input's dtype."""
        mean, variance = spatial.group_statistics(x, self.num_groups)
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
        precision: Precision,
    ):
        self.norm1 = GroupNorm(in_channels, num_groups)
        self.conv1 = Conv(in_channels, out_channels, rngs=rngs, precision=precision)
        self.norm2 = GroupNorm(out_channels, num_groups)
        self.conv2 = Conv(out_channels, out_channels, rngs=rngs, precision=precision)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = Linear(in_channels, out_channels, rngs=rngs, precision=precision)

    def __call__(
        self, x: Float[Array, "b h w i"], spatial: Spatial = LOCAL
    ) -> Float[Array, "b h w o"]:
        """Applies the block."""
        h = self.conv1(jax.nn.silu(self.norm1(x, spatial)), spatial)
        h = self.conv2(jax.nn.silu(self.norm2(h, spatial)), spatial)
        return (self.conv_shortcut(x) if self.has_shortcut else x) + h


class AttentionBlock(nnx.Module):
    """Single-head self-attention over all pixels, around a shortcut."""

    def __init__(self, channels: int, num_groups: int, *, rngs: nnx.Rngs, precision: Precision):
        self.group_norm = GroupNorm(channels, num_groups)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Linear(channels, channels, rngs=rngs, precision=precision) for _ in range(4)
        )

    def __call__(
        self, x: Float[Array, "b h w c"], spatial: Spatial = LOCAL
    ) -> Float[Array, "b h w c"]:
        """Applies the block."""
        b, h, w, c = x.shape
        tokens = self.group_norm(x, spatial).reshape(b, h * w, 1, c)
        attention = spatial.attention or attention_lib.LocalAttention()
        out, _ = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out(out).reshape(b, h, w, c)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(
        self,
        channels: int,
        num_groups: int,
        add_attention: bool,
        *,
        rngs: nnx.Rngs,
        precision: Precision,
    ):
        self.resnets = numbered(
            ResnetBlock(channels, channels, num_groups, rngs=rngs, precision=precision)
            for _ in range(2)
        )
        self.add_attention = add_attention
        if add_attention:
            self.attention = AttentionBlock(channels, num_groups, rngs=rngs, precision=precision)

    def __call__(
        self, x: Float[Array, "b h w c"], spatial: Spatial = LOCAL
    ) -> Float[Array, "b h w c"]:
        """Applies the three."""
        x = self.resnets["0"](x, spatial)
        x = self.attention(x, spatial) if self.add_attention else x
        return self.resnets["1"](x, spatial)


class Downsample(nnx.Module):
    """Half the resolution by a convolution of stride 2."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, precision: Precision):
        self.conv = Conv(
            channels, channels, rngs=rngs, precision=precision, stride=2, padding=DOWNSAMPLING
        )

    def __call__(
        self, x: Float[Array, "b h w c"], spatial: Spatial = LOCAL
    ) -> Float[Array, "b h2 w2 c"]:
        """Applies the layer."""
        return self.conv(x, spatial)


class Upsample(nnx.Module):
    """Twice the resolution by repeating pixels, then a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, precision: Precision):
        self.conv = Conv(channels, channels, rngs=rngs, precision=precision)

    def __call__(
        self, x: Float[Array, "b h w c"], spatial: Spatial = LOCAL
    ) -> Float[Array, "b h2 w2 c"]:
        """Applies the layer."""
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return self.conv(x.reshape(b, 2 * h, 2 * w, c), spatial)


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
        precision: Precision,
    ):
        widths = [in_channels] + [out_channels] * depth
        self.resnets = numbered(
            ResnetBlock(before, after, num_groups, rngs=rngs, precision=precision)
            for before, after in itertools.pairwise(widths)
        )
        self.has_resample = resample is not None
        if resample:
            self.resample = resample(out_channels, rngs=rngs, precision=precision)

    def __call__(
        self, x: Float[Array, "b h w i"], spatial: Spatial = LOCAL
    ) -> Float[Array, "b h2 w2 o"]:
        """Applies the level."""
        x = in_turn(self.resnets, x, spatial)
        return self.resample(x, spatial) if self.has_resample else x


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
        precision: Precision,
    ):
        options = {"rngs": rngs, "precision": precision}
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

    def __call__(
        self, x: Float[Array, "b h w i"], spatial: Spatial = LOCAL
    ) -> Float[Array, "b h2 w2 o"]:
        """Encodes."""
        x = in_turn(self.down_blocks, self.conv_in(x, spatial), spatial)
        x = self.mid_block(x, spatial)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x, spatial)), spatial)


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
        precision: Precision,
    ):
        options = {"rngs": rngs, "precision": precision}
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

    def __call__(
        self, z: Float[Array, "b h w i"], spatial: Spatial = LOCAL
    ) -> Float[Array, "b h2 w2 o"]:
        """Decodes."""
        x = self.mid_block(self.conv_in(z, spatial), spatial)
        x = in_turn(self.up_blocks, x, spatial)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x, spatial)), spatial)


def numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    """Modules under the keys '0', '1', ...: strings, as every key of a parameter tree."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def in_turn(modules: nnx.Dict, x: Array, spatial: Spatial = LOCAL) -> Array:
    """Applies numbered modules one after the other."""
    for i in range(len(modules)):
        x = modules[str(i)](x, spatial)
    return x
