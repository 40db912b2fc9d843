"""Weights of a pipeline divided over several devices, each of which reads its part alone."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.parallel.mesh import put_whole
from dit_jax.parallel.partitioning import ShardedPlacement, rules_for

_BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Divided:
    """The transformer and the text encoders of a pipeline over a mesh, by the rules of training.

    Along 'fsdp' a layer's weights are gathered where it is computed, or its products are summed,
    as XLA's partitioner chooses; along 'tensor' heads and channels are computed apart.

    Attributes:
        mesh: of `parallel.mesh.create_mesh`.

    Raises:
        ValueError: a mesh of other axes, or one that divides rows of images.
    """

    mesh: Mesh

    def __post_init__(self):
        axes = dict(self.mesh.shape)
        if not {"data", "fsdp", "tensor"} <= set(axes):
            raise ValueError(
                f"a mesh of the axes {', '.join(axes)}: expected one of "
                "dit_jax.parallel.mesh.create_mesh(data=1, fsdp=2, ...)"
            )
        if axes.get("sequence", 1) > 1:
            raise ValueError(
                f"mesh.sequence={axes['sequence']} is for training: rows of one image are divided "
                "by parallel=ImageParallel(...)"
            )

    def put(self, name: str) -> Callable[[str, np.ndarray], jax.Array]:
        """(path, array) -> the array, each device given its part; of the architecture `name`."""
        return self._placement(name).put_params

    def shardings(self, name: str, params: Any) -> Any:
        """Where parameters, or their shapes, live."""
        return self._placement(name).state_shardings(params)

    def put_examples(self, tree: Any, count: int) -> Any:
        """Arrays of `count` examples, or keys, onto the devices."""
        return jax.tree.map(lambda array: put_whole(array, self._examples(count)), tree)

    def tracing(self, count: int) -> contextlib.AbstractContextManager:
        """A context for calls with `count` examples: these are what is divided, if they can be."""
        # Fewer examples than devices: the partitioner divides channels, which moves less.
        return jax.set_mesh(self.mesh) if self._divides(count) else contextlib.nullcontext()

    def _placement(self, name: str) -> ShardedPlacement:
        return ShardedPlacement(self.mesh, rules_for(name))

    def _divides(self, count: int) -> bool:
        return count % math.prod(self.mesh.shape[axis] for axis in _BATCH) == 0

    def _examples(self, count: int) -> NamedSharding:
        spec = PartitionSpec(_BATCH) if self._divides(count) else PartitionSpec()
        return NamedSharding(self.mesh, spec)


def bytes_a_device(*trees: Any) -> int:
    """The most that one device holds of these arrays."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(trees):
        for shard in getattr(leaf, "addressable_shards", ()):
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
