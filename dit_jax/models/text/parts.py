"""What text encoders share: the record they give, token embeddings, checks of their shapes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_jax.models import stack
from dit_jax.models.attention import LocalAttention
from dit_jax.models.attention_options import AttentionOptions
from dit_jax.models.batch_axes import divided_by_examples
from dit_jax.models.linear import (
    FLOAT32,
    Initialization,
    Precision,
    resolve_dtype,
    resolve_param_dtype,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextStates:
    """What a text encoder makes of prompts, float32.

    Attributes:
        tokens: [b, l, d], after the final normalisation.
        pooled: [b, d], of a whole prompt; None where the encoder has none (T5).
        projected: [b, p], the pooled state through CLIP's projection; None without one.
        hidden: [b, l, d] each, of the blocks asked for, before the final normalisation.
    """

    tokens: Any
    pooled: Any = None
    projected: Any = None
    hidden: tuple[Any, ...] = ()


class TokenEmbedding(nnx.Module):
    """One vector a number: tokens, positions, or distances."""

    def __init__(
        self,
        count: int,
        dim: int,
        *,
        rngs: nnx.Rngs,
        scale: float = 0.02,
        precision: Precision = FLOAT32,
    ):
        init = Initialization("normal", scale)
        self.embedding = init.kernel(rngs, (count, dim), precision.stored("hidden"))

    def __call__(self, ids: Int[Array, "*s"]) -> Float[Array, "*s d"]:
        """Looks numbers up; float32."""
        return divided_by_examples(self.embedding[...][ids].astype(jnp.float32))


def run_blocks(
    blocks: nnx.Module,
    x: Float[Array, "b l d"],
    config: Any,
    options: AttentionOptions,
    hidden: tuple[int, ...],
) -> tuple[Float[Array, "b l d"], tuple[Array, ...]]:
    """The residual stream after a stack of blocks, and after those numbered `hidden`.

    Args:
        blocks: stacked, each called with the stream, an attention and its options.
        x: the stream before them.
        config: of the encoder.
        options: of every block's attention.
        hidden: ascending numbers from 0.
    """
    attention = LocalAttention(config.attention)

    def call(block: nnx.Module, x: Any, state: Any, options: AttentionOptions):
        return block(x, attention, options), state

    x, _, captured = stack.run_stack(
        blocks,
        call,
        x,
        options,
        depth=config.depth,
        layer_loop=config.layer_loop,
        capture=hidden,
    )
    return x, captured


def check_counts(name: str, config: Any, names: tuple[str, ...]) -> None:
    """Refuses sizes below one, and ways of execution that there are not.

    Raises:
        ValueError: says which, and of which encoder.
    """
    for field in names:
        if getattr(config, field) < 1:
            raise ValueError(f"{name} {field}={getattr(config, field)}: expected at least 1")
    if config.layer_loop not in stack.LAYER_LOOPS:
        raise ValueError(
            f"{name} layer_loop={config.layer_loop!r}: expected one of {stack.LAYER_LOOPS}"
        )
    resolve_param_dtype(config.param_dtype)
    # For any backend 'auto' is no float16: naming one here keeps JAX from starting its own.
    if resolve_dtype(config.dtype, backend="cpu") == jnp.float16:
        raise ValueError(
            f"{name} dtype='float16': its activations can exceed float16's range. Use 'bfloat16' "
            "or 'float32'"
        )


def hidden_blocks(numbers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Numbers of blocks from 0, negative ones counted from the last; ascending.

    Raises:
        ValueError: there is no such block, or they do not ascend.
    """
    found = tuple(number + depth if number < 0 else number for number in numbers)
    if list(found) != sorted(set(found)) or not all(0 <= number < depth for number in found):
        raise ValueError(
            f"hidden={numbers}: expected ascending numbers of blocks, 0 to {depth - 1}, or "
            "negative ones counted from the last"
        )
    return found
