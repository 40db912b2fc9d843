"""Files of sets that are written in shards: complete or not there at all, and checked when read.

A set is a folder of .npy files and a header that names them. Each file is written beside its
place, flushed to the disk and moved there; the header follows the files it names. So a program
killed at any moment leaves a folder whose header is true.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

HEADER, UNFINISHED = "header.json", "unfinished.json"


@dataclass(frozen=True)
class StoredFile:
    """One file of a set, by name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


def save_array(folder: Path, name: str, array: Shaped[np.ndarray, ...]) -> StoredFile:
    """Writes an array as FOLDER/NAME; it is safe on disk when this returns."""
    temporary = folder / f"{name}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    stored = StoredFile(name, temporary.stat().st_size, file_sha256(temporary))
    os.replace(temporary, folder / name)
    return stored


def save_text(path: Path, text: str) -> None:
    """Writes a text file; it is safe on disk when this returns."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def validate_file(
    folder: Path,
    stored: StoredFile,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    remedy: str,
    checksum: bool = False,
) -> None:
    """Checks that a file is what the header says.

    Args:
        folder: of the set.
        stored: the file, as written.
        shape: of its array.
        dtype: of its array.
        remedy: how to make the set anew, for the message: "extract the latents again".
        checksum: read the whole file and compare its SHA-256.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is truncated or damaged, or holds something else.
    """
    file = folder / stored.name
    if not file.is_file():
        raise FileNotFoundError(f"shard {file} is missing. {remedy.capitalize()}.")
    found = file.stat().st_size
    if found != stored.bytes:
        raise ValueError(
            f"shard {file} is truncated or damaged: {found} bytes instead of {stored.bytes}. Copy "
            f"it again, or {remedy}."
        )
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    if (array.shape, array.dtype) != (shape, dtype):
        raise ValueError(
            f"shard {file} holds {array.dtype}{list(array.shape)}, the header says "
            f"{dtype}{list(shape)}"
        )
    if checksum and file_sha256(file) != stored.sha256:
        raise ValueError(
            f"shard {file} is damaged: its SHA-256 differs from the header's. Copy it again, or "
            f"{remedy}."
        )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
