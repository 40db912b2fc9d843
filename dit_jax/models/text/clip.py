"""CLIP's text encoder: a causal transformer, its state at the prompt's end standing for the whole.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv
2103.00020), section 2.4, with the options of OpenCLIP's models (GELU, another width). FLUX.1 takes
its pooled state, Stable Diffusion its tokens, SDXL both and the tokens before the last block.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_jax.models import stack
from dit_jax.models.attention import Attention
from dit_jax.models.attention_options import AttentionOptions
from dit_jax.models.layers import LayerNorm
from dit_jax.models.linear import Linear, Precision, precision_of
from dit_jax.models.text.parts import TextStates, TokenEmbedding, check_counts, run_blocks

# Checkpoints whose config says so were saved before transformers knew CLIP's own id of the end
# token: it is the largest of the vocabulary, and prompts are pooled where the largest id stands.
LEGACY_EOS_TOKEN_ID = 2


def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Shape and execution; names are those of transformers' config.json. The defaults are ViT-L/14.

    Attributes:
        vocab_size: tokens.
        hidden_size: width.
        intermediate_size: of the MLPs.
        num_hidden_layers: blocks.
        num_attention_heads: heads, which divide the width.
        max_position_embeddings: the longest prompt, its two special tokens included.
        hidden_act: 'quick_gelu' or 'gelu'.
        layer_norm_eps: epsilon of the normalisations.
        projection_dim: width of the projection of the pooled state.
        with_projection: whether there is this projection.
        eos_token_id: where a prompt is pooled: at the first of these tokens, or, if it is
            `LEGACY_EOS_TOKEN_ID`, at the largest id.
        dtype: of products: 'float32', 'bfloat16' or 'auto', bfloat16 on accelerators. The residual
            stream and normalisations are float32.
        param_dtype: what kernels and embeddings are stored in: 'float32', 'bfloat16' or 'auto',
            here float32; normalisations' parameters are float32.
        layer_loop: 'scan', 'unroll' or 'auto' (`stack.resolve_layer_loop`).
        attention: a kernel of `attention.IMPLEMENTATIONS`.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    with_projection: bool = False
    eos_token_id: int = LEGACY_EOS_TOKEN_ID
    dtype: str = "auto"
    param_dtype: str = "auto"
    layer_loop: str = "auto"
    attention: str = "auto"

    def __post_init__(self):
        counts = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
        check_counts("CLIP", self, counts + self.with_projection * ("projection_dim",))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIP num_attention_heads={self.num_attention_heads} must divide "
                f"hidden_size={self.hidden_size}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"CLIP hidden_act={self.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}"
            )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def max_length(self) -> int:
        """Of a prompt in tokens."""
        return self.max_position_embeddings

    @property
    def precision(self) -> Precision:
        """What products are computed in, and their parameters stored in."""
        return precision_of(self.dtype, self.param_dtype)


class CLIPAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        options = {"rngs": rngs, "precision": config.precision}
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, **options)
        self.proj = Linear(config.hidden_size, config.hidden_size, **options)

    def __call__(
        self, x: Float[Array, "b l d"], attention: Attention, options: AttentionOptions
    ) -> Float[Array, "b l d"]:
        """Attends as `options` say."""
        b, length, dim = x.shape
        qkv = self.qkv(x).reshape(b, length, 3, self.num_heads, dim // self.num_heads)
        out, _ = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], None, options)
        return self.proj(out.reshape(b, length, dim))


class CLIPMlp(nnx.Module):
    """Two linear maps with the activation between them."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        options = {"rngs": rngs, "precision": config.precision}
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **options)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Applies the MLP to every token."""
        return self.fc2(self.activation(self.fc1(x)))


class CLIPBlock(nnx.Module):
    """Attention and MLP, each after its normalisation."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = CLIPAttention(config, rngs=rngs)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMlp(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"], attention: Attention, options: AttentionOptions):
        """The residual stream after the block, float32."""
        x = x + self.attn(self.norm1(x), attention, options).astype(x.dtype)
        return x + self.mlp(self.norm2(x)).astype(x.dtype)


class CLIPText(nnx.Module):
    """The parameters and the call; `encoder.TextEncoder` is its functional face."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        dim, options = config.hidden_size, {"rngs": rngs, "precision": config.precision}
        self.config = config
        self.token_embedding = TokenEmbedding(config.vocab_size, dim, **options)
        self.position_embedding = TokenEmbedding(config.max_position_embeddings, dim, **options)
        self.blocks = stack.create_stack(
            lambda rngs: CLIPBlock(config, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.final_norm = LayerNorm(dim, config.layer_norm_eps)
        if config.with_projection:
            self.text_projection = Linear(dim, config.projection_dim, use_bias=False, **options)

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        hidden: tuple[int, ...] = (),
    ) -> TextStates:
        """See `encoder.TextEncoder.encode`."""
        config, length = self.config, ids.shape[1]
        if length > config.max_position_embeddings:
            raise ValueError(
                f"prompts of {length} tokens: this CLIP has positions for "
                f"{config.max_position_embeddings}. Truncate them"
            )
        positions = self.position_embedding.embedding[:length].astype(jnp.float32)
        x = self.token_embedding(ids) + positions[None]
        options = AttentionOptions(key_mask=mask, causal=True)
        x, captured = run_blocks(self.blocks, x, config, options, hidden)
        tokens = self.final_norm(x)
        pooled = jnp.take_along_axis(tokens, self._ends(ids)[:, None, None], axis=1)[:, 0]
        projected = None
        if config.with_projection:
            projected = self.text_projection(pooled).astype(jnp.float32)
        return TextStates(tokens, pooled, projected, captured)

    def _ends(self, ids: Int[Array, "b l"]) -> Int[Array, " b"]:
        """Where prompts are pooled."""
        if self.config.eos_token_id == LEGACY_EOS_TOKEN_ID:
            return ids.argmax(axis=-1)
        return (ids == self.config.eos_token_id).argmax(axis=-1)
