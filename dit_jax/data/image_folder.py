"""A folder of images, one subfolder a class."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from dit_jax.data.buckets import Bucket, nearest_bucket, parse_buckets
from dit_jax.data.image_index import check_images, validate_verify
from dit_jax.data.images import (
    DECODE_ERRORS,
    SUFFIXES,
    Size,
    as_size,
    decode_image,
    note_of_others,
    size_text,
    split_by_suffix,
    validate_resize,
)
from dit_jax.data.source import DatasetInfo, Example, Source, fingerprint
from dit_jax.options import option
from dit_jax.ranges import SHARE_BELOW_ONE
from dit_jax.untrusted import walk_files

logger = logging.getLogger(__name__)

# Beyond this fraction of unreadable files the folder is taken to be damaged.
MAX_CORRUPT_FRACTION = 0.01
_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}
_MESSAGES_SHOWN = 20


@dataclass(frozen=True)
class ImageFolderOptions:
    """Keys of config.data.image_folder."""

    path: str = option(
        "",
        "folder of class subfolders",
        expected="IMAGES, a folder with a subfolder of images for every class (IMAGES/cat/1.jpg, "
        "IMAGES/dog/2.png), or with such folders train/ and test/",
    )
    resize: str = option("adm", "adm: scale and centre-crop to the model's size | none")
    buckets: str = option(
        "",
        "sizes, '192x320,256x256', of which an image gets the one of nearest aspect; auto:64: all "
        "of about the model's pixels in multiples of 64; empty: one size",
    )
    test_fraction: float = option(
        0.0, "share held out where the folder has no test/", SHARE_BELOW_ONE
    )
    verify: str = option("fast", "fast | full | none: looking for corrupt files")
    index_cache: str = option("", "where the result of that is kept; empty: beside the data")


def open_image_folder(
    split: str,
    *,
    path: str,
    image_size: Size | None = None,
    channels: int = 3,
    resize: str = "none",
    buckets: str = ImageFolderOptions.buckets,
    test_fraction: float = ImageFolderOptions.test_fraction,
    verify: str = ImageFolderOptions.verify,
    index_cache: str | None = None,
) -> ImageFolder:
    """Open a folder of JPEG, PNG, WebP, BMP and TIFF images (suffixes in upper or lower case).

    Layout. If `path` has a folder train/, the splits are its folders train/ and test/ (or val/,
    or validation/); otherwise `path` is taken whole. In there, each subfolder is a class, and the
    labels 0, 1, ... follow the subfolders' sorted names (those of train/, for every split); images
    may lie deeper inside. Without subfolders the images are unlabelled: num_classes = 0. Hidden
    files and folders are skipped, files of other suffixes too, with one warning.

    Corrupt files are left out, each named in a warning, and the images keep their numbers from
    one opening to the next. More than 1 % of them is an error. The check's result is kept in an
    index file, valid as long as the files' names, sizes and modification times stay.

    Args:
        split: "train" or "test".
        path: The folder.
        image_size: Side of the images in pixels, or (height, width). With resize="none": what they
            must have.
        channels: 3 (RGB) or 1 (grey); files of the other kind are converted.
        resize: "adm" scales and crops to `image_size` as ADM does; "none" demands images of one
            size.
        buckets: Sizes of which each image gets that of the nearest aspect ratio, instead of
            `image_size`: '192x320,256x256,320x192' (heights x widths), or 'auto:64' for all of
            about the pixels of `image_size` in multiples of 64. Needs resize="adm".
        test_fraction: If there is no folder for the test split: the fraction of the images held
            out for it, evenly spread over the sorted files (hence over the classes).
        verify: "fast" reads headers and looks at the files' ends; "full" decodes every image
            once. An image which passes but cannot be decoded later is replaced by the next one,
            with a warning.
        index_cache: Where the index file lies. Default: .dit_jax_index.npz in the folder of the
            split, or nowhere (checked at each opening) if that cannot be written.

    Raises:
        FileNotFoundError: The folder, or the split, is missing or holds no image.
        ValueError: Images of mixed or unexpected sizes, too many corrupt files, contradictory
            options.
    """
    sizes = _bucket_sizes(buckets, image_size, resize)
    validate_resize(resize, sizes[0] if sizes and image_size is None else image_size, channels)
    validate_verify(verify)
    root, class_root, held_out_exists = _find_split(Path(path).expanduser(), split)
    _validate_fraction(test_fraction, split, held_out_exists, root)
    listing = _list_images(root, tuple(_subfolders(class_root)))

    index = check_images(root, listing.files, verify, index_cache)
    _report_corrupt(root, listing.files, index.reasons)
    chosen = np.ones(len(listing.files), bool)
    if not held_out_exists:
        chosen = _in_split(len(listing.files), split, test_fraction)
    chosen[list(index.reasons)] = False
    kept = np.flatnonzero(chosen)
    if kept.size == 0:
        raise FileNotFoundError(f"split {split!r} of {root} holds no readable image")
    files = [listing.files[i] for i in kept]
    of_image, found = None, ()
    if sizes:
        of_image, found = fill_buckets(root, index.sizes[kept], sizes)
        height, width = max((bucket.size for bucket in found), key=math.prod)
    elif resize == "none":
        width, height = _common_size(root, files, index.sizes[kept], image_size)
    else:
        height, width = as_size(image_size)
    shape = (height, width, channels)
    identity = ["image_folder", files, index.byte_counts[kept], listing.labels[kept], shape, resize]
    if sizes:
        identity.append([bucket.size for bucket in found])
    return ImageFolder(
        root,
        files,
        listing.labels[kept],
        DatasetInfo(
            name=f"image_folder/{root.name}",
            split=split,
            image_shape=shape,
            num_classes=len(listing.class_names),
            num_examples=len(files),
            class_names=listing.class_names,
            fingerprint=fingerprint(*identity),
            buckets=found,
        ),
        resize,
        of_image,
    )


def _bucket_sizes(
    buckets: str, image_size: Size | None, resize: str
) -> tuple[tuple[int, int], ...]:
    if not buckets:
        return ()
    if resize != "adm":
        raise ValueError(f"buckets={buckets!r} needs resize='adm', which crops images to them")
    if image_size is None and buckets.startswith("auto"):
        raise ValueError(f"buckets={buckets!r} needs image_size, whose pixels they are to have")
    return parse_buckets(buckets, math.prod(as_size(image_size or 1)))


def fill_buckets(
    root: Path, sizes: Int32[np.ndarray, "n 2"], buckets: Sequence[tuple[int, int]]
) -> tuple[Int32[np.ndarray, " n"], tuple[Bucket, ...]]:
    """The bucket of each image, by its (width, height), and those that have any.

    Buckets to which no image is nearest are left out, with a warning.
    """
    nearest = nearest_bucket(sizes, buckets)
    counts = np.bincount(nearest, minlength=len(buckets))
    empty = [
        f"{height}x{width}" for (height, width), n in zip(buckets, counts, strict=True) if not n
    ]
    if empty:
        logger.warning(
            "%s: no image is nearest to the aspect ratio of %s (height x width): left out of the "
            "buckets",
            root,
            ", ".join(empty),
        )
    used = np.flatnonzero(counts)
    renumbered = np.searchsorted(used, nearest).astype(np.int32)
    return renumbered, tuple(Bucket(tuple(buckets[i]), int(counts[i])) for i in used)


class ImageFolder(Source):
    """See `open_image_folder`. Images are decoded when read."""

    slow_to_read = True

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: Int[np.ndarray, " n"],
        info: DatasetInfo,
        resize: str,
        of_image: Int32[np.ndarray, " n"] | None = None,
    ):
        self.info, self.bucket_of = info, of_image
        self._root = str(root)
        # One array of bytes instead of a list: a million paths pickle in one piece.
        self._files = np.array([os.fsencode(name) for name in files])
        self._labels = labels.astype(np.int32)
        self._resize = resize
        self._failed: set[int] = set()

    def __getitem__(self, index: int) -> Example:
        """Return example `index`, or the next readable one if its file turns out corrupt."""
        for candidate in self._candidates(index):
            try:
                pixels = self._decode(candidate)
            except DECODE_ERRORS as error:
                self._note_failure(candidate, error)
                continue
            return {"image": pixels, "label": int(self._labels[candidate])}
        raise ValueError(f"no image of {self._root} can be decoded")

    def _candidates(self, index: int) -> Iterator[int]:
        """The example and those that may stand for it: of the same bucket, if there are any."""
        if not self.info.buckets:
            yield from ((index + step) % len(self) for step in range(len(self)))
            return
        members = self.members(int(self.bucket_of[index]))
        first = int(np.searchsorted(members, index))
        yield from (int(members[(first + step) % len(members)]) for step in range(len(members)))

    def describe(self, index: int) -> str:
        """Name an example by its file."""
        return os.path.join(self._root, os.fsdecode(self._files[index]))

    def _decode(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        height, width, channels = shape = self.shape_of(np.array([index]))
        path, size = self.describe(index), (height, width)
        pixels = decode_image(path, channels=channels, resize=self._resize, image_size=size)
        if pixels.shape != shape:
            raise ValueError(
                f"it is now {pixels.shape[1]}x{pixels.shape[0]}, it was {width}x{height} when "
                f"the folder was opened"
            )
        return pixels

    def _note_failure(self, index: int, error: Exception) -> None:
        if index in self._failed:
            return
        self._failed.add(index)
        logger.warning(
            "%s cannot be decoded, using the next image instead (%d of %d so far): %s",
            self.describe(index),
            len(self._failed),
            len(self),
            error,
        )
        if len(self._failed) > max(1, MAX_CORRUPT_FRACTION * len(self)):
            raise ValueError(
                f"{len(self._failed)} of {len(self)} images in {self._root} cannot be decoded, "
                f"more than {MAX_CORRUPT_FRACTION:.0%}, the last being {self.describe(index)}. "
                f"Replace or delete them; verify='full' finds them all at the start."
            ) from error


@dataclass(frozen=True)
class _Listing:
    """The images below a folder: paths relative to it in sorted order, with their labels."""

    files: list[str]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]


def _find_split(path: Path, split: str) -> tuple[Path, Path, bool]:
    """Return the split's folder, the one that defines the classes, and: is the split on disk."""
    if split not in _SPLIT_FOLDERS:
        raise ValueError(f"image_folder has the splits 'train' and 'test', not {split!r}")
    if not path.is_dir():
        kind = "is not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"image folder {path} {kind}")
    train = path / "train"
    known = {name for names in _SPLIT_FOLDERS.values() for name in names}
    # A *class* may be called "train" (CIFAR-100 and COCO have one): a split has classes inside,
    # or stands beside nothing but other splits.
    is_split = train.is_dir() and (bool(_subfolders(train)) or set(_subfolders(path)) <= known)
    if not is_split:
        return path, path, False
    tests = [path / name for name in _SPLIT_FOLDERS["test"] if (path / name).is_dir()]
    if len(tests) > 1:
        names = " and ".join(folder.name for folder in tests)
        raise ValueError(f"{path} has two folders for the test split: {names}; remove one")
    if not tests:
        return train, train, False
    return (train if split == "train" else tests[0]), train, True


