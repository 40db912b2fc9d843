"""Names of a tree's leaves: 'params/blocks/mlp/fc1/kernel', however the containers are typed."""

from typing import Any

import jax


def path_of(entries: tuple, separator: str = "/") -> str:
    """The name of a leaf, of its path as JAX gives it."""
    return jax.tree_util.keystr(entries, simple=True, separator=separator)


def paths_of(tree: Any) -> Any:
    """A tree of its leaves' names."""
    return jax.tree_util.tree_map_with_path(lambda entries, _: path_of(entries), tree)


def by_path(tree: Any, separator: str = "/") -> dict[str, Any]:
    """A tree's leaves by name, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(entries, separator): leaf for entries, leaf in leaves}
