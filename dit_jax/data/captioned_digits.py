"""Pictures of one or two handwritten digits, with captions: text to image without a download.

Canvases of 8x16 pixels made of scikit-learn's digits: one in the middle, "a handwritten seven", or
two of them, "three and five side by side".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from dit_jax.data.digits import open_digits
from dit_jax.data.source import to_arrays

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8
HEIGHT, WIDTH = CANVAS = (SIDE, 2 * SIDE)
Digits = tuple[int, ...]


def caption(digits: Digits) -> str:
    """What a picture of one or of two digits, from left to right, is called."""
    if len(digits) == 1:
        return f"a handwritten {NAMES[digits[0]]}"
    left, right = digits
    return f"{NAMES[left]} and {NAMES[right]} side by side"


def all_captions() -> list[str]:
    """Of every picture there can be: ten of one digit, a hundred of two."""
    ones = [caption((digit,)) for digit in range(10)]
    return ones + [caption((left, right)) for left in range(10) for right in range(10)]


def compose(
    images: UInt8[np.ndarray, "n 8 8 1"],
    labels: Int[np.ndarray, " n"],
    pairs: int,
    seed: int = 0,
) -> tuple[UInt8[np.ndarray, "m 8 16 1"], list[Digits]]:
    """Every digit alone, and `pairs` pictures of two of them.

    Of the pairs every combination of classes is as frequent as every other, to one.

    Args:
        images: digits, black where there is no ink.
        labels: their classes; each of the ten occurs.
        pairs: pictures of two.
        seed: of the choice.

    Returns:
        n + pairs pictures, and the digits each shows from left to right.
    """
    random = np.random.default_rng(seed)
    pictures = np.zeros((len(images) + pairs, *CANVAS, 1), np.uint8)
    pictures[: len(images), :, SIDE // 2 : SIDE // 2 + SIDE] = images
    shown: list[Digits] = [(int(label),) for label in labels]
    members = [np.flatnonzero(labels == digit) for digit in range(10)]
    for row in range(pairs):
        pair = divmod(row % 100, 10)
        left, right = (images[random.choice(members[digit])] for digit in pair)
        pictures[len(images) + row] = np.concatenate([left, right], axis=1)
        shown.append(pair)
    return pictures, shown


def halves(
    pictures: UInt8[np.ndarray, "n 8 16 1"], digits: Sequence[Digits]
) -> tuple[UInt8[np.ndarray, "m 8 8 1"], Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """The digits that pictures were to show, cut out where they should be.

    Returns:
        (digits [m, 8, 8, 1], their classes, the number of the picture each is of).
    """
    cut, classes, of_picture = [], [], []
    for number, (picture, shown) in enumerate(zip(pictures, digits, strict=True)):
        first = SIDE // 2 if len(shown) == 1 else 0
        for place, digit in enumerate(shown):
            start = first + place * SIDE
            cut.append(picture[:, start : start + SIDE])
            classes.append(digit)
            of_picture.append(number)
    return np.stack(cut), np.array(classes), np.array(of_picture)


def write_folder(folder: Path, pairs: int, seed: int = 0) -> int:
    """Writes the training digits as a folder of PNG files with metadata.jsonl.

    Args:
        folder: must not exist.
        pairs: pictures of two digits.
        seed: of their choice.

    Returns:
        The number of pictures.
    """
    pictures, shown = compose(*to_arrays(open_digits("train")), pairs, seed)
    folder.mkdir(parents=True)
    lines = []
    for number, (picture, digits) in enumerate(zip(pictures, shown, strict=True)):
        name = f"{number:05d}.png"
        Image.fromarray(picture[..., 0]).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption(digits)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(pictures)
