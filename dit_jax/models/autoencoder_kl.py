"""The KL-regularised convolutional autoencoder (VAE) of latent diffusion.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752),
section 3.1. One architecture serves Stable Diffusion's 4-channel VAEs (1x1 "quant" convolutions
around the latents) and Flux's 16-channel one (without them; its latents are shifted and scaled).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from dit_jax.models.autoencoder_layers import Decoder, Encoder
from dit_jax.models.linear import Linear, precision_of, resolve_dtype, resolve_param_dtype
from dit_jax.models.spatial import LOCAL, Spatial

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Shape and execution of an autoencoder; names are those of diffusers' config.json.

    Attributes:
        scaling_factor: latents enter a network as (z - shift_factor) * scaling_factor. It has no
            default: it belongs to the weights (0.18215 for Stable Diffusion's, 0.3611 for Flux's).
        in_channels: channels of the images encoded.
        out_channels: channels of the images decoded.
        latent_channels: channels of the latents.
        block_out_channels: width at each resolution, from the full one down; each level beyond the
            first halves the resolution.
        layers_per_block: residual blocks a level (the decoder has one more).
        norm_num_groups: groups of the normalisation; divides every width.
        shift_factor: see `scaling_factor`; 0 for VAEs without one.
        sample_size: side in pixels of the images it was trained on: the default tile's size.
        use_quant_conv: whether a 1x1 convolution follows the encoder.
        use_post_quant_conv: whether one precedes the decoder.
        mid_block_add_attention: whether pixels attend to each other at the lowest resolution.
        force_upcast: activations exceed float16's range.
        dtype: of convolutions and matrix products: 'float32', 'bfloat16', 'float16', or 'auto',
            bfloat16 on accelerators and float32 on CPUs.
        param_dtype: what their parameters are stored in: 'float32', 'bfloat16', or 'auto', here
            float32; those of normalisation are float32 always.
    """

    scaling_factor: float
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    shift_factor: float = 0.0
    sample_size: int = 256
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True
    dtype: str = "auto"
    param_dtype: str = "auto"

    def __post_init__(self):
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"autoencoder {name}={getattr(self, name)}: expected at least 1")
        if not self.block_out_channels:
            raise ValueError("autoencoder block_out_channels=(): expected at least one width")
        groups = self.norm_num_groups
        if groups < 1 or any(width < 1 or width % groups for width in self.block_out_channels):
            raise ValueError(
                f"autoencoder norm_num_groups={groups} must divide every width of "
                f"block_out_channels={self.block_out_channels}"
            )
        if not self.scaling_factor > 0:
            raise ValueError(f"autoencoder scaling_factor={self.scaling_factor}: expected above 0")
        resolve_param_dtype(self.param_dtype)
        # For any backend 'auto' is no float16: naming one here keeps JAX from starting its own.
        if resolve_dtype(self.dtype, backend="cpu") == jnp.float16 and self.force_upcast:
            raise ValueError(
                "autoencoder dtype='float16': this autoencoder's activations exceed float16's "
                "range (force_upcast in its config). Use 'bfloat16' or 'float32'"
            )

    @property
    def downsampling_factor(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderKLModule(nnx.Module):
    """The parameters and the two directions; `AutoencoderKL` is its functional face."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        options = {"rngs": rngs, "precision": precision_of(config.dtype, config.param_dtype)}
        shape = (
            config.block_out_channels,
            config.layers_per_block,
            config.norm_num_groups,
            config.mid_block_add_attention,
        )
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config.in_channels, 2 * latent, *shape, **options)
        self.decoder = Decoder(latent, config.out_channels, *shape, **options)
        if config.use_quant_conv:
            self.quant_conv = Linear(2 * latent, 2 * latent, **options)
        if config.use_post_quant_conv:
            self.post_quant_conv = Linear(latent, latent, **options)

    def encode(self, images):
        """See `AutoencoderKL.encode`."""
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z, spatial):
        """See `AutoencoderKL.decode`."""
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z, spatial).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class AutoencoderKL:
    """An autoencoder's architecture as pure functions; hashable, holds no arrays.

    "Raw" latents are the autoencoder's own; "latents" are what a diffusion network sees.
    """

    config: AutoencoderKLConfig

    @functools.cached_property
    def _graph(self):
        module = nnx.eval_shape(lambda: self._create(jax.random.key(0)))
        return nnx.split(module)[0]

    def _create(self, key: Key[Array, ""]) -> nnx.Module:
        return AutoencoderKLModule(self.config, rngs=nnx.Rngs(params=key))

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters as a nested dict. Jit it to create them where they will live."""
        return nnx.to_pure_dict(nnx.state(self._create(key), nnx.Param))

    def encode(
        self, params: Params, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h2 w2 k"], Float[Array, "b h2 w2 k"]]:
        """The posterior of the raw latents.

        Args:
            params: the parameters.
            images: pixels in [-1, 1], sides multiples of `downsampling_factor`.

        Returns:
            Mean and log variance (clipped to [-30, 20], as the originals do), float32.

        Raises:
            ValueError: sides that do not divide, or another number of channels.
        """
        factor, channels = self.downsampling_factor, self.config.in_channels
        if images.shape[-1] != channels or any(side % factor for side in images.shape[1:3]):
            raise ValueError(
                f"cannot encode images of shape {images.shape}: expected [batch, height, width, "
                f"{channels}] with height and width multiples of {factor}"
            )
        return nnx.merge(self._graph, params).encode(images)

    def sample(
        self, params: Params, images: Float[Array, "b h w c"], key: Key[Array, ""]
    ) -> Float[Array, "b h2 w2 k"]:
        """Raw latents drawn from the posterior, mean + exp(logvar / 2) eps."""
        mean, logvar = self.encode(params, images)
        return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)

    def decode(
        self, params: Params, z: Float[Array, "b h w k"], *, spatial: Spatial = LOCAL
    ) -> Float[Array, "b h2 w2 c"]:
        """Images of raw latents, float32, about [-1, 1] but not clipped.

        Args:
            params: the parameters.
            z: raw latents, or the rows of them at hand.
            spatial: how layers see the rows around them; by default the whole image is at hand.

        Raises:
            ValueError: another number of channels.
        """
        if z.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"cannot decode latents of {z.shape[-1]} channels: this autoencoder's have "
                f"{self.config.latent_channels}"
            )
        return nnx.merge(self._graph, params).decode(z, spatial)

    def decode_tiled(
        self,
        params: Params,
        z: Float[Array, "b h w k"],
        *,
        tile: int | None = None,
        overlap: float = 0.25,
    ) -> Float[np.ndarray, "b h2 w2 c"]:
        """Images of raw latents, decoded in overlapping square tiles that are blended linearly.

        The device holds the activations of one tile and the pixels of one row of tiles, however
        large the image; the image is put together on the host. The result differs from `decode`:
        attention and normalisation see a tile at a time. The blending is that of diffusers'
        `enable_tiling`. Not to be called under jit; the decoder is compiled once for each shape
        of a tile (at most four: those on the right and lower edges are smaller).

        Args:
            params: the parameters.
            z: raw latents.
            tile: a tile's side in latents; default: the training images' (`sample_size`).
            overlap: fraction of a tile blended with its neighbour.

        Raises:
            ValueError: `overlap` is not in [0, 1), or the overlap is no whole number of latents.
        """
        factor = self.downsampling_factor
        tile = tile or max(self.config.sample_size // factor, 1)
        shared = round(tile * overlap)
        if not 0 <= overlap < 1 or tile < 1 or abs(tile * overlap - shared) > 1e-6:
            raise ValueError(
                f"tile={tile} latents with overlap={overlap}: expected an overlap in [0, 1) that "
                f"makes tile * overlap a whole number of latents"
            )
        if max(z.shape[1:3]) <= tile:
            return np.asarray(_decode(self, params, z))
        rows = self._tile_rows(params, z, tile, tile - shared, shared * factor)
        return np.concatenate(list(rows), axis=1)

    def _tile_rows(
        self, params: Params, z: Array, tile: int, step: int, blend: int
    ) -> Iterator[np.ndarray]:
        """Yields the stripes of the image from top to bottom."""
        keep = step * self.downsampling_factor
        above: list[np.ndarray] = []
        for top in range(0, z.shape[1], step):
            columns = range(0, z.shape[2], step)
            # All of a row is dispatched before the first tile is waited for.
            row = [
                _decode(self, params, z[:, top : top + tile, left : left + tile])
                for left in columns
            ]
            row = [np.array(decoded) for decoded in row]
            for j, decoded in enumerate(row):
                if above:
                    _blend(above[j], decoded, blend, axis=1)
                if j:
                    _blend(row[j - 1], decoded, blend, axis=2)
            above = row
            yield np.concatenate([decoded[:, :keep, :keep] for decoded in row], axis=2)

    def to_latents(self, raw: Float[Array, "*b h w k"]) -> Float[Array, "*b h w k"]:
        """What a network sees of raw latents: (raw - shift) * scale."""
        return (raw - self.config.shift_factor) * self.config.scaling_factor

    def from_latents(self, latents: Float[Array, "*b h w k"]) -> Float[Array, "*b h w k"]:
        """The inverse of `to_latents`: latents / scale + shift."""
        return latents / self.config.scaling_factor + self.config.shift_factor

    @property
    def downsampling_factor(self) -> int:
        """Pixels a latent, along each side."""
        return self.config.downsampling_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(height, width, channels) of the latents of an image.

        Raises:
            ValueError: the image's sides are not multiples of `downsampling_factor`.
        """
        factor = self.downsampling_factor
        if min(height, width) < 1 or height % factor or width % factor:
            raise ValueError(
                f"images of {height}x{width} pixels cannot be encoded: this autoencoder needs "
                f"sides that are multiples of {factor}"
            )
        return height // factor, width // factor, self.config.latent_channels


@functools.partial(jax.jit, static_argnums=0)
def _decode(autoencoder: AutoencoderKL, params: Params, z: Array) -> Array:
    return autoencoder.decode(params, z)


def _blend(before: np.ndarray, after: np.ndarray, extent: int, axis: int) -> None:
    """Fades, in place, from the end of `before` to the start of `after`."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    if not extent:
        return
    shape = [1] * after.ndim
    shape[axis] = extent
    weight = (np.arange(extent, dtype=np.float32) / np.float32(extent)).reshape(shape)
    lead = (slice(None),) * axis
    end, start = (*lead, slice(before.shape[axis] - extent, None)), (*lead, slice(extent))
    after[start] = before[end] * (1 - weight) + after[start] * weight
