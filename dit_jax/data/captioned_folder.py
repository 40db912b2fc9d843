"""A folder of images with captions, in the convention of Hugging Face's image folders.

Beside the images lies metadata.jsonl, one JSON object a line: {"file_name": "1.jpg", "text": "a red
house"}; file names may lead into subfolders. A network is told embeddings of captions, not texts:
launch/extract_features.py makes them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from dit_jax.data.image_files import FolderFiles, ImageFiles
from dit_jax.data.image_folder import ImageFolder, ImageFolderOptions, Opening
from dit_jax.data.image_listing import (
    find_split,
    in_split,
    validate_fraction,
    validate_split,
)
from dit_jax.data.images import SUFFIXES, Size, split_by_suffix
from dit_jax.data.source import Example, fingerprint
from dit_jax.quantities import counted
from dit_jax.untrusted import open_regular, parse_json, shown, walk_files

METADATA = "metadata.jsonl"
CAPTION = "caption"
# Bytes of one: a caption is text, and nobody writes a megabyte of it below an image.
MAX_CAPTION = 2**20
_NAMED = 3


def open_captioned_folder(
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
) -> CaptionedImages:
    """Open a folder of images and metadata.jsonl.

    metadata.jsonl lies in `path`, or, with splits on disk, in `path`/train and `path`/test (or val,
    or validation). Every image has a line, and every line an image. For the other options see
    `open_image_folder`.

    Raises:
        FileNotFoundError: The folder, metadata.jsonl, the split or an image that a line names is
            missing.
        ValueError: Another split; a line that is not JSON or lacks file_name or text, which its
            number tells; images without a caption, or with two; and what `open_image_folder`
            refuses.
    """
    validate_split(split, "captioned_folder")
    opening = Opening("captioned_folder", split, image_size, channels, resize, buckets)
    opening.check(verify)
    folder = Path(path).expanduser()
    if (folder / METADATA).is_file():
        root, held_out_exists = folder, False
    else:
        root, _, held_out_exists = find_split(folder, split)
    validate_fraction(test_fraction, split, held_out_exists, root)
    captions = read_captions(root)
    files = sorted(captions)
    chosen = None if held_out_exists else in_split(len(files), split, test_fraction)
    images = FolderFiles(root, files)
    texts = [captions[name] for name in files]
    return CaptionedImages.read(opening, images, texts, chosen, verify, index_cache)


class CaptionedImages(ImageFolder):
    """See `open_captioned_folder` and `captioned_shards.open_captioned_shards`.

    An example is {"image": uint8 [h, w, c], "caption": the number of its text in `captions`}.

    Attributes:
        captions: The texts.
    """

    def __init__(self, captions: Sequence[str], *arguments: Any):
        super().__init__(*arguments)
        self.captions = tuple(captions)
        texts = [self.captions[number] for number in self._labels]
        self.info = replace(
            self.info,
            conditions=(CAPTION,),
            fingerprint=fingerprint(self.info.fingerprint, texts),
        )

    @classmethod
    def read(
        cls,
        opening: Opening,
        images: ImageFiles,
        captions: Sequence[str],
        chosen: Bool[np.ndarray, " n"] | None,
        verify: str,
        index_cache: str | None,
    ) -> CaptionedImages:
        """Those of a split; see `Opening.read` for arguments and errors.

        Args:
            opening: How they become a source.
            images: All of them.
            captions: One an image.
            chosen: Which are of the split; None for all.
            verify: See `open_image_folder`.
            index_cache: See there.
        """
        # Labels are the numbers of captions: an image that stands for a corrupt one keeps its own.
        labels = np.arange(len(images), dtype=np.int32)
        return cls(captions, *opening.read(images, labels, (), chosen, verify, index_cache))

    def __getitem__(self, index: int) -> Example:
        """Return example `index`, or the next readable one if its file turns out corrupt."""
        example = super().__getitem__(index)
        return {"image": example["image"], CAPTION: np.int32(example["label"])}

    @property
    def used(self) -> np.ndarray:
        """The numbers of the captions of this split, image by image."""
        return self._labels


def read_captions(root: Path) -> dict[str, str]:
    """The captions of a folder's images, by file name.

    Raises:
        FileNotFoundError: No metadata.jsonl, or an image that it names is missing.
        ValueError: See `open_captioned_folder`.
    """
    metadata = root / METADATA
    if not metadata.is_file():
        raise FileNotFoundError(
            f"{root} has no {METADATA}: expected one JSON object a line for every image, "
            '{"file_name": "1.jpg", "text": "a red house"}'
        )
    present = {
        os.path.normpath(os.path.join(below, name))
        for below, names in walk_files(root)
        for name in split_by_suffix(names)[0]
    }
    captions: dict[str, str] = {}
    with open_regular(metadata) as file:
        number = 0
        while line := file.readline(MAX_CAPTION + 1):
            number += 1
            if len(line) > MAX_CAPTION:
                raise ValueError(f"{metadata}, line {number} is longer than {MAX_CAPTION} bytes")
            if line.strip():
                name, text = _parse(line, f"{metadata}, line {number}", present)
                if name in captions:
                    raise ValueError(f"{metadata}, line {number}: {name} has a caption already")
                captions[name] = text
    if not captions:
        raise ValueError(f"{metadata} is empty: expected a line for every image")
    without = sorted(present - captions.keys())
    if without:
        more = f", and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
        raise ValueError(
            f"{counted(len(without), 'image')} of {root} without a caption: "
            f"{', '.join(without[:_NAMED])}{more}. Give each a line in {METADATA}, or move them "
            "elsewhere"
        )
    return captions


def _parse(line: bytes, where: str, present: set[str]) -> tuple[str, str]:
    """(file name, caption) of a line."""
    entry = parse_json(line, where)
    for key in ("file_name", "text"):
        if not isinstance(entry.get(key), str):
            found = shown(entry[key]) if key in entry else "missing"
            raise ValueError(f"{where}: {key} is {found}; expected a string")
    name = os.path.normpath(entry["file_name"])
    if name in present:
        return name, entry["text"]
    if Path(name).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{where}: {shown(entry['file_name'])} is no image; expected one of "
            f"{', '.join(SUFFIXES)}"
        )
    raise FileNotFoundError(f"{where}: there is no image {shown(entry['file_name'])} in the folder")
