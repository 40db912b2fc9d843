"""Zip archives whose directory is checked before it is believed."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from dit_jax.untrusted.files import FileRefusedError, open_regular

MAX_DIRECTORY_BYTES = 16 * 2**20  # over 100,000 entries
# Arrays of images and weights shrink by less; below the second figure it does not matter.
MAX_INFLATION = 20
_MIN_INFLATED = 256 * 2**20
_ENCRYPTED = 0x1

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64_BYTES = 20
_MAX_COMMENT = 65535


@contextlib.contextmanager
def open_zip(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive whose directory is of a sound size and names each entry once.

    Raises:
        FileRefusedError: It is none, or damaged; also while it is read.
        OSError: It cannot be opened.
    """
    with open_regular(path) as file:
        _check_directory(path, file)
        try:
            with zipfile.ZipFile(file) as archive:
                _check_entries(path, archive.infolist())
                yield archive
        # zipfile and zlib raise nearly anything for damaged archives.
        except (FileRefusedError, MemoryError, GeneratorExit):
            raise
        except (zipfile.BadZipFile, zipfile.zlib.error, EOFError, NotImplementedError) as error:
            raise FileRefusedError(
                f"{os.fspath(path)} is truncated or damaged, or no zip archive: {error}"
            ) from error
        except (RuntimeError, struct.error, UnicodeError, OverflowError) as error:
            raise FileRefusedError(
                f"{os.fspath(path)} is truncated or damaged, or no zip archive"
            ) from error


def _check_directory(path: str | os.PathLike, file: BinaryIO) -> None:
    """Refuse an archive whose directory alone would fill the memory."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END.size - _MAX_COMMENT))
    tail_start = file.tell()
    found = (tail := file.read()).rfind(b"PK\5\6")
    if found < 0 or len(tail) - found < _END.size:
        raise FileRefusedError(f"{os.fspath(path)} is truncated, or no zip archive")
    directory = _END.unpack_from(tail, found)[5]
    before = tail_start + found - _LOCATOR64_BYTES
    if before >= _END64.size:
        file.seek(before - _END64.size)
        record = file.read(_END64.size + 4)
        if record[_END64.size :] == b"PK\6\7":
            directory = max(_END64.unpack_from(record)[8], directory * (directory < 2**32 - 1))
    if directory > MAX_DIRECTORY_BYTES:
        raise FileRefusedError(
            f"{os.fspath(path)} has a directory of {directory} bytes; at most "
            f"{MAX_DIRECTORY_BYTES} are read"
        )
    file.seek(0)


def _check_entries(path: str | os.PathLike, entries: list[zipfile.ZipInfo]) -> None:
    size = os.stat(path).st_size
    names: set[str] = set()
    for entry in entries:
        # Readers differ in whether capitals count, and in which of two they take.
        if entry.filename.lower() in names:
            raise FileRefusedError(f"{os.fspath(path)} has two records of one name; it is damaged")
        names.add(entry.filename.lower())
        stored = entry.compress_type == zipfile.ZIP_STORED
        if entry.flag_bits & _ENCRYPTED:
            raise FileRefusedError(f"{os.fspath(path)} is encrypted; unpack it")
        if entry.compress_size > size or (stored and entry.file_size != entry.compress_size):
            raise FileRefusedError(
                f"{os.fspath(path)} is truncated or damaged: a record's size is not true"
            )
    if sum(entry.compress_size for entry in entries) > size:
        raise FileRefusedError(f"{os.fspath(path)} is damaged: its records lie over one another")


def check_inflation(
    path: str | os.PathLike, entries: Iterable[zipfile.ZipInfo], most: int = MAX_INFLATION
) -> None:
    """Refuse records that would grow out of all proportion when they are decompressed.

    Args:
        path: The archive.
        entries: The records that will be held in memory together.
        most: How many times as large as the archive they may become.

    Raises:
        FileRefusedError: They become larger than that, and than 256 MiB.
    """
    inflated = sum(entry.file_size for entry in entries)
    size = os.stat(path).st_size
    if inflated > max(most * size, _MIN_INFLATED):
        raise FileRefusedError(
            f"{os.fspath(path)} has {size} bytes and would become {inflated} by decompression, "
            f"more than {most} times as many, which no real data does; if it is, save it "
            "uncompressed"
        )
