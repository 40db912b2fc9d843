"""What a backward pass keeps of the forward pass, and what it computes anew.

A policy of `REMAT_POLICIES` is put around a block (`stack.rematerialised`). What a block with
policy 'activations' keeps is named where it is made (`activation`): the results of matrix products
and convolutions, of attention and its statistics. All else is elementwise or a normalisation, a
pass over memory to recompute, no arithmetic to speak of.

On accelerators elementwise operations are recomputed under every policy: what lies between the
input of a normalisation or GELU and the matrix product that takes its result is float32 inside of
XLA's kernels, and kept in none. JAX's own derivatives, so that `jax.jvp` passes as well. On CPUs
nothing of this happens unless a policy asks for it: there `cpu_kernels` are faster.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dit_jax.nearest import one_of
from dit_jax.target import target_platform

REMAT_POLICIES = ("auto", "none", "activations", "dots", "block")

# The forward pass of cuDNN's attention, whose results its backward pass wants: no name can be given
# to the statistics inside.
_ATTENTION_KERNELS = ("dot_product_attention_fwd_wrapper", "dot_product_attention_fwd")
_ACTIVATION = "activation"

# tanh(u) = 2 sigmoid(2 u) - 1 with u = sqrt(2 / pi) (x + 0.044715 x^3).
_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_SLOPE

# Of the blocks that are being traced: their policy, and whether a scan runs them.
_blocks = contextvars.ContextVar("blocks", default=("none", False))


@contextlib.contextmanager
def tracing_blocks(remat: str, *, scanned: bool) -> Iterator[None]:
    """A context in which a block is traced.

    Args:
        remat: the policy around it, resolved.
        scanned: whether its forward and backward pass are bodies of two scans. XLA cannot merge
            then what one computes with what the other computes anew.
    """
    token = _blocks.set((remat, scanned))
    try:
        yield
    finally:
        _blocks.reset(token)


def resolve_remat(remat: str, backend: str | None = None) -> str:
    """The policy that is meant where none was chosen by numbers (`training.remat_choice`).

    'auto' is 'none' on CPUs and 'activations' elsewhere: no product is computed twice.

    Raises:
        ValueError: an unknown policy.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat={remat!r}: {one_of(remat, REMAT_POLICIES)}")
    if remat != "auto":
        return remat
    return "none" if (backend or target_platform()) == "cpu" else "activations"


def activation(x: Array) -> Array:
    """`x`, which policy 'activations' keeps for the backward pass, if that needs it."""
    return checkpoint_name(x, _ACTIVATION)


def activations_saveable(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """The checkpoint policy of 'activations': what is named by `activation`, and attention."""
    if primitive.name == "name":
        return parameters["name"] == _ACTIVATION
    return primitive.name in _ATTENTION_KERNELS


def recomputes_elementwise(backend: str | None = None) -> bool:
    """Whether elementwise operations are recomputed whatever the policy: on accelerators."""
    return (backend or target_platform()) != "cpu"


def elementwise(
    function: Callable[..., Array], *operands: Array, prevent_cse: bool = False
) -> Array:
    """function(*operands), keeping the operands alone for its backward pass."""
    return jax.checkpoint(function, prevent_cse=prevent_cse)(*operands)


def product_of(
    layer: nnx.Module,
    prepare: Callable[..., Array],
    *operands: Array,
    following: nnx.Module | None = None,
) -> tuple[Array, nnx.Module | None]:
    """layer(prepare(*operands)), keeping operands and result but not what the layer takes.

    Args:
        layer: a linear map.
        prepare: elementwise or a normalisation.
        *operands: of `prepare`.
        following: the layer that takes the result. The gradients of both layers' parameters are
            computed before that of the operands: what they are made of can be dropped then.

    Returns:
        The result, and `following`, which is to be called in place of the one given.
    """
    graph, parameters = nnx.split((layer, following))

    def run(parameters, *operands):
        x = prepare(*operands)
        if following is not None:
            # Of a barrier's results the cotangents wait for one another, too.
            x, parameters = jax.lax.optimization_barrier((x, parameters))
        layer, after = nnx.merge(graph, parameters)
        return layer(x), nnx.split(after)[1]

    # Within a scan's body `prepare` is computed twice only if the whole block is computed anew:
    # there it is better merged than stored and read once more.
    _, scanned = _blocks.get()
    run = jax.checkpoint(run, policy=activations_saveable, prevent_cse=not scanned)
    y, after = run(parameters, *operands)
    return y, nnx.merge(nnx.graphdef(following), after)


@jax.custom_jvp
def _gelu(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _gelu_gate(wide)).astype(x.dtype)


def _gelu_gate(x):
    return jax.nn.sigmoid(x * (_GELU_SLOPE + _GELU_CUBIC * x * x))


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    gate = _gelu_gate(wide)
    slope = gate * (1 + wide * (1 - gate) * (_GELU_SLOPE + 3 * _GELU_CUBIC * wide * wide))
    return (wide * gate).astype(x.dtype), (tangent.astype(wide.dtype) * slope).astype(x.dtype)


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """GELU in its tanh approximation, computed in float32 and kept in none."""
    # Where a block is computed anew XLA would make GELU and its gradient in one kernel, and both of
    # them, the widest arrays of a block, would be there at once with what they are made of.
    remat, _ = _blocks.get()
    return elementwise(_gelu, x, prevent_cse=remat == "block")


@jax.custom_jvp
def converted(value: Array, like: Array) -> Array:
    """`value` in the dtype of `like`, whose gradient is then of that dtype, too.

    The gradient goes to `like` alone, whose value is not used: with `like` a conversion of all
    layers' `value`, and `value` stopped, the gradients of a scan's layers are stacked in the dtype
    they were computed in, converted after the scan, and no conversion of all layers is ever stored.
    """
    return value.astype(like.dtype)


@converted.defjvp
def _converted_jvp(primals, tangents):
    value, like = primals
    return value.astype(like.dtype), tangents[1]
