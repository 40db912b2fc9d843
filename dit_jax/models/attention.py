"""The attention seam: the one place where queries meet keys and values.

Every network calls an `Attention` strategy with this layer's queries, keys and values and, for
strategies that keep something between calls (displaced patches keep the other devices' stale keys
and values), this layer's state. `LocalAttention`, the default, keeps none. Strategies that exchange
keys and values between devices live in the room `parallel` and fit the same call.

A strategy may offer two methods more, which the networks look for:

- `prefetch(state)`: turns the state of one layer into what the call takes, without the layer's
  queries, keys and values. `stack.run_stack` calls it for layer l + 1 before layer l is computed,
  so that communication in it can overlap with that computation.
- `own_tokens(values, count)`: of values for all tokens [L, d] (positions) those of the `count`
  tokens at hand, where a device holds a part of the image only.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_jax.models import cpu_kernels

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
    ) -> tuple[Float[Array, "b lq h d"], Any]:
        """Returns the attention output and the layer's new state."""
        ...


def own_tokens(attention: Attention, values: Array | np.ndarray, count: int) -> Array | np.ndarray:
    """Of `values` [L, d] for all tokens, those of the `count` tokens that `attention` is given."""
    select = getattr(attention, "own_tokens", None)
    return values if select is None else select(values, count)


def einsum_attention(
    q: Float[Array, "b lq h d"], k: Float[Array, "b lk h d"], v: Float[Array, "b lk h d"]
) -> Float[Array, "b lq h d"]:
    """softmax(q k^T / sqrt(d)) v written out, the softmax in float32.

    Heads are brought in front explicitly and the normaliser divides the short output rows instead
    of the long score rows: on CPUs this is far faster than `jax.nn.dot_product_attention`.
    """
    dtype = q.dtype
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(dtype), v, preferred_element_type=jnp.float32
    )
    out = out / weights.sum(axis=-1, keepdims=True)
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
) -> str:
    """The kernel that `implementation` stands for on `backend` (default: JAX's own).

    'auto' is 'cpu' (`cpu_kernels.attention`) on CPUs if `custom_gradients`, else 'einsum' there;
    'cudnn' on GPUs where cuDNN takes the dtype and head size, and 'xla' elsewhere. An explicit
    'cudnn' that cannot run is an error, never a silent substitute.
    """
    backend = backend or jax.default_backend()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r}: expected one of {IMPLEMENTATIONS}")
    if implementation == "cudnn":
        if backend not in ("gpu", "cuda"):
            raise ValueError(f"attention='cudnn' needs an NVIDIA GPU; the backend is {backend!r}")
        if not cudnn_supports(dtype, head_dim):
            raise ValueError(
                "attention='cudnn' takes bfloat16 or float16 and a head size that is a multiple of "
                f"8 up to 128; given {jnp.dtype(dtype).name} and {head_dim}. Use attention='auto'."
            )
    if implementation != "auto":
        return implementation
    if backend == "cpu":
        return "cpu" if custom_gradients else "einsum"
    if backend in ("gpu", "cuda") and cudnn_supports(dtype, head_dim):
        return "cudnn"
    return "xla"


@dataclasses.dataclass(frozen=True)
class LocalAttention:
    """Attention among the keys and values at hand; keeps no state between calls."""

    implementation: str = "auto"
    custom_gradients: bool = False

    def __call__(self, q, k, v, state=None):
        """See `Attention`; `state` is handed back untouched."""
        implementation = resolve_implementation(
            self.implementation, q.dtype, q.shape[-1], custom_gradients=self.custom_gradients
        )
        if implementation == "cpu":
            return cpu_kernels.attention(q, k, v), state
        if implementation == "einsum":
            return einsum_attention(q, k, v), state
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation), state
