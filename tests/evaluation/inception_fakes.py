"""A cheap extractor with the interface of `InceptionExtractor`, and images for it."""

from typing import NamedTuple

import numpy as np


class FakeFeatures(NamedTuple):
    pool: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


class FakeInception:
    """Random projections of average-pooled pixels; counts what it is shown."""

    name = "fake-inception"
    dim = 6

    def __init__(self, seed: int = 0, *, standard: bool = False):
        self.fingerprint = f"fake{seed}"
        self.standard = standard
        self.seen = 0
        self.largest_batch = 0
        rng = np.random.default_rng(seed)
        self._pool, self._spatial, self._logits = (
            rng.normal(size=(12, width)).astype(np.float32) for width in (self.dim, 5, 4)
        )

    def features(self, images: np.ndarray) -> FakeFeatures:
        assert images.dtype == np.uint8
        self.seen += len(images)
        self.largest_batch = max(self.largest_batch, len(images))
        n, h, w, c = images.shape
        pixels = images.reshape(n, 2, h // 2, 2, w // 2, c).mean((2, 4), dtype=np.float64)
        flat = (pixels.reshape(n, -1) / 32 - 4).astype(np.float32)
        return FakeFeatures(
            np.maximum(flat @ self._pool, 0), np.tanh(flat @ self._spatial), flat @ self._logits
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.features(images).pool


class StreamingFake(FakeInception):
    """With `stream`, in parts of other sizes than the batches."""

    def stream(self, batches):
        for batch in batches:
            yield self.features(batch[:3])
            yield self.features(batch[3:])


def random_images(seed: int, count: int, size: int = 4, shift: float = 0.0) -> np.ndarray:
    """uint8 [count, size, size, 3], with something of their own in each."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(40, 200, size=(count, 2, 1, 2, 1, 3))
    blocks = np.broadcast_to(colour, (count, 2, size // 2, 2, size // 2, 3))
    pixels = blocks.reshape(count, size, size, 3) + rng.normal(0, 20, (count, size, size, 3))
    return np.clip(pixels + shift, 0, 255).astype(np.uint8)
