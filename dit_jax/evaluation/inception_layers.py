"""Inception-V3 of the graph of 2015-12-05 as `flax.nnx` modules: convolutions, pooling, blocks.

Szegedy et al. (2015), "Rethinking the Inception Architecture", arXiv 1512.00567, as frozen in the
TensorFlow graph that FID has been measured with since Heusel et al. (2017). What sets that graph
apart from other Inceptions: average pooling counts no padding, the last block pools by maximum,
and there are 1008 logits. Attributes are named as in the PyTorch ports of the weights.

Everything is computed in float32 and at the highest precision of matrix products: accelerators
would otherwise fall to TF32 or bfloat16, and a score could not be compared with anyone else's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from dit_jax.models.linear import Precision, product

IMAGE_SIZE = 299
"""Height and width of the images the network sees."""
BATCH_NORM_EPSILON = 1e-3
SPATIAL_CHANNELS = 7
"""How many channels of Mixed_6d's first branch make ADM's spatial features."""
PRECISION = Precision(float32_products="highest")


class Convolution(nnx.Module):
    """Convolution without bias, batch normalisation by stored statistics, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: str = "SAME",
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the kernel (He-normal) and the statistics of an unnormalised unit Gaussian."""
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        initializer = nnx.initializers.he_normal()
        self.kernel = nnx.Param(initializer(rngs.params(), (*size, inputs, outputs)))
        self.scale, self.bias = nnx.Param(jnp.ones(outputs)), nnx.Param(jnp.zeros(outputs))
        self.mean, self.var = nnx.Param(jnp.zeros(outputs)), nnx.Param(jnp.ones(outputs))
        self.stride, self.padding = stride, padding

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Applies all three; the normalisation is folded into the kernel, which is far smaller."""
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + BATCH_NORM_EPSILON)
        kernel = self.kernel[...] * factor[None, None, None]
        shift = self.bias[...] - self.mean[...] * factor
        return jax.nn.relu(self._convolve(x, kernel) + shift[None, None, None])

    def _convolve(self, x: Array, kernel: Array) -> Array:
        if kernel.shape[:2] == (1, 1):
            # The same sums; on CPUs XLA's matrix product is up to twice as fast as its convolution.
            pixels = x.reshape(-1, x.shape[-1])
            y = product(pixels, kernel[0, 0], PRECISION)
            return y.reshape(*x.shape[:-1], y.shape[-1])
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=PRECISION.float32_products,
        )


def max_pool(x: Float[Array, "b h w c"], *, stride: int) -> Float[Array, "b y x c"]:
    """Maximum over 3x3 windows, padded at stride 1 and not at stride 2."""
    if stride == 1:
        x = _pad(x, -jnp.inf)
    return _pool_axis(_pool_axis(x, 1, stride, jnp.maximum), 2, stride, jnp.maximum)


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mean over 3x3 windows at stride 1, of the pixels that exist: padding is not counted."""
    total = _pool_axis(_pool_axis(_pad(x, 0.0), 1, 1, jnp.add), 2, 1, jnp.add)
    rows, columns = (np.convolve(np.ones(size), np.ones(3), mode="same") for size in x.shape[1:3])
    return total / np.outer(rows, columns).astype(np.float32)[None, :, :, None]


def _pad(x: Array, value: float) -> Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _pool_axis(x: Array, axis: int, stride: int, reduce: Callable) -> Array:
    """Three neighbours along an axis into one; shifted slices, for CPUs faster than a window."""
    last = (x.shape[axis] - 3) // stride * stride
    shifted = (jax.lax.slice_in_dim(x, i, i + last + 1, stride=stride, axis=axis) for i in range(3))
    return functools.reduce(reduce, shifted)


class MixedA(nnx.Module):
    """Mixed_5b to 5d, on 35x35."""

    def __init__(self, inputs: int, pool_features: int, *, rngs: nnx.Rngs) -> None:
        """Makes branches of 64, 64, 96 and `pool_features` channels."""
        conv = functools.partial(Convolution, rngs=rngs)
        self.branch1x1 = conv(inputs, 64)
        self.branch5x5_1 = conv(inputs, 48)
        self.branch5x5_2 = conv(48, 64, 5)
        self.branch3x3dbl_1 = conv(inputs, 64)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3)
        self.branch_pool = conv(inputs, pool_features)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """Joins the branches."""
        return _join(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        )


class MixedB(nnx.Module):
    """Mixed_6a, from 35x35 to 17x17."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs) -> None:
        """Makes branches of 384 and 96 channels; the third passes the input on."""
        conv = functools.partial(Convolution, rngs=rngs)
        self.branch3x3 = conv(inputs, 384, 3, stride=2, padding="VALID")
        self.branch3x3dbl_1 = conv(inputs, 64)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3, stride=2, padding="VALID")

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Joins the branches."""
        return _join(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            max_pool(x, stride=2),
        )


class MixedC(nnx.Module):
    """Mixed_6b to 6e, on 17x17: 7x7 convolutions as rows and columns."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs) -> None:
        """Makes four branches of 192 channels, `width` of them between their convolutions."""
        conv = functools.partial(Convolution, rngs=rngs)
        row, column = (1, 7), (7, 1)
        self.branch1x1 = conv(inputs, 192)
        self.branch7x7_1 = conv(inputs, width)
        self.branch7x7_2 = conv(width, width, row)
        self.branch7x7_3 = conv(width, 192, column)
        self.branch7x7dbl_1 = conv(inputs, width)
        self.branch7x7dbl_2 = conv(width, width, column)
        self.branch7x7dbl_3 = conv(width, width, row)
        self.branch7x7dbl_4 = conv(width, width, column)
        self.branch7x7dbl_5 = conv(width, 192, row)
        self.branch_pool = conv(inputs, 192)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """Joins the branches."""
        double = self.branch7x7dbl_2(self.branch7x7dbl_1(x))
        double = self.branch7x7dbl_4(self.branch7x7dbl_3(double))
        return _join(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(double),
            self.branch_pool(average_pool(x)),
        )


