"""Sets of images read in batches, never whole: ADM .npz files, folders, and data sources.

Each knows how many images it holds before the first is read (for progress, and to refuse too few at
once) and can say what exactly it holds, by a hash.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from dit_jax.atomic import atomic_file
from dit_jax.data.images import (
    DECODE_ERRORS,
    MAX_PIXELS,
    SUFFIXES,
    decode_image,
    note_of_others,
    split_by_suffix,
    validate_resize,
)
from dit_jax.data.source import Source
from dit_jax.evaluation.features import batches_of
from dit_jax.evaluation.images import AnyArray, to_uint8
from dit_jax.untrusted import (
    check_regular,
    open_regular,
    open_zip,
    read_npy_header,
    shown,
    walk_files,
)

logger = logging.getLogger(__name__)

_READ_BLOCK = 1 << 22
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a member of a zip file: 30 bytes


@runtime_checkable
class ImageSet(Protocol):
    """Images to be read once, in order.

    Attributes:
        description: For people and records.
        preprocessing: What was done to the pixels on reading, for records and cache keys.
        count: Number of images.
    """

    description: str
    preprocessing: str
    count: int

    def batches(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """All images in order; every batch but the last has `batch_size`."""
        ...

    def content_hash(self, cache_dir: Path | None = None) -> str:
        """SHA-256 that changes with the content; `cache_dir` remembers it for unchanged files."""
        ...


class NpzImages:
    """`arr_0` (or another array) of an .npz, in batches.

    An array stored without compression, as NumPy's `savez` does, is memory-mapped; a compressed
    one is decompressed batch by batch.
    """

    preprocessing = "as stored"

    def __init__(self, path: str | os.PathLike, name: str = "arr_0"):
        """Reads the array's header.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: Not an .npz, damaged, or `name` is no uint8 array [n, h, w, c].
        """
        self.path = Path(path)
        self.description = str(path)
        if not self.path.exists():
            raise FileNotFoundError(f"no file {path}")
        check_regular(self.path)
        self._member = f"{name}.npy"
        try:
            with open_zip(self.path) as archive:
                names = archive.namelist()
                if self._member not in names:
                    raise ValueError(
                        f"it holds no images: expected {name!r}, found [{_bare(names)}]"
                    )
                self._info = archive.getinfo(self._member)
                with archive.open(self._member) as file:
                    self.shape, self._fortran, dtype = read_npy_header(file, path)
                    self._data_start = file.tell()
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a readable .npz of images: {error}") from error
        size = self._data_start + math.prod(self.shape) * dtype.itemsize
        if dtype != np.uint8 or len(self.shape) != 4 or 0 in self.shape[1:]:
            raise ValueError(
                f"{path}: expected {name!r} as uint8 [n, height, width, channels], got {dtype} "
                f"{list(self.shape)}"
            )
        if size != self._info.file_size or math.prod(self.shape[1:3]) > MAX_PIXELS:
            raise ValueError(
                f"{path} is damaged: {name!r} has {self._info.file_size} bytes for uint8 "
                f"{list(self.shape)}"
            )
        self.count = self.shape[0]
        if self._is_compressed and self._fortran:
            raise ValueError(
                f"{path}: {name!r} is compressed and in Fortran order, which cannot be read image "
                "by image; save np.ascontiguousarray(images) instead"
            )

    @property
    def _is_compressed(self) -> bool:
        return self._info.compress_type != zipfile.ZIP_STORED

    def batches(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """See `ImageSet`.

        Raises:
            ValueError: The file ends early or its checksum is wrong.
        """
        if not self._is_compressed:
            mapped = self._mapped()
            yield from (np.array(batch) for batch in batches_of(mapped, batch_size))
            return
        image_bytes = int(np.prod(self.shape[1:]))
        with open_zip(self.path) as archive, archive.open(self._member) as file:
            read_npy_header(file, self.path)
            for rows in _slices(self.count, batch_size):
                size = rows.stop - rows.start
                try:
                    data = file.read(size * image_bytes)
                except (zipfile.BadZipFile, EOFError, OSError, zipfile.zlib.error) as error:
                    raise ValueError(f"{self.path} is damaged: {error}") from error
                if len(data) != size * image_bytes:
                    raise ValueError(f"{self.path} is damaged: it ends at image {rows.start}")
                yield np.frombuffer(data, np.uint8).reshape(size, *self.shape[1:])

    def content_hash(self, cache_dir: Path | None = None) -> str:
        """SHA-256 of the file."""
        return hash_files(self.path.parent, [self.path.name], cache_dir)

    def _mapped(self) -> np.ndarray:
        # The lengths in the local header can differ from those of the central directory.
        with open_regular(self.path) as file:
            file.seek(self._info.header_offset)
            header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        offset = self._info.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
        try:
            return np.memmap(
                self.path,
                np.uint8,
                mode="r",
                offset=offset + self._data_start,
                shape=self.shape,
                order="F" if self._fortran else "C",
            )
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged, it is too short: {error}") from error


class FolderImages:
    """All images in a folder and the folders in it, in the order of their sorted paths.

    Every file counts: one that cannot be decoded is an error and not left out, since a reference
    that silently lacks images is another reference.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_size: int | None = None,
        resize: str = "none",
        channels: int = 3,
    ):
        """Lists the files.

        Args:
            path: The folder. Hidden files and folders are skipped.
            image_size: Side in pixels; needed for "adm", checked for "none".
            resize: "adm" scales and crops as ADM does (`data.images.adm_center_crop`); "none" takes
                the images as they are, all of one size.
            channels: 3 (RGB) or 1 (grey).

        Raises:
            FileNotFoundError: No folder, or no images in it.
            ValueError: Options that do not fit together.
        """
        validate_resize(resize, image_size, channels)
        self._root = Path(path).expanduser()
        self._size, self._resize, self._channels = image_size, resize, channels
        if not self._root.is_dir():
            raise FileNotFoundError(f"no folder {path}")
        self._files, others = split_by_suffix(_walk(self._root))
        if not self._files:
            raise FileNotFoundError(
                f"no images ({', '.join(SUFFIXES)}) in {path}{note_of_others(others)}"
            )
        if others:
            _warn_once(f"{path}{note_of_others(others)}")
        self.count = len(self._files)
        self.description = str(path)
        size = f" to {image_size}" if resize == "adm" else ""
        self.preprocessing = f"decoded, {channels} channels, resize {resize}{size}"

    @property
    def first_file(self) -> Path:
        """Path of the first image."""
        return self._root / self._files[0]

    def batches(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """See `ImageSet`; files are decoded in threads, one batch ahead.

        Raises:
            ValueError: A file cannot be decoded or has another size than the first.
        """
        groups = [self._files[rows] for rows in _slices(self.count, batch_size)]
        shape = None
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            ahead = [pool.submit(self._decode, name) for name in groups[0]]
            for following in [*groups[1:], ()]:
                current, ahead = ahead, [pool.submit(self._decode, name) for name in following]
                images = [future.result() for future in current]
                for name, image in images:
                    shape = shape or (name, image.shape)
                    if image.shape != shape[1]:
                        raise ValueError(
                            f"images of mixed sizes in {self._root}: {shape[0]} is "
                            f"{list(shape[1])}, {name} is {list(image.shape)}. Make them one size; "
                            "a reference's by --reference_resize=adm --reference_size=SIDE"
                        )
                yield np.stack([image for _, image in images])

    def content_hash(self, cache_dir: Path | None = None) -> str:
        """SHA-256 of the files' names and bytes."""
        return hash_files(self._root, self._files, cache_dir)

    def _decode(self, name: str) -> tuple[str, np.ndarray]:
        path = self._root / name
        try:
            image = decode_image(
                path, channels=self._channels, resize=self._resize, image_size=self._size
            )
        except DECODE_ERRORS as error:
            raise ValueError(f"{path} cannot be decoded: {error}. Replace or remove it") from error
        wanted = (self._size, self._size) if self._size else image.shape[:2]
        if image.shape[:2] != wanted:
            raise ValueError(
                f"{path} is {image.shape[1]}x{image.shape[0]}, expected {self._size}x{self._size}: "
                "correct --reference_size, or scale and crop with --reference_resize=adm"
            )
        return name, image


class SourceImages:
    """The images of a `dit_jax.data` source, for instance a TFDS set."""

    def __init__(self, source: Source):
        """Refuses sources of latents, whose pixels only a decoder knows."""
        if source.info.latents is not None:
            raise ValueError(
                f"{source.info.name} holds latents, not images: give the images they came from"
            )
        self._source = source
        self.count = len(source)
        self.description = f"{source.info.name}/{source.info.split}"
        height, width, channels = source.info.image_shape
        # How a source crops is part of its own fingerprint, hence of the content hash.
        self.preprocessing = f"{height}x{width}x{channels}"

    def batches(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """See `ImageSet`."""
        for rows in _slices(self.count, batch_size):
            yield self._source.batch(np.arange(self.count)[rows])["image"]

    def content_hash(self, cache_dir: Path | None = None) -> str:
        """SHA-256 over the source's own fingerprint (name, version, files, sizes, crop)."""
        info = self._source.info
        text = json.dumps([info.name, info.split, info.num_examples, info.fingerprint])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class BatchImages:
    """Images as they come, e.g. from a sampler, of a number known beforehand; read once.

    Attributes:
        source: Batches of uint8 or [-1, 1] images, of any sizes.
        count: How many images there will be.
        rounding: How floating point becomes bytes, see `to_uint8`.
        description: For records.
        preprocessing: For records.
    """

    source: Iterable[AnyArray]
    count: int
    rounding: str = "nearest"
    description: str = "batches"
    preprocessing: str = "none"

    def batches(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """See `ImageSet`.

        Raises:
            ValueError: Another number of images than `count`.
        """
        held: list[np.ndarray] = []
        seen = 0
        for batch in self.source:
            images = to_uint8(batch, self.rounding)
            seen += len(images)
            held.append(images)
            if sum(map(len, held)) >= batch_size:
                joined = np.concatenate(held)
                whole = len(joined) // batch_size * batch_size
                yield from batches_of(joined[:whole], batch_size)
                held = [joined[whole:]]
        rest = np.concatenate(held) if held else ()
        if seen != self.count:
            raise ValueError(f"expected {self.count} images, the batches held {seen}")
        if len(rest):
            yield rest

    def content_hash(self, cache_dir: Path | None = None) -> str:
        """Not known before the images are read."""
        raise ValueError("images that come once have no hash beforehand")


def hash_files(root: Path, names: Iterable[str], cache_dir: Path | None = None) -> str:
    """SHA-256 of files: of the content alone for one file, of names and contents for several.

    Args:
        root: Folder that the names are relative to.
        names: In the order that counts.
        cache_dir: Keeps the result under the files' paths, sizes and modification times, so that
            unchanged files are not read again.
    """
    names = list(names)
    remembered = None
    if cache_dir is not None:
        seen = hashlib.sha256(str(root.resolve()).encode())
        for name in names:
            status = (root / name).stat()
            seen.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
        remembered = Path(cache_dir) / f"files-{seen.hexdigest()[:32]}.sha256"
        if remembered.is_file():
            return remembered.read_text().strip()
    digest = hashlib.sha256()
    for name in names:
        part = digest if len(names) == 1 else hashlib.sha256()
        with open_regular(root / name) as file:
            while block := file.read(_READ_BLOCK):
                part.update(block)
        if part is not digest:
            digest.update(json.dumps([name, part.hexdigest()]).encode())
    if remembered is not None:
        with atomic_file(remembered, overwrite=True) as file:
            file.write(digest.hexdigest().encode())
    return digest.hexdigest()


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _slices(count: int, batch_size: int) -> list[slice]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    starts = range(0, count, batch_size)
    return [slice(start, min(start + batch_size, count)) for start in starts]


def _bare(names: Iterable[str]) -> str:
    return ", ".join(shown(name.removesuffix(".npy")) for name in list(names)[:8])


def _walk(root: Path) -> Iterator[str]:
    for folder, files in walk_files(root):
        for name in files:
            yield os.path.join(folder, name)
