"""The block's operations with hand-written backward passes, for XLA's CPU backend.

They compute what the plain forms in layers.py and attention.py compute. The derivatives are
arranged so that nearly all of them are matrix products with the left operand not transposed, the
one form that jax 0.10 gives to its fast CPU library, and so that little is stored: sums over rows
or tokens are products with ones, GELU stores its input alone, attention its raw weights.

A hand-written backward pass has no forward mode: under `jax.jvp` these raise. Objectives that need
a Jacobian-vector product use networks with `custom_gradients='off'`.
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dit_jax.models.attention_options import nonzero, score_weights
from dit_jax.models.recomputation import activation
from dit_jax.nearest import one_of
from dit_jax.target import target_platform

CUSTOM_GRADIENTS = ("auto", "on", "off")

# Longer sequences recompute their attention weights instead of storing length^2 of them.
_LONGEST_STORED = 512
# From this length on each head is a product of its own, which is a quarter faster than products
# over a batch of heads; of short ones there would be more programs than work.
_HEADS_APART = 1024
_GELU_SLOPE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def resolve_custom_gradients(custom_gradients: str, backend: str | None = None) -> bool:
    """'auto' is 'on' on CPUs and 'off' elsewhere, where XLA's own derivatives fuse well."""
    if custom_gradients not in CUSTOM_GRADIENTS:
        raise ValueError(
            f"custom_gradients={custom_gradients!r}: {one_of(custom_gradients, CUSTOM_GRADIENTS)}"
        )
    if custom_gradients == "auto":
        return (backend or target_platform()) == "cpu"
    return custom_gradients == "on"


