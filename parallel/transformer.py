"""A DiT evaluated by many devices: slabs of rows in `jax.shard_map`, or split matrices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dit_jax.models import Network, cpu_kernels
from dit_jax.models.attention import LocalAttention
from dit_jax.models.attention_options import PLAIN, AttentionOptions
from dit_jax.models.dit import DiTConfig, resolve_dtype
from dit_jax.sampling import Carried
from parallel.partitioning import DIT, place_tree
from parallel.patch import Displaced, Naive, Synchronous
from parallel.sequence import UlyssesRing, check_heads, exchanged_bytes

DIT_MODES = ("displaced", "synchronous", "naive", "ulysses", "ring", "tensor")
BATCH_AXES = ("guidance", "data")
PATCH_AXES = ("ulysses", "ring")


def check_network(config: DiTConfig, mode: str, patch_devices: int, ulysses: int) -> list[str]:
    """Notes on how an image is split.

    Raises:
        ValueError: the network has no such mode, or cannot be split over so many devices.
    """
    if mode not in DIT_MODES:
        raise ValueError(
            f"parallel={mode!r} is for U-Nets; for DiT and SiT use one of {', '.join(DIT_MODES)}"
        )
    if mode == "tensor":
        _check_tensor(config, patch_devices)
        return []
    check_heads(config.num_heads, ulysses)
    return split_rows(config.grid[0], patch_devices)


def split_rows(rows: int, devices: int) -> list[str]:
    """Checks that every device gets rows of patches.

    Returns:
        A note if the rows do not divide evenly, else nothing.

    Raises:
        ValueError: a device would have none, with the next number of devices that would do.
    """
    own = -(-rows // devices)
    busy = -(-rows // own)
    if busy < devices:
        raise ValueError(
            f"{rows} rows of patches do not go over {devices} devices: with {own} rows each, "
            f"{devices - busy} would have none. Use patch_devices={busy}"
        )
    if own * devices == rows:
        return []
    return [
        f"{rows} rows of patches over {devices} devices: padded to {own * devices}, {own} a device "
        f"(nothing attends to the padding, and it is cut off)"
    ]


def exchange_note(
    config: DiTConfig, mode: str, patch_devices: int, ulysses: int, examples: int
) -> str:
    """What a device receives in one evaluation of `examples`, beside the other modes' (formulas).

    Modes that this network or number of devices does not allow are left out.
    """
    rows, columns = config.grid
    tokens = -(-rows // patch_devices) * patch_devices * columns
    activation = examples * tokens * config.hidden_size * resolve_dtype(config.dtype).itemsize
    degrees = {"displaced": 1, "ulysses": patch_devices, "ring": 1, "tensor": 1}
    if config.num_heads % patch_devices:
        del degrees["ulysses"], degrees["tensor"]
    degrees.pop(mode, None)

    def mib(mode: str, degree: int) -> str:
        received = exchanged_bytes(
            mode,
            depth=config.depth,
            activation_bytes=activation,
            devices=patch_devices,
            ulysses=degree,
        )
        return f"{mode} {received / 2**20:.3g} MiB"

    others = ", ".join(mib(*item) for item in degrees.items())
    return f"a device receives in one evaluation: {mib(mode, ulysses)} (for comparison {others})"


def _check_tensor(config: DiTConfig, devices: int) -> None:
    hidden = int(config.hidden_size * config.mlp_ratio)
    for name, size in (("attention heads", config.num_heads), ("MLP channels", hidden)):
        if size % devices:
            raise ValueError(
                f"parallel='tensor': {size} {name} cannot be split over patch_devices={devices}"
            )


def place_split(params: Any, mesh: Mesh) -> Any:
    """A DiT's parameters over the axis 'tensor' of a mesh, by the rules of training."""
    placed = place_tree(params, DIT, {"tensor": mesh.shape["tensor"], "fsdp": 1})
    leaves, structure = jax.tree.flatten(params)
    shardings = [NamedSharding(mesh, place.spec) for place in placed]
    return structure.unflatten(jax.device_put(leaves, shardings))


