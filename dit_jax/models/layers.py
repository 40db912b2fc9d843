"""Layers shared by the networks: embeddings, normalisation, MLP, patches.

What products are computed in is told by a `linear.Precision`. Normalisation and features of time
are float32 always.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_jax.models import cpu_kernels, recomputation
from dit_jax.models.attention import Attention, own_positions
from dit_jax.models.batch_axes import divided_by_examples
from dit_jax.models.linear import FLOAT32, ZEROS, Initialization, Linear, Precision

TIME_FREQUENCY_SPACINGS = ("original", "diffusers")
SECOND_TIMES = ("none", "r", "t-r")

_NORMAL = Initialization("normal", 0.02)


def layer_norm(x: Float[Array, "*batch d"], epsilon: float = 1e-6) -> Float[Array, "*batch d"]:
    """Normalisation over the last axis without learned scale or shift, in float32."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + epsilon)
    return x.astype(dtype)


class LayerNorm(nnx.Module):
    """`layer_norm` with learned scale and shift."""

    def __init__(self, dim: int, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalises; the result has x's dtype."""
        lead = (None,) * (x.ndim - 1)
        y = layer_norm(x.astype(jnp.float32), self.epsilon)
        return (y * self.scale[...][lead] + self.bias[...][lead]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) scale over the last axis, in float32 (arXiv 1910.07467).

    Of the channels of a head it is the q/k normalisation of FLUX and SD3.
    """

    def __init__(self, dim: int, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(dim))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalises; the result has x's dtype."""
        dtype, x = x.dtype, x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...][(None,) * (x.ndim - 1)]).astype(dtype)


def modulate(
    x: Float[Array, "b l d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b l d"]:
    """adaLN's affine map, x (1 + scale) + shift, the same for every token of an example."""
    return x * (1 + scale[:, None]) + shift[:, None]


def modulated_layer_norm(
    x: Float[Array, "b l d"],
    shift: Float[Array, "b d"],
    scale: Float[Array, "b d"],
    *,
    epsilon: float = 1e-6,
    custom_gradients: bool = False,
) -> Float[Array, "b l d"]:
    """adaLN: `modulate(layer_norm(x), shift, scale)`, with either backward pass."""
    if custom_gradients:
        return cpu_kernels.modulated_layer_norm(x, shift, scale, epsilon)
    if recomputation.recomputes_elementwise():
        return recomputation.elementwise(
            lambda *operands: _modulated_layer_norm(*operands, epsilon), x, shift, scale
        )
    return _modulated_layer_norm(x, shift, scale, epsilon)


def _modulated_layer_norm(x, shift, scale, epsilon):
    return modulate(layer_norm(x, epsilon), shift, scale)


def modulated_product(
    layer: nnx.Module,
    x: Float[Array, "b l d"],
    shift: Float[Array, "b d"],
    scale: Float[Array, "b d"],
    *,
    epsilon: float = 1e-6,
    custom_gradients: bool = False,
    following: nnx.Module | None = None,
) -> tuple[Float[Array, "b l o"], nnx.Module | None]:
    """layer(modulated_layer_norm(x, shift, scale)), and the layer to apply to the result.

    On accelerators the backward pass computes the normalisation anew; for `following` see
    `recomputation.product_of`.
    """
    options = {"epsilon": epsilon, "custom_gradients": custom_gradients}

    def prepare(*operands):
        return modulated_layer_norm(*operands, **options)

    if custom_gradients or not recomputation.recomputes_elementwise():
        return layer(prepare(x, shift, scale)), following
    return recomputation.product_of(layer, prepare, x, shift, scale, following=following)


def gated_residual(
    x: Float[Array, "b l d"],
    update: Float[Array, "b l d"],
    gate: Float[Array, "b d"],
    *,
    custom_gradients: bool = False,
) -> Float[Array, "b l d"]:
    """adaLN-zero's residual, x + gate update, with either backward pass."""
    if custom_gradients:
        return cpu_kernels.gated_residual(x, update, gate)
    return x + gate[:, None] * update


def timestep_frequencies(
    t: Float[Array, " b"], dim: int, *, spacing: str = "original", max_period: float = 10_000.0
) -> Float[Array, "b dim"]:
    """Sinusoidal features [cos(w_i t), sin(w_i t)] of a real-valued time.

    With h = dim / 2, w_i = max_period^(-i / h) in the original DiT and max_period^(-i / (h - 1)) in
    diffusers' DiT: two different functions of t that no transform of weights reconciles, so a
    checkpoint's origin decides (`spacing`).
    """
    half = dim // 2
    last = {"original": half, "diffusers": half - 1}[spacing]
    frequencies = np.exp(-math.log(max_period) * np.arange(half) / last).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nnx.Module):
    """Sinusoidal features of time through a two-layer MLP with SiLU (DiT, section 3.2)."""

    def __init__(
        self,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        frequency_dim: int = 256,
        spacing: str = "original",
        zero_init: bool = False,
        precision: Precision = FLOAT32,
    ):
        options = {"rngs": rngs, "precision": precision, "role": "conditioning"}
        last = ZEROS if zero_init else _NORMAL
        self.frequency_dim, self.spacing = frequency_dim, spacing
        self.fc1 = Linear(frequency_dim, hidden_size, init=_NORMAL, **options)
        self.fc2 = Linear(hidden_size, hidden_size, init=last, **options)

    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b d"]:
        """Embeds the network time."""
        features = timestep_frequencies(t, self.frequency_dim, spacing=self.spacing)
        return self.fc2(jax.nn.silu(self.fc1(features)))