def _sum_tokens(x: Float[Array, "b l d"]) -> Float[Array, "b d"]:
    return jnp.matmul(jnp.ones((x.shape[0], 1, x.shape[1]), x.dtype), x)[:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def modulated_layer_norm(
    x: Float[Array, "b l d"],
    shift: Float[Array, "b d"],
    scale: Float[Array, "b d"],
    epsilon: float = 1e-6,
) -> Float[Array, "b l d"]:
    """layer_norm(x) (1 + scale) + shift, the normalisation in float32."""
    return _norm_forward(x, shift, scale, epsilon)[0]


def _norm_forward(x, shift, scale, epsilon):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(x32 - mean).mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (x32 - mean) * inverse * (1 + scale[:, None]) + shift[:, None]
    return y.astype(x.dtype), (x, mean, inverse, scale)


def _norm_backward(epsilon, residuals, dy):
    # With n = (x - mean) inverse and dn = dy (1 + scale):
    # dx = inverse (dn - mean_d(dn) - n mean_d(dn n)), every mean a product with (1 + scale).
    x, mean, inverse, scale = residuals
    dtype, dim = x.dtype, x.shape[-1]
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    weighted, gain = dy * x, (1 + scale.astype(jnp.float32))[:, :, None]
    sum_dn = jnp.matmul(dy, gain)
    sum_dn_n = (jnp.matmul(weighted, gain) - mean * sum_dn) * inverse
    quadratic = inverse * inverse * sum_dn_n / dim
    constant = mean * quadratic - inverse * sum_dn / dim
    dx = dy * jnp.swapaxes(gain, 1, 2) * inverse - x * quadratic + constant

    inverse_t, mean_t = jnp.swapaxes(inverse, 1, 2), jnp.swapaxes(mean, 1, 2)
    rows = jnp.concatenate([jnp.ones_like(inverse_t), -inverse_t * mean_t], axis=1)
    sums = jnp.matmul(rows, dy)
    dscale = sums[:, 1] + jnp.matmul(inverse_t, weighted)[:, 0]
    return dx.astype(dtype), sums[:, 0].astype(scale.dtype), dscale.astype(scale.dtype)


modulated_layer_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """GELU in its tanh approximation, written as x sigmoid(2 u)."""
    return x * _gelu_gate(x)


def _gelu_gate(x):
    # tanh(u) = 2 sigmoid(2 u) - 1: one exponential instead of a rational function of x.
    return 1 / (1 + jnp.exp(-x * (2 * _GELU_SLOPE + 2 * _GELU_SLOPE * _GELU_CUBIC * x * x)))


def _gelu_backward(x, dy):
    # The barrier keeps XLA from storing the forward pass's gate, a pass over memory more.
    x, dy = jax.lax.optimization_barrier((x, dy))
    gate = _gelu_gate(x)
    slope = 2 * _GELU_SLOPE + 6 * _GELU_SLOPE * _GELU_CUBIC * x * x
    return (dy * gate * (1 + x * (1 - gate) * slope),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def gated_residual(
    x: Float[Array, "b l d"], update: Float[Array, "b l d"], gate: Float[Array, "b d"]
) -> Float[Array, "b l d"]:
    """x + gate update, the gate the same for every token of an example."""
    return x + gate[:, None] * update


gated_residual.defvjp(
    lambda x, update, gate: (gated_residual(x, update, gate), (update, gate)),
    lambda residuals, dy: (dy, dy * residuals[1][:, None], _sum_tokens(dy * residuals[0])),
)


def _parts(batch: int) -> int:
    """Independent parts of a batch, for the cores: one batched product runs on one core only."""
    return max(n for n in range(1, min(batch, os.cpu_count() or 1) + 1) if batch % n == 0)


def _cut(tree: Any, parts: int) -> list[Any]:
    """The parts of a batch; what is the same for all examples goes to every part."""
    leaves, treedef = jax.tree.flatten(tree)
    split = [[leaf] * parts if leaf.shape[0] == 1 else jnp.split(leaf, parts) for leaf in leaves]
    return [treedef.unflatten(piece) for piece in zip(*split, strict=True)]


def _heads_first(x):
    return jnp.swapaxes(x, 1, 2)


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


# Traced once for all heads and parts of the same shapes, and then written out as if it were not.
@functools.partial(jax.jit, inline=True, static_argnames="scale")
def _attend(q, k, v, allowed, bias, scale):
    q, k, v = map(_heads_first, (q * _scale(q, scale), k, v))
    weights, _ = score_weights(q, k, allowed, bias)
    total = weights.sum(axis=-1, keepdims=True)
    inverse = 1 / (total if allowed is None else nonzero(total))
    weights = weights.astype(v.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, v, preferred_element_type=jnp.float32) * inverse
    return _heads_first(out.astype(v.dtype)), weights, inverse


def _attend_backward(q, k, v, allowed, bias, scale, out, weights, inverse, d_out):
    scale = _scale(q, scale)
    delta = _heads_first((d_out * out).sum(axis=-1, keepdims=True)) * inverse
    q, k, v, d_out = map(_heads_first, (q * scale, k, v, d_out))
    if weights is None:
        # The barrier keeps XLA from storing the forward pass's weights after all.
        q, k, inverse = jax.lax.optimization_barrier((q, k, inverse))
        weights, _ = score_weights(q, k, allowed, bias)
    d_out = (d_out * inverse).astype(q.dtype)
    d_scores = weights * (jnp.einsum("bhqd,bhkd->bhqk", d_out, v) - delta)
    d_v = jnp.einsum("bhqk,bhqd->bhkd", weights.astype(q.dtype), d_out)
    d_k = jnp.einsum("bhqk,bhqd->bhkd", d_scores, q)
    d_q = jnp.einsum("bhqk,bhkd->bhqd", d_scores, k * scale)
    d_bias = None if bias is None else _sum_to(d_scores, bias)
    d_qkv = (_heads_first(gradient.astype(q.dtype)) for gradient in (d_q, d_k, d_v))
    return *d_qkv, d_bias


def _sum_to(x: Array, like: Array) -> Array:
    """The sum over the axes along which `like` has been repeated, in its dtype."""
    axes = [axis for axis in range(x.ndim) if like.shape[axis] == 1]
    return x.sum(axis=axes, keepdims=True).astype(like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    allowed: Bool[Array, "#b #h #lq lk"] | None = None,
    bias: Float[Array, "#b #h #lq lk"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b lq h d"]:
    """softmax(scale q k^T + bias) v over the allowed keys, in parts of the batch for the cores.

    The softmax is in float32, `scale` by default 1 / sqrt(d).
    """
    return _attention_forward(q, k, v, allowed, bias, scale)[0]


def _attend_by_heads(q, k, v, allowed, bias, scale):
    """`_attend` of one head after another; the weights are not handed out."""
    heads = range(q.shape[2])

    def of_head(array, head, axis):
        if array is None or array.shape[axis] == 1:
            return array
        return jax.lax.slice_in_dim(array, head, head + 1, axis=axis)

    pieces = [
        _attend(
            *(of_head(a, head, 2) for a in (q, k, v)),
            *(of_head(a, head, 1) for a in (allowed, bias)),
            scale,
        )
        for head in heads
    ]
    outs, _, inverses = zip(*pieces, strict=True)
    return jnp.concatenate(outs, axis=2), None, jnp.concatenate(inverses, axis=1)


def _attention_forward(q, k, v, allowed, bias, scale):
    operands = (q, k, v, allowed, bias)
    longest = max(q.shape[1], k.shape[1])
    stored = longest <= _LONGEST_STORED
    attend = _attend_by_heads if longest >= _HEADS_APART and not stored else _attend
    parts = _parts(q.shape[0]) if attend is _attend else q.shape[0]
    pieces = [attend(*piece, scale) for piece in _cut(operands, parts)]
    out = activation(jnp.concatenate([piece[0] for piece in pieces]))
    kept = [
        (activation(weights) if stored else None, activation(inverse))
        for _, weights, inverse in pieces
    ]
    return out, (operands, out, kept)


def _attention_backward(scale, residuals, d_out):
    operands, out, kept = residuals
    pieces = _cut((operands, out, d_out), len(kept))
    *d_qkv, d_bias = zip(
        *[
            _attend_backward(*own, scale, out, *weights, d_out)
            for (own, out, d_out), weights in zip(pieces, kept, strict=True)
        ],
        strict=True,
    )
    bias = operands[4]
    if bias is None:
        d_bias = None
    else:
        d_bias = sum(d_bias) if bias.shape[0] == 1 else jnp.concatenate(d_bias)
    return *map(jnp.concatenate, d_qkv), None, d_bias


attention.defvjp(_attention_forward, _attention_backward)