@dataclasses.dataclass(frozen=True)
class ParallelNetwork:
    """A network evaluated by many devices, with the face of `dit_jax.models.Network`.

    Arrays are global: x [b, h, w, c] goes in and the output comes out whole, however they lie.

    Attributes:
        network: on one device.
        mesh: of `ImageParallel`.
        mode: see there.
        warmup_steps: of 'displaced'.
    """

    network: Network
    mesh: Mesh
    mode: str
    warmup_steps: int = 0

    def __getattr__(self, name: str) -> Any:
        # Shapes, classes and conditions are the network's own.
        if name.startswith("_") or name == "network":
            raise AttributeError(name)
        return getattr(self.network, name)

    def carried(self, batch: int) -> Carried:
        """The state sampling begins with: none, or for 'displaced' zeros and the warm-up."""
        if self.mode != "displaced":
            return Carried()
        config = self.network.config
        rows, columns = config.grid
        devices = self._patch_devices
        length = -(-rows // devices) * devices * columns
        shape = (config.depth, batch, length, config.num_heads, config.head_dim)
        dtype = resolve_dtype(config.dtype)
        sharding = NamedSharding(self.mesh, self._state_spec(batch))
        zeros = jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)
        warmup = dataclasses.replace(self, mode="synchronous", warmup_steps=0)
        return Carried({"k": zeros, "v": zeros}, warmup, self.warmup_steps)

    def apply(
        self,
        params: Any,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        conditions: dict[str, Array],
        *,
        dropout_keys: Any = None,
        features: tuple[int, ...] | None = None,
        attention: Any = None,
        attention_state: Any = None,
    ):
        """As `Network.apply`, on the mesh.

        Args:
            params: placed by `ImagePlacement.place`.
            x: the (preconditioned) noisy input.
            t: network time.
            conditions: see there.
            dropout_keys: refused: this is for sampling.
            features: refused.
            attention: refused: the mode decides it.
            attention_state: of `carried`, then of the evaluation before.

        Returns:
            float32 output [b, h, w, c]; with `attention_state` (output, new state).

        Raises:
            ValueError: for what is refused.
        """
        refused = {"dropout_keys": dropout_keys, "features": features, "attention": attention}
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"a network on many devices takes no {name}")
        if self.mode == "tensor":
            return self._apply_tensor(params, x, t, conditions)
        config, batch_axes = self.network.config, self._batch_axes(x.shape[0])
        height, rows = x.shape[1], config.grid[0]
        padding = -rows % self._patch_devices * config.patch_size
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
        slabs, state_spec = PartitionSpec(batch_axes, PATCH_AXES), self._state_spec(x.shape[0])
        strategy = self._strategy()

        def evaluate(params, x, t, conditions, state):
            out = self.network.apply(
                params, x, t, conditions, attention=strategy, attention_state=state
            )
            return (out, None) if state is None else out

        examples = PartitionSpec(batch_axes)
        out, state = jax.shard_map(
            evaluate,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), slabs, examples, examples, state_spec),
            out_specs=(slabs, state_spec),
            # Whether a value differs between devices cannot be followed through the hand-written
            # gradients; the outputs all do.
            check_vma=False,
        )(params, x, t, conditions, attention_state)
        out = out[:, :height]
        return out if attention_state is None else (out, state)

    def _apply_tensor(self, params, x, t, conditions):
        batch_axes = self._batch_axes(x.shape[0])
        examples = NamedSharding(self.mesh, PartitionSpec(batch_axes))
        x, t, conditions = jax.lax.with_sharding_constraint((x, t, conditions), examples)
        heads = NamedSharding(self.mesh, PartitionSpec(batch_axes, None, "tensor"))
        attention = _SplitHeads(heads, self._kernel)
        return self.network.apply(params, x, t, conditions, attention=attention)

    @property
    def _kernel(self) -> LocalAttention:
        config = self.network.config
        custom_gradients = cpu_kernels.resolve_custom_gradients(config.custom_gradients)
        return LocalAttention(config.attention, custom_gradients)

    def _strategy(self):
        rows, columns = self.network.config.grid
        strategies = {"displaced": Displaced, "synchronous": Synchronous, "naive": Naive}
        strategy = strategies.get(self.mode, UlyssesRing)
        return strategy(rows * columns, axes=PATCH_AXES, kernel=self._kernel)

    @property
    def _patch_devices(self) -> int:
        return self.mesh.shape["ulysses"] * self.mesh.shape["ring"]

    def _state_spec(self, batch: int) -> PartitionSpec:
        return PartitionSpec(None, self._batch_axes(batch), PATCH_AXES)

    def _batch_axes(self, batch: int) -> tuple[str, ...]:
        """Axes an evaluation's examples are split over: all that divide them."""
        for axes in (BATCH_AXES, BATCH_AXES[1:]):
            if batch % int(np.prod([self.mesh.shape[axis] for axis in axes])) == 0:
                return axes
        return ()


@dataclasses.dataclass(frozen=True)
class _SplitHeads:
    """Local attention with the heads split over the tensor axis."""

    heads: NamedSharding
    kernel: LocalAttention

    def __call__(self, q, k, v, state=None, options: AttentionOptions = PLAIN):
        q, k, v = jax.lax.with_sharding_constraint((q, k, v), self.heads)
        out, state = self.kernel(q, k, v, state, options)
        return jax.lax.with_sharding_constraint(out, self.heads), state
