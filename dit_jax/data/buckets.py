"""Aspect-ratio buckets: images of several sizes, of which every batch holds one.

An image is scaled and cropped to that size of a few whose aspect ratio is nearest to its own, so
that little of it is lost. Which bucket a batch is of is a function of the seed and of the batch's
number, and so are its examples: a stream that goes on at batch k is the stream that never stopped.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, Integer

from dit_jax.data.transforms import turn_order

MOST_ELONGATED = 2.0  # of 'auto:MULTIPLE': the longer side over the shorter one
# Batches of a round, at most; see `Turns`.
MAX_ROUND = 2**20
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@dataclass(frozen=True)
class Bucket:
    """The images of one size.

    Attributes:
        size: (height, width).
        count: How many there are.
    """

    size: tuple[int, int]
    count: int

    def __str__(self) -> str:
        """'192x320', height first."""
        return "{}x{}".format(*self.size)


def parse_buckets(text: str, area: int) -> tuple[tuple[int, int], ...]:
    """The sizes that an option `buckets` names.

    Args:
        text: '192x320,256x256,320x192' (heights x widths), or 'auto:64' for `aspect_buckets` of
            sides that are multiples of 64.
        area: Pixels of an image, for 'auto'.

    Raises:
        ValueError: It means nothing, or two sizes have one aspect ratio.
    """
    kind, colon, number = text.partition(":")
    if colon and kind == "auto" and number.isdecimal() and 0 < int(number) < 2**15:
        return aspect_buckets(area, int(number))
    found = [_SIZE.fullmatch(part.strip()) for part in text.split(",")]
    if not all(found):
        raise ValueError(
            f"buckets={text!r}: expected heights and widths as '192x320,256x256,320x192', or "
            "'auto:64' for all of about the model's size in multiples of 64"
        )
    sizes = tuple((int(match[1]), int(match[2])) for match in found)
    ratios: dict[float, tuple[int, int]] = {}
    for height, width in sizes:
        if min(height, width) < 1:
            raise ValueError(f"buckets={text!r}: a side of 0 pixels")
        other = ratios.setdefault(width / height, (height, width))
        if other != (height, width) or sizes.count(other) > 1:
            raise ValueError(
                f"buckets={text!r}: {other[0]}x{other[1]} and {height}x{width} have the same "
                "aspect ratio, and an image could go to either: leave one out"
            )
    return sizes


def aspect_buckets(area: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """All sizes of at most `area` pixels, and nearly as many, from 1:2 to 2:1.

    Args:
        area: Pixels.
        multiple: What the sides are multiples of.

    Returns:
        (height, width) from the widest to the tallest.

    Raises:
        ValueError: No such size has so few pixels.
    """
    sizes = []
    for height in range(multiple, math.isqrt(int(area * MOST_ELONGATED)) + 1, multiple):
        width = area // height // multiple * multiple
        if width and max(height, width) <= MOST_ELONGATED * min(height, width):
            sizes.append((height, width))
    if not sizes:
        raise ValueError(
            f"buckets='auto:{multiple}': no rectangle of multiples of {multiple} has at most "
            f"{area} pixels: give a smaller multiple"
        )
    # Of two with one width the taller one has more of the pixels that are allowed.
    largest = {width: (height, width) for height, width in sizes}
    ratios = {width / height: (height, width) for height, width in largest.values()}
    return tuple(ratios[ratio] for ratio in sorted(ratios, reverse=True))


def nearest_bucket(
    sizes: Integer[np.ndarray, "n 2"], buckets: Sequence[tuple[int, int]]
) -> Int32[np.ndarray, " n"]:
    """The number of the bucket of the nearest aspect ratio, on a logarithmic scale.

    Args:
        sizes: (width, height) of images.
        buckets: (height, width) of each.
    """
    own = np.log(sizes[:, 0] / sizes[:, 1])
    ratios = np.log([width / height for height, width in buckets])
    return np.abs(own[:, None] - ratios[None]).argmin(axis=1).astype(np.int32)


@dataclass(frozen=True)
class Turns:
    """Which bucket each batch of an endless stream is of.

    Batches come in rounds, in which every bucket has as many turns as its share of the images, in
    random order: so all images are seen equally often, however the buckets differ in size. (Rounds
    are as long as it takes for whole numbers, but `MAX_ROUND` at most: beyond that shares are kept
    to a millionth.)

    Attributes:
        counts: Images of each bucket.
        seed: Of the order.
        shuffle: Whether the order is random; else one bucket comes after the other.
    """

    counts: tuple[int, ...]
    seed: int
    shuffle: bool = True

    @functools.cached_property
    def per_round(self) -> tuple[int, ...]:
        """Turns of each bucket in a round."""
        common = math.gcd(*self.counts)
        total = sum(self.counts) // common
        if total <= MAX_ROUND:
            return tuple(count // common for count in self.counts)
        return tuple(max(1, round(MAX_ROUND * n / sum(self.counts))) for n in self.counts)

    def __call__(self, batch: int) -> tuple[int, int]:
        """(bucket, how many of its batches came before) of batch number `batch`."""
        number, place = divmod(batch, sum(self.per_round))
        buckets, ranks = _round(self, number)
        bucket = int(buckets[place])
        return bucket, number * self.per_round[bucket] + int(ranks[place])


@functools.lru_cache(maxsize=4)
def _round(turns: Turns, number: int) -> tuple[Int32[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """For the batches of a round: their buckets, and which of its bucket's batches each is."""
    buckets = np.repeat(np.arange(len(turns.counts), dtype=np.int32), turns.per_round)
    if turns.shuffle:
        buckets = buckets[turn_order(turns.seed, number, len(buckets))]
    ranks = np.empty(len(buckets), np.int64)
    for bucket, count in enumerate(turns.per_round):
        ranks[buckets == bucket] = np.arange(count)
    return buckets, ranks
