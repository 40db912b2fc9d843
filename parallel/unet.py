"""EDM's U-Nets with the rows of one image split over devices (DistriFusion for U-Nets).

Li et al., "DistriFusion", CVPR 2024, section 4.2: convolutions take the neighbours' boundary rows,
group normalisation the others' statistics, and attention the others' keys and values, all of the
evaluation before; this device's own are fresh. The first layer sees fresh rows.

What an evaluation leaves for the next is this device's *own* boundary rows, statistics, keys and
values; the next one exchanges them. So everything that a displaced evaluation sends was known when
it began, and the compiler may overlap all of it with computation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dit_jax.models import (
    DhariwalUNetConfig,
    Network,
    Request,
    Result,
    SongUNetConfig,
    cpu_kernels,
)
from dit_jax.models.attention import Attention, LocalAttention
from dit_jax.models.attention_options import PLAIN, AttentionOptions
from dit_jax.nearest import one_of
from dit_jax.parallel.network import PATCH_AXES, ImageNetwork, register_image_network
from dit_jax.parallel.patch import Displaced, Naive, all_replicated
from dit_jax.parallel.rows import RowExchange, Rows
from dit_jax.sampling import Carried

UNET_MODES = (
    "full_sync",
    "corrected_async_gn",
    "stale_gn",
    "sync_gn",
    "separate_gn",
    "no_sync",
)
# What the modes of one image on many devices mean for a U-Net.
ALIASES = {"displaced": "corrected_async_gn", "synchronous": "full_sync", "naive": "naive"}
# Those that take something of the evaluation before, and so begin with a warm-up.
DISPLACED_MODES = UNET_MODES[1:]


def resolve_mode(mode: str) -> str:
    """One of `UNET_MODES`, or 'naive', for it or for its name among the modes of DiT.

    Raises:
        ValueError: there is no such mode for U-Nets.
    """
    mode = ALIASES.get(mode, mode)
    if mode not in (*UNET_MODES, "naive"):
        known = (*ALIASES, *UNET_MODES)
        raise ValueError(f"parallel={mode!r} is not for U-Nets: {one_of(mode, known)}")
    return mode


def split_units(config: Any, height: int, devices: int) -> Rows:
    """How a U-Net's image of `height` rows is split.

    Raises:
        ValueError: the network cannot halve it as often as it does; more devices than rows.
    """
    factor = 2 ** (len(config.channel_mult) - 1)
    if height % factor:
        raise ValueError(f"{height} rows: this U-Net takes multiples of {factor}")
    return Rows(height // factor, devices, PATCH_AXES)


def row_notes(config: Any, devices: int) -> list[str]:
    """A note if the rows do not divide evenly, else nothing; refuses what `split_units` does."""
    rows = split_units(config, config.input_size[0], devices)
    if not rows.padding:
        return []
    return [
        f"{rows.units} rows at the coarsest resolution over {devices} devices: padded to "
        f"{rows.own * devices}, {rows.own} a device (no layer sees the padding, and it is cut off)"
    ]


class UNetExchange(RowExchange):
    """What the layers of one evaluation exchange, as it is traced.

    All modes but 'full_sync' take boundary rows, keys and values of the evaluation before. They
    differ in the statistics of group normalisation, of which the first two moments count:

    - 'corrected_async_gn': everyone's of the evaluation before, plus by how much this device's own
      have changed since; its own variance where that turns negative.
    - 'stale_gn': the others' of the evaluation before with this device's fresh ones.
    - 'sync_gn': everyone's fresh ones; every normalisation waits for them.
    - 'separate_gn': this device's own.
    - 'no_sync': this device's own; rows, keys and values of others stay those of the warm-up.
    - 'full_sync': everything fresh, exact.
    - 'naive': zeros for the neighbours' rows, nothing of other devices at all.

    The states are a tape: layers take theirs in the order in which they run, and leave new ones in
    `recorded`. So an object serves one evaluation, and rematerialisation has to be off.

    Args:
        rows: how the image is split.
        mode: one of these.
        states: of the evaluation before, in order; None for none.
        records: whether new states are wanted.
        kernel: attention among the keys and values at hand.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        rows: Rows,
        mode: str,
        *,
        states: tuple[Any, ...] | None = None,
        records: bool = False,
        kernel: Attention | None = None,
    ):
        super().__init__(rows, kernel)
        self.mode = resolve_mode(mode)
        self.records = records
        self._states = None if states is None else list(states)
        self._is_first, self.recorded = True, []

    @property
    def is_fresh(self) -> bool:
        """Whether this evaluation takes nothing of the one before: full_sync, and warm-ups."""
        return self._states is None

    def _turn(self, own: dict[str, Array]) -> dict[str, Array] | None:
        """A layer's state; leaves `own` as its new one."""
        stale = None if self._states is None else self._states.pop(0)
        if self.records:
            keeps = self.mode == "no_sync" and stale is not None
            self.recorded.append(stale if keeps else own)
        return stale

    def neighbours(self, first: Array, last: Array) -> tuple[Array, Array]:
        """The rows above and below: stale ones, but in the first layer."""
        if self.mode == "naive":
            return jnp.zeros_like(last), jnp.zeros_like(first)
        if self._is_first:
            self._is_first = False
            return self.rows.exchange(first, last)
        stale = self._turn({"first": first, "last": last})
        if stale is not None:
            first, last = stale["first"], stale["last"]
        return self.rows.exchange(first, last)

    def combined(self, mean: Array, variance: Array) -> tuple[Array, Array]:
        """The mode's statistics, from this device's own."""
        if self.mode == "naive":
            return mean, variance
        if self.mode not in ("corrected_async_gn", "stale_gn"):
            exact = self.is_fresh or self.mode in ("full_sync", "sync_gn")
            return super().combined(mean, variance) if exact else (mean, variance)
        moments = jnp.stack([mean, variance + jnp.square(mean)], axis=1)
        stale = self._turn({"moments": moments[:, None]})
        if stale is None:
            return super().combined(mean, variance)
        everyone = jax.lax.all_gather(stale["moments"][:, 0], self.rows.axes)
        weights = self.rows.weights()
        whole = (weights[:, None, None, None] * everyone).sum(axis=0)
        change = moments - stale["moments"][:, 0]
        if self.mode == "stale_gn":
            change = weights[jax.lax.axis_index(self.rows.axes)] * change
        whole_mean, second = whole[:, 0] + change[:, 0], whole[:, 1] + change[:, 1]
        whole_variance = second - jnp.square(whole_mean)
        # Of a mixture of devices' moments it is negative by rounding alone.
        instead = variance if self.mode == "corrected_async_gn" else jnp.zeros_like(variance)
        return whole_mean, jnp.where(whole_variance < 0, instead, whole_variance)

    def attend(
        self, q: Array, k: Array, v: Array, state=None, options: AttentionOptions = PLAIN
    ) -> tuple[Array, None]:
        """See `Attention`; its states are on the tape."""
        if self.mode == "naive":
            return self.strategy(Naive, k, options)(q, k, v, None, options)
        if all_replicated(k, options):  # there is nothing to exchange
            return self.kernel(q, k, v, None, options)[0], None
        stale = self._turn({"k": k, "v": v})
        if stale is None:
            return super().attend(q, k, v, None, options)
        strategy = self.strategy(Displaced, k, options)
        return strategy(q, k, v, strategy.prefetch(stale), options)[0], None


