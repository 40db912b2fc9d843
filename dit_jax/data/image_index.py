"""Which files of a folder are readable images, and their sizes: found once, kept in a file."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from dit_jax.atomic import atomic_file
from dit_jax.data.image_files import ImageFiles
from dit_jax.data.images import (
    DECODE_ERRORS,
    decode_image,
    open_image,
    upright_size,
)
from dit_jax.untrusted import parse_json, read_npz

logger = logging.getLogger(__name__)

VERIFY_MODES = ("fast", "full")

# Part of the index file's key: raise it when the check itself changes.
_VERSION = 2
_LARGE = 20_000


@dataclass(frozen=True)
class ImageIndex:
    """The result of checking a list of files.

    Attributes:
        sizes: (width, height) in pixels, upright, (0, 0) for unreadable files.
        byte_counts: The files' sizes.
        reasons: Why a file is unreadable, by its position in the list.
    """

    sizes: Int32[np.ndarray, "n 2"]
    byte_counts: Int64[np.ndarray, " n"]
    reasons: dict[int, str]


def validate_verify(verify: str) -> None:
    """Raise a ValueError unless `verify` is a known mode."""
    if verify not in VERIFY_MODES:
        raise ValueError(f"verify must be one of {list(VERIFY_MODES)}, not {verify!r}")


def check_images(files: ImageFiles, verify: str, index_cache: str | None = None) -> ImageIndex:
    """Check every file, or recall the last check of the very same files.

    Args:
        files: The images.
        verify: "fast" (headers and ends) or "full" (decode).
        index_cache: Path of the index file; default .dit_jax_index.npz in their root, if writable.
    """
    byte_counts, times = files.stats()
    key = _key(files, byte_counts, times, verify)
    cache = Path(index_cache).expanduser() if index_cache else files.root / ".dit_jax_index.npz"
    recalled = _recall(cache, key, len(files))
    if recalled is not None:
        return ImageIndex(recalled[0], byte_counts, recalled[1])

    if len(files) > _LARGE:
        logger.info("checking the %d images in %s, once", len(files), files.root)
    workers = min(32, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda number: _check(files, number, verify), range(len(files))))
    sizes = np.array([size for size, _ in results], np.int32).reshape(len(files), 2)
    reasons = {i: reason for i, (_, reason) in enumerate(results) if reason}
    _keep(cache, key, sizes, reasons, required=index_cache is not None)
    return ImageIndex(sizes, byte_counts, reasons)


def _check(files: ImageFiles, number: int, verify: str) -> tuple[tuple[int, int], str]:
    """Return (size, "") or ((0, 0), what is wrong)."""
    try:
        with open_image(files.open(number)) as image:
            size, image_format = upright_size(image), image.format
        # Decoding is what costs; a file with a proper end is taken to be whole.
        if verify == "full" or not _has_proper_end(files.open(number), image_format):
            decode_image(files.open(number), channels=3)
    except DECODE_ERRORS as error:
        return (0, 0), str(error) or type(error).__name__
    return size, ""


def _has_proper_end(file: io.BufferedReader, image_format: str) -> bool:
    """Tell whether a file ends as its format demands, so that it was not cut short."""
    with file:
        head = file.read(12)
        byte_count = file.seek(0, os.SEEK_END)
        file.seek(max(0, byte_count - 64))
        tail = file.read()
    if image_format == "PNG":
        return tail[-12:-4] == b"\0\0\0\0IEND"
    if image_format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= byte_count
    if image_format != "JPEG":
        return False
    return tail.rstrip(b"\0\r\n").endswith(b"\xff\xd9")


def _key(files: ImageFiles, byte_counts: np.ndarray, times: np.ndarray, verify: str) -> str:
    digest = hashlib.sha256(f"{_VERSION} {verify}".encode())
    names = "\0".join(files.name(number) for number in range(len(files)))
    digest.update(names.encode(errors="surrogateescape"))
    digest.update(byte_counts.tobytes() + times.tobytes())
    return digest.hexdigest()


def _recall(cache: Path, key: str, count: int) -> tuple[np.ndarray, dict[int, str]] | None:
    try:
        content = read_npz(cache, ("key", "sizes", "reasons"))
        if str(content["key"]) != key:
            return None
        found = parse_json(str(content["reasons"]), cache)
        sizes, reasons = content["sizes"], {int(i): str(reason) for i, reason in found.items()}
        if (sizes.shape, sizes.dtype) != ((count, 2), np.int32) or not set(reasons) <= set(
            range(count)
        ):
            raise ValueError("its arrays are not those of an index")
        return sizes, reasons
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged or foreign file only costs a new check
        logger.warning("ignoring the unreadable index file %s: %s", cache, error)
        return None


def _keep(
    cache: Path, key: str, sizes: np.ndarray, reasons: dict[int, str], *, required: bool
) -> None:
    try:
        os.stat(cache.parent)  # a folder that is not there is a mistake
        # Several processes may do this at once: each writes its own file and renames it into place.
        with atomic_file(cache, overwrite=True) as file:
            np.savez(file, key=np.array(key), sizes=sizes, reasons=np.array(json.dumps(reasons)))
    except OSError as error:
        if required:
            raise OSError(
                f"cannot write the index file index_cache={str(cache)!r}: {error}. Give a path "
                f"in an existing, writable folder."
            ) from error
        logger.info("not keeping an index of %s: %s", cache.parent, error)
