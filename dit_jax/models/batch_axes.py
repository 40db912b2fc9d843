"""Keeps activations divided by examples where training runs on a mesh.

Where a matrix is divided over the devices that also share the batch, XLA's partitioner may divide
the activations by channels and sum partial products, instead of gathering the matrix. Saying after
each layer that the batch is what is divided settles it, in the backward pass too. Without a mesh
set (`jax.set_mesh`), or on one without the training axes, nothing happens.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

_BATCH = ("data", "fsdp")
_ROWS = "sequence"


def is_training_mesh() -> bool:
    """Whether the code is being traced for a mesh with the axes of training."""
    return set(_BATCH) <= set(jax.sharding.get_abstract_mesh().axis_names)


def divided_by_examples(x: Float[Array, "b *rest"]) -> Float[Array, "b *rest"]:
    """`x` with its examples over the batch axes; how the rest lies is left to the partitioner."""
    return _divided(x, {})


def divided_by_rows(x: Float[Array, "b *rest"], axis: int = 1) -> Float[Array, "b *rest"]:
    """`x` with its examples over the batch axes, and an image's rows or tokens over 'sequence'.

    For arrays of the image alone: a network says by this call that there are its rows or tokens
    along `axis`. Text, whatever its shape, is never divided.
    """
    return _divided(x, {axis: _ROWS})


def _divided(x: Array, names: dict[int, str]) -> Array:
    if not is_training_mesh():
        return x
    sizes = jax.sharding.get_abstract_mesh().shape
    named = {axis: name for axis, name in names.items() if sizes.get(name, 1) > 1}
    free = PartitionSpec.UNCONSTRAINED
    rest = [named.get(axis, free) for axis in range(1, x.ndim)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_BATCH, *rest))
