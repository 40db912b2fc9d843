"""Decoding image files to pixels, with the crop and resize of ADM."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from dit_jax.untrusted import open_regular

RESIZES = ("none", "adm")
Size = int | tuple[int, int]  # of a square's side, or (height, width)
# 8192 x 8192; Pillow itself refuses 13000 x 13000, which would not fit the memory several times.
MAX_PIXELS = 2**26

# What PIL may try when opening a file, whatever its suffix.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # in any case
_ORIENTATION = 0x0112  # of EXIF
Image.init()  # registers WebP, which PIL otherwise loads late
# What PIL raises for a file it cannot read; decompression bombs (images of more pixels than PIL's
# limit) are refused like corrupt files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
DECODE_ERRORS += (Image.DecompressionBombWarning,)  # where warnings are errors


def decode_image(
    file: str | os.PathLike | bytes | io.BufferedReader,
    *,
    channels: int,
    resize: str = "none",
    image_size: Size | None = None,
) -> UInt8[np.ndarray, "h w c"]:
    """Read one JPEG, PNG, WebP, BMP or TIFF image (of several, the first).

    Args:
        file: A path, the file's content, or a file that was opened, which is closed.
        channels: 3 for RGB, 1 for grey (luma of ITU-R 601 where the file is coloured). Palettes
            are looked up, CMYK is converted, 16-bit grey keeps its upper 8 bits, transparent
            pixels are laid over white. Photographs that EXIF says lie on a side are put upright.
        resize: "adm" for `adm_center_crop` to `image_size`, "none" to leave the size alone.
        image_size: Of the result in pixels, for "adm": a side, or (height, width).

    Returns:
        Pixels 0..255.

    Raises:
        OSError, SyntaxError, ValueError, EOFError, DecompressionBombError: The file is not a
            readable image (`DECODE_ERRORS`).
    """
    with open_image(file) as image, _IN_MEMORY.take(image.width * image.height):
        image.load()
        image = _to_mode(ImageOps.exif_transpose(image), channels)
        if resize == "adm":
            image = adm_center_crop(image, image_size)
        pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels


@contextlib.contextmanager
def open_image(file: str | os.PathLike | bytes | io.BufferedReader) -> Iterator[Image.Image]:
    """Open an image, whose size is then known, without decoding it; a file given is closed.

    Raises:
        OSError, SyntaxError, ValueError, EOFError, DecompressionBombError: See `decode_image`.
    """
    if isinstance(file, bytes):
        stream = io.BytesIO(file)
    else:
        stream = open_regular(file) if isinstance(file, str | os.PathLike) else file
    with stream, _recognised(stream) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(
                f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded"
            )
        yield image


def _recognised(stream: io.BufferedIOBase) -> Image.Image:
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:  # which names the stream as Python prints it
        formats = ", ".join(FORMATS)
        raise UnidentifiedImageError(f"not an image in one of the formats {formats}") from error


class _Budget:
    """Lets threads decode at once as many pixels as fit the memory; one image always may."""

    def __init__(self, pixels: int):
        self._free, self._pixels = threading.Condition(), pixels
        self._left = pixels

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._pixels)
        with self._free:
            self._free.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._free:
                self._left += pixels
                self._free.notify_all()


# While one with transparency is converted, a pixel takes up to 20 bytes.
_IN_MEMORY = _Budget(MAX_PIXELS)


def split_by_suffix(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Sorted names of images, and of other files."""
    names = sorted(names)
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    return images, [name for name in names if not name.lower().endswith(SUFFIXES)]


def note_of_others(names: Sequence[str]) -> str:
    """What to say of files that are left out for their suffix, after the folder's name; or ""."""
    if not names:
        return ""
    found = sorted({os.path.splitext(name)[1].lower() or "none" for name in names})
    return (
        f": {len(names)} files of other suffixes ({', '.join(found[:10])}) are left out, the first "
        f"being {names[0]}; images are {', '.join(SUFFIXES)}, convert those that should count"
    )


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image as `decode_image` gives it, from its header alone."""
    # Of a TIFF, PIL turns the size itself; of a PNG without it here, getexif decodes the pixels.
    exif = image.getexif() if "exif" in image.info and image.format != "TIFF" else {}
    turned = exif.get(_ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def adm_center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Scale until the result is just covered, then cut its size from the middle.

    The scaling of ADM (Dhariwal & Nichol 2021, guided-diffusion `image_datasets.py`), which DiT
    and its published figures use: halve with a box filter while the shorter side is at least
    twice the target, then resize bicubically. Here for rectangles, too, of which the side that is
    covered last stands for the shorter one.

    Args:
        image: An image of any size, in a mode PIL can resample ("L", "RGB").
        size: Of the result in pixels: a side, or (height, width).
    """
    height, width = as_size(size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = round(image.width * scale), round(image.height * scale)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def crop_pixels(images: UInt8[np.ndarray, "n h w c"], size: Size) -> UInt8[np.ndarray, "n _h _w c"]:
    """`adm_center_crop` of decoded images of 1 or 3 channels."""
    cropped = []
    for pixels in images:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        cropped.append(np.asarray(adm_center_crop(image, size)))
    stacked = np.stack(cropped)
    return stacked[..., None] if images.shape[-1] == 1 else stacked


def as_size(image_size: Size) -> tuple[int, int]:
    """(height, width) of a side, or of itself."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def size_text(size: Size) -> str:
    """'256' of a square, else 'HEIGHT x WIDTH'."""
    height, width = as_size(size)
    return f"{height}" if height == width else f"{height} x {width} (height x width)"


def validate_resize(resize: str, image_size: Size | None, channels: int) -> None:
    """Check the options that sources of images have in common.

    Raises:
        ValueError: `resize` is unknown or lacks its `image_size`, or `channels` is not 1 or 3.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {list(RESIZES)}, not {resize!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {channels!r}")
    if image_size is not None and (len(as_size(image_size)) != 2 or min(as_size(image_size)) < 1):
        raise ValueError(
            f"image_size must be a positive number of pixels, or two, not {image_size!r}"
        )
    if resize == "adm" and image_size is None:
        raise ValueError("resize='adm' needs image_size, the side of the images in pixels")


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8-bit grey or RGB."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers, of unknown range; save 8 bits")
    if image.mode.startswith("I"):
        # PIL clips 16-bit grey to 255 instead of scaling it.
        values = np.asarray(image).clip(0, 65535).astype(np.uint16)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)
