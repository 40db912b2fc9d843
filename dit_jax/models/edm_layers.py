"""Layers of EDM's U-Nets: resampling by a filter, group normalisation, the residual block.

They are those of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models"
(arXiv 2206.00364), with channels last. Normalisation and features of the noise level are float32;
what products are computed in is told by a `linear.Precision`. What looks beyond one pixel goes
through a `Spatial` object (`dit_jax.models.spatial`) or the attention seam.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dit_jax.models import attention as attention_lib
from dit_jax.models import stack
from dit_jax.models.convolution import Conv
from dit_jax.models.linear import FLOAT32, XAVIER, Initialization, Linear, Precision
from dit_jax.models.spatial import LOCAL, Spatial


def rematerialised(function: Callable, remat: str) -> Callable:
    """`stack.rematerialised`, where 'dots' also saves the results of convolutions."""
    if remat != "dots":
        return stack.rematerialised(function, remat)
    policy = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _is_convolution
    )
    return jax.checkpoint(function, policy=policy)


def _is_convolution(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == "conv_general_dilated"


class LabelMap(Linear):
    """A linear map of one-hot labels, times `gain`; labels out of range are the zero vector."""

    def __init__(self, num_classes: int, out_features: int, *, gain: float = 1.0, **options: Any):
        super().__init__(num_classes, out_features, **options)
        self.gain = gain

    def __call__(self, label: Int[Array, " b"]) -> Float[Array, "b o"]:
        """Looks the labels up."""
        y = self._row(self.kernel, label)
        if self.lora_a is not None:
            y = y + self._row(self.lora_a, label) @ self.lora_b[...]
        y = self.gain * y
        return y if self.bias is None else y + self.bias[...][None]

    @staticmethod
    def _row(matrix: nnx.Param, label: Array) -> Array:
        return matrix[...].at[label].get(mode="fill", fill_value=0)


def downsample(
    x: Float[Array, "b h w c"],
    resample_filter: Sequence[float],
    padding: int | None = None,
    spatial: Spatial = LOCAL,
) -> Float[Array, "b h2 w2 c"]:
    """Half the resolution: the normalised separable filter at every second pixel.

    (1, 1) averages 2 x 2 pixels. `padding` zeros surround the image, by default as many as centre
    the filter. Written as sums of strided slices, which XLA fuses; a depthwise convolution is slow
    on CPUs.
    """
    taps = [f / sum(resample_filter) for f in resample_filter]
    padding = (len(taps) - 1) // 2 if padding is None else padding
    for axis in (1, 2):
        if padding and axis == 1:
            x = spatial.extend(x, padding, padding)
        elif padding:
            x = jnp.pad(x, ((0, 0), (0, 0), (padding, padding), (0, 0)))
        count = (x.shape[axis] - len(taps)) // 2 + 1
        x = sum(
            tap * jax.lax.slice_in_dim(x, i, i + 2 * (count - 1) + 1, 2, axis)
            for i, tap in enumerate(taps)
        )
    return x


def upsample(
    x: Float[Array, "b h w c"], resample_filter: Sequence[float], spatial: Spatial = LOCAL
) -> Float[Array, "b h2 w2 c"]:
    """Twice the resolution: zeros between the pixels, then the separable filter, of sum 2 an axis.

    (1, 1) repeats pixels. The filter has an even length.
    """
    taps = [2 * f / sum(resample_filter) for f in resample_filter]
    center = (len(taps) - 1) // 2
    for axis in (1, 2):
        # Output pixel 2 m + phase sees input pixel m + (phase + center - tap) / 2.
        shifts = {
            phase: [
                ((phase + center - i) // 2, tap)
                for i, tap in enumerate(taps)
                if (phase + center - i) % 2 == 0
            ]
            for phase in (0, 1)
        }
        reach = max(abs(shift) for phase in (0, 1) for shift, _ in shifts[phase])
        shape = list(x.shape)
        wide = x
        if reach and axis == 1:
            wide = spatial.extend(x, reach, reach)
        elif reach:
            wide = jnp.pad(x, ((0, 0), (0, 0), (reach, reach), (0, 0)))
        phases = [
            sum(
                tap * _window(wide, reach + shift, shape[axis], axis)
                for shift, tap in shifts[phase]
            )
            for phase in (0, 1)
        ]
        shape[axis] *= 2
        x = jnp.stack(phases, axis=axis + 1).reshape(shape)
    return x


def _window(x: Array, start: int, length: int, axis: int) -> Array:
    """x[start : start + length] along an axis."""
    return jax.lax.slice_in_dim(x, start, start + length, axis=axis)


class GroupNorm(nnx.Module):
    """Normalisation over pixels and the channels of a group: 32 groups, of 4 channels or more."""

    def __init__(self, channels: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.num_groups = min(32, channels // 4)
        self.epsilon = epsilon

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
        spatial: Spatial = LOCAL,
    ) -> Float[Array, "b h w c"]:
        """norm(x), or norm(x) (1 + scale) + shift, in float32; the result has x's dtype."""
        mean, variance = spatial.group_statistics(x, self.num_groups)
        gain = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...][None, None, None]
        offset = self.bias[...][None, None, None] - mean * gain
        if scale is not None and shift is not None:
            factor = 1 + scale[:, None, None]
            gain, offset = gain * factor, offset * factor + shift[:, None, None]
        return (x.astype(jnp.float32) * gain + offset).astype(x.dtype)


