"""Images with captions in tar shards, as WebDataset and img2dataset write them.

A sample is the files of one shard whose names are equal up to the first dot of the last part, its
key: KEY.jpg (or another image), and KEY.txt or KEY.json with the caption. Nothing is unpacked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dit_jax.data.captioned_folder import MAX_CAPTION, CaptionedImages
from dit_jax.data.image_folder import ImageFolderOptions, Opening
from dit_jax.data.image_listing import in_split, validate_fraction, validate_split
from dit_jax.data.images import SUFFIXES, Size
from dit_jax.data.shard_files import ShardFiles, find_shards
from dit_jax.quantities import counted
from dit_jax.untrusted import TarEntry, open_regular, parse_json, read_tar, shown

logger = logging.getLogger(__name__)

_IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
_CAPTIONS = ("txt", "json")  # the first counts where there are both
_KEYS = ("caption", "text")  # of a .json
_MAX_IMAGE = 2**30  # bytes
_NAMED = 3


def open_captioned_shards(
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
    """Open tar shards of images with captions.

    A .json holds an object whose "caption", or else "text", is the caption; where there is a .txt
    too, that counts, and those that say something else are counted in a warning. Images keep the
    order of shards and of their files in them. The shards' headers are read once, here.

    Args:
        split: "train" or "test".
        path: 'pictures-{00000..00012}.tar', where '{split}' stands for the split's name if it is
            there; 'pictures-*.tar'; a folder of .tar files, or with such folders train/ and test/.
        image_size: See `open_image_folder`, as what follows.
        channels: See there.
        resize: See there.
        buckets: See there.
        test_fraction: See there.
        verify: See there.
        index_cache: Where the result of that is kept; default: .dit_jax_index.npz beside the
            shards.

    Raises:
        FileNotFoundError: A shard or the split is missing; a caption without an image.
        ValueError: Another split; images without a caption; two images, or two captions, of a key;
            a caption that is no text; a shard that is truncated, compressed or holds links; and
            what `open_image_folder` refuses.
    """
    validate_split(split, "captioned_shards")
    opening = Opening("captioned_shards", split, image_size, channels, resize, buckets)
    opening.check(verify)
    shards, on_disk = find_shards(path, split)
    validate_fraction(test_fraction, split, on_disk, shards[0].parent)
    images, captions = _read_shards(shards)
    chosen = None if on_disk else in_split(len(images), split, test_fraction)
    return CaptionedImages.read(opening, images, captions, chosen, verify, index_cache)


@dataclass
class _Content:
    """What one shard holds.

    Attributes:
        images: those with a caption.
        captions: theirs.
        without: names of images that have none.
        others: names of files of neither kind.
        contradicted: names of captions beside which there is another, in a .json.
    """

    images: list[TarEntry] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    contradicted: list[str] = field(default_factory=list)


def _read_shards(shards: Sequence[Path]) -> tuple[ShardFiles, list[str]]:
    """The images of all shards, and their captions."""
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        contents = list(pool.map(_read_shard, shards))
    without = _named(shards, [content.without for content in contents])
    if without:
        more = f", and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
        raise ValueError(
            f"{counted(len(without), 'image')} without a caption: {', '.join(without[:_NAMED])}"
            f"{more}. Put a .txt, or a .json with a caption, of the same key into the same shard"
        )
    others = _named(shards, [content.others for content in contents])
    if others:
        what = counted(len(others), "file")
        logger.warning("%s neither of images nor captions left out, as %s", what, others[0])
    contradicted = _named(shards, [content.contradicted for content in contents])
    if contradicted:
        what = counted(len(contradicted), "caption")
        logger.warning(
            "%s of a .txt beside a .json that says something else: the .txt counts, as %s",
            what,
            contradicted[0],
        )
    entries = [entry for content in contents for entry in content.images]
    if not entries:
        raise FileNotFoundError(
            f"no images in {counted(len(shards), 'shard')}, the first being {shards[0]}: expected "
            f"files KEY.jpg (or {', '.join(SUFFIXES[1:])}) and KEY.txt or KEY.json"
        )
    of_shard = np.repeat(np.arange(len(shards)), [len(content.images) for content in contents])
    images = ShardFiles(
        shards,
        of_shard.astype(np.int32),
        np.array([entry.offset for entry in entries], np.int64),
        np.array([entry.size for entry in entries], np.int64),
        [entry.name for entry in entries],
    )
    return images, [text for content in contents for text in content.captions]


def _named(shards: Sequence[Path], names: Sequence[Sequence[str]]) -> list[str]:
    """Names of files after those of their shards."""
    return [
        f"{shard}: {name}" for shard, inside in zip(shards, names, strict=True) for name in inside
    ]


def _read_shard(shard: Path) -> _Content:
    samples: dict[str, dict[str, TarEntry]] = {}
    content = _Content()
    for entry in read_tar(shard):
        folder, name = os.path.split(entry.name)
        first, dot, suffix = name.partition(".")
        if not first and dot:
            continue  # hidden
        suffix = suffix.lower()
        kind = "image" if suffix in _IMAGES else suffix if suffix in _CAPTIONS else None
        if kind is None:
            content.others.append(entry.name)
            continue
        sample = samples.setdefault(os.path.join(folder, first), {})
        if kind in sample:
            raise ValueError(
                f"{shard} has two files of one key, {shown(sample[kind].name)} and "
                f"{shown(entry.name)}: expected one image and one caption; remove one"
            )
        sample[kind] = entry
    with open_regular(shard) as file:
        for key, sample in samples.items():
            _add(content, shard, key, sample, file)
    return content


def _add(content: _Content, shard: Path, key: str, sample: dict[str, TarEntry], file) -> None:
    texts = [sample[kind] for kind in _CAPTIONS if kind in sample]
    if "image" not in sample:
        near = next((name for name in content.others if name.startswith(f"{key}.")), None)
        hint = f"; {shown(near)} is none, as keys end at the first dot" if near else ""
        raise FileNotFoundError(
            f"{shard}: {shown(texts[0].name)} is the caption of no image: expected {key}.jpg or "
            f"another of {', '.join(SUFFIXES)} in the same shard{hint}"
        )
    image = sample["image"]
    if image.size > _MAX_IMAGE:
        raise ValueError(
            f"{shard}: {shown(image.name)} has {image.size} bytes; images have at most {_MAX_IMAGE}"
        )
    if not texts:
        content.without.append(image.name)
        return
    content.images.append(image)
    content.captions.append(_caption(shard, texts[0], file))
    if any(_says_otherwise(shard, other, file, content.captions[-1]) for other in texts[1:]):
        content.contradicted.append(texts[0].name)


def _says_otherwise(shard: Path, entry: TarEntry, file, caption: str) -> bool:
    """Whether a .json that does not count has another caption; of its own it need have none."""
    try:
        return _caption(shard, entry, file).strip() != caption
    except ValueError:
        return False


def _caption(shard: Path, entry: TarEntry, file) -> str:
    where = f"{shard}: {entry.name}"
    if entry.size > MAX_CAPTION:
        raise ValueError(f"{where} has {entry.size} bytes; captions have at most {MAX_CAPTION}")
    file.seek(entry.offset)
    written = file.read(entry.size)
    if entry.name.lower().endswith(".json"):
        values = parse_json(written, where)
        found = {key: values[key] for key in _KEYS if key in values}
        if not found:
            raise ValueError(f'{where} has no "caption": expected {{"caption": "a red house"}}')
        key, text = next(iter(found.items()))
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key} is {shown(text)}; expected a string")
        return text
    try:
        return written.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{where} is no text: expected a caption in UTF-8") from None
