"""The device mesh, and where states and batches live on it."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The slowest first: neighbours in the last axes are the devices closest to each other.
AXES = ("data", "fsdp", "tensor", "sequence")
# Arrays of a batch that are images or latents, [b, ..., rows, columns, channels].
IMAGES = ("image", "noise", "path")


def create_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `AXES`.

    Args:
        data: parts of a batch; every one of them has the whole state.
        fsdp: parts of a batch among which the state is divided as well.
        tensor: devices over which the columns and rows of matrices are divided.
        sequence: devices over which the rows of an image are divided.
        devices: to be used; None for all of all processes.
        One of the four sizes may be -1: all the devices that the others leave.

    Raises:
        ValueError: the axes do not multiply to the number of devices, with values that do; a
            process would hold parts of images only; a mesh that XLA divides wrongly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_axes(
        {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}, len(devices)
    )
    _refuse_wrong_results(sizes)
    processes = len({device.process_index for device in devices})
    inner, local = sizes["tensor"] * sizes["sequence"], len(devices) // processes
    if processes > 1 and local % inner:
        raise ValueError(
            f"mesh.tensor x mesh.sequence = {inner} does not divide the {local} devices of a "
            "process: keep these two axes within a process, and use mesh.fsdp across processes"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)


def _refuse_wrong_results(sizes: dict[str, int]) -> None:
    """Refuses the one kind of mesh on which XLA's partitioner computes something else.

    With data, fsdp and tensor all above 1, jax 0.10's partitioner swaps the examples of devices
    where a bias stored over 'tensor' is added to a product of rows (two products, their biases and
    a constraint of the batch suffice to see it): half of the outputs are other examples'.

    Raises:
        ValueError: with meshes that are right.
    """
    data, fsdp, tensor = (sizes[name] for name in ("data", "fsdp", "tensor"))
    if min(data, fsdp, tensor) > 1:
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp} and mesh.tensor={tensor}: with all three above 1 "
            "the partitioner of this jax mixes up the examples of a batch. Set mesh.data=1 and "
            f"mesh.fsdp={data * fsdp}, or mesh.fsdp=1 and mesh.data={data * fsdp}"
        )


def resolve_axes(axes: dict[str, int], count: int) -> dict[str, int]:
    """The sizes of the axes, -1 replaced, whose product is `count`.

    Raises:
        ValueError: there are none, with values that would do.
    """
    given = ", ".join(f"mesh.{name}={size}" for name, size in axes.items())
    devices = "1 device" if count == 1 else f"{count} devices"
    for name, size in axes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{name}={size}: expected 1 or more, or -1 for the rest")
    rest = [name for name, size in axes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"{given}: only one axis can be -1, all that the others leave")
    known = math.prod(size for size in axes.values() if size != -1)
    if rest:
        if count % known:
            possible = [n for n in range(1, count + 1) if count % n == 0]
            raise ValueError(
                f"{given}: the axes other than {rest[0]} multiply to {known}, which does not "
                f"divide {devices}: they must multiply to one of {', '.join(map(str, possible))}"
            )
        return {**axes, rest[0]: count // known}
    if known != count:
        others = {name: known // size for name, size in axes.items()}
        fitting = [
            f"mesh.{name}={count // product}"
            for name, product in others.items()
            if count % product == 0
        ]
        hint = " or ".join([*fitting, "mesh.data=-1 with others that divide them"])
        raise ValueError(f"{given} multiply to {known}, but there are {devices}: set {hint}")
    return axes


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """Every device holds the whole state and its share of each batch."""

    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """Devices that share the work."""
        return self.mesh.size

    @property
    def batch_parts(self) -> int:
        """Parts into which a batch is divided."""
        return math.prod(self.mesh.shape[name] for name in self._batch_axes)

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return tuple(name for name in ("data", "fsdp") if name in self.mesh.shape)

    @property
    def replicated(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def split(self) -> NamedSharding:
        """The leading axis split as batches are."""
        return NamedSharding(self.mesh, PartitionSpec(self._batch_axes))

    def check_batch_size(self, batch_size: int, num_microbatches: int = 1) -> None:
        """Refuses a batch that the devices cannot share evenly.

        Raises:
            ValueError: with the nearest batch sizes that would do.
        """
        parts = self.batch_parts * num_microbatches
        if batch_size < 1 or batch_size % parts:
            below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
            sizes = f"{below} or {above}" if below > 0 else f"{above}"
            microbatches = f" x {num_microbatches} microbatches" if num_microbatches > 1 else ""
            raise ValueError(
                f"a batch of {batch_size} is not divisible by {self.batch_parts} devices"
                f"{microbatches}: use {sizes}, or change "
                "config.training.num_microbatches"
            )

    def check_rows(self, info: Any) -> None:
        """Refuses images whose rows the axis 'sequence' cannot divide evenly.

        Args:
            info: of the data, a `dit_jax.data.DatasetInfo`.

        Raises:
            ValueError: with the numbers that would do.
        """
        parts = self.mesh.shape.get("sequence", 1)
        for height, _ in [bucket.size for bucket in info.buckets] or [info.image_shape[:2]]:
            if height % parts:
                fitting = [str(n) for n in range(1, height + 1) if height % n == 0]
                raise ValueError(
                    f"config.mesh.sequence={parts} does not divide images of {height} rows: use "
                    f"one of {', '.join(fitting)}"
                )

    def state_shardings(self, abstract_state: Any) -> Any:
        """Every leaf replicated."""
        return jax.tree.map(lambda _: self.replicated, abstract_state)

    def put_params(self, path: str, array: Any) -> jax.Array:
        """One parameter of a network, read from a file, to where it belongs."""
        return put_whole(array, self.replicated)

    def put_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This process's part of a batch, onto its devices."""
        return jax.tree_util.tree_map_with_path(
            lambda path, value: jax.make_array_from_process_local_data(
                self.batch_sharding(jax.tree_util.keystr(path[:1], simple=True), value.ndim), value
            ),
            batch,
        )

    def put_keys(self, keys: jax.Array) -> jax.Array:
        """Keys that every process has, one an example of a batch, onto the devices."""
        if jax.process_count() == 1:
            return jax.device_put(keys, self.split)
        return jax.random.wrap_key_data(put_whole(jax.random.key_data(keys), self.split))

    def batch_sharding(self, name: str, ndim: int) -> NamedSharding:
        """Of the array `name` of a batch, of so many dimensions.

        Over 'sequence' go the rows of `IMAGES`, never a part of another array: a text condition has
        as many dimensions as an image's tokens.
        """
        split_rows = name in IMAGES and self.mesh.shape.get("sequence", 1) > 1
        rows = (*(None,) * (ndim - 4), "sequence") if split_rows else ()
        return NamedSharding(self.mesh, PartitionSpec(self._batch_axes, *rows))

    def tracing(self) -> contextlib.AbstractContextManager:
        """A context for tracing programs: networks then keep to the axes of the mesh.

        Where whole states are trained on whole images they need no telling, and nothing is set.
        """
        divides = self.mesh.shape.get("sequence", 1) > 1 or type(self) is not DataParallel
        return jax.set_mesh(self.mesh) if divides else contextlib.nullcontext()

    def put_flag(self, flag: bool) -> jax.Array:
        """A yes or no of every process, int32 [batch_parts]: its maximum is whether any says so."""
        part = np.full(self.batch_parts // jax.process_count(), flag, np.int32)
        return jax.make_array_from_process_local_data(self.split, part)


def put_whole(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has in full, each device given its part of it alone."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
