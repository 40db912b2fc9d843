"""Opening regular files only, and none outside of the folder that was named."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_MAX_SHOWN = 80


class FileRefusedError(ValueError):
    """A file that is not read, because it is not what it should be; the message says why."""


def shown(value: Any) -> str:
    """A name or number out of a file for a message: printable, and never long."""
    # The representation of a long or nested value may itself take for ever.
    if isinstance(value, str):
        text = repr(value[: _MAX_SHOWN + 1])
    elif value is None or isinstance(value, bool | float):
        text = repr(value)
    elif isinstance(value, int):
        text = repr(value) if abs(value) < 10**_MAX_SHOWN else "a number of over 80 digits"
    elif isinstance(value, list | tuple) and len(value) <= 8:
        text = f"[{', '.join(shown(item) if _is_plain(item) else '...' for item in value)}]"
    else:
        text = f"a {type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else "..."
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def check_regular(path: str | os.PathLike) -> None:
    """Refuse what is there but is no regular file: reading a pipe or a device may never end.

    Raises:
        FileRefusedError: It is a folder, a named pipe, a socket or a device.
        OSError: It is not there, or may not be looked at.
    """
    _check_mode(path, os.stat(path).st_mode)


def _check_mode(path: str | os.PathLike, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise FileRefusedError(f"{os.fspath(path)} is not a regular file: it is {kind}")


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises:
        FileRefusedError: It is no regular file.
        OSError: It cannot be opened.
    """
    check_regular(path)
    # What was a file a moment ago may be a pipe now: opening it must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_file_name(name: Any, where: str | os.PathLike) -> str:
    """A file's name from a header or an index: a name and nothing else, so that it stays beside it.

    Args:
        name: What the header says.
        where: The header, for the message.

    Raises:
        FileRefusedError: It leads to another folder, or is no name.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or len(os.fsencode(name)) > 255
        or any(character in name for character in "/\\:")
        or not name.isprintable()
    ):
        raise FileRefusedError(
            f"{os.fspath(where)} names the shard {shown(name)}: shards must lie in its own folder, "
            "named by a file name alone"
        )
    return name


def check_within(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Refuse a file that links lead out of a folder, for instance one that was downloaded.

    The cache of the Hugging Face hub may be read: there a file of snapshots/REVISION/ is a link to
    blobs/ of the same repository.

    Raises:
        FileRefusedError: The file lies elsewhere.
    """
    target, root = os.path.realpath(path), os.path.realpath(folder)
    if target == root or target.startswith(root.rstrip(os.sep) + os.sep):
        return
    parts = Path(root).parts
    if "snapshots" in parts:
        last = len(parts) - 1 - parts[::-1].index("snapshots")
        # Compared as a name: a blobs/ that is itself a link resolves to another.
        if os.path.dirname(target) == os.path.join(*parts[:last], "blobs"):
            return
    raise FileRefusedError(
        f"{os.fspath(path)} is a link out of {os.fspath(folder)}, which is not followed: put the "
        "file itself there"
    )


def walk_files(root: str | os.PathLike, below: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every folder under `root` with the names of its regular files, hidden ones left out.

    Links are followed, and each folder is visited once: links in a circle end.

    Args:
        root: Where to begin.
        below: A folder in it to begin in instead.

    Yields:
        The folder relative to `root`, "" for itself, and the sorted names of its files.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [below] if os.path.isdir(os.path.join(root, below)) else []
    while waiting:
        folder = waiting.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:
            logger.warning("%s is a link to a folder read before: left out", Path(root) / folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = [], []
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _leads_to(entry.is_dir):
                    folders.append(os.path.join(folder, entry.name))
                elif _leads_to(entry.is_file):
                    files.append(entry.name)
        yield folder, sorted(files)
        waiting += sorted(folders, reverse=True)


def _leads_to(test: Any) -> bool:
    try:
        return test()
    except OSError:  # links in a circle
        return False