class FourierFeatures(nnx.Module):
    """[cos, sin] of 2 pi times random frequencies times the noise level (NCSN++).

    The frequencies belong to the network and come with its weights, but are never trained: no
    gradient reaches them.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs, scale: float = 16.0):
        self.freqs = nnx.Param(scale * jax.random.normal(rngs.params(), (dim // 2,)))

    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b dim"]:
        """Embeds the network time."""
        frequencies = 2 * math.pi * jax.lax.stop_gradient(self.freqs[...])
        angles = t.astype(jnp.float32)[:, None] * frequencies[None]
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def dropout(
    x: Float[Array, "b h w c"], rate: float, keys: Key[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Zeros at `rate`, the rest scaled up; an example's mask depends on its own key alone."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """In what the residual blocks of the architectures differ; the defaults are ADM's.

    Attributes:
        channels_per_head: of attention; 0 for one head of all channels.
        dropout: rate, before the second convolution.
        skip_scale: multiplies the sums of branch and shortcut.
        epsilon: of group normalisation.
        resample_filter: of blocks that change the resolution.
        resample_proj: whether their shortcuts have a 1 x 1 convolution also without a change of
            width.
        adaptive_scale: whether the embedding scales and shifts the second normalisation; else it is
            added before it.
        init: of most layers.
        init_zero: of the last layers of branches.
        init_attn: of attention's first layer.
    """

    channels_per_head: int = 64
    dropout: float = 0.0
    skip_scale: float = 1.0
    epsilon: float = 1e-5
    resample_filter: tuple[float, ...] = (1, 1)
    resample_proj: bool = False
    adaptive_scale: bool = True
    init: Initialization = XAVIER
    init_zero: Initialization = XAVIER
    init_attn: Initialization = XAVIER

    def num_heads(self, channels: int) -> int:
        """Attention heads at a width."""
        return channels // self.channels_per_head if self.channels_per_head else 1


class UNetBlock(nnx.Module):
    """Two convolutions around a shortcut, conditioned on the embedding; optionally resampling
    before the first and attention after the second (EDM, table 1 and appendix F)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        style: BlockStyle,
        *,
        resample: str = "none",
        attention: bool = False,
        rngs: nnx.Rngs,
        precision: Precision = FLOAT32,
    ):
        self.style, self.resample = style, resample
        self.num_heads = style.num_heads(out_channels) if attention else 0
        options = {"rngs": rngs, "precision": precision}
        self.norm0 = GroupNorm(in_channels, style.epsilon)
        self.conv0 = Conv(in_channels, out_channels, init=style.init, **options)
        affine_channels = out_channels * (2 if style.adaptive_scale else 1)
        self.affine = Linear(
            emb_channels, affine_channels, init=style.init, role="conditioning", **options
        )
        self.norm1 = GroupNorm(out_channels, style.epsilon)
        self.conv1 = Conv(out_channels, out_channels, init=style.init_zero, **options)
        projects = in_channels != out_channels or (resample != "none" and style.resample_proj)
        self.skip = (
            Linear(in_channels, out_channels, init=style.init, **options) if projects else None
        )
        if attention:
            self.norm2 = GroupNorm(out_channels, style.epsilon)
            # Output channels in the original's order: (head, channel of the head, q or k or v).
            self.qkv = Linear(out_channels, 3 * out_channels, init=style.init_attn, **options)
            self.proj = Linear(out_channels, out_channels, init=style.init_zero, **options)

    def __call__(
        self,
        x: Float[Array, "b h w i"],
        emb: Float[Array, "b e"],
        attention: attention_lib.Attention,
        state: Any = None,
        keys: Key[Array, " b"] | None = None,
        spatial: Spatial = LOCAL,
    ):
        """Returns the features and the attention layer's state.

        Args:
            x: features.
            emb: the embedding of noise level and conditions.
            attention: the strategy of the seam.
            state: its state of this layer.
            keys: of dropout, one an example; None for none.
            spatial: how layers see the rows around them.
        """
        style = self.style
        h = jax.nn.silu(self.norm0(x, spatial=spatial))
        h = self.conv0(self._resampled(h, spatial), spatial)
        affine = self.affine(emb)
        if style.adaptive_scale:
            h = jax.nn.silu(self.norm1(h, *jnp.split(affine, 2, axis=-1), spatial=spatial))
        else:
            h = h + affine[:, None, None].astype(h.dtype)
            h = jax.nn.silu(self.norm1(h, spatial=spatial))
        if style.dropout and keys is not None:
            h = dropout(h, style.dropout, keys)
        shortcut = self._resampled(x, spatial)
        shortcut = shortcut if self.skip is None else self.skip(shortcut)
        x = (self.conv1(h, spatial) + shortcut) * style.skip_scale
        if self.num_heads:
            out, state = self._attend(x, attention, state, spatial)
            x = (out + x) * style.skip_scale
        return x, state

    def _resampled(self, x: Array, spatial: Spatial) -> Array:
        if self.resample == "none":
            return x
        function = upsample if self.resample == "up" else downsample
        return function(x, self.style.resample_filter, spatial=spatial)

    def _attend(self, x: Array, attention: attention_lib.Attention, state: Any, spatial: Spatial):
        b, height, width, c = x.shape
        tokens = self.qkv(self.norm2(x, spatial=spatial).reshape(b, height * width, c))
        tokens = tokens.reshape(b, height * width, self.num_heads, c // self.num_heads, 3)
        out, state = attention(tokens[..., 0], tokens[..., 1], tokens[..., 2], state)
        return self.proj(out.reshape(b, height, width, c)), state
