"""A source of images that a text tells of: bright or dark squares, in two words."""

import dataclasses

import numpy as np

from dit_jax.data import register_source
from dit_jax.data.source import DatasetInfo, Source
from dit_jax.options import option
from dit_jax.ranges import COUNT

EMPTY = np.full((1, 4), 0.5, np.float32)  # the embedding of the empty prompt


class Captions(Source):
    def __init__(self, split, image_size, count):
        self.info = DatasetInfo(
            name="captions",
            split=split,
            image_shape=(image_size, image_size, 1),
            num_classes=0,
            num_examples=count,
            class_names=(),
            fingerprint=f"captions {image_size} {count}",
            conditions=("text", "text_mask"),
            null_conditions={"text": EMPTY},
        )

    def __getitem__(self, index):
        side, bright = self.info.image_shape[0], index % 2
        image = np.full((side, side, 1), 230 if bright else 25, np.uint8)
        text = np.zeros((3, 4), np.float32)
        text[:2, bright] = 1.0
        return {"image": image, "text": text, "text_mask": np.array([True, True, False])}


@dataclasses.dataclass(frozen=True)
class CaptionsOptions:
    count: int = option(32, "how many there are", COUNT)


def open_captions(split: str, image_size: int, count: int = CaptionsOptions.count) -> Captions:
    return Captions(split, image_size, count)


def register() -> None:
    register_source("captions", open_captions, CaptionsOptions)
