"""Images inside tar shards: which shards a pattern means, and reading their files in any order."""

from __future__ import annotations

import glob
import io
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, Int32, Int64

from dit_jax.data.image_files import ImageFiles
from dit_jax.data.image_listing import find_split
from dit_jax.quantities import counted
from dit_jax.untrusted import open_regular, walk_files

SUFFIX = ".tar"
_MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_EXAMPLES = "'pictures-{00000..00012}.tar', 'pictures-*.tar' or a folder of .tar files"


def find_shards(path: str, split: str) -> tuple[list[Path], bool]:
    """The shards of a split in their order, and whether the split is one on disk.

    Args:
        path: a folder of .tar files, or with such folders train/ and test/; a file; or a pattern
            with ranges ({00000..00012}), alternatives ({a,b}) and globs, in which '{split}'
            becomes the split.
        split: "train" or "test".

    Raises:
        FileNotFoundError: There are none, or one of a range is missing.
        ValueError: Braces without a meaning, a file that is no .tar, or one named twice.
    """
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(f"{path} is no file: copy the shards here first, and give {_EXAMPLES}")
    pattern = os.path.expanduser(path)
    if os.path.isdir(pattern):
        root, _, on_disk = find_split(Path(pattern), split)
        names = (os.path.join(f, name) for f, files in walk_files(root) for name in files)
        shards = sorted(root / name for name in names if name.lower().endswith(SUFFIX))
        if not shards:
            raise FileNotFoundError(f"{root} holds no {SUFFIX} files: expected {_EXAMPLES}")
        return shards, on_disk
    on_disk = "{split}" in pattern
    shards = _matches(pattern.replace("{split}", split))
    wrong = next((shard for shard in shards if shard.suffix.lower() != SUFFIX), None)
    if wrong is not None:
        raise ValueError(f"{wrong} is no {SUFFIX} file: expected {_EXAMPLES}")
    if len(set(shards)) != len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise ValueError(f"{path} names {twice} more than once")
    return shards, on_disk


def _matches(pattern: str) -> list[Path]:
    if os.path.exists(pattern):
        return [Path(pattern)]
    found, missing = [], []
    for name in _expanded(pattern):
        matching = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        found += matching
        missing += [name] if not any(map(os.path.exists, matching)) else []
    if missing:
        more = f", and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(
            f"{counted(len(missing), 'shard')} of {pattern} missing: {', '.join(missing[:3])}"
            f"{more}. Expected {_EXAMPLES}"
        )
    return [Path(name) for name in found]


def _expanded(pattern: str) -> list[str]:
    """The names that braces stand for, in their order."""
    pieces = _BRACES.split(pattern)  # texts and, in between, what stands in braces
    if any(brace in text for text in pieces[::2] for brace in "{}"):
        raise ValueError(f"{pattern}: braces that are not closed, or in one another")
    choices = [[piece] if i % 2 == 0 else _choices(piece) for i, piece in enumerate(pieces)]
    if np.prod([len(choice) for choice in choices], dtype=float) > _MAX_SHARDS:
        raise ValueError(f"{pattern} stands for more than {_MAX_SHARDS} shards")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    if found := _RANGE.fullmatch(inside):
        first, last = found.groups()
        if int(last) - int(first) >= _MAX_SHARDS:
            raise ValueError(f"{{{inside}}} stands for more than {_MAX_SHARDS} shards")
        if int(first) <= int(last):
            padded = any(end.startswith("0") and len(end) > 1 for end in (first, last))
            width = max(len(first), len(last)) if padded else 0
            return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    elif "," in inside:
        return inside.split(",")
    raise ValueError(
        f"{{{inside}}}: expected a range from the lower to the higher number, as {{00000..00012}}, "
        "or alternatives, as {a,b}"
    )


class ShardFiles(ImageFiles):
    """Files inside uncompressed tar archives.

    Args:
        shards: the archives.
        of_shard: which of them each file is in.
        offsets: where its first byte lies in there.
        sizes: in bytes.
        names: what the archive calls it, for messages.
    """

    place = "the shards"

    def __init__(
        self,
        shards: Sequence[Path],
        of_shard: Int32[np.ndarray, " n"],
        offsets: Int64[np.ndarray, " n"],
        sizes: Int64[np.ndarray, " n"],
        names: Sequence[str],
    ):
        self._shards = [str(shard) for shard in shards]
        self.root = Path(os.path.commonpath([os.path.dirname(s) or "." for s in self._shards]))
        stats = [os.stat(shard) for shard in self._shards]
        self._stats = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        self._of_shard, self._offsets, self._sizes = of_shard, offsets, sizes
        # Two arrays instead of a list: a million names pickle in one piece.
        written = [os.fsencode(name) for name in names]
        self._names = np.frombuffer(b"".join(written), np.uint8)
        self._ends = np.cumsum([len(name) for name in written], dtype=np.int64)

    def __len__(self) -> int:
        """How many."""
        return len(self._offsets)

    def _member(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        return os.fsdecode(self._names[start : self._ends[number]].tobytes())

    def name(self, number: int) -> str:
        """A file's name, after that of its shard relative to the root."""
        shard = os.path.relpath(self._shards[self._of_shard[number]], self.root)
        return f"{shard}: {self._member(number)}"

    def describe(self, number: int) -> str:
        """A file's name, after that of its shard."""
        return f"{self._shards[self._of_shard[number]]}: {self._member(number)}"

    def stats(self) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(sizes in bytes, times of the shards' last change in nanoseconds)."""
        times = np.array([time for _, time in self._stats], np.int64)
        return self._sizes, times[self._of_shard]

    def open(self, number: int) -> io.BufferedReader:
        """Open one for reading.

        Raises:
            OSError: The shard cannot be read, or was changed.
        """
        shard = self._of_shard[number]
        file = open_regular(self._shards[shard])
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != self._stats[shard]:
            file.close()
            raise OSError(f"{self._shards[shard]} was changed after it was opened: begin anew")
        return io.BufferedReader(
            _Section(file, int(self._offsets[number]), int(self._sizes[number]))
        )

    def take(self, numbers: Int[np.ndarray, " k"]) -> ShardFiles:
        """Some of them, in this order."""
        arrays = (array[numbers] for array in (self._of_shard, self._offsets, self._sizes))
        return ShardFiles(
            [Path(shard) for shard in self._shards],
            *arrays,
            [self._member(int(number)) for number in numbers],
        )


class _Section(io.RawIOBase):
    """A part of a file, as a file of its own; closing it closes the file."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}, before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
