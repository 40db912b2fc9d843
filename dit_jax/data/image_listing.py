"""Which images a folder holds, of which split, and of which class each is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

from dit_jax.data.images import SUFFIXES, note_of_others, split_by_suffix
from dit_jax.untrusted import walk_files

logger = logging.getLogger(__name__)

_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}


@dataclass(frozen=True)
class Listing:
    """The images below a folder: paths relative to it in sorted order, with their labels."""

    files: list[str]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]


def validate_split(split: str, source: str) -> None:
    """Refuse a split that a source of this name does not have.

    Raises:
        ValueError: It is neither "train" nor "test".
    """
    if split not in _SPLIT_FOLDERS:
        raise ValueError(f"{source} has the splits 'train' and 'test', not {split!r}")


def find_split(path: Path, split: str) -> tuple[Path, Path, bool]:
    """Return the split's folder, the one that defines the classes, and: is the split on disk.

    Args:
        path: The folder of all splits.
        split: "train" or "test".

    Raises:
        FileNotFoundError: `path` is no folder.
        ValueError: There are two folders for the test split.
    """
    if not path.is_dir():
        kind = "is not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"image folder {path} {kind}")
    train = path / "train"
    known = {name for names in _SPLIT_FOLDERS.values() for name in names}
    # A *class* may be called "train" (CIFAR-100 and COCO have one): a split has classes inside,
    # or stands beside nothing but other splits.
    is_split = train.is_dir() and (bool(subfolders(train)) or set(subfolders(path)) <= known)
    if not is_split:
        return path, path, False
    tests = [path / name for name in _SPLIT_FOLDERS["test"] if (path / name).is_dir()]
    if len(tests) > 1:
        names = " and ".join(folder.name for folder in tests)
        raise ValueError(f"{path} has two folders for the test split: {names}; remove one")
    if not tests:
        return train, train, False
    return (train if split == "train" else tests[0]), train, True


def validate_fraction(test_fraction: float, split: str, held_out_exists: bool, root: Path) -> None:
    """Refuse a share held out that cannot be, or is needed and not given.

    Raises:
        ValueError: It is no share, or there is a folder for the test split.
        FileNotFoundError: There is none, and nothing is held out.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must be at least 0 and below 1, not {test_fraction}")
    if held_out_exists and test_fraction:
        raise ValueError(
            f"test_fraction={test_fraction} is for folders without a test split, but "
            f"{root.parent} has one: set test_fraction=0"
        )
    if split == "test" and not held_out_exists and not test_fraction:
        raise FileNotFoundError(
            f"{root} has no test split: put its images into a folder test/ beside train/, or "
            f"set test_fraction (for example 0.1) to hold out a part of the images"
        )


def subfolders(folder: Path) -> list[str]:
    """The names of a folder's folders, hidden ones excepted, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def list_images(root: Path, class_names: tuple[str, ...]) -> Listing:
    """The images of a split's folder, by class if there are any.

    Raises:
        FileNotFoundError: There is no image.
        ValueError: There is a class that the training split lacks.
    """
    unexpected = sorted(set(subfolders(root)) - set(class_names))
    if unexpected:
        raise ValueError(f"{root} has classes that the training split lacks: {unexpected[:5]}")
    visible = (e.name for e in os.scandir(root) if e.is_file() and not e.name.startswith("."))
    loose, others = split_by_suffix(visible)
    if not class_names:
        if not loose:
            raise FileNotFoundError(
                f"{root} is empty: expected class subfolders, or images ({', '.join(SUFFIXES)}), "
                f"and found neither{note_of_others(others)}"
            )
        if others:
            logger.warning("%s%s", root, note_of_others(others))
        return Listing(loose, np.zeros(len(loose), np.int32), ())
    if loose:
        logger.warning(
            "%s: ignoring %d images beside the class subfolders, the first being %s",
            root,
            len(loose),
            loose[0],
        )
    files: list[str] = []
    labels: list[int] = []
    others = []
    for label, name in enumerate(class_names):
        members, not_images = split_by_suffix(_walk(root, name))
        files += members
        labels += [label] * len(members)
        others += not_images
    if not files:
        raise FileNotFoundError(
            f"{root} is empty: its class subfolders hold no image ({', '.join(SUFFIXES)})"
            f"{note_of_others(others)}"
        )
    if others:
        logger.warning("%s%s", root, note_of_others(others))
    sizes = np.bincount(labels, minlength=len(class_names))
    empty = [class_names[label] for label in np.flatnonzero(sizes == 0)]
    if empty:
        logger.warning("%s: %d classes without an image: %s", root, len(empty), empty[:5])
    return Listing(files, np.array(labels, np.int32), class_names)


def _walk(root: Path, name: str) -> Iterator[str]:
    for folder, files in walk_files(root, name):
        yield from (os.path.join(folder, file) for file in files)


def in_split(count: int, split: str, test_fraction: float) -> Bool[np.ndarray, " {count}"]:
    """Which images are of a split, the held-out ones spread evenly."""
    # One is held out wherever i * test_fraction passes an integer.
    total = np.floor(np.arange(count + 1) * test_fraction + 1e-9)
    held_out = np.diff(total) > 0
    return held_out if split == "test" else ~held_out
