"""A network's parameters by dotted paths: names, shapes and dtypes, without making them."""

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


def flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{'blocks.mlp.fc1.bias': (12, 1536), ...} of nested parameters or their abstract shapes."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree)}


def flat_dtypes(tree: Any) -> dict[str, np.dtype]:
    """`flat_shapes`, of dtypes."""
    return {path: np.dtype(leaf.dtype) for path, leaf in flatten(tree)}


def flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted path and leaf of nested dictionaries."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def unflatten(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def abstract_params(network: Any) -> Any:
    """Shapes of a network's parameters, without making them."""
    return jax.eval_shape(lambda: network.init(jax.random.key(0)))  # compiles nothing


@functools.lru_cache(maxsize=32)
def parameter_dtypes(network: Any) -> Mapping[str, np.dtype]:
    """`flat_dtypes` of a network's parameters, as its configuration has them stored."""
    return types.MappingProxyType(flat_dtypes(abstract_params(network)))


@functools.lru_cache(maxsize=32)
def parameter_shapes(network: Any) -> Shapes:
    """`flat_shapes` of a network's parameters; remembered, since tracing a U-Net takes seconds."""
    return types.MappingProxyType(flat_shapes(abstract_params(network)))
