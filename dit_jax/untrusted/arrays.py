"""NumPy's files, read after their headers are known to fit them, and never by a pickle."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Collection
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped

from dit_jax.untrusted.files import FileRefusedError, open_regular
from dit_jax.untrusted.zip_files import check_inflation, open_zip

_KINDS = "biufcSU"  # numbers and strings
_MAX_DIMENSIONS = 32
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npy_header(
    file: BinaryIO, where: str | os.PathLike
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and type of a .npy file that is being read.

    Raises:
        FileRefusedError: It is none, or holds anything but numbers and strings.
    """
    try:
        shape, fortran, dtype = _READERS[np.lib.format.read_magic(file)](file)
    except (OSError, MemoryError):
        raise
    # NumPy's messages repeat what is in the file.
    except Exception:
        raise FileRefusedError(f"{os.fspath(where)} is not a plain .npy array") from None
    if dtype.kind not in _KINDS:
        raise FileRefusedError(
            f"{os.fspath(where)} holds Python objects or records, which are not read; expected "
            "numbers"
        )
    if len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise FileRefusedError(f"{os.fspath(where)} has an impossible shape; it is damaged")
    return shape, fortran, dtype


def map_array(path: str | os.PathLike) -> Shaped[np.ndarray, ...]:
    """Map a .npy file into memory, read-only.

    Raises:
        FileRefusedError: It is none, of another size than its header says, or holds anything but
            numbers and strings.
        OSError: It cannot be opened.
    """
    with open_regular(path) as file:
        shape, fortran, dtype = read_npy_header(file, path)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
        expected = offset + math.prod(shape) * dtype.itemsize
        if expected != size:
            raise FileRefusedError(
                f"{os.fspath(path)} is truncated or damaged: {size} bytes, its header says "
                f"{expected}"
            )
        if offset == size:
            return np.empty(shape, dtype)
        order = "F" if fortran else "C"
        # A plain view indexes faster than np.memmap does.
        return np.asarray(np.memmap(file, dtype, "r", offset, shape, order))


def npz_names(path: str | os.PathLike) -> list[str]:
    """Names of the arrays of an .npz, in the order of the file.

    Raises:
        FileRefusedError: It is none, or damaged.
        OSError: It cannot be opened.
    """
    with open_zip(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(
    path: str | os.PathLike, names: Collection[str] | None = None
) -> dict[str, Shaped[np.ndarray, ...]]:
    """Read arrays of an .npz.

    Args:
        path: The file.
        names: The arrays wanted, as far as they are there; None for all.

    Raises:
        FileRefusedError: It is none or damaged, an array's size is not what its header says, it
            would grow out of all proportion, or holds anything but numbers and strings.
        OSError: It cannot be opened.
    """
    with open_zip(path) as archive:
        entries = {
            entry.filename.removesuffix(".npy"): entry
            for entry in archive.infolist()
            if entry.filename.endswith(".npy")
        }
        if names is not None:
            entries = {name: entries[name] for name in names if name in entries}
        check_inflation(path, entries.values())
        return {name: _read(archive, entry, path) for name, entry in entries.items()}


def _read(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: str | os.PathLike
) -> Shaped[np.ndarray, ...]:
    where = f"{os.fspath(path)}: the array {entry.filename.removesuffix('.npy')[:80]!r}"
    with archive.open(entry) as file:
        shape, fortran, dtype = read_npy_header(file, where)
        if file.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
            raise FileRefusedError(f"{where} is damaged: its size is not that of its header")
        array = np.empty(math.prod(shape), dtype)
        target = memoryview(array.view(np.uint8)) if array.nbytes else memoryview(b"")
        position = 0
        while position < len(target):
            count = file.readinto(target[position : position + 2**24])
            if not count:
                raise FileRefusedError(f"{where} is truncated")
            position += count
        file.read(1)  # at the end the checksum is compared
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
