"""What a data source is: random access to labelled images, or to their latents."""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64, Integer, Shaped, UInt8, UInt64

from dit_jax.conditions import Condition
from dit_jax.data.buckets import Bucket
from dit_jax.data.labels import validate_labels
from dit_jax.data.records.header import Header
from dit_jax.data.transforms import flip_where, random_bit

Example = dict[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a source before its first example is read.

    Attributes:
        name: The source's name, as given to `open_source` (with the data set's own name if any).
        split: The split that was opened, "train" or "test".
        image_shape: (height, width, channels) of every image, or of every latent; where there are
            buckets, of the largest.
        num_classes: Labels lie in 0..num_classes-1. 0 means unlabelled: every label is then 0,
            which is also the index of the null class of a model with no classes.
        num_examples: Number of examples.
        class_names: One name a label; () if the data have none.
        fingerprint: A hash of what the source delivers, cheap to compute (file names and sizes,
            headers), so that a resumed run notices that its data changed.
        latents: The header of a set of pre-extracted latents, None for images.
        conditions: Which of an example's arrays tell the network what it shows, by name.
        null_conditions: What stands for their absence, for those whose network does not know it by
            itself (the embedding of an empty prompt).
        declared: Shape and kind of numbers of conditions, as far as they are known without reading.
        buckets: The sizes of images that come in several; () for one size.
    """

    name: str
    split: str
    image_shape: tuple[int, int, int]
    num_classes: int
    num_examples: int
    class_names: tuple[str, ...]
    fingerprint: str
    latents: Header | None = None
    conditions: tuple[str, ...] = ("label",)
    null_conditions: Mapping[str, np.ndarray] | None = None
    declared: Mapping[str, Condition] = field(default_factory=dict)
    buckets: tuple[Bucket, ...] = ()


class Source(ABC):
    """Random access to examples.

    Read by several threads at once. Cheap to pickle: each loader worker receives a copy.
    """

    info: DatasetInfo
    # Whether a batch takes so long to read that several should be read at once.
    slow_to_read: bool = False
    # Which of `info.buckets` each example is of, where there are any.
    bucket_of: Int32[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return self.info.num_examples

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Return example `index`, always the same and never augmented.

        Returns:
            {"image": uint8 [h, w, c] or float32 latents [h, w, c], "label": int}.
        """

    def describe(self, index: int) -> str:
        """Name example `index` for an error message (a file's path where there is one)."""
        return f"example {index} of {self.info.name}/{self.info.split}"

    @functools.cached_property
    def _members(self) -> list[Int64[np.ndarray, " _"]]:
        buckets = range(len(self.info.buckets))
        return [np.flatnonzero(self.bucket_of == bucket) for bucket in buckets]

    def members(self, bucket: int) -> Int64[np.ndarray, " n"]:
        """The ascending indices of the examples of one of `info.buckets`.

        Raises:
            ValueError: There are no buckets.
        """
        if not self.info.buckets:
            raise ValueError(f"{self.info.name}/{self.info.split} has no buckets")
        return self._members[bucket]

    def shape_of(self, indices: Int[np.ndarray, " b"]) -> tuple[int, int, int]:
        """(height, width, channels) of some examples.

        Raises:
            ValueError: They are of several buckets.
        """
        if not self.info.buckets:
            return self.info.image_shape
        found = np.unique(self.bucket_of[indices])
        if len(found) != 1:
            listed = ", ".join(str(self.info.buckets[i]) for i in found)
            raise ValueError(
                f"images of {self.info.name} are of several sizes ({listed}): read together only "
                "those of one bucket"
            )
        return (*self.info.buckets[found[0]].size, self.info.image_shape[-1])

    def require_horizontal_flip(self) -> None:  # noqa: B027 - pixels can always be mirrored
        """Raise a ValueError if this source cannot deliver mirrored examples."""

    def batch(
        self,
        indices: Int[np.ndarray, " b"],
        *,
        draws: UInt64[np.ndarray, " b"] | None = None,
        horizontal_flip: bool = False,
    ) -> Batch:
        """Read several examples, augmented.

        Args:
            indices: Which examples, of one bucket if there are buckets.
            draws: One random 64-bit word an example, the only source of randomness: equal words
                give equal examples. None reads without any randomness, as `__getitem__` does.
            horizontal_flip: Mirror each example with probability 1/2 (needs `draws`).

        Returns:
            {"image": uint8 or float32 [b, h, w, c], "label": int32 [b]}, or instead of the label
            what `info.conditions` names.
        """
        batch = self._gather(indices)
        if horizontal_flip and draws is not None:
            batch["image"] = flip_where(random_bit(draws), batch["image"])
        return batch

    def _gather(self, indices: Int[np.ndarray, " b"]) -> Batch:
        """Read the plain examples one by one; sources that know a faster way override this."""
        examples = [self[int(index)] for index in indices]
        dtype = np.uint8 if self.info.latents is None else np.float32
        image = np.empty((len(examples), *self.shape_of(indices)), dtype)
        for row, example in enumerate(examples):
            image[row] = example["image"]
        batch = {"image": image}
        for name in self.info.conditions:
            values = np.asarray([example[name] for example in examples])
            batch[name] = values.astype(np.int32) if name == "label" else values
        return batch


class ArraySource(Source):
    """Images held in memory, batched by one indexing operation.

    Attributes:
        info: See `DatasetInfo`. Without `num_classes`, there are as many as class names.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        labels: Integer[np.ndarray, " n"],
        *,
        name: str,
        split: str,
        class_names: Sequence[str] = (),
        num_classes: int | None = None,
    ):
        num_classes = len(class_names) if num_classes is None else num_classes
        self.info = DatasetInfo(
            name=name,
            split=split,
            image_shape=tuple(images.shape[1:]),
            num_classes=num_classes,
            num_examples=len(images),
            class_names=tuple(class_names),
            fingerprint=fingerprint(name, split, num_classes, images, labels),
        )
        validate_labels(labels, num_classes, self.describe)
        self._images = images
        self._labels = labels.astype(np.int32)

    def __getitem__(self, index: int) -> Example:
        """Return example `index`."""
        return {"image": self._images[index], "label": int(self._labels[index])}

    def _gather(self, indices):
        return {"image": self._images[indices], "label": self._labels[indices]}


def to_arrays(
    source: Source, limit: int | None = None
) -> tuple[Shaped[np.ndarray, "n h w c"], Int32[np.ndarray, " n"]]:
    """Read the first `limit` examples (default: all) of a source into memory, unaugmented.

    Returns:
        (uint8 images or float32 latents [n, h, w, c], int32 labels [n]), in the source's order.
    """
    count = len(source) if limit is None else min(limit, len(source))
    batch = source.batch(np.arange(count))
    return batch["image"], batch["label"]


def fingerprint(*parts: Any) -> str:
    """Hash arrays and JSON-able values into 16 hexadecimal digits.

    Equal values give equal hashes on every machine.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
