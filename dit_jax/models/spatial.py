"""What looks beyond one pixel: the second seam of the networks, beside attention.

Convolutional networks call a `Spatial` object for everything whose result at a pixel depends on
other pixels: convolution, resampling (through `extend`), group normalisation's statistics and
attention. `LocalSpatial`, the default, has the whole image at hand. Where an image's rows are split
over devices, the room `parallel` passes objects that exchange rows and statistics, and the networks
see the rows of one device.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.models.attention import Attention

# ((before, after) rows, (before, after) columns) of zeros.
Padding = tuple[tuple[int, int], tuple[int, int]]
SAME_3X3: Padding = ((1, 1), (1, 1))


@runtime_checkable
class Spatial(Protocol):
    """How a layer sees the pixels around one.

    Attributes:
        attention: strategy of the attention seam; None for the network's own.
    """

    attention: Attention | None

    def extend(self, x: Float[Array, "b h w c"], above: int, below: int) -> Array:
        """The rows at hand with so many neighbouring ones; beyond the image they are zeros."""
        ...

    def convolve(
        self,
        x: Float[Array, "b h w i"],
        kernel: Float[Array, "kh kw i o"],
        *,
        stride: int = 1,
        padding: Padding = SAME_3X3,
    ) -> Float[Array, "b h2 w2 o"]:
        """See the function `convolve`."""
        ...

    def group_statistics(
        self, x: Float[Array, "b h w c"], num_groups: int
    ) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
        """See the function `group_statistics`."""
        ...


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: Padding = SAME_3X3,
) -> Float[Array, "b h2 w2 o"]:
    """Cross-correlation of channels-last images, zeros around them."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def group_statistics(
    x: Float[Array, "b h w c"], num_groups: int
) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
    """Mean and variance of each channel's group, repeated for its channels, in float32."""
    c = x.shape[-1]
    x = x.astype(jnp.float32)

    def mean_in_group(values):  # sums over pixels first: no transposition of the image
        means = values.mean(axis=(1, 2)).reshape(-1, num_groups, c // num_groups).mean(axis=-1)
        return jnp.repeat(means, c // num_groups, axis=-1)[:, None, None]

    mean = mean_in_group(x)
    return mean, mean_in_group(jnp.square(x - mean))


@dataclasses.dataclass(frozen=True)
class LocalSpatial:
    """The whole image is at hand."""

    attention: Attention | None = None

    def extend(self, x: Float[Array, "b h w c"], above: int, below: int) -> Array:
        """Zeros above and below."""
        return jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))

    def convolve(
        self,
        x: Float[Array, "b h w i"],
        kernel: Float[Array, "kh kw i o"],
        *,
        stride: int = 1,
        padding: Padding = SAME_3X3,
    ) -> Float[Array, "b h2 w2 o"]:
        """See the function `convolve`."""
        return convolve(x, kernel, stride=stride, padding=padding)

    def group_statistics(
        self, x: Float[Array, "b h w c"], num_groups: int
    ) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
        """See the function `group_statistics`."""
        return group_statistics(x, num_groups)


LOCAL = LocalSpatial()
