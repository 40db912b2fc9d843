"""A folder of images, one subfolder a class."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from dit_jax.data.buckets import Bucket, nearest_bucket, parse_buckets
from dit_jax.data.image_files import FolderFiles, ImageFiles
from dit_jax.data.image_index import check_images, validate_verify
from dit_jax.data.image_listing import (
    find_split,
    in_split,
    list_images,
    subfolders,
    validate_fraction,
    validate_split,
)
from dit_jax.data.images import (
    DECODE_ERRORS,
    Size,
    as_size,
    decode_image,
    size_text,
    validate_resize,
)
from dit_jax.data.source import DatasetInfo, Example, Source, fingerprint
from dit_jax.options import option
from dit_jax.ranges import SHARE_BELOW_ONE

logger = logging.getLogger(__name__)

# Beyond this fraction of unreadable files the folder is taken to be damaged.
MAX_CORRUPT_FRACTION = 0.01
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
        ValueError: Another split, images of mixed or unexpected sizes, too many corrupt files,
            contradictory options.
    """
    validate_split(split, "image_folder")
    opening = Opening("image_folder", split, image_size, channels, resize, buckets)
    opening.check(verify)
    root, class_root, held_out_exists = find_split(Path(path).expanduser(), split)
    validate_fraction(test_fraction, split, held_out_exists, root)
    listing = list_images(root, tuple(subfolders(class_root)))
    chosen = None if held_out_exists else in_split(len(listing.files), split, test_fraction)
    files = FolderFiles(root, listing.files)
    labelled = files, listing.labels, listing.class_names
    return ImageFolder(*opening.read(*labelled, chosen, verify, index_cache))


@dataclass(frozen=True)
class Opening:
    """How listed images become a source.

    Attributes:
        source: its name.
        split: see `open_image_folder`, as all that follows.
        image_size: see there.
        channels: see there.
        resize: see there.
        buckets: see there.
    """

    source: str
    split: str
    image_size: Size | None
    channels: int
    resize: str
    buckets: str

    def check(self, verify: str) -> None:
        """Refuse options that contradict each other.

        Raises:
            ValueError: Which, and why.
        """
        sizes, size = _bucket_sizes(self.buckets, self.image_size, self.resize), self.image_size
        validate_resize(self.resize, sizes[0] if sizes and size is None else size, self.channels)
        validate_verify(verify)

    def read(
        self,
        files: ImageFiles,
        labels: Int32[np.ndarray, " n"],
        class_names: tuple[str, ...],
        chosen: Bool[np.ndarray, " n"] | None,
        verify: str,
        index_cache: str | None,
    ) -> tuple[
        ImageFiles, Int32[np.ndarray, " k"], DatasetInfo, str, Int32[np.ndarray, " k"] | None
    ]:
        """The arguments of `ImageFolder`: corrupt files left out, sizes known.

        Args:
            files: The images.
            labels: Of each.
            class_names: What labels mean.
            chosen: Which images are of the split; None for all.
            verify: See `open_image_folder`.
            index_cache: See there.

        Raises:
            FileNotFoundError: None is readable.
            ValueError: Too many corrupt files, or images of mixed sizes.
        """
        sizes = _bucket_sizes(self.buckets, self.image_size, self.resize)
        index = check_images(files, verify, index_cache)
        _report_corrupt(files, index.reasons)
        chosen = np.ones(len(files), bool) if chosen is None else chosen
        chosen[list(index.reasons)] = False
        kept = np.flatnonzero(chosen)
        root = files.root
        if kept.size == 0:
            raise FileNotFoundError(f"split {self.split!r} of {root} holds no readable image")
        files, labels = files.take(kept), labels[kept]
        of_image, found = None, ()
        if sizes:
            of_image, found = fill_buckets(root, index.sizes[kept], sizes)
            height, width = max((bucket.size for bucket in found), key=math.prod)
        elif self.resize == "none":
            width, height = _common_size(files, index.sizes[kept], self.image_size)
        else:
            height, width = as_size(self.image_size)
        shape = (height, width, self.channels)
        names = [files.name(number) for number in range(len(files))]
        identity = [self.source, names, index.byte_counts[kept], labels, shape, self.resize]
        if sizes:
            identity.append([bucket.size for bucket in found])
        info = DatasetInfo(
            name=f"{self.source}/{root.name}",
            split=self.split,
            image_shape=shape,
            num_classes=len(class_names),
            num_examples=len(files),
            class_names=class_names,
            fingerprint=fingerprint(*identity),
            buckets=found,
        )
        return files, labels, info, self.resize, of_image


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
        files: ImageFiles,
        labels: Int[np.ndarray, " n"],
        info: DatasetInfo,
        resize: str,
        of_image: Int32[np.ndarray, " n"] | None = None,
    ):
        self.info, self.bucket_of = info, of_image
        self._files = files
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
        raise ValueError(f"no image of {self._files.root} can be decoded")

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
        return self._files.describe(index)

    def _decode(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        height, width, channels = shape = self.shape_of(np.array([index]))
        file, size = self._files.open(index), (height, width)
        pixels = decode_image(file, channels=channels, resize=self._resize, image_size=size)
        if pixels.shape != shape:
            raise ValueError(
                f"it is now {pixels.shape[1]}x{pixels.shape[0]}, it was {width}x{height} when "
                f"{self._files.place} was opened"
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
                f"{len(self._failed)} of {len(self)} images in {self._files.root} cannot be "
                f"decoded, more than {MAX_CORRUPT_FRACTION:.0%}, the last being "
                f"{self.describe(index)}. Replace or delete them; verify='full' finds them all at "
                f"the start."
            ) from error


def _report_corrupt(files: ImageFiles, reasons: dict[int, str]) -> None:
    if not reasons:
        return
    root = files.root
    named = [f"{files.describe(i)} ({reason})" for i, reason in sorted(reasons.items())]
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
    files: ImageFiles, sizes: Int32[np.ndarray, "n 2"], image_size: Size | None
) -> tuple[int, int]:
    """Return the (width, height) of all images."""
    first = tuple(int(side) for side in sizes[0])
    other = np.flatnonzero((sizes != sizes[0]).any(axis=1))
    if other.size:
        width, height = sizes[other[0]]
        raise ValueError(
            f"images of mixed sizes: {files.describe(0)} is {first[0]}x{first[1]}, "
            f"{files.describe(int(other[0]))} is {width}x{height} (width x height). Set "
            f"resize='adm' and image_size to scale and crop them to one size."
        )
    if image_size is not None and first[::-1] != as_size(image_size):
        raise ValueError(
            f"the images in {files.root} are {first[0]}x{first[1]} (width x height), not "
            f"image_size={size_text(image_size)}. Correct image_size, or set resize='adm' to scale "
            f"and crop them."
        )
    return first