class MixedD(nnx.Module):
    """Mixed_7a, from 17x17 to 8x8."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs) -> None:
        """Makes branches of 320 and 192 channels; the third passes the input on."""
        conv = functools.partial(Convolution, rngs=rngs)
        self.branch3x3_1 = conv(inputs, 192)
        self.branch3x3_2 = conv(192, 320, 3, stride=2, padding="VALID")
        self.branch7x7x3_1 = conv(inputs, 192)
        self.branch7x7x3_2 = conv(192, 192, (1, 7))
        self.branch7x7x3_3 = conv(192, 192, (7, 1))
        self.branch7x7x3_4 = conv(192, 192, 3, stride=2, padding="VALID")

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Joins the branches."""
        deep = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _join(
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(deep),
            max_pool(x, stride=2),
        )


class MixedE(nnx.Module):
    """Mixed_7b and 7c, on 8x8: branches that fork into a row and a column."""

    def __init__(self, inputs: int, *, pool: str, rngs: nnx.Rngs) -> None:
        """Makes branches of 320, 768, 768 and 192 channels; `pool` is "average" or "max"."""
        conv = functools.partial(Convolution, rngs=rngs)
        row, column = (1, 3), (3, 1)
        self.branch1x1 = conv(inputs, 320)
        self.branch3x3_1 = conv(inputs, 384)
        self.branch3x3_2a = conv(384, 384, row)
        self.branch3x3_2b = conv(384, 384, column)
        self.branch3x3dbl_1 = conv(inputs, 448)
        self.branch3x3dbl_2 = conv(448, 384, 3)
        self.branch3x3dbl_3a = conv(384, 384, row)
        self.branch3x3dbl_3b = conv(384, 384, column)
        self.branch_pool = conv(inputs, 192)
        self.pool = {
            "average": average_pool,
            "max": functools.partial(max_pool, stride=1),
        }[pool]

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w 2048"]:
        """Joins the branches."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _join(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )


class Logits(nnx.Module):
    """The last linear map, its bias apart: ADM's Inception Score leaves the bias out."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        """Makes the kernel [inputs, outputs] and the bias."""
        initializer = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(initializer(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        """The product with the kernel alone."""
        return product(x, self.kernel[...], PRECISION)


class InceptionV3(nnx.Module):
    """The whole network."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        """Makes all layers."""
        conv = functools.partial(Convolution, rngs=rngs)
        self.Conv2d_1a_3x3 = conv(3, 32, 3, stride=2, padding="VALID")
        self.Conv2d_2a_3x3 = conv(32, 32, 3, padding="VALID")
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.Conv2d_3b_1x1 = conv(64, 80)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, padding="VALID")
        self.Mixed_5b = MixedA(192, 32, rngs=rngs)
        self.Mixed_5c = MixedA(256, 64, rngs=rngs)
        self.Mixed_5d = MixedA(288, 64, rngs=rngs)
        self.Mixed_6a = MixedB(288, rngs=rngs)
        self.Mixed_6b = MixedC(768, 128, rngs=rngs)
        self.Mixed_6c = MixedC(768, 160, rngs=rngs)
        self.Mixed_6d = MixedC(768, 160, rngs=rngs)
        self.Mixed_6e = MixedC(768, 192, rngs=rngs)
        self.Mixed_7a = MixedD(768, rngs=rngs)
        self.Mixed_7b = MixedE(1280, pool="average", rngs=rngs)
        self.Mixed_7c = MixedE(2048, pool="max", rngs=rngs)
        self.fc = Logits(2048, 1008, rngs=rngs)

    def __call__(
        self, x: Float32[Array, "b 299 299 3"]
    ) -> tuple[Float32[Array, "b 2048"], Float32[Array, "b 2023"], Float32[Array, "b 1008"]]:
        """Pool features, spatial features and logits without bias, of pixels in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = max_pool(x, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = max_pool(x, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6d(x)
        # The first branch comes first: these are channels of mixed_6/conv in the TensorFlow graph.
        spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean(axis=(1, 2))
        return pool, spatial, self.fc(pool)


def _join(*branches: Float[Array, "b h w _"]) -> Float[Array, "b h w o"]:
    return jnp.concatenate(branches, axis=-1)
