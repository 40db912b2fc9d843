"""What networks evaluated by many devices have in common; see `parallel.transformer`, `unet`."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dit_jax.models import Network, Request, Result
from dit_jax.sampling import Carried

BATCH_AXES = ("guidance", "data")
PATCH_AXES = ("ulysses", "ring")


@dataclasses.dataclass(frozen=True)
class ImageNetwork(abc.ABC):
    """A network evaluated by many devices, with the face of `dit_jax.models.Network`.

    Arrays are global: x [b, h, w, c] goes in and the output comes out whole, however they lie.

    Attributes:
        network: on one device.
        mesh: of `ImageParallel`.
        mode: what the devices exchange.
        warmup_steps: of modes that take something of the evaluation before.
    """

    network: Network
    mesh: Mesh
    mode: str
    warmup_steps: int = 0

    def __getattr__(self, name: str) -> Any:
        # Shapes and conditions are the network's own.
        if name.startswith("_") or name == "network":
            raise AttributeError(name)
        return getattr(self.network, name)

    @classmethod
    @abc.abstractmethod
    def notes(cls, config: Any, mode: str, patch_devices: int, ulysses: int) -> list[str]:
        """Notes on how an image is split.

        Raises:
            ValueError: the network has no such mode, or cannot be split over so many devices.
        """

    @abc.abstractmethod
    def carried(self, batch: int, size: tuple[int, int]) -> Carried:
        """What sampling of `batch` examples of (height, width) begins with."""

    @abc.abstractmethod
    def evaluate(self, params: Any, request: Request) -> Result:
        """`Network.apply`, on the mesh."""

    def apply(self, params: Any, request: Request) -> Result:
        """As `Network.apply`, on the mesh.

        Args:
            params: placed by `ImagePlacement.place`.
            request: its carry is of `carried`, then of the evaluation before.

        Raises:
            ValueError: the request has what is not for sampling on many devices.
        """
        refused = {
            "dropout_keys": request.dropout_keys,
            "features": request.features or None,
            "attention": request.attention,
            "spatial": request.spatial,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"a network on many devices takes no {name}")
        return self.evaluate(params, request)

    @property
    def patch_devices(self) -> int:
        """Devices over which the rows of an image are split."""
        return self.mesh.shape["ulysses"] * self.mesh.shape["ring"]

    def batch_axes(self, batch: int) -> tuple[str, ...]:
        """Axes an evaluation's examples are split over: all that divide them."""
        for axes in (BATCH_AXES, BATCH_AXES[1:]):
            if batch % int(np.prod([self.mesh.shape[axis] for axis in axes])) == 0:
                return axes
        return ()

    def in_slabs(
        self, evaluate: Any, params: Any, request: Request, padding: int, state_spec: Any
    ) -> Result:
        """Evaluates slabs of rows, each on its device.

        Args:
            evaluate: (params, request of a slab) -> (output of the slab, new carry or None).
            params: on every device.
            request: of the whole images.
            padding: rows that are missing for slabs of one size.
            state_spec: of the carry, a prefix of its tree.
        """
        x = request.x
        axes, height = self.batch_axes(x.shape[0]), x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
        examples, slabs = PartitionSpec(axes), PartitionSpec(axes, PATCH_AXES)

        def of_slab(params, x, t, conditions, ahead, carry):
            more = {"carry": carry, "ahead": ahead, "step_cache": request.step_cache}
            slab = Request(x, t, conditions, **more)
            return evaluate(params, slab)

        out, carry = jax.shard_map(
            of_slab,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), slabs, examples, examples, examples, state_spec),
            out_specs=(slabs, state_spec),
            # Whether a value differs between devices cannot be followed through the hand-written
            # gradients; the outputs all do.
            check_vma=False,
        )(params, x, request.t, request.conditions, request.ahead, request.carry)
        return Result(out[:, :height], carry=carry)


IMAGE_NETWORKS: dict[type, type[ImageNetwork]] = {}
"""How one image of a network is split, by the type of the network's configuration."""


def register_image_network(config: type, parallel: type[ImageNetwork]) -> None:
    """Says how one image of an architecture is split over devices.

    Raises:
        ValueError: something else was said before.
    """
    if IMAGE_NETWORKS.get(config, parallel) is not parallel:
        raise ValueError(f"{config.__name__} is split as {IMAGE_NETWORKS[config].__name__} already")
    IMAGE_NETWORKS[config] = parallel


def image_network(config: Any) -> type[ImageNetwork]:
    """How one image of a network is split.

    Raises:
        ValueError: nobody has said so.
    """
    if type(config) not in IMAGE_NETWORKS:
        raise ValueError(
            f"images of {type(config).__name__} cannot be split over devices; those of "
            f"{', '.join(known.__name__ for known in IMAGE_NETWORKS)} can"
        )
    return IMAGE_NETWORKS[type(config)]
