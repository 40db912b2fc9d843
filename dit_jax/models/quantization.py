"""Matrix products of 8-bit operands: fp8 for inference and training, int8 weights for inference.

An operand is stored as 8-bit values and a float32 scale, x = scale values. In fp8 both operands of
every product are quantised, with the scale of the values at hand (current scaling): forwards in
e4m3, gradients in e5m2 (Micikevicius et al. 2022, arXiv 2209.05433). Products are accumulated in
float32. XLA makes cuBLASLt's or Triton's 8-bit kernels of them on GPUs that have the units, and
computes the very same numbers in float32 anywhere else, so that quality is measured on any machine.

Scales are powers of two. So dividing by one is exact, a product's result is the same whether it is
scaled before or after it is rounded, and of the range of a format that has an exponent, less than a
factor of two at its lower end is lost. A weight-only int8 format has no exponent: its scales are
not rounded.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.fp8_kernels import PRODUCT_SCOPE
from dit_jax.models import te_products
from dit_jax.nearest import one_of
from dit_jax.target import target_platform

QUANTIZATIONS = ("none", "fp8", "fp8_rowwise", "int8", "te")
STORED = ("fp8", "fp8_rowwise", "int8")
"""Those whose kernels are quantised once for inference; 'te' quantises them at every call."""
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
STORED_DTYPES = (jnp.dtype(E4M3), jnp.dtype(jnp.int8))
"""Of kernels that are quantised already."""

# The largest value of both formats is 1.75 times a power of two: e4m3's 448, e5m2's 57344.
_LARGEST_EXPONENT = {jnp.dtype(E4M3): 8, jnp.dtype(E5M2): 15}
_LARGEST_MANTISSA = 0x600000  # of a float32: 0.75 of 2^23
_LEAST_CAPABILITY = (8, 9)  # of NVIDIA's GPUs: Ada, then Hopper


def is_fp8(quantization: str) -> bool:
    """Whether both operands of products are quantised."""
    return quantization.startswith("fp8") or quantization == "te"


def require_quantization(quantization: str) -> None:
    """Refuses an unknown quantisation, and fp8 for a device that has no such products.

    A CPU has none either, but there it is meant: the same numbers, to measure quality with.

    Raises:
        ValueError: with what to set.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={quantization!r}: {one_of(quantization, QUANTIZATIONS)}")
    if not is_fp8(quantization):
        return  # before the platform is asked for, which starts JAX: several processes join first
    if quantization == "te":
        te_products.require_available()
    platform = target_platform()
    if platform == "cpu":
        return
    device, remedy = jax.devices()[0], "set model.quantization='none' (or 'int8', for inference)"
    if platform != "gpu":
        raise ValueError(
            f"quantization={quantization!r}: XLA has products of 8-bit floats for NVIDIA's GPUs, "
            f"and would convert them to 16 bits for a {platform.upper()}; {remedy}"
        )
    # NVIDIA's alone are numbers, and that of a target that is not there is not known.
    capability = str(getattr(device, "compute_capability", ""))
    numbers = re.fullmatch(r"(\d+)\.(\d+)", capability)
    if numbers and tuple(map(int, numbers.groups())) < _LEAST_CAPABILITY:
        raise ValueError(
            f"quantization={quantization!r}: {device.device_kind} (compute capability "
            f"{capability}) has no 8-bit floats, Ada (8.9) and Hopper (9.0) have; {remedy}"
        )


