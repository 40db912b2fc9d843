"""The convolutions of the networks; those of one pixel are `linear.Linear`."""

from flax import nnx
from jaxtyping import Array, Float

from dit_jax.models.batch_axes import divided_by_rows
from dit_jax.models.linear import FLOAT32, XAVIER, Initialization, Precision
from dit_jax.models.recomputation import activation
from dit_jax.models.spatial import LOCAL, SAME_3X3, Padding, Spatial


class Conv(nnx.Module):
    """A 3 x 3 convolution with bias.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        rngs: keys of the initial values.
        init: how the parameters start.
        precision: the network's.
        role: what of `precision` applies.
        stride: of both axes.
        padding: rows and columns of zeros around the input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        rngs: nnx.Rngs,
        init: Initialization = XAVIER,
        precision: Precision = FLOAT32,
        role: str = "hidden",
        stride: int = 1,
        padding: Padding = SAME_3X3,
    ):
        shape, stored = (3, 3, in_channels, out_channels), precision.stored(role)
        self.kernel = init.kernel(rngs, shape, stored)
        self.bias = init.bias(rngs, shape, stored)
        self.precision, self.role = precision, role
        self.stride, self.padding = stride, padding

    def __call__(
        self,
        x: Float[Array, "b h w i"],
        spatial: Spatial = LOCAL,
        padding: int | None = None,
    ) -> Float[Array, "b h2 w2 o"]:
        """Convolves in the dtype of its role; `padding`, on every side, replaces its own."""
        dtype = self.precision.dtype(self.role)
        y = spatial.convolve(
            x.astype(dtype),
            self.kernel[...].astype(dtype),
            stride=self.stride,
            padding=self.padding if padding is None else ((padding, padding),) * 2,
        )
        return activation(divided_by_rows(y + self.bias[...].astype(dtype)[None, None, None]))