def _validate_fraction(test_fraction: float, split: str, held_out_exists: bool, root: Path) -> None:
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


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _list_images(root: Path, class_names: tuple[str, ...]) -> _Listing:
    unexpected = sorted(set(_subfolders(root)) - set(class_names))
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
        return _Listing(loose, np.zeros(len(loose), np.int32), ())
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
    return _Listing(files, np.array(labels, np.int32), class_names)


def _walk(root: Path, name: str) -> Iterator[str]:
    for folder, files in walk_files(root, name):
        yield from (os.path.join(folder, file) for file in files)


def _in_split(count: int, split: str, test_fraction: float) -> Bool[np.ndarray, " {count}"]:
    """Spread the held-out images evenly: one wherever i * test_fraction passes an integer."""
    total = np.floor(np.arange(count + 1) * test_fraction + 1e-9)
    held_out = np.diff(total) > 0
    return held_out if split == "test" else ~held_out


def _report_corrupt(root: Path, files: Sequence[str], reasons: dict[int, str]) -> None:
    if not reasons:
        return
    named = [f"{root / files[i]} ({reason})" for i, reason in sorted(reasons.items())]
    share = f"{len(reasons)} of {len(files)} images ({len(reasons) / len(files):.2%})"
    if len(reasons) > MAX_CORRUPT_FRACTION * len(files):
        more = f", and {len(named) - 5} more" if len(named) > 5 else ""
        raise ValueError(
            f"{share} in {root} are corrupt, more than {MAX_CORRUPT_FRACTION:.0%}: "
            f"{'; '.join(named[:5])}{more}. Replace or delete them."
        )
    for message in named[:_MESSAGES_SHOWN]:
        logger.warning("skipping corrupt image %s", message)
    logger.warning("skipped %s in %s: corrupt", share, root)


def _common_size(
    root: Path, files: Sequence[str], sizes: Int32[np.ndarray, "n 2"], image_size: Size | None
) -> tuple[int, int]:
    """Return the (width, height) of all images."""
    first = tuple(int(side) for side in sizes[0])
    other = np.flatnonzero((sizes != sizes[0]).any(axis=1))
    if other.size:
        width, height = sizes[other[0]]
        raise ValueError(
            f"images of mixed sizes: {root / files[0]} is {first[0]}x{first[1]}, "
            f"{root / files[other[0]]} is {width}x{height} (width x height). Set resize='adm' "
            f"and image_size to scale and crop them to one size."
        )
    if image_size is not None and first[::-1] != as_size(image_size):
        raise ValueError(
            f"the images in {root} are {first[0]}x{first[1]} (width x height), not "
            f"image_size={size_text(image_size)}. Correct image_size, or set resize='adm' to scale "
            f"and crop them."
        )
    return first
