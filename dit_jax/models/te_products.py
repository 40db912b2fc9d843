"""Products of 8-bit floats by NVIDIA's Transformer Engine (`quantization='te'`).

`transformer_engine.jax.dense.dense` with its quantisers of current scaling: forwards in e4m3,
gradients in e5m2, one scale an array, as `quantization='fp8'` has it. Here quantising and the
product are the library's own kernels, and XLA sees opaque calls.

Written against version 2.20 and checked with that version's own Python code; no GPU was at hand
to run it on (docs/precision.md). The library asks the driver for the GPU while a program is traced:
programs for a GPU that is not there cannot have its calls.
"""

import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.target import target_platform

PACKAGE = "transformer_engine.jax"
_ALIGNMENT = 16  # of all sides of a product, which cuBLASLt's 8-bit kernels want
_REMEDY = "set model.quantization='fp8', which needs no library and computes as much in 8 bits"


def require_available() -> None:
    """Refuses a device, or an environment, in which there is no such library to call.

    Raises:
        ValueError: with what to do.
    """
    if target_platform() != "gpu":
        raise ValueError(
            "quantization='te': Transformer Engine is for NVIDIA's GPUs, and this is a "
            f"{target_platform().upper()}; {_REMEDY} (on CPUs, to measure quality, too)"
        )
    if jax.default_backend() != "gpu":
        raise ValueError(
            "quantization='te': Transformer Engine asks the GPU itself while a program is traced, "
            f"so there is none for a GPU that is not there; {_REMEDY}"
        )
    if jax.device_count() > 1:
        raise ValueError(
            f"quantization='te' is for one GPU, and there are {jax.device_count()}: set "
            f"CUDA_VISIBLE_DEVICES=0, or {_REMEDY}, on several, too"
        )
    _library()


def _library() -> tuple[Any, Any]:
    """The library's modules of products and of quantisers."""
    # Without its own it would compute in 16 bits, silently.
    switched_off = os.environ.get("NVTE_JAX_CUSTOM_CALLS", "").strip().lower() == "false"
    if switched_off and jax.default_backend() == "gpu":
        raise ValueError(
            "quantization='te' with NVTE_JAX_CUSTOM_CALLS=false, which switches Transformer "
            f"Engine's kernels off: unset it, or {_REMEDY}"
        )
    try:
        return tuple(importlib.import_module(f"{PACKAGE}.{name}") for name in ("dense", "quantize"))
    except (ImportError, OSError, RuntimeError) as error:  # its shared libraries may be missing
        raise ValueError(
            f"quantization='te' needs Transformer Engine for JAX (`pip install 'dit-jax[te]'`), "
            f"which cannot be imported: {error}; or {_REMEDY}"
        ) from error


def te_product(
    x: Float[Array, "*batch i"], kernel: Float[Array, "i o"], dtype: Any
) -> Float[Array, "*batch o"]:
    """x kernel by the library, with gradients of its own.

    Args:
        x: left operand; tokens in all its leading axes.
        kernel: as trained. It is quantised at every call.
        dtype: of operands before they are quantised, and of the result.

    Raises:
        ValueError: sides that its kernels do not take.
    """
    tokens = x.reshape(-1, x.shape[-1])
    sides = (*tokens.shape, kernel.shape[-1])
    if any(side % _ALIGNMENT for side in sides):
        raise ValueError(
            f"quantization='te': a product of {sides[0]} tokens, {sides[1]} by {sides[2]} "
            f"channels; its kernels take multiples of {_ALIGNMENT}. Change them, or {_REMEDY}"
        )
    dense, quantize = _library()
    quantizers = quantize.QuantizerFactory.create_set(
        scaling_mode=quantize.ScalingMode.CURRENT_TENSOR_SCALING,
        fwd_dtype=jnp.float8_e4m3fn,
        bwd_dtype=jnp.float8_e5m2,
    )
    # The kernel's gradient has the dtype it is given in: the conversion brings it back to float32.
    y = dense.dense(tokens.astype(dtype), kernel.astype(dtype), quantizer_set=quantizers)
    return y.reshape(*x.shape[:-1], -1)
