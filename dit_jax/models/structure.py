"""What modules are beside those they are created as: factors of a LoRA, kernels in 8 bits.

Parameters tell it by themselves, so that whatever has a graph for each `Structure`, a network or a
text encoder, takes them like any others.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Key

from dit_jax.models.linear import Linear


@runtime_checkable
class Architecture(Protocol):
    """What makes a module: a `Network` or a `TextEncoder`; hashable."""

    def create(self, key: Key[Array, ""]) -> nnx.Module:
        """The module with fresh parameters."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """What parameters are, beside those a module is created with: which decides its graph.

    Attributes:
        quantized: whether kernels are quantised.
        adapted: paths of the layers that carry the factors of a LoRA.
    """

    quantized: bool = False
    adapted: frozenset[tuple] = frozenset()

    @classmethod
    def of(cls, params: Any) -> "Structure":
        """That of parameters, or of their shapes."""
        quantized, adapted = False, set()
        for path, _ in jax.tree_util.tree_leaves_with_path(params):
            names = tuple(getattr(entry, "key", None) for entry in path)
            quantized |= "kernel_scale" in names
            if "lora_a" in names:
                adapted.add(names[: names.index("lora_a")])
        return cls(quantized, frozenset(adapted))


def module_of(architecture: Architecture, structure: Structure) -> nnx.Module:
    """The module, without values, whose parameters have this structure."""

    def create():
        module = architecture.create(jax.random.key(0))
        if structure.quantized:
            quantize_layers(module)
        for path, layer in nnx.iter_modules(module):
            if path in structure.adapted:
                layer.adapt()
        return module

    return nnx.eval_shape(create)


@functools.lru_cache(maxsize=64)
def linear_layers(architecture: Architecture) -> Mapping[tuple, tuple[int, ...]]:
    """Shapes of the kernels, [*layers, i, o], of all `Linear` layers, by path."""
    return types.MappingProxyType(
        {
            path: layer.kernel.get_value().shape
            for path, layer in nnx.iter_modules(module_of(architecture, Structure()))
            if isinstance(layer, Linear)
        }
    )


def quantize_layers(module: nnx.Module) -> nnx.Module:
    """The module with the kernels of its quantised products in 8 bits, changed in place."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, Linear):
            layer.quantize()
    return module
