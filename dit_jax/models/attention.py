"""The attention seam: the one place where queries meet keys and values.

Every network calls an `Attention` strategy with this layer's queries, keys and values, for
strategies that keep something between calls (displaced patches keep the other devices' stale keys
and values) this layer's state, and where it needs them `AttentionOptions`: masks, bias, causal,
scale, and how many of the tokens are text before the image's. What is done to queries and keys
before their product (normalisation, `rotary`) is the network's. `LocalAttention`, the default,
keeps no state. Strategies that exchange keys and values between devices live in the room `parallel`
and fit the same call.

A strategy may offer three methods more, which the networks look for:

- `prefetch(state)`: turns the state of one layer into what the call takes, without the layer's
  queries, keys and values. `stack.run_stack` calls it for layer l + 1 before layer l is computed,
  so that communication in it can overlap with that computation.
- `prefetch_next(state)`: the same of the first layer's new state, for the call that comes next;
  `run_stack` calls it before the last layer is computed, where the carry is `stack.Ahead`.
- `own_tokens(values, count)`: of values for all of the image's tokens [L, ...] (positions, rotary
  tables) those of the `count` tokens at hand, where a device holds a part of the image only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_jax.models import cpu_kernels
from dit_jax.models.attention_options import PLAIN, AttentionOptions, nonzero, score_weights
from dit_jax.models.recomputation import activation
from dit_jax.nearest import one_of
from dit_jax.target import target_platform

IMPLEMENTATIONS = ("auto", "einsum", "xla", "cudnn", "cpu")


@runtime_checkable
class Attention(Protocol):
    """Softmax attention of one layer; `state` is whatever the strategy carries for it."""

    def __call__(
        self,
        q: Float[Array, "b lq h d"],
        k: Float[Array, "b lk h d"],
        v: Float[Array, "b lk h d"],
        state: Any = None,
        options: AttentionOptions = PLAIN,
    ) -> tuple[Float[Array, "b lq h d"], Any]:
        """Returns the attention output and the layer's new state."""
        ...


def whole_grid(attention: Attention, own: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of all of an image's tokens, of which `attention` is given `own` rows.

    A strategy that splits an image says by its attribute `length` how many tokens there are in all.
    """
    rows, columns = own
    return getattr(attention, "length", rows * columns) // columns, columns


def own_tokens(attention: Attention, values: Array | np.ndarray, count: int) -> Array | np.ndarray:
    """Of `values` [L, ...] for all tokens, those of the `count` that `attention` is given."""
    select = getattr(attention, "own_tokens", None)
    return values if select is None else select(values, count)


def own_positions(
    attention: Attention,
    own: tuple[int, int],
    of_grid: Callable[[tuple[int, int]], Array | np.ndarray],
) -> Array | np.ndarray:
    """Positions of the tokens that `attention` is given, made of all of the image's.

    Args:
        attention: the strategy.
        own: (rows, columns) of the tokens it is given.
        of_grid: (rows, columns) -> [L, ...], for all tokens of such a grid.
    """
    return own_tokens(attention, of_grid(whole_grid(attention, own)), own[0] * own[1])


def prefetching(attention: Attention) -> dict[str, Callable | None]:
    """What `stack.run_stack` has to know of a strategy: its `prefetch` and `prefetch_next`."""
    return {name: getattr(attention, name, None) for name in ("prefetch", "prefetch_next")}


def einsum_attention(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    options: AttentionOptions = PLAIN,
) -> Float[Array, "b lq h d"]:
    """softmax(q k^T / sqrt(d)) v, or as `options` have it, written out, the softmax in float32.

    Heads are brought in front explicitly and the normaliser divides the short output rows instead
    of the long score rows: on CPUs this is far faster than `jax.nn.dot_product_attention`.
    """
    dtype = q.dtype
    allowed = options.allowed(q.shape[1], k.shape[1])
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * scale, k, v))
    weights, _ = score_weights(q, k, allowed, options.bias)
    out = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(dtype), v, preferred_element_type=jnp.float32
    )
    total = weights.sum(axis=-1, keepdims=True)
    out = out / (total if allowed is None else nonzero(total))
    return jnp.swapaxes(out.astype(dtype), 1, 2)


def cudnn_supports(dtype: Any, head_dim: int) -> bool:
    """Whether cuDNN's fused attention takes this dtype and head size (backward pass included)."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


def resolve_implementation(
    implementation: str,
    dtype: Any,
    head_dim: int,
    backend: str | None = None,
    *,
    custom_gradients: bool = False,
    scores_shape: tuple[int, int] | None = None,
) -> str:
    """The kernel that `implementation` stands for on `backend` (default: the target).

    'auto' is 'cpu' (`cpu_kernels.attention`) on CPUs if `custom_gradients`, else 'einsum' there;
    'cudnn' on GPUs where cuDNN takes the dtype, head size and, with a mask or bias, the lengths;
    and 'xla' elsewhere. An explicit 'cudnn' that cannot run is an error, never a silent substitute.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        dtype: of queries, keys and values.
        head_dim: channels of a head.
        backend: JAX's name of it; None for `target.target_platform`.
        custom_gradients: whether 'auto' may be the kernel with a hand-written backward pass.
        scores_shape: (queries, keys) where a mask or bias is given.

    Raises:
        ValueError: an unknown implementation, or a 'cudnn' that cannot run.
    """
    # With a bias, as which it takes masks too, cuDNN's backward pass wants even lengths.
    odd = scores_shape is not None and any(length % 2 for length in scores_shape)
    backend = backend or target_platform()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r}: {one_of(implementation, IMPLEMENTATIONS)}")
    if implementation == "cudnn":
        if backend not in ("gpu", "cuda"):
            raise ValueError(f"attention='cudnn' needs an NVIDIA GPU; the backend is {backend!r}")
        if not cudnn_supports(dtype, head_dim):
            raise ValueError(
                "attention='cudnn' takes bfloat16 or float16 and a head size that is a multiple of "
                f"8 up to 128; given {jnp.dtype(dtype).name} and {head_dim}. Use attention='auto'."
            )
        if odd:
            raise ValueError(
                "attention='cudnn' takes a mask or bias for even numbers of queries and keys; "
                f"given {scores_shape[0]} and {scores_shape[1]}. Pad them, or use attention='auto'."
            )
    if implementation != "auto":
        return implementation
    if backend == "cpu":
        return "cpu" if custom_gradients else "einsum"
    if backend in ("gpu", "cuda") and cudnn_supports(dtype, head_dim) and not odd:
        return "cudnn"
    return "xla"


