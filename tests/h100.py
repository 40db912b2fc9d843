"""Programs of the library for H100s that are not there, as text."""

import functools

import jax

from dit_jax.parallel.planning.compilers import GPU_OPTIONS, GpuCompiler


@functools.cache
def devices(count, name="h100"):
    """Stand-ins for GPUs, of which meshes are made."""
    return GpuCompiler(name, count).devices()


def compile_text(lower):
    """The text of the program that `lower` lowers for a GPU; its large products are cuBLASLt's."""
    with GpuCompiler("h100", 1).targeting():
        lowered = lower()
    return lowered.compile(compiler_options=GPU_OPTIONS).as_text()


def shapes_on(tree, sharding):
    """Shapes for arrays, with a sharding, or one a leaf."""
    shardings = sharding
    if isinstance(sharding, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings,
    )
