"""A transformer evaluated by many devices: slabs of rows in `jax.shard_map`, or split matrices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.models import Request, Result, cpu_kernels, stack
from dit_jax.models.attention import LocalAttention
from dit_jax.models.attention_options import PLAIN, AttentionOptions
from dit_jax.models.dit import DiTConfig
from dit_jax.models.flux_config import FluxConfig
from dit_jax.models.linear import resolve_dtype
from dit_jax.models.step_cache import CachedCarry, CacheState, Everyone
from dit_jax.parallel.network import PATCH_AXES, ImageNetwork, register_image_network
from dit_jax.parallel.partitioning import Rule, place_tree
from dit_jax.parallel.patch import Displaced, Naive, Synchronous
from dit_jax.parallel.sequence import UlyssesRing, check_heads, exchanged_bytes
from dit_jax.sampling import Carried

DIT_MODES = ("displaced", "synchronous", "naive", "ulysses", "ring", "tensor")


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


def depth_of(config: Any) -> int:
    """Layers of a transformer, those of all its stacks."""
    return sum(getattr(config, "stack_depths", (config.depth,)))


def exchange_note(config: Any, mode: str, patch_devices: int, ulysses: int, examples: int) -> str:
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
            depth=depth_of(config),
            activation_bytes=activation,
            devices=patch_devices,
            ulysses=degree,
        )
        return f"{mode} {received / 2**20:.3g} MiB"

    others = ", ".join(mib(*item) for item in degrees.items())
    return f"a device receives in one evaluation: {mib(mode, ulysses)} (for comparison {others})"


def _check_tensor(config: Any, devices: int) -> None:
    hidden = int(config.hidden_size * config.mlp_ratio)
    for name, size in (("attention heads", config.num_heads), ("MLP channels", hidden)):
        if size % devices:
            raise ValueError(
                f"parallel='tensor': {size} {name} cannot be split over patch_devices={devices}"
            )


def split_shardings(params: Any, mesh: Mesh, rules: tuple[Rule, ...]) -> Any:
    """Of a network's parameters over the axis 'tensor' of a mesh, by its rules of training."""
    placed = place_tree(params, rules, {"tensor": mesh.shape["tensor"], "fsdp": 1})
    structure = jax.tree.structure(params)
    return structure.unflatten([NamedSharding(mesh, place.spec) for place in placed])


