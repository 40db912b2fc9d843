"""Files and folders that are written whole or not at all, whatever ends the program meanwhile."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def check_destination(path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Checks that `path` can be written, making its folder; call it before the long work.

    Raises:
        FileExistsError: It exists and `overwrite` is False.
        OSError: Its folder cannot be made or written to (PermissionError where that is the cause).
    """
    path = Path(path)
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(
            f"{path} exists already; give another name, or --overwrite to replace it"
        )
    probe = _temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The mode bits do not tell for root, read-only or network file systems: writing does.
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _explained(error, path) from error
    return path


@contextmanager
def atomic_file(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, which replaces `path` if the block succeeds.

    After an exception, or a crash of the machine, `path` is what it was before.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        OSError: It cannot be written; the message names `path` and the cause.
    """
    path = check_destination(path, overwrite=overwrite)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    temporary = _temporary_sibling(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Makes a temporary folder beside `path`, which replaces `path` if the block succeeds.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        OSError: It cannot be written; the message names `path` and the cause.
    """
    path = check_destination(path, overwrite=overwrite)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; give the name of a folder")
    temporary, previous = _temporary_sibling(path), _temporary_sibling(path)
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            os.replace(path, previous)
        try:
            os.replace(temporary, path)
        except OSError:
            if previous.exists():
                os.replace(previous, path)
            raise
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)


def save_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, or replaces it; it is safe on disk when this returns.

    Raises:
        OSError: It cannot be written; the message names `path` and the cause.
    """
    with atomic_file(path, overwrite=True) as file:
        file.write(text.encode())


def _temporary_sibling(path: Path) -> Path:
    # Same folder, hence same file system: only there is a rename atomic.
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"


def _explained(error: OSError, path: Path) -> OSError:
    reason = error.strerror or str(error)
    # OSError picks its subclass (PermissionError, ...) from the error number.
    return OSError(
        error.errno,
        f"cannot write {path}: {reason}. Check the name, the permissions of its folder and the "
        "space left, or choose another place",
    )
