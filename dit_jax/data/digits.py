"""The 8x8 handwritten digits that ship inside scikit-learn: data without a download."""

from __future__ import annotations

import dataclasses

import numpy as np

from dit_jax.data.images import Size, crop_pixels, validate_resize
from dit_jax.data.source import ArraySource
from dit_jax.options import option

_SIDE = 8


@dataclasses.dataclass(frozen=True)
class DigitsOptions:
    """Keys of config.data.digits."""

    resize: str = option("none", "adm: scale and centre-crop to the model's size | none")


def open_digits(
    split: str, *, image_size: Size | None = None, resize: str = DigitsOptions.resize
) -> ArraySource:
    """Open the 1,797 digits (10 classes, one grey channel, 8x8).

    Every fifth example of each class is held out: 1,442 training and 355 test images. The rule
    draws no random numbers, so the split is the same for everybody.

    Args:
        split: "train" or "test".
        image_size: Side of the images in pixels, or (height, width), for "adm".
        resize: "adm" scales and crops to `image_size` as ADM does; "none" leaves 8x8 pixels.

    Returns:
        The source, in memory; the 17 grey levels 0..16 are spread over 0..255.

    Raises:
        ValueError: Unknown split or `resize`.
    """
    validate_resize(resize, image_size, 1)
    if split not in ("train", "test"):
        raise ValueError(f"digits has the splits 'train' and 'test', not {split!r}")
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    rank_in_class = np.empty_like(labels)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        rank_in_class[members] = np.arange(members.size)
    held_out = rank_in_class % 5 == 4
    chosen = held_out if split == "test" else ~held_out
    pixels = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    if resize == "adm":
        pixels = crop_pixels(pixels, image_size)
    return ArraySource(
        pixels,
        labels[chosen],
        name="digits",
        split=split,
        class_names=[str(digit) for digit in range(10)],
    )