@dataclasses.dataclass(frozen=True)
class ParallelTransformer(ImageNetwork):
    """A transformer over patches evaluated by many devices; see `ImageNetwork`.

    The network's configuration has `patch_size`, `depth`, `num_heads`, `head_dim`, `dtype`,
    `attention` and `custom_gradients`; the leaves of its carry have a leading layer axis. Of a
    network of several stacks of blocks it has `stack_depths`, and the carry is a tuple of theirs.
    """

    @classmethod
    def notes(cls, config: Any, mode: str, patch_devices: int, ulysses: int) -> list[str]:
        """Notes on how an image is split; see `ImageNetwork.notes`."""
        if mode not in DIT_MODES:
            raise ValueError(
                f"parallel={mode!r} is for U-Nets; for transformers such as DiT and SiT use one of "
                f"{', '.join(DIT_MODES)}"
            )
        if mode == "tensor":
            _check_tensor(config, patch_devices)
            return []
        check_heads(config.num_heads, ulysses)
        return split_rows(config.grid[0], patch_devices)

    def carried(self, batch: int, size: tuple[int, int]) -> Carried:
        """None, or for 'displaced' zeros and the warm-up."""
        if self.mode != "displaced":
            return Carried()
        config, length = self.network.config, self._padded_length(size)
        shape = (batch, length, config.num_heads, config.head_dim)
        dtype = resolve_dtype(config.dtype)

        def zeros(shape, spec):
            sharding = NamedSharding(self.mesh, spec)
            values = jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)
            return {"k": values, "v": values}

        def empty(depth, spec):
            return stack.Ahead(zeros((depth, *shape), spec.layers), zeros(shape, spec.first))

        state = self._of_stacks(empty, self._state_spec(batch))
        warmup = dataclasses.replace(self, mode="synchronous", warmup_steps=0)
        return Carried(state, warmup, self.warmup_steps)

    def blank_tokens(self, batch: int, size: tuple[int, int]) -> jax.Array:
        """As `Network.blank_tokens`, with the padding and on the devices that hold them."""
        if self.mode == "tensor":
            return self.network.blank_tokens(batch, size)
        config = self.network.config
        zeros = jnp.zeros(
            (batch, self._padded_length(size), config.hidden_size), resolve_dtype(config.dtype)
        )
        spec = PartitionSpec(self.batch_axes(batch), PATCH_AXES)
        return jax.lax.with_sharding_constraint(zeros, NamedSharding(self.mesh, spec))

    def evaluate(self, params: Any, request: Request) -> Result:
        """As `Network.apply`, in slabs of rows or with split matrices."""
        if self.mode == "tensor":
            return self._evaluate_tensor(params, request)
        rows, columns = self._grid(request.x.shape[1:3])
        strategies = {"displaced": Displaced, "synchronous": Synchronous, "naive": Naive}
        strategy = strategies.get(self.mode, UlyssesRing)
        attention = strategy(rows * columns, axes=PATCH_AXES, kernel=self._kernel)

        def evaluate(params, request):
            result = self.network.apply(params, request.replace(attention=attention))
            return result.out, result.carry

        padding = -rows % self.patch_devices * self.network.config.patch_size
        kept = request.carry if request.step_cache is None else request.carry.layers
        spec = PartitionSpec() if kept is None else self._state_spec(request.x.shape[0])
        if (cache := request.step_cache) is not None:
            everyone = Everyone(PATCH_AXES, self.mesh.axis_names)
            request = request.replace(step_cache=dataclasses.replace(cache, everyone=everyone))
            spec = CachedCarry(spec, self._cache_spec(request.carry.cache))
        return self.in_slabs(evaluate, params, request, padding, spec)

    def _evaluate_tensor(self, params: Any, request: Request) -> Result:
        axes = self.batch_axes(request.x.shape[0])
        examples = NamedSharding(self.mesh, PartitionSpec(axes))
        inputs = (request.x, request.t, request.conditions)
        x, t, conditions = jax.lax.with_sharding_constraint(inputs, examples)
        heads = NamedSharding(self.mesh, PartitionSpec(axes, None, "tensor"))
        attention = _SplitHeads(heads, self._kernel)
        names = ("carry", "step_cache", "ahead")
        more = {name: getattr(request, name) for name in names}
        return self.network.apply(params, Request(x, t, conditions, attention=attention, **more))

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return tuple(side // self.network.config.patch_size for side in size)

    def _padded_length(self, size: tuple[int, int]) -> int:
        """Tokens of all devices."""
        rows, columns = self._grid(size)
        return -(-rows // self.patch_devices) * self.patch_devices * columns

    @property
    def _kernel(self) -> LocalAttention:
        config = self.network.config
        custom_gradients = cpu_kernels.resolve_custom_gradients(config.custom_gradients)
        return LocalAttention(config.attention, custom_gradients)

    def _of_stacks(self, make: Callable[[int, Any], Any], specs: Any) -> Any:
        """make(depth, spec) of the stack of blocks, or of each where there are several."""
        depths = getattr(self.network.config, "stack_depths", None)
        if depths is None:
            return make(self.network.config.depth, specs)
        return tuple(map(make, depths, specs))

    def _state_spec(self, batch: int) -> Any:
        """Of keys and values: each device's own of all layers, everyone's of the first."""
        axes = self.batch_axes(batch)
        spec = stack.Ahead(PartitionSpec(None, axes, PATCH_AXES), PartitionSpec(axes))
        depths = getattr(self.network.config, "stack_depths", None)
        return spec if depths is None else (spec,) * len(depths)

    def _cache_spec(self, state: CacheState) -> CacheState:
        """Tokens lie as a device's rows do, numbers an example as the examples."""
        axes = self.batch_axes(state.evaluations.shape[0])
        of = {1: PartitionSpec(axes), 3: PartitionSpec(axes, PATCH_AXES)}
        return jax.tree.map(lambda leaf: of[leaf.ndim], state)


@dataclasses.dataclass(frozen=True)
class _SplitHeads:
    """Local attention with the heads split over the tensor axis."""

    heads: NamedSharding
    kernel: LocalAttention

    def __call__(self, q, k, v, state=None, options: AttentionOptions = PLAIN):
        q, k, v = jax.lax.with_sharding_constraint((q, k, v), self.heads)
        out, state = self.kernel(q, k, v, state, options)
        return jax.lax.with_sharding_constraint(out, self.heads), state


register_image_network(DiTConfig, ParallelTransformer)
register_image_network(FluxConfig, ParallelTransformer)
