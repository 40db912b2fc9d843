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
    """`x` with its examples over the batch axes, and rows or tokens over 'sequence' if there is."""
    if not is_training_mesh():
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    if x.ndim in (3, 4) and jax.sharding.get_abstract_mesh().shape.get(_ROWS, 1) > 1:
        free[0] = _ROWS
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_BATCH, *free))
