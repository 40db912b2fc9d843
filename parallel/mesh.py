"""The device mesh, and where states and batches live on it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def create_mesh(*, data: int = -1) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
        data: devices over which a batch is split; -1 takes them all.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    count = jax.device_count()
    if data not in (-1, count):
        raise ValueError(
            f"mesh.data={data}, but there are {count} devices: set config.mesh.data={count} or -1"
        )
    return jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """Every device holds the whole state and its share of each batch."""

    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """Devices that share the work."""
        return self.mesh.size

    @property
    def replicated(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def split(self) -> NamedSharding:
        """The leading axis split over the devices."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def check_batch_size(self, batch_size: int, num_microbatches: int = 1) -> None:
        """Refuses a batch that the devices cannot share evenly.

        Raises:
            ValueError: with the nearest batch sizes that would do.
        """
        parts = self.num_devices * num_microbatches
        if batch_size < 1 or batch_size % parts:
            below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
            sizes = f"{below} or {above}" if below > 0 else f"{above}"
            microbatches = f" x {num_microbatches} microbatches" if num_microbatches > 1 else ""
            raise ValueError(
                f"a batch of {batch_size} is not divisible by {self.num_devices} devices"
                f"{microbatches}: use {sizes}, or change "
                "config.training.num_microbatches"
            )

    def state_shardings(self, abstract_state: Any) -> Any:
        """Every leaf replicated."""
        return jax.tree.map(lambda _: self.replicated, abstract_state)

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's part of a batch, onto its devices."""
        return {
            name: jax.make_array_from_process_local_data(self.split, value)
            for name, value in batch.items()
        }
