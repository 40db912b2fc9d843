"""Convolutional networks over an image whose rows are split over devices, exactly.

`RowExchange` fits the seam `dit_jax.models.spatial` and is called inside `jax.shard_map`: before a
convolution or a resampling filter it fetches the neighbours' rows, group normalisation takes the
pixels of all devices, attention everyone's keys and values.

Rows are split in units of the network's coarsest resolution, so that a device's slab is a whole
number of rows at every resolution. Where the units do not divide evenly, padding follows the last
of them. Nothing sees it: it is set to zero before a convolution, as rows beyond an image are, and
counts neither in statistics nor among keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.models.attention import Attention, LocalAttention
from dit_jax.models.attention_options import PLAIN, AttentionOptions
from dit_jax.models.spatial import SAME_3X3, Padding, convolve
from dit_jax.parallel.patch import Patches, Synchronous


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the rows of an image are split.

    Attributes:
        units: rows of the image at the coarsest resolution.
        devices: over which they are split, evenly but for the last.
        axes: their mesh axes, the first the slowest.

    Raises:
        ValueError: a device would have no rows, with the next number that would do.
    """

    units: int
    devices: int
    axes: tuple[str, ...] = ("ring",)

    def __post_init__(self):
        if self.devices < 1:
            raise ValueError(f"rows over {self.devices} devices: expected at least 1")
        busy = -(-self.units // self.own)
        if busy < self.devices:
            raise ValueError(
                f"{self.units} rows at the network's coarsest resolution do not go over "
                f"{self.devices} devices: with {self.own} each, {self.devices - busy} would have "
                f"none. Use {busy} devices"
            )

    @property
    def own(self) -> int:
        """Units a device holds, padding included."""
        return -(-self.units // self.devices)

    @property
    def padding(self) -> int:
        """Units of padding at the end."""
        return self.own * self.devices - self.units

    def real(self, height: int) -> Array | int:
        """How many of this device's `height` rows, at any resolution, are the image's."""
        if not self.padding:
            return height
        total = self.whole(height)
        return jnp.clip(total - jax.lax.axis_index(self.axes) * height, 0, height)

    def whole(self, count: int) -> int:
        """The image's rows (or tokens), where a device holds `count` with padding."""
        return count * self.units // self.own

    def weights(self) -> Float[Array, " devices"]:
        """The share of the image each device holds."""
        starts = jnp.arange(self.devices) * self.own
        return jnp.clip(self.units - starts, 0, self.own) / self.units

    def without_padding(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Zeros in place of the padding."""
        if not self.padding:
            return x
        is_real = jnp.arange(x.shape[1]) < self.real(x.shape[1])
        return jnp.where(is_real[None, :, None, None], x, jnp.zeros((), x.dtype))

    def exchange(self, first: Array, last: Array) -> tuple[Array, Array]:
        """Everyone's last rows to the device below, first rows to the one above.

        Returns:
            The rows above this device's and those below; zeros beyond the image.
        """
        down = [(i, i + 1) for i in range(self.devices - 1)]
        up = [(i + 1, i) for i in range(self.devices - 1)]
        return (
            jax.lax.ppermute(last, self.axes, down),
            jax.lax.ppermute(first, self.axes, up),
        )


class RowExchange:
    """Everything fresh: what it computes is what one device would.

    Args:
        rows: how the image is split.
        kernel: attention among the keys and values at hand.
    """

    def __init__(self, rows: Rows, kernel: Attention | None = None):
        self.rows, self.kernel = rows, kernel or LocalAttention()

    @property
    def attention(self) -> Attention:
        """The strategy of the attention seam."""
        return self.attend

    def extend(self, x: Float[Array, "b h w c"], above: int, below: int) -> Array:
        """See `Spatial.extend`; more rows than a device has are refused."""
        if above == below == 0:
            return x
        if max(above, below) > x.shape[1]:
            raise ValueError(
                f"a layer looks {max(above, below)} rows beyond its own, but a device has "
                f"{x.shape[1]} rows there: use fewer devices"
            )
        x = self.rows.without_padding(x)
        rows_above, rows_below = self.neighbours(x[:, :below], x[:, x.shape[1] - above :])
        return jnp.concatenate([rows_above, x, rows_below], axis=1)

    def neighbours(self, first: Array, last: Array) -> tuple[Array, Array]:
        """The rows above and below, given this device's first and last ones."""
        return self.rows.exchange(first, last)

    def convolve(
        self,
        x: Float[Array, "b h w i"],
        kernel: Float[Array, "kh kw i o"],
        *,
        stride: int = 1,
        padding: Padding = SAME_3X3,
    ) -> Float[Array, "b h2 w2 o"]:
        """See `Spatial.convolve`."""
        if x.shape[1] % stride:
            raise ValueError(f"a stride of {stride} does not divide the {x.shape[1]} rows at hand")
        (above, below), columns = padding
        x = self.extend(x, above, below)
        return convolve(x, kernel, stride=stride, padding=((0, 0), columns))

    def group_statistics(
        self, x: Float[Array, "b h w c"], num_groups: int
    ) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
        """See `Spatial.group_statistics`."""
        mean, variance = self.combined(*self.own_statistics(x, num_groups))
        size = x.shape[-1] // num_groups
        spread = [jnp.repeat(a, size, axis=-1)[:, None, None] for a in (mean, variance)]
        return spread[0], spread[1]

    def own_statistics(self, x: Array, num_groups: int) -> tuple[Array, Array]:
        """Mean and variance [b, groups] of this device's pixels, float32."""
        b, height, width, c = x.shape
        rows = self.rows
        count = jnp.float32(1.0) * rows.real(height) * width * (c // num_groups)
        x = rows.without_padding(x.astype(jnp.float32))

        def mean_in_group(values):
            sums = values.sum(axis=(1, 2)).reshape(b, num_groups, c // num_groups)
            return sums.sum(axis=-1) / count

        mean = mean_in_group(x)
        centered = x - jnp.repeat(mean, c // num_groups, axis=-1)[:, None, None]
        return mean, mean_in_group(jnp.square(rows.without_padding(centered)))

    def combined(self, mean: Array, variance: Array) -> tuple[Array, Array]:
        """Statistics of the image from everyone's fresh ones (Chan et al. 1979)."""
        weights = self.rows.weights()[:, None, None]
        means, variances = jax.lax.all_gather((mean, variance), self.rows.axes)
        mean = (weights * means).sum(axis=0)
        return mean, (weights * (variances + jnp.square(means - mean[None]))).sum(axis=0)

    def attend(
        self, q: Array, k: Array, v: Array, state=None, options: AttentionOptions = PLAIN
    ) -> tuple[Array, None]:
        """See `Attention`; keeps no state."""
        return self.strategy(Synchronous, k, options)(q, k, v, None, options)

    def strategy(self, kind: type[Patches], k: Array, options: AttentionOptions) -> Patches:
        """Attention of a `kind` over this image's rows, at the resolution of the keys `k`."""
        length = self.rows.whole(k.shape[1] - options.replicated)
        return kind(length, self.rows.axes, kernel=self.kernel)