@dataclasses.dataclass(frozen=True)
class ParallelUNet(ImageNetwork):
    """A U-Net evaluated by many devices; see `ImageNetwork`. The image need not be square.

    Attributes:
        is_warmup: everything fresh, for what the mode takes of the evaluation before.

    Raises:
        ValueError: an unknown mode; more devices than rows.
    """

    is_warmup: bool = False

    def __post_init__(self):
        resolve_mode(self.mode)
        self.rows(self.network.config.input_size[0])

    @classmethod
    def notes(cls, config: Any, mode: str, patch_devices: int, ulysses: int) -> list[str]:
        """Notes on how an image is split; see `ImageNetwork.notes`."""
        resolve_mode(mode)
        return row_notes(config, patch_devices)

    def rows(self, height: int) -> Rows:
        """How an image of `height` rows is split, see `split_units`."""
        return split_units(self.network.config, height, self.patch_devices)

    @property
    def is_displaced(self) -> bool:
        """Whether evaluations take something of the one before."""
        return resolve_mode(self.mode) in DISPLACED_MODES

    def carried(self, batch: int, size: tuple[int, int]) -> Carried:
        """None, or zeros and the warm-up."""
        if not self.is_displaced:
            return Carried()
        shape = (batch, *size, self.network.config.in_channels)
        sharding = NamedSharding(self.mesh, self._state_spec(batch))
        zeros = [
            jax.tree.map(
                lambda leaf: jax.lax.with_sharding_constraint(
                    jnp.zeros(leaf.shape, leaf.dtype), sharding
                ),
                state,
            )
            for state in self.state_shapes(shape)
        ]
        warmup = dataclasses.replace(self, is_warmup=True, warmup_steps=0)
        return Carried(tuple(zeros), warmup, self.warmup_steps)

    def state_shapes(self, shape: tuple[int, int, int, int]) -> tuple[Any, ...]:
        """The states of an evaluation of x of `shape`, as shapes."""
        # Conditions do not change them.
        unconditional = dataclasses.replace(self.network.config, num_classes=0)
        warmup = dataclasses.replace(self, network=Network(unconditional), is_warmup=True)
        params = jax.eval_shape(warmup.network.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        t = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
        return jax.eval_shape(
            lambda params, x, t: warmup.apply(params, Request(x, t, carry=())).carry, params, x, t
        )

    def evaluate(self, params: Any, request: Request) -> Result:
        """As `Network.apply`, in slabs of rows. A warm-up reads nothing of the carry; it may be ().

        Raises:
            ValueError: a displaced mode without a carry.
        """
        records, is_stale = request.carry is not None, self.is_displaced and not self.is_warmup
        if is_stale and not records:
            raise ValueError(f"{self.mode} needs the states that a warm-up leaves")
        config = dataclasses.replace(self.network.config, remat="none")
        height = request.x.shape[1]
        network, rows = Network(config), self.rows(height)
        custom_gradients = cpu_kernels.resolve_custom_gradients(config.custom_gradients)
        kernel = LocalAttention(config.attention, custom_gradients)

        def evaluate(params, request):
            options = {"states": request.carry, "records": records, "kernel": kernel}
            exchange = UNetExchange(rows, self.mode, **options)
            out = network.apply(params, request.replace(spatial=exchange, carry=None)).out
            return out, tuple(exchange.recorded)

        padding = rows.padding * (height // rows.units)
        spec = self._state_spec(request.x.shape[0])
        request = request if is_stale else request.replace(carry=None)
        result = self.in_slabs(evaluate, params, request, padding, spec)
        return result if records else Result(result.out)

    def _state_spec(self, batch: int) -> PartitionSpec:
        """Of every leaf of the states: examples, then what the devices of a slab have each."""
        return PartitionSpec(self.batch_axes(batch), PATCH_AXES)


for _config in (SongUNetConfig, DhariwalUNetConfig):
    register_image_network(_config, ParallelUNet)
