"""Files and folders of results, each written whole or not at all: JSON, ADM .npz, PNG."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dit_jax.atomic import atomic_file, atomic_folder
from dit_jax.evaluation.images import AnyArray, to_uint8
from dit_jax.untrusted import check_regular, npz_names, read_npz, shown


def save_json(
    path: str | os.PathLike, record: Mapping[str, Any], *, overwrite: bool = False
) -> Path:
    """Writes a record as indented JSON, atomically.

    Raises:
        ValueError: The record holds NaN or infinity, which JSON has no word for.
        TypeError: It holds an object that JSON cannot express.
    """
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(text.encode())
    return Path(path)


def save_adm_npz(
    path: str | os.PathLike,
    images: AnyArray,
    labels: AnyArray | None = None,
    *,
    rounding: str = "nearest",
    overwrite: bool = False,
) -> Path:
    """Writes the .npz of ADM's evaluator (openai/guided-diffusion): `arr_0` images, `arr_1` labels.

    Args:
        path: Where to; conventionally ending in .npz.
        images: uint8 or [-1, 1] images [n, h, w, c]. ADM's evaluator itself wants c = 3.
        labels: Integer labels [n], or None to leave `arr_1` out.
        rounding: How floating point becomes bytes, see `to_uint8`.
        overwrite: Replace an existing file instead of refusing.
    """
    arrays = [to_uint8(images, rounding)]
    if labels is not None:
        arrays.append(_checked_labels(labels, len(arrays[0])))
    with atomic_file(path, overwrite=overwrite) as file:
        np.savez(file, *arrays)
    return Path(path)


def load_adm_npz(
    path: str | os.PathLike,
) -> tuple[UInt8[np.ndarray, "n h w c"], np.ndarray | None]:
    """Reads images and, where present, labels from an ADM .npz. Nothing in the file is executed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not an .npz, damaged, or without uint8 images [n, h, w, c] in `arr_0`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    check_regular(path)
    try:
        arrays = read_npz(path, ("arr_0", "arr_1"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npz of plain arrays: {error}") from error
    if "arr_0" not in arrays:
        found = ", ".join(shown(name) for name in npz_names(path)[:8])
        raise ValueError(f"{path} has no images: expected the array 'arr_0', found [{found}]")
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"{path}: expected 'arr_0' as uint8 [n, height, width, channels], got {images.dtype} "
            f"{list(images.shape)}"
        )
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{path}: {len(images)} images but {len(labels)} labels")
    return images, labels


def save_png_folder(
    path: str | os.PathLike,
    images: AnyArray,
    labels: AnyArray | None = None,
    *,
    rounding: str = "nearest",
    overwrite: bool = False,
) -> Path:
    """Writes each image as a PNG into a new folder, which appears once all of them are written.

    Files are 000000.png, 000001.png, ... in the order given. With labels they lie in one sub-folder
    per class (0, 1, ..., zero-padded so that their sorted order is that of the labels), as an
    image-folder data set is laid out.

    Args:
        path: The folder to make.
        images: uint8 or [-1, 1] images [n, h, w, c], c = 1, 3 or 4.
        labels: Integer labels [n], or None for a flat folder.
        rounding: How floating point becomes bytes, see `to_uint8`.
        overwrite: Replace an existing folder (with all it holds) instead of refusing.
    """
    pixels = to_uint8(images, rounding)
    folders: Sequence[str] = [""] * len(pixels)
    if labels is not None:
        checked = _checked_labels(labels, len(pixels))
        width = len(str(checked.max(initial=0)))
        folders = [f"{label:0{width}d}" for label in checked]
    with atomic_folder(path, overwrite=overwrite) as temporary:
        for name in set(folders):
            (temporary / name).mkdir(exist_ok=True)
        for index, (pixel, folder) in enumerate(zip(pixels, folders, strict=True)):
            to_pil(pixel).save(temporary / folder / f"{index:06d}.png", format="PNG")
    return Path(path)


def to_pil(image: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """One image as a PIL image: 1 channel grey, 3 RGB, 4 RGBA."""
    channels = image.shape[-1]
    if channels not in (1, 3, 4):
        raise ValueError(
            f"an image file holds 1, 3 or 4 channels, got {channels}; latents must be decoded first"
        )
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if channels == 1 else image))


def _checked_labels(labels: AnyArray, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"expected {count} integer labels, one an image; got {labels.dtype} "
            f"of shape {labels.shape}"
        )
    if count and labels.min() < 0:
        raise ValueError(f"labels must not be negative, got {labels.min()}")
    return labels.astype(np.int64)
