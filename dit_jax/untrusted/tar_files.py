"""Headers of tar archives: where its files lie in an archive, without unpacking any."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from dit_jax.untrusted.files import FileRefusedError, open_regular, shown

_BLOCK = tarfile.BLOCKSIZE
_MAX_NAME = 4096  # bytes, of a path on Linux
_MAX_EXTENDED = 2**20  # bytes, of a header of a file's further properties
_MAX_PADDING = 2**20  # bytes, of what tar fills an archive up with
_ANEW = ". Write or fetch it anew"
_REFUSED = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_EXTENDING = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\3\4": "zip",
}


@dataclass(frozen=True)
class TarEntry:
    """A file of an archive.

    Attributes:
        name: what the archive calls it. Nothing is ever written to a path of this name.
        offset: where its first byte lies in the archive.
        size: in bytes; all of them are in the archive.
    """

    name: str
    offset: int
    size: int


def read_tar(path: str | os.PathLike) -> Iterator[TarEntry]:
    """The files of an uncompressed tar archive (ustar, GNU or pax), in its order; no folders.

    Headers alone are read, each once.

    Raises:
        FileRefusedError: It is no tar archive, is compressed, truncated or damaged; or holds links,
            devices, pipes or sparse files.
        OSError: It cannot be opened.
    """
    with open_regular(path) as file:
        yield from _Reader(os.fspath(path), file).entries()


class _Reader:
    def __init__(self, path: str, file: BinaryIO):
        self._path, self._file = path, file
        self._total = os.fstat(file.fileno()).st_size

    def _refusal(self, text: str) -> FileRefusedError:
        return FileRefusedError(f"{self._path} {text}")

    def entries(self) -> Iterator[TarEntry]:
        position, extended = 0, {}
        while (header := self._header(position)) is not None:
            data, extends = position + _BLOCK, header.type in _EXTENDING
            size = header.size if extends else int(extended.get("size", header.size))
            name = header.name if extends else extended.get("path", header.name)
            if header.isdir():
                size = 0  # whatever it says: nothing follows
            self._check(header.type, name, size, data)
            if header.type == tarfile.XGLTYPE:  # of all files: dates and comments
                self._extension(header.type, data, size)
            elif extends:
                extended |= self._extension(header.type, data, size)
            else:
                if header.type in tarfile.REGULAR_TYPES:
                    yield TarEntry(name, data, size)
                extended = {}
            # Forwards by at least a block: reading ends, whatever sizes say.
            position = data + -(-size // _BLOCK) * _BLOCK
        if extended:
            raise self._refusal(f"is damaged: it ends between a header and its file{_ANEW}")

    def _header(self, position: int) -> tarfile.TarInfo | None:
        """The header at a position, None at the archive's end."""
        self._file.seek(position)
        block = self._file.read(_BLOCK)
        if len(block) < _BLOCK:
            if position == 0 and len(block) < 8:
                raise self._refusal("is empty: expected a tar archive")
            raise self._refusal(
                f"is truncated: after {position} of at least {position + 2 * _BLOCK} bytes it ends "
                f"without the two blocks of zeros of a complete tar archive{_ANEW}"
            )
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            self._check_end(position)
            return None
        except (tarfile.HeaderError, ValueError, IndexError) as error:
            compressed = next((n for m, n in _COMPRESSED.items() if block.startswith(m)), None)
            if position == 0 and compressed:
                raise self._refusal(
                    f"is compressed ({compressed}): expected a plain tar archive, whose files can "
                    "be read in any order. Decompress it; images inside are compressed anyway"
                ) from None
            where = "no tar archive" if position == 0 else f"damaged at byte {position}"
            raise self._refusal(f"is {where}: {error}") from None

    def _check_end(self, position: int) -> None:
        """Refuse what would be left out: anything but zeros after the end."""
        self._file.seek(position)
        if self._total - position > _MAX_PADDING or any(self._file.read(_MAX_PADDING)):
            raise self._refusal(
                f"goes on after its end at byte {position}, as archives do that were joined by cat "
                "or damaged. Write it anew, or give its parts as files of their own"
            )
        if self._total - position < 2 * _BLOCK:
            raise self._refusal(
                f"is truncated: it ends within its last two blocks, of zeros{_ANEW}"
            )

    def _check(self, kind: bytes, name: str, size: int, data: int) -> None:
        label = shown(name)
        if kind in _REFUSED or kind == tarfile.GNUTYPE_LONGLINK:
            found = _REFUSED.get(kind, "a link")
            raise self._refusal(
                f"holds {label}, {found}: expected files and folders. Pack what it leads to "
                "(tar --dereference --hard-dereference)"
            )
        if kind not in (*tarfile.SUPPORTED_TYPES, *_EXTENDING):
            raise self._refusal(f"holds {label} of the unknown type {kind!r}")
        if not 0 <= size <= self._total:
            raise self._refusal(
                f"is truncated or damaged: {label} is to have {size} bytes, the archive has "
                f"{self._total}{_ANEW}"
            )
        if data + size > self._total:
            raise self._refusal(
                f"is truncated: it ends within {label}, {data + size - self._total} bytes of which "
                f"are missing{_ANEW}"
            )
        if len(os.fsencode(name)) > _MAX_NAME:
            raise self._refusal(f"holds a name of more than {_MAX_NAME} bytes, {label}")

    def _extension(self, kind: bytes, data: int, size: int) -> dict[str, str]:
        """What a header before a file's own says of it: its whole name, its size."""
        if size > _MAX_EXTENDED:
            raise self._refusal(
                f"has a header of {size} bytes at byte {data}; at most {_MAX_EXTENDED} are read"
            )
        self._file.seek(data)
        content = self._file.read(size)
        if kind == tarfile.GNUTYPE_LONGNAME:
            return {"path": os.fsdecode(content.rstrip(b"\0"))}
        found, start = {}, 0
        while start < size:
            length, _, rest = content[start : start + 16].partition(b" ")
            end = start + int(length) if length.isdigit() else 0
            if end > size or end - start < 5 or not rest:
                raise self._refusal(f"is damaged: the extended header at byte {data} is none")
            record = content[start + len(length) + 1 : end].rstrip(b"\n")
            key, _, value = record.partition(b"=")
            start = end
            key = key.decode(errors="replace")
            if key.startswith("GNU.sparse") or (key in ("size", "path") and not value):
                raise self._refusal(f"has {shown(key)} in an extended header, which is not read")
            if key == "size" and (not value.isdigit() or len(value) > 18):
                raise self._refusal(f"is damaged: a size is {shown(os.fsdecode(value))}")
            if key in ("size", "path"):
                found[key] = os.fsdecode(value)
        return found
