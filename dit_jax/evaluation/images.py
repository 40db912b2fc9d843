"""Image arrays as evaluation sees them: checked, and [-1, 1] <-> uint8 by a named rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

AnyArray = np.ndarray | jax.Array
"""What public functions accept: their checks, not their types, refuse a wrong shape or kind."""

ROUNDING_RULES = ("nearest", "truncate")
"""Names `to_uint8` accepts; the one used belongs in the record of every score."""


def check_images(images: AnyArray, what: str = "images") -> np.ndarray:
    """Returns `images` as a NumPy array after checking that it is a batch of images.

    Args:
        images: uint8 [n, h, w, c], or floating point [n, h, w, c] nominally in [-1, 1].
        what: How the error messages call it.

    Returns:
        uint8 as given, or float32 (float64 stays float64).

    Raises:
        ValueError: Not four dimensions, no pixels, a type that is neither, or values not finite.
    """
    array = np.asarray(images)
    if array.ndim != 4:
        raise ValueError(
            f"{what}: expected a batch [n, height, width, channels], got shape {array.shape}"
        )
    if 0 in array.shape[1:]:
        raise ValueError(f"{what}: the shape {array.shape} has no pixels")
    if array.dtype == np.uint8:
        return array
    # jnp knows bfloat16 as a floating type; NumPy does not.
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{what}: expected uint8 in 0..255 or floating point in [-1, 1], got {array.dtype}"
        )
    if array.dtype != np.float64:
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array).all(axis=(1, 2, 3))).sum())
        raise ValueError(f"{what}: {bad} of {len(array)} images hold values that are not finite")
    return array


def to_uint8(images: AnyArray, rounding: str = "nearest") -> UInt8[np.ndarray, "n h w c"]:
    """Turns images in [-1, 1] into bytes in 0..255; values outside are clipped.

    The rules:

    * `nearest`: clip, then the nearest byte of 127.5 (x + 1), halves to the even one.
    * `truncate`: clip 127.5 x + 128 to 0..255 and drop the fraction, as the sampling script of DiT
      (and EDM's) does. The offset makes it a rounding with halves upwards: the two rules differ on
      exact halves alone, which is enough for files not to be equal byte for byte.

    Args:
        images: Floating point [n, h, w, c]; bytes pass through unchanged.
        rounding: A name of `ROUNDING_RULES`.

    Raises:
        ValueError: An unknown rule, or not a batch of finite images.
    """
    if rounding not in ROUNDING_RULES:
        raise ValueError(f"unknown rounding rule {rounding!r}; known: {', '.join(ROUNDING_RULES)}")
    array = check_images(images)
    if array.dtype == np.uint8:
        return array
    if rounding == "nearest":
        return np.rint(127.5 * (np.clip(array, -1.0, 1.0) + 1.0)).astype(np.uint8)
    return np.clip(127.5 * array + 128.0, 0.0, 255.0).astype(np.uint8)


def to_float(images: AnyArray) -> Float32[np.ndarray, "n h w c"]:
    """Turns bytes into float32 in [-1, 1], x / 127.5 - 1; floating point is clipped to [-1, 1].

    Raises:
        ValueError: Not a batch of finite images.
    """
    array = check_images(images)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    return np.clip(array, -1.0, 1.0).astype(np.float32)
