"""T5's encoder in version 1.1: gated GELU, distances between tokens told by a bias of the scores.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(arXiv 1910.10683), section 2.1, and Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
No layer has a bias of its own, and scores are not divided by the square root of the head's width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_jax.models import stack
from dit_jax.models.attention import Attention
from dit_jax.models.attention_options import AttentionOptions
from dit_jax.models.layers import RMSNorm
from dit_jax.models.linear import Linear, Precision, precision_of
from dit_jax.models.text.parts import TextStates, TokenEmbedding, check_counts, run_blocks


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape and execution; names are those of transformers' config.json. The defaults are XXL.

    Attributes:
        vocab_size: tokens.
        d_model: width.
        d_kv: width of a head.
        d_ff: width of the MLPs.
        num_layers: blocks.
        num_heads: heads, whose widths together need not be the model's.
        relative_attention_num_buckets: distances that the bias tells apart, half of them a side.
        relative_attention_max_distance: from which on distances are one.
        layer_norm_epsilon: epsilon of the normalisations.
        dtype: of products: 'float32', 'bfloat16' or 'auto', bfloat16 on accelerators. The residual
            stream, which grows to tens of thousands, and normalisations are float32.
        param_dtype: what kernels and embeddings are stored in: 'float32', 'bfloat16' or 'auto',
            here float32; normalisations' parameters are float32.
        layer_loop: 'scan', 'unroll' or 'auto' (`stack.resolve_layer_loop`).
        attention: a kernel of `attention.IMPLEMENTATIONS`.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dtype: str = "auto"
    param_dtype: str = "auto"
    layer_loop: str = "auto"
    attention: str = "auto"

    def __post_init__(self):
        counts = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        check_counts("T5", self, counts)
        buckets = self.relative_attention_num_buckets
        distance = self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or distance <= buckets // 4:
            raise ValueError(
                f"T5 relative_attention_num_buckets={buckets} and relative_attention_max_distance="
                f"{distance}: expected a multiple of 4, and more than a quarter of it"
            )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.num_layers

    @property
    def precision(self) -> Precision:
        """What products are computed in, and their parameters stored in."""
        return precision_of(self.dtype, self.param_dtype)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Which of the distances told apart lies between a query and a key, int32 [length, length].

    Half of the numbers are for keys before the query or at it, half for those after. Of each half,
    the first half are distances from 0 on, one each; the others grow as their logarithm up to
    `max_distance`. In float32 as in the original, whose rounding decides at powers of two.
    """
    positions = np.arange(length)
    offset = positions[None] - positions[:, None]
    side = num_buckets // 2
    exact = side // 2
    distance = np.abs(offset)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    scaled = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    far = np.minimum(exact + scaled.astype(np.int32), side - 1)
    return ((offset > 0) * side + np.where(distance < exact, distance, far)).astype(np.int32)


class T5Attention(nnx.Module):
    """Self-attention of unscaled scores."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        options = {"rngs": rngs, "use_bias": False, "precision": config.precision}
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.qkv = Linear(config.d_model, 3 * inner, **options)
        self.proj = Linear(inner, config.d_model, **options)

    def __call__(
        self, x: Float[Array, "b l d"], attention: Attention, options: AttentionOptions
    ) -> Float[Array, "b l d"]:
        """Attends as `options` say."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        out, _ = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], None, options)
        return self.proj(out.reshape(*x.shape[:2], -1))


class T5Mlp(nnx.Module):
    """(gelu(x W_0) * x W_1) W_o. The two maps stay apart, so that devices can share columns."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        options = {"rngs": rngs, "use_bias": False, "precision": config.precision}
        self.wi_0 = Linear(config.d_model, config.d_ff, **options)
        self.wi_1 = Linear(config.d_model, config.d_ff, **options)
        self.wo = Linear(config.d_ff, config.d_model, **options)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Applies the MLP to every token."""
        return self.wo(jax.nn.gelu(self.wi_0(x)) * self.wi_1(x))


class T5Block(nnx.Module):
    """Attention and MLP, each after its normalisation."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attn = T5Attention(config, rngs=rngs)
        self.norm2 = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.mlp = T5Mlp(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"], attention: Attention, options: AttentionOptions):
        """The residual stream after the block, float32."""
        x = x + self.attn(self.norm1(x), attention, options).astype(x.dtype)
        return x + self.mlp(self.norm2(x)).astype(x.dtype)


class T5Encoder(nnx.Module):
    """The parameters and the call; `encoder.TextEncoder` is its functional face."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        options = {"rngs": rngs, "precision": config.precision}
        self.config = config
        self.token_embedding = TokenEmbedding(config.vocab_size, config.d_model, **options)
        self.relative_bias = TokenEmbedding(
            config.relative_attention_num_buckets, config.num_heads, **options
        )
        self.blocks = stack.create_stack(
            lambda rngs: T5Block(config, rngs=rngs), config.num_layers, rngs
        )
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        hidden: tuple[int, ...] = (),
    ) -> TextStates:
        """See `encoder.TextEncoder.encode`."""
        config = self.config
        buckets = relative_buckets(
            ids.shape[1],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        bias = self.relative_bias.embedding[...][buckets].transpose(2, 0, 1)[None]
        options = AttentionOptions(key_mask=mask, bias=bias.astype(jnp.float32), scale=1.0)
        x, captured = run_blocks(self.blocks, self.token_embedding(ids), config, options, hidden)
        return TextStates(self.final_norm(x), hidden=captured)
