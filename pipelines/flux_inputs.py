"""What callers give a FLUX pipeline, checked and in the shape it computes with."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from PIL import Image

from dit_jax import ranges
from dit_jax.sampling import image_keys

PACKED = 2  # a token is 2 x 2 latents
# (width, height) of the images that FLUX.1 Kontext was trained on, each of about a million pixels;
# turned by a quarter, they are the same.
_LANDSCAPE = ((1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752))
_LANDSCAPE += ((1456, 720), (1504, 688), (1568, 672))
KONTEXT_SIZES = (*((h, w) for w, h in _LANDSCAPE[:0:-1]), *_LANDSCAPE)


def is_text(prompt: str) -> bool:
    """Whether UTF-8 can write it, as tokenizers need: no lone half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)


def as_list(name: str, prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several, as a list.

    Raises:
        ValueError: something else.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"{name}: expected a string or a list of strings")
    if not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"{name}: expected a string or a list of strings")
    if not all(map(is_text, prompts)):
        raise ValueError(f"{name}: expected text that UTF-8 can write, without lone surrogates")
    return list(prompts)


def check_prompts(prompt: Any, prompt_2: Any, embeds: Any, pooled: Any) -> int:
    """How many prompts there are; refuses anything but prompts, or both of their embeddings.

    Raises:
        ValueError: says what was expected.
    """
    if (embeds is None) != (pooled is None):
        raise ValueError("prompt_embeds and pooled_prompt_embeds: expected both, or neither")
    if (prompt is None) == (embeds is None):
        raise ValueError("expected either a prompt, or prompt_embeds and pooled_prompt_embeds")
    if embeds is not None and prompt_2 is not None:
        raise ValueError("prompt_2 would do nothing beside prompt_embeds")
    if embeds is None:
        count = len(as_list("prompt", prompt))
        others = count if prompt_2 is None else len(as_list("prompt_2", prompt_2))
        if others != count:
            raise ValueError(f"{count} of prompt and {others} of prompt_2: expected as many")
        return count
    if len(embeds) != len(pooled):
        raise ValueError(
            f"{len(embeds)} of prompt_embeds and {len(pooled)} of pooled_prompt_embeds: expected "
            "as many"
        )
    return len(embeds)


def check_negative(prompt: Any, prompt_2: Any, scale: float) -> None:
    """Refuses anything but one negative prompt for each encoder, or none; and any without guidance.

    Raises:
        ValueError: says what was expected.
    """
    for name, text in (("negative_prompt", prompt), ("negative_prompt_2", prompt_2)):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{name} is a {type(text).__name__}: expected a string, the same for all pictures"
            )
        if text is not None and scale <= 1:
            raise ValueError("a negative_prompt needs a true_cfg_scale above 1")


def picture_size(
    height: int | None, width: int | None, default: int, multiple: int
) -> tuple[int, int]:
    """(height, width) in pixels, `default` where None is given.

    Raises:
        ValueError: no multiples of what they have to be.
    """
    height, width = height or default, width or default
    if min(height, width) < multiple or height % multiple or width % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise ValueError(
            f"height={height}, width={width}: expected multiples of {multiple}, for instance "
            f"{near[0]} and {near[1]}"
        )
    return height, width


def check_source(generator: Any, latents: Any, seed: int, first: int, count: int) -> None:
    """Refuses what noise cannot be drawn from, and what would do nothing.

    Raises:
        ValueError: `generator` is no key of JAX, or not one a picture; a seed out of range; two
            sources of noise, or the number of a first picture where none is looked at.
    """
    if latents is not None and generator is not None:
        raise ValueError("generator would do nothing beside latents, which are the noise")
    if first and (latents is not None or getattr(generator, "ndim", 0)):
        given = "latents" if latents is not None else "a generator of one key a picture"
        raise ValueError(f"first_image={first} would do nothing beside {given}")
    if generator is None:
        if not isinstance(seed, int | np.integer) or int(seed) not in ranges.SEED:
            raise ValueError(f"seed={seed}: expected {ranges.SEED}")
        return
    dtype = getattr(generator, "dtype", None)
    if not isinstance(generator, jax.Array) or not jax.dtypes.issubdtype(
        dtype, jax.dtypes.prng_key
    ):
        raise ValueError(
            f"generator is a {type(generator).__name__}: expected a key (jax.random.key(0)), or "
            "give seed"
        )
    if generator.shape not in ((), (count,)):
        raise ValueError(f"generator of {generator.shape} keys: expected one, or {count}")


