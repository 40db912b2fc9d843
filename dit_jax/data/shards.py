"""Files of sets that are written in shards: complete or not there at all, and checked when read.

A set is a folder of .npy files and a header that names them. Each file is written beside its
place, flushed to the disk and moved there; the header follows the files it names. So a program
killed at any moment leaves a folder whose header is true.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from dit_jax.untrusted import (
    Fields,
    FileRefusedError,
    check_file_name,
    check_regular,
    check_within,
    map_array,
    read_json,
    shown,
)

HEADER, UNFINISHED = "header.json", "unfinished.json"
# What a header may say: more, and its labels alone would fill the memory.
MAX_EXAMPLES, MAX_CLASSES, MAX_SIDE = 10**8, 10**6, 2**14
_MAX_RECORD_BYTES = 2**28
_MAX_NPY_HEADER = 2**14


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
    """Checks that a file is what the header says, and lies in the folder.

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
    file = folder / check_file_name(stored.name, folder / HEADER)
    if not file.exists():
        raise FileNotFoundError(f"shard {file} is missing. {remedy.capitalize()}.")
    check_within(file, folder)
    check_regular(file)
    least = math.prod(shape) * dtype.itemsize
    if not least < stored.bytes <= least + _MAX_NPY_HEADER:
        raise ValueError(
            f"{folder / HEADER} contradicts itself: {stored.bytes} bytes for {stored.name}, which "
            f"holds {dtype}{list(shape)}. {remedy.capitalize()}."
        )
    found = file.stat().st_size
    if found != stored.bytes:
        raise ValueError(
            f"shard {file} is truncated or damaged: {found} bytes instead of {stored.bytes}. Copy "
            f"it again, or {remedy}."
        )
    array = map_array(file)
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


def read_header(path: Path, names: Sequence[str], format_: str, version: int) -> Fields:
    """The fields of a set's header, whose format, version and names of fields are checked.

    Args:
        path: The file.
        names: Of all fields but "format" and "version".
        format_: What the field "format" must be.
        version: What the field "version" must be.

    Raises:
        ValueError: Not such a file, of another version, or with missing or unknown fields.
        OSError: It cannot be read.
    """
    content = read_json(path)
    found = content.pop("format", None), content.pop("version", None)
    if found[0] != format_:
        raise ValueError(
            f"{path} is not the header of a set of {format_.rpartition('.')[2]}: its format is "
            f"{shown(found[0])}; expected {format_!r}"
        )
    if found != (format_, version):
        raise ValueError(
            f"{path} has format {format_!r} version {shown(found[1])}; this code reads version "
            f"{version}. Write the set again."
        )
    fields = Fields(content, path)
    fields.check_names(list(names))
    return fields


def read_stored_file(fields: Fields, name: str, size: str, sha256: str) -> StoredFile:
    """A file as a header names it, in three of its fields."""
    stored = StoredFile(
        check_file_name(fields.text(name), fields.where), fields.count(size), fields.text(sha256)
    )
    if not re.fullmatch("[0-9a-f]{64}", stored.sha256):
        raise FileRefusedError(f"{fields.where}: {sha256} is no SHA-256")
    return stored


def check_sizes(
    path: Path, what: str, record: Sequence[int], counts: Sequence[int], total: int
) -> None:
    """Checks what a header says of its examples before a shard is opened.

    Args:
        path: The header.
        what: What it counts, for the message.
        record: Shape of one example.
        counts: Examples of each shard.
        total: Examples by the header's own count.

    Raises:
        FileRefusedError: One example is absurdly large, or the counts contradict each other.
    """
    if 4 * math.prod(record) > _MAX_RECORD_BYTES:
        raise FileRefusedError(f"{path}: one example of shape {list(record)} is beyond any use")
    if sum(counts) != total:
        raise FileRefusedError(
            f"{path}: the header counts {total} {what}, its shards {sum(counts)}"
        )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