@dataclasses.dataclass(frozen=True)
class LocalAttention:
    """Attention among the keys and values at hand; keeps no state between calls."""

    implementation: str = "auto"
    custom_gradients: bool = False

    def __call__(self, q, k, v, state=None, options: AttentionOptions = PLAIN):
        """See `Attention`; `state` is handed back untouched."""
        (b, lq, h, d), lk = q.shape, k.shape[1]
        options.check(b, h, lq, lk)
        arrays = (options.key_mask, options.mask, options.bias)
        implementation = resolve_implementation(
            self.implementation,
            q.dtype,
            d,
            custom_gradients=self.custom_gradients,
            scores_shape=None if all(a is None for a in arrays) else (lq, lk),
        )
        if implementation == "cpu":
            allowed = options.allowed(lq, lk)
            return cpu_kernels.attention(q, k, v, allowed, options.bias, options.scale), state
        if implementation == "einsum":
            return activation(einsum_attention(q, k, v, options)), state
        out = _library_attention(q, k, v, options, implementation)
        # Of cuDNN's kernel the policy knows itself, statistics included.
        return (out if implementation == "cudnn" else activation(out)), state


def _library_attention(q, k, v, options: AttentionOptions, implementation: str) -> Array:
    """`jax.nn.dot_product_attention`, with zeros for queries that attend to nothing."""
    (b, lq, h, _), lk = q.shape, k.shape[1]
    mask, bias = options.allowed(lq, lk, causal=False), options.bias
    if implementation == "cudnn":  # takes them whole, the bias in the dtype of the queries
        mask = None if mask is None else jnp.broadcast_to(mask, (*mask.shape[:2], lq, lk))
        bias = None if bias is None else jnp.broadcast_to(bias, (b, h, lq, lk)).astype(q.dtype)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=bias,
        mask=mask,
        scale=options.scale,
        is_causal=options.causal,
        implementation=implementation,
    )
    if mask is None:
        return out
    attends = options.allowed(lq, lk).any(axis=-1)
    return jnp.where(jnp.swapaxes(attends, 1, 2)[..., None], out, jnp.zeros((), out.dtype))
