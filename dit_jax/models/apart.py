"""Parameters of repeated blocks of which every layer has an array of its own, for inference.

GPUs copy a layer's part of a stacked array before the product that reads it, in a scan and in an
unrolled loop alike: three times the traffic of reading it. An array of its own is read where it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """What stands in place of a stacked parameter; `stack.run_stack` unrolls over it.

    Attributes:
        layers: in order.
    """

    layers: tuple[Any, ...]

    @property
    def dtype(self) -> Any:
        """Of all of them."""
        return self.layers[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As if they were stacked."""
        return len(self.layers), *self.layers[0].shape

    @property
    def ndim(self) -> int:
        """As if they were stacked."""
        return 1 + self.layers[0].ndim

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """They are stacked, in host memory."""
        return np.stack([np.asarray(layer, dtype) for layer in self.layers])


def is_apart(leaf: Any) -> bool:
    """Whether it is an `Apart`, for the functions of `jax.tree`."""
    return isinstance(leaf, Apart)


def take_apart(parameters: Any) -> Any:
    """Parameters of a stack with an `Apart` in place of every array."""

    def apart(leaf):
        return leaf if is_apart(leaf) else Apart(tuple(leaf[i] for i in range(leaf.shape[0])))

    return jax.tree.map(apart, parameters, is_leaf=is_apart)


def of_layers(function: Callable[[Any], tuple[Any, ...]], leaf: Any) -> tuple[Any, ...]:
    """function(leaf), arrays with the layers as theirs; of an `Apart`, of each of its layers."""
    if not is_apart(leaf):
        return function(leaf)
    return tuple(map(Apart, zip(*map(function, leaf.layers), strict=True)))
