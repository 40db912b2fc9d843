"""Where the bytes of images lie: in files of a folder, or in what else is read like that."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int64

from dit_jax.untrusted import open_regular


class ImageFiles(ABC):
    """Files by number. Cheap to pickle, and read by several threads at once.

    Attributes:
        root: the folder that messages name, and beside whose content an index is kept.
        place: what holds the files, for messages, as 'the folder'.
    """

    root: Path
    place: str

    @abstractmethod
    def __len__(self) -> int:
        """How many."""

    @abstractmethod
    def name(self, number: int) -> str:
        """A file's name, relative to the root."""

    @abstractmethod
    def stats(self) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(sizes in bytes, times of their last change in nanoseconds)."""

    @abstractmethod
    def open(self, number: int) -> io.BufferedReader:
        """Open one for reading.

        Raises:
            OSError: It cannot be read, or is no longer what it was.
            ValueError: It is no regular file.
        """

    @abstractmethod
    def take(self, numbers: Int[np.ndarray, " k"]) -> ImageFiles:
        """Some of them, in this order."""

    def describe(self, number: int) -> str:
        """A file's name for messages."""
        return os.path.join(self.root, self.name(number))


class FolderFiles(ImageFiles):
    """Files of a folder.

    Args:
        root: the folder.
        names: the files' paths, relative to it.
    """

    place = "the folder"

    def __init__(self, root: Path, names: Sequence[str]):
        self.root = root
        # One array of bytes instead of a list: a million paths pickle in one piece.
        self._names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        """How many."""
        return len(self._names)

    def name(self, number: int) -> str:
        """A file's path, relative to the folder."""
        return os.fsdecode(self._names[number])

    def stats(self) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(sizes in bytes, times of their last change in nanoseconds)."""
        stats = [os.stat(self.describe(number)) for number in range(len(self))]
        sizes = np.array([stat.st_size for stat in stats], np.int64)
        return sizes, np.array([stat.st_mtime_ns for stat in stats], np.int64)

    def open(self, number: int) -> io.BufferedReader:
        """Open one for reading."""
        return open_regular(self.describe(number))

    def take(self, numbers: Int[np.ndarray, " k"]) -> FolderFiles:
        """Some of them, in this order."""
        return FolderFiles(self.root, [os.fsdecode(name) for name in self._names[numbers]])
