"""Discriminators: heads on intermediate features of a frozen or a training network, a logit each.

Two kinds of heads, after FastGen: for feature maps of U-Nets, strided convolutions down to one
pixel (DMD2, arXiv 2405.14867, appendix; `head='unet'`); for the token grids of transformers, one
strided convolution, a logit a position and their mean (`head='transformer'`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from dit_jax.models.linear import Initialization
from dit_jax.models.spatial import convolve, group_statistics
from dit_jax.nearest import one_of

HEADS = ("unet", "transformer")

# PyTorch's default: uniform within 1 / sqrt(fan_in), biases too.
_INITIALIZATION = Initialization("fan_in", 1 / 3, random_bias=True)
# Side down to which U-Net heads halve the map; the last convolution covers what is left.
_LAST_SIDE = 4


def group_count(channels: int) -> int:
    """Groups to normalise in: of four channels where there are few, else at most 32."""
    count = max(1, channels // 4) if channels <= 32 else 32
    while channels % count:
        count -= 1
    return count


class StridedConv(nnx.Module):
    """A convolution with bias, then optionally group normalisation; all of it float32."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        *,
        rngs: nnx.Rngs,
        stride: int = 1,
        padding: int = 0,
        norm: bool = True,
    ):
        shape = (*kernel, in_channels, out_channels)
        self.kernel = _INITIALIZATION.kernel(rngs, shape)
        self.bias = _INITIALIZATION.bias(rngs, shape)
        if norm:
            self.norm_scale = nnx.Param(jnp.ones(out_channels))
            self.norm_bias = nnx.Param(jnp.zeros(out_channels))
        self.stride, self.padding, self.norm = stride, ((padding, padding),) * 2, norm

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Convolves, and normalises over pixels and the channels of a group."""
        y = convolve(x, self.kernel[...], stride=self.stride, padding=self.padding)
        y = y + self.bias[...][None, None, None]
        if not self.norm:
            return y
        mean, variance = group_statistics(y, group_count(y.shape[-1]))
        y = (y - mean) * jax.lax.rsqrt(variance + 1e-5)
        return y * self.norm_scale[...][None, None, None] + self.norm_bias[...][None, None, None]


class UNetHead(nnx.Module):
    """Halves a map until its side is at most 4, takes the rest at once, then one logit.

    On 8 x 8 maps that is the classifier of DMD2's released code; larger ones are halved more
    often, smaller ones (down to a single pixel) not at all.
    """

    def __init__(self, shape: tuple[int, int, int], *, rngs: nnx.Rngs):
        height, width, channels = shape
        convs, self.flops = {}, 0
        while min(height, width) > _LAST_SIDE:
            options = {"stride": 2, "padding": 1, "rngs": rngs}
            convs[f"conv{len(convs)}"] = StridedConv(channels, channels, (4, 4), **options)
            height, width = height // 2, width // 2
            self.flops += 2 * 16 * channels**2 * height * width
        convs[f"conv{len(convs)}"] = StridedConv(channels, channels, (height, width), rngs=rngs)
        self.flops += 2 * channels**2 * height * width
        self.convs = nnx.Dict(convs)
        self.depth = len(convs)
        self.logit = StridedConv(channels, 1, (1, 1), norm=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        """One logit an example."""
        for index in range(self.depth):
            x = jax.nn.silu(self.convs[f"conv{index}"](x))
        return self.logit(x)[:, 0, 0, 0]


class TransformerHead(nnx.Module):
    """One strided convolution to half the width, a logit a position, and their mean.

    A grid of a single token is not halved: there the convolution is 1 x 1.
    """

    def __init__(self, shape: tuple[int, int, int], *, rngs: nnx.Rngs):
        height, width, channels = shape
        hidden = max(1, channels // 2)
        if min(height, width) < 2:
            self.conv = StridedConv(channels, hidden, (1, 1), rngs=rngs)
            self.flops = 2 * channels * hidden * height * width
        else:
            self.conv = StridedConv(channels, hidden, (4, 4), stride=2, padding=1, rngs=rngs)
            self.flops = 2 * 16 * channels * hidden * (height // 2) * (width // 2)
        self.logit = StridedConv(hidden, 1, (1, 1), norm=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        """One logit an example."""
        x = jax.nn.leaky_relu(self.conv(x), 0.2)
        return self.logit(x).mean(axis=(1, 2, 3))


class _Heads(nnx.Module):
    def __init__(self, head: str, shapes: tuple[tuple[int, int, int], ...], *, rngs: nnx.Rngs):
        kind = UNetHead if head == "unet" else TransformerHead
        self.heads = nnx.Dict(
            {f"head{i}": kind(shape, rngs=rngs) for i, shape in enumerate(shapes)}
        )

    def __call__(self, features: tuple[Array, ...]) -> Array:
        logits = [self.heads[f"head{i}"](x.astype(jnp.float32)) for i, x in enumerate(features)]
        return jnp.stack(logits, axis=1)


@dataclasses.dataclass(frozen=True)
class Discriminator:
    """Heads as pure functions of their parameters; hashable, holds no arrays.

    Attributes:
        head: 'unet' or 'transformer', see the module.
        shapes: (height, width, channels) of the feature maps, a head each.
    """

    head: str
    shapes: tuple[tuple[int, int, int], ...]

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"discriminator head {self.head!r}: {one_of(self.head, HEADS)}")
        if not self.shapes:
            raise ValueError("a discriminator needs at least one feature map")

    @functools.cached_property
    def _graph(self):
        return nnx.split(nnx.eval_shape(lambda: self._create(jax.random.key(0))))[0]

    def _create(self, key: Key[Array, ""]) -> nnx.Module:
        return _Heads(self.head, self.shapes, rngs=nnx.Rngs(params=key))

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh float32 parameters as a nested dict."""
        return nnx.to_pure_dict(nnx.state(self._create(key), nnx.Param))

    def apply(
        self, params: dict[str, Any], features: tuple[Float[Array, "b _h _w _c"], ...]
    ) -> Float[Array, "b heads"]:
        """Logits that say 'real' where positive, one a head.

        Raises:
            ValueError: the maps are not those it was made for; a transformer's head takes grids of
                any size.
        """
        shapes = tuple(feature.shape[1:] for feature in features)
        if not self._reads(shapes):
            raise ValueError(f"the discriminator reads maps of {self.shapes}, got {shapes}")
        return nnx.merge(self._graph, params)(tuple(features))

    def _reads(self, shapes: tuple[tuple[int, int, int], ...]) -> bool:
        """Whether maps of these shapes are read: a U-Net's head sees the whole of its map."""
        if self.head == "unet" or len(shapes) != len(self.shapes):
            return shapes == self.shapes
        return all(
            found[2] == made[2] and (min(found[:2]) > 1 or min(made[:2]) == 1)
            for found, made in zip(shapes, self.shapes, strict=True)
        )

    @property
    def flops_per_example(self) -> float:
        """Floating-point operations of a forward pass, those of the convolutions to the logit."""
        module = nnx.eval_shape(lambda: self._create(jax.random.key(0)))
        return float(sum(module.heads[f"head{i}"].flops for i in range(len(self.shapes))))