class LabelEmbedder(nnx.Module):
    """One vector a class and, if `null_class`, a last one, index `num_classes`, for "no class"."""

    def __init__(
        self,
        num_classes: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        null_class: bool = True,
        precision: Precision = FLOAT32,
    ):
        stored = precision.stored("conditioning")
        self.embedding = _NORMAL.kernel(rngs, (num_classes + null_class, hidden_size), stored)

    def __call__(self, label: Int[Array, " b"]) -> Float[Array, "b d"]:
        """Looks the labels up."""
        return divided_by_examples(self.embedding[...][label])


def gelu(x: Float[Array, "*s"], *, custom_gradients: bool = False) -> Float[Array, "*s"]:
    """GELU in its tanh approximation, with either backward pass."""
    if custom_gradients:
        return cpu_kernels.gelu(x)
    accelerator = recomputation.recomputes_elementwise()
    return recomputation.gelu(x) if accelerator else jax.nn.gelu(x)


class Mlp(nnx.Module):
    """Two linear maps with a tanh-approximated GELU between them."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        rngs: nnx.Rngs,
        precision: Precision = FLOAT32,
        custom_gradients: bool = False,
    ):
        self.custom_gradients = custom_gradients
        self.fc1 = Linear(dim, hidden_dim, rngs=rngs, precision=precision)
        self.fc2 = Linear(hidden_dim, dim, rngs=rngs, precision=precision)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Applies the MLP to every token."""
        return self.fc2(self._gelu(self.fc1(x)))

    def modulated(
        self,
        x: Float[Array, "b l d"],
        shift: Float[Array, "b d"],
        scale: Float[Array, "b d"],
        epsilon: float = 1e-6,
    ) -> Float[Array, "b l d"]:
        """Applies the MLP to `modulated_layer_norm(x, shift, scale)`."""
        hidden, fc2 = modulated_product(
            self.fc1,
            x,
            shift,
            scale,
            epsilon=epsilon,
            custom_gradients=self.custom_gradients,
            following=self.fc2,
        )
        return fc2(self._gelu(hidden))

    def _gelu(self, x):
        return gelu(x, custom_gradients=self.custom_gradients)


def sincos_position_embedding(dim: int, grid: Sequence[int]) -> np.ndarray:
    """Fixed 2-D sine-cosine positions of a (rows, columns) grid, float32 [rows * columns, dim].

    The first half of the channels encodes the column and the second half the row, each as
    [sin, cos] over dim / 4 frequencies, in the order of MAE and DiT.
    """
    rows, columns = grid
    omega = 1.0 / 10_000 ** (np.arange(dim // 4, dtype=np.float64) / (dim // 4))

    def encode(position):
        angles = position.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


def patchify(x: Float[Array, "b h w c"], patch_size: int) -> Float[Array, "b l d"]:
    """Cuts an image into row-major patches, each flattened as (row, column, channel)."""
    b, h, w, c = x.shape
    p = patch_size
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def embed_patches(
    embed: Linear, x: Float[Array, "b h w c"], patch_size: int, attention: Attention
) -> tuple[Float[Array, "b l d"], tuple[int, int]]:
    """Tokens of an image with sine-cosine positions, and the (rows, columns) that they are.

    Args:
        embed: of a patch.
        x: the rows that `attention` is given.
        patch_size: side of a patch.
        attention: the strategy, which knows how many rows the whole image has.
    """
    tokens, own = embed(patchify(x, patch_size)), tuple(n // patch_size for n in x.shape[1:3])
    of_grid = functools.partial(sincos_position_embedding, tokens.shape[-1])
    return tokens + own_positions(attention, own, of_grid)[None].astype(tokens.dtype), own


def unpatchify(
    x: Float[Array, "b l d"], patch_size: int, grid: Sequence[int]
) -> Float[Array, "b h w c"]:
    """The inverse of `patchify` for a (rows, columns) grid of patches."""
    b, _, d = x.shape
    (rows, columns), p = grid, patch_size
    x = x.reshape(b, rows, columns, p, p, d // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * p, columns * p, d // (p * p))