def keys_of(generator: Key[Array, "*n"] | None, seed: int, first: int, count: int) -> Array:
    """One key a picture, of those number `first` on; of what `check_source` lets through."""
    if generator is None:
        return image_keys(seed, np.arange(first, first + count))
    if generator.ndim == 0:
        numbers = np.arange(first, first + count)
        return jax.vmap(lambda i: jax.random.fold_in(generator, i))(numbers)
    return generator


def unpacked(latents: Any, count: int, size: tuple[int, int], channels: int) -> np.ndarray:
    """Noise as [n, h, w, channels], from that or from diffusers' tokens.

    Raises:
        ValueError: of another shape.
    """
    noise, (h, w) = np.asarray(latents, np.float32), size
    tokens = (count, h // PACKED * (w // PACKED), channels * PACKED**2)
    if noise.shape == tokens:
        noise = noise.reshape(count, h // PACKED, w // PACKED, channels, PACKED, PACKED)
        noise = noise.transpose(0, 1, 4, 2, 5, 3).reshape(count, h, w, channels)
    if noise.shape != (count, h, w, channels):
        raise ValueError(
            f"latents of shape {list(noise.shape)}: expected {[count, h, w, channels]}, or packed "
            f"{list(tokens)}"
        )
    return noise


def reference_size(height: int, width: int, multiple: int, auto_resize: bool) -> tuple[int, int]:
    """(height, width) in pixels at which Kontext is shown an image.

    Args:
        height: of the image.
        width: likewise.
        multiple: what sides are multiples of.
        auto_resize: that of `KONTEXT_SIZES` whose aspect ratio is nearest; else the image's own,
            less what is over the multiple.

    Raises:
        ValueError: the image is smaller than that.
    """
    if min(height, width) < multiple:
        raise ValueError(
            f"image of {width} x {height} pixels: expected at least {multiple} pixels a side"
        )
    height, width = (side - side % multiple for side in (height, width))
    if not auto_resize:
        return height, width
    ratio = width / height
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in KONTEXT_SIZES)
    return height - height % multiple, width - width % multiple


def reference_pixels(image: Any, multiple: int, auto_resize: bool = True) -> np.ndarray | None:
    """[1, h, w, 3] in [-1, 1] of an image to be edited; None for none.

    Args:
        image: PIL, or [h, w, 3] bytes or floats in [0, 1].
        multiple: what sides are multiples of.
        auto_resize: see `reference_size`.

    Raises:
        ValueError: it has not three channels, is too small, or neither of bytes nor of floats in
            [0, 1].
    """
    if image is None:
        return None
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"image of shape {list(pixels.shape)}: expected [height, width, 3]: convert it to RGB"
        )
    if pixels.dtype != np.uint8:
        pixels = _in_unit_range(pixels)
    size = reference_size(*pixels.shape[:2], multiple, auto_resize)
    if size != pixels.shape[:2]:
        pixels = _resized(pixels, size)
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / 255
    return (2 * pixels - 1)[None]


def _in_unit_range(pixels: np.ndarray) -> np.ndarray:
    wanted = "expected bytes (uint8), or floats in [0, 1]"
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(f"image of {pixels.dtype}: {wanted}")
    pixels = pixels.astype(np.float32)
    low, high = pixels.min(initial=1), pixels.max(initial=0)
    if not (low >= 0 and high <= 1):  # nor NaN
        raise ValueError(f"image of floats from {low:g} to {high:g}: {wanted}")
    return pixels


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """By Lanczos' filter, as diffusers' image processor resizes PIL images."""
    height, width = size

    def resize(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))

    if pixels.dtype == np.uint8:
        return resize(Image.fromarray(pixels))
    channels = [resize(Image.fromarray(pixels[..., i])) for i in range(pixels.shape[-1])]
    return np.stack(channels, axis=-1).clip(0, 1)


def repeated(array: Any, count: int) -> Any:
    """Every example so many times, one after another."""
    return array if count == 1 else jnp.repeat(jnp.asarray(array), count, axis=0)