def _power_of_two(exponent: Array) -> Array:
    """2^exponent in float32, exact, for -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def quantize(
    x: Float[Array, "..."], dtype: Any, axes: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """8-bit floats and the scale under which their largest one is just in range.

    Args:
        x: any floating-point array. Where a largest absolute value is not finite, nothing is.
        dtype: `E4M3` or `E5M2`.
        axes: over which the largest absolute value is taken.

    Returns:
        Values, rounded to nearest even, and float32 scales with the axes kept, powers of two with
        x = scale values.
    """
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    exponent = (bits >> 23) - 127 - _LARGEST_EXPONENT[jnp.dtype(dtype)]
    exponent += (bits & 0x7FFFFF) > _LARGEST_MANTISSA
    exponent = jnp.clip(exponent, -126, 126)  # its inverse is representable; of zeros: the least
    # What is not finite must not look finite, e4m3 having no infinity.
    inverse = jnp.where(jnp.isfinite(largest), _power_of_two(-exponent), jnp.nan)
    return (x.astype(jnp.float32) * inverse).astype(dtype), _power_of_two(exponent)


def quantize_kernel(
    kernel: Float[Array, "*layers i o"], quantization: str
) -> tuple[Array, Float[Array, "*layers _"]]:
    """A kernel as products read it: [out, in], which is what cuBLASLt takes, and its scales.

    Args:
        kernel: of one layer, or stacked ones.
        quantization: one of `STORED`.

    Returns:
        Values [*layers, out, in], and float32 scales: [*layers, 1] for 'fp8', else
        [*layers, out].
    """
    if is_fp8(quantization):
        axes = (-2, -1) if quantization == "fp8" else (-2,)
        values, scale = quantize(kernel, E4M3, axes)
    else:
        kernel = kernel.astype(jnp.float32)
        scale = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True) / 127
        scale = jnp.where(scale == 0, 1.0, scale)
        values = jnp.round(kernel / scale).astype(jnp.int8)
    return jnp.swapaxes(values, -1, -2), scale[..., 0, :]


def quantized_product(
    x: Float[Array, "*batch i"],
    kernel: Array,
    scale: Float[Array, " _"] | None,
    quantization: str,
    dtype: Any,
) -> Float[Array, "*batch o"]:
    """x kernel with 8-bit operands.

    Args:
        x: left operand.
        kernel: as trained, [in, out], if `scale` is None; else of `quantize_kernel`.
        scale: of the kernel.
        quantization: not 'none'.
        dtype: of the result.
    """
    if quantization == "te":
        return te_products.te_product(x, kernel, dtype)
    if is_fp8(quantization) and scale is None:
        return _trained_product(x, kernel, quantization, jnp.dtype(dtype))
    if scale is None:
        kernel, scale = quantize_kernel(kernel, quantization)
    if is_fp8(quantization):
        return _fp8_product(x, kernel, scale, quantization, dtype)[0]
    contracted = (((x.ndim - 1,), (1,)), ((), ()))
    y = jax.lax.dot_general(
        x.astype(dtype), kernel.astype(dtype), contracted, preferred_element_type=jnp.float32
    )
    return (y * scale.reshape((1,) * (y.ndim - 1) + scale.shape)).astype(dtype)


def _fp8_product(x, kernel, scale, quantization, dtype):
    """The product with a quantised kernel, and x, its values and their scale."""
    with jax.named_scope(PRODUCT_SCOPE):
        rowwise = quantization == "fp8_rowwise"
        values, x_scale = quantize(x, E4M3, _axes(x, rowwise, (-1,)))
        y = _scaled_dot(values, kernel, ((-1,), (1,)), (x_scale, scale), dtype)
    return y, (values, x_scale)


def _axes(x: Array, rowwise: bool, contracted: tuple[int, ...]) -> tuple[int, ...]:
    """Over which a scale is taken: those a product sums over, or all."""
    return contracted if rowwise else tuple(range(x.ndim))


def _scaled_dot(a, b, contracted, scales, dtype):
    """The product of values, summed over `contracted` axes of each, times the scales.

    The scales broadcast against the result, or are of one element. In bfloat16 the product is
    rounded before it is scaled: the same numbers, and half the traffic where scaling is not a part
    of the product's kernel.
    """
    axes = tuple(
        tuple(axis % x.ndim for axis in group) for x, group in zip((a, b), contracted, strict=True)
    )
    wide = dtype if dtype == jnp.bfloat16 else jnp.float32
    y = jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=wide)
    if all(scale.size == 1 for scale in scales):
        # One number, which cuBLASLt's kernel takes.
        scales = (scales[0].reshape(()) * scales[1].reshape(()),)
    for scale in scales:
        y = y * scale.astype(wide).reshape((1,) * (y.ndim - scale.ndim) + scale.shape)
    return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _trained_product(x, kernel, quantization, dtype):
    """x kernel with both gradients computed of 8-bit operands; it has no forward mode."""
    return _forward(x, kernel, quantization, dtype)[0]


def _forward(x, kernel, quantization, dtype):
    # Its own scope: a derivative's names begin anew.
    with jax.named_scope(PRODUCT_SCOPE):
        quantized, scale = quantize_kernel(kernel, quantization)
    y, saved = _fp8_product(x, quantized, scale, quantization, dtype)
    if quantization == "fp8_rowwise":
        # The kernel's gradient sums over rows, where every channel has its scale.
        with jax.named_scope(PRODUCT_SCOPE):
            saved = quantize(x, E4M3, tuple(range(x.ndim - 1)))
    # Of x its 8 bits are kept; an empty array tells its dtype.
    return y, (saved, kernel, jnp.zeros((0,), x.dtype))


def _backward(quantization, dtype, residuals, dy):
    (values, x_scale), kernel, like = residuals
    rowwise, rows = quantization == "fp8_rowwise", tuple(range(dy.ndim - 1))
    with jax.named_scope(PRODUCT_SCOPE):
        dy_values, dy_scale = quantize(dy, E5M2, _axes(dy, rowwise, (-1,)))
        kernel_values, kernel_scale = quantize(kernel, E4M3, _axes(kernel, rowwise, (1,)))
        scales = dy_scale, kernel_scale.reshape(-1)
        dx = _scaled_dot(dy_values, kernel_values, ((-1,), (1,)), scales, like.dtype)
        if rowwise:
            dy_values, dy_scale = quantize(dy, E5M2, rows)
        scales = x_scale.reshape(-1, 1), dy_scale.reshape(-1)
        dkernel = _scaled_dot(values, dy_values, (rows, rows), scales, kernel.dtype)
    return dx, dkernel


_trained_product.defvjp(_forward, _backward)
