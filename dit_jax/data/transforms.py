"""Array transforms of a batch, and the random words that drive them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8, UInt64


def to_float(images: UInt8[np.ndarray, "*b h w c"]) -> Float32[np.ndarray, "*b h w c"]:
    """Map pixels 0..255 to float32 in [-1, 1]: x / 127.5 - 1 (both ends exact)."""
    scaled = images.astype(np.float32)
    scaled /= np.float32(127.5)
    scaled -= np.float32(1)
    return scaled


def flip_where(
    mask: Bool[np.ndarray, " b"], images: Shaped[np.ndarray, "b h w c"]
) -> Shaped[np.ndarray, "b h w c"]:
    """Mirror left to right the images where `mask` is true."""
    flipped = images.copy()
    flipped[mask] = images[mask, :, ::-1]
    return flipped


def random_words(seed: int, start: int, count: int) -> UInt64[np.ndarray, " {count}"]:
    """Draw one random 64-bit word for each of the examples start..start+count-1 of a stream.

    The word of an example depends on the seed and on its position in the stream only, not on how
    the stream is cut into batches, processes or workers: this is what makes resuming exact.
    A counter-based generator (Philox) yields the words of any stretch of the stream directly.
    """
    generator = np.random.Philox(key=[seed, _WORDS], counter=[start, 0, 0, 0])
    # One counter value gives a block of four words; an example uses the first.
    return generator.random_raw(4 * count).reshape(count, 4)[:, 0]


def random_bit(words: UInt64[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
    """Return a fair coin for each word (its highest bit)."""
    return (words >> np.uint64(63)).astype(bool)


def epoch_order(
    seed: int, epoch: int, num_examples: int, stream: int = 0
) -> Shaped[np.ndarray, " {num_examples}"]:
    """Return the random order in which pass number `epoch` over the data visits the examples.

    Streams (0 for all the data, then one a bucket) have orders of their own. The order sorts
    random words, rather than calling `Generator.permutation`, since NumPy guarantees the streams of
    its bit generators between versions but not those of its methods.
    """
    generator = np.random.Philox(key=[seed, _ORDER], counter=[0, 0, epoch, stream])
    return np.argsort(generator.random_raw(num_examples), kind="stable")


def turn_order(seed: int, number: int, count: int) -> Shaped[np.ndarray, " {count}"]:
    """Return the random order of the `count` batches of round `number`; see `buckets.Turns`."""
    generator = np.random.Philox(key=[seed, _TURNS], counter=[0, 0, number, 0])
    return np.argsort(generator.random_raw(count), kind="stable")


# Second halves of the Philox keys: keep the streams of one seed apart. (3 is of latents.)
_WORDS, _ORDER, _TURNS = 1, 2, 4
