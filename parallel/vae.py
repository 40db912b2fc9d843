"""Decoding one image's latents on many devices, by rows, exactly.

Every device decodes its rows of latents: convolutions fetch the rows next to them, normalisation
and attention take all devices' (`parallel.rows`). A device holds its share of the activations, so
that N devices decode images N times larger than one could, with the same result.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dit_jax.models.attention import einsum_attention
from dit_jax.models.attention_options import PLAIN, AttentionOptions
from dit_jax.models.autoencoder_kl import AutoencoderKL
from dit_jax.parallel.rows import RowExchange, Rows

AXIS = "rows"
# Of attention's scores that exist at once. At 512 x 512 latents all of them would be 256 GiB.
SCORE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class BlockwiseAttention:
    """Attention of a block of queries after the other, so that few scores exist at once.

    Attributes:
        score_bytes: of the scores of a block, float32.
    """

    score_bytes: int = SCORE_BYTES

    def __call__(self, q, k, v, state: Any = None, options: AttentionOptions = PLAIN):
        """See `Attention`; `state` is handed back untouched."""
        b, length, heads, _ = q.shape
        block = max(1, self.score_bytes // (4 * b * heads * k.shape[1]))
        if block >= length:
            return einsum_attention(q, k, v, options), state
        padded = jnp.pad(q, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
        blocks = jnp.moveaxis(padded.reshape(b, -1, block, *q.shape[2:]), 1, 0)
        starts = jnp.arange(blocks.shape[0]) * block

        def attend(part):
            queries, start = part
            own = options.at(start + jnp.arange(block), k.shape[1])
            return einsum_attention(queries, k, v, own)

        out = jax.lax.map(attend, (blocks, starts))
        return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :length], state


@dataclasses.dataclass(frozen=True)
class RowDecoder:
    """An autoencoder's decoder over several devices.

    Attributes:
        autoencoder: its architecture.
        devices: number of devices, the first of those there are.

    Raises:
        ValueError: there are not so many devices.
    """

    autoencoder: AutoencoderKL
    devices: int

    def __post_init__(self):
        if not 1 <= self.devices <= jax.device_count():
            raise ValueError(
                f"decoding by rows on {self.devices} devices: there are {jax.device_count()}"
            )

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices, in the order of the rows."""
        return Mesh(np.asarray(jax.devices()[: self.devices]), (AXIS,))

    @property
    def replicated(self) -> NamedSharding:
        """Where parameters belong: whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def rows(self, height: int) -> Rows:
        """How `height` rows of latents are split.

        Raises:
            ValueError: there are more devices than they can go over.
        """
        return Rows(height, self.devices, (AXIS,))

    def __call__(self, params: Any, z: Float[Array, "b h w k"]) -> Float[Array, "b h2 w2 c"]:
        """Images of raw latents, see `AutoencoderKL.decode`; the rows of the result are split.

        Args:
            params: `replicated`.
            z: raw latents.

        Raises:
            ValueError: another number of channels, or fewer rows than devices.
        """
        rows, height = self.rows(z.shape[1]), z.shape[1]
        z = jnp.pad(z, ((0, 0), (0, rows.padding), (0, 0), (0, 0)))

        def decode(params, z):
            spatial = RowExchange(rows, BlockwiseAttention())
            return self.autoencoder.decode(params, z, spatial=spatial)

        slabs = PartitionSpec(None, AXIS)
        images = jax.shard_map(
            decode,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), slabs),
            out_specs=slabs,
            # Through the hand-written gradients it cannot be followed what differs between devices.
            check_vma=False,
        )(params, z)
        return images[:, : height * self.autoencoder.downsampling_factor]
