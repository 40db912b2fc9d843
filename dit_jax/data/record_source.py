"""Records as a source of batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Int

from dit_jax.conditions import Condition
from dit_jax.data.buckets import Bucket
from dit_jax.data.records.reader import Records
from dit_jax.data.source import Batch, DatasetInfo, Example, Source, fingerprint


class RecordSource(Source):
    """What sources of records have in common: the example that is an image, and its conditions.

    Args:
        records: The records.
        image: The field that becomes the batch's "image".
        *read_as: How they are read, as JSON: it enters the fingerprint.

    Attributes:
        records: The records.
        header: What they are.

    Raises:
        ValueError: They are no images; or of several sizes, which not every kind of source takes.
    """

    slow_to_read = True
    has_buckets = False  # whether images may be of several sizes

    def __init__(self, records: Records, image: str, *read_as: Any):
        self.records, self.header = records, records.header
        header, field = self.header, self.header.fields[image]
        shape = field.shape
        if len(shape) != 3 or not field.is_floating or field.condition:
            raise ValueError(
                f"{image} of {records.folder} is {field.dtype} {list(shape)}; expected an image, "
                "float32 or float16 [height, width, channels]"
            )
        buckets: tuple[Bucket, ...] = ()
        if not field.is_of_one_shape and self.has_buckets:
            shapes = records.shapes(image)
            buckets = tuple(Bucket(size[:2], len(found)) for size, found in shapes.items())
            shape = max(shapes, key=math.prod)
            if len(buckets) == 1:  # as it happens: like any other set
                buckets = ()
            else:
                self.bucket_of = np.empty(header.count, np.int32)
                for number, found in enumerate(shapes.values()):
                    self.bucket_of[found] = number
        elif not field.is_of_one_shape:
            sizes = ", ".join("x".join(map(str, shape[:2])) for shape in records.shapes(image))
            raise ValueError(
                f"the {header.kind} in {records.folder} are of several sizes ({sizes}), and a batch"
                " holds images of one size: give a set of one size"
            )
        self.info = DatasetInfo(
            name=f"{header.kind}/{records.folder.name}",
            split=header.split,
            image_shape=shape,
            num_classes=header.num_classes,
            num_examples=header.count,
            class_names=header.class_names,
            # The header holds the hash of every file.
            fingerprint=fingerprint(header.kind, records.text, *read_as),
            conditions=header.conditions,
            buckets=buckets,
            null_conditions={name: records.null(name) for name in header.nulls} or None,
            declared={
                name: Condition(header.fields[name].shape, header.fields[name].read_dtype.name)
                for name in header.conditions
            },
        )

    def __getitem__(self, index: int) -> Example:
        """Return record `index`, the same at every reading."""
        batch = self.batch(np.array([index]))
        example = {name: batch[name][0] for name in ("image", *self.info.conditions)}
        if "label" in example:
            example["label"] = int(example["label"])
        return example

    def describe(self, index: int) -> str:
        """Name an example by its folder and position."""
        return self.records.describe(index)

    def conditions(self, indices: Int[np.ndarray, " b"]) -> Batch:
        """What tells a network of some records, by name."""
        return {
            name: self.records.labels[indices]
            if name == "label"
            else self.records.read(name, indices)
            for name in self.info.conditions
        }
