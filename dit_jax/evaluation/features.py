"""The seam between images and scores: a feature extractor, and streaming over batches of images.

A score never knows which network made its features. A new extractor is an object with the four
members of `FeatureExtractor`; everything that measures accepts it as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Shaped

from dit_jax.evaluation.frechet import GaussianStatistics
from dit_jax.evaluation.images import AnyArray


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images to features, with an identity.

    Attributes:
        name: For people and records, e.g. "inception-v3-2015".
        fingerprint: Hash of all that decides the features (weights, architecture, preprocessing).
            Statistics with different fingerprints are never compared.
        dim: Number of features.
    """

    name: str
    fingerprint: str
    dim: int

    def __call__(self, images: Shaped[AnyArray, "n h w c"]) -> Float[np.ndarray, "n dim"]:
        """Features of images given as uint8, or as floating point in [-1, 1]."""
        ...


def batches_of(
    images: Shaped[AnyArray, "n h w c"], batch_size: int
) -> Iterator[Shaped[AnyArray, "b h w c"]]:
    """Cuts an array of images into consecutive batches; the last one may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


def extract_features(
    extractor: FeatureExtractor, batches: Iterable[Shaped[AnyArray, "b h w c"]]
) -> Float[np.ndarray, "n dim"]:
    """Features of every image of `batches`, in order, for scores that need them one by one."""
    parts = [_features_of(extractor, batch) for batch in batches]
    return np.concatenate(parts) if parts else np.zeros((0, extractor.dim), np.float32)


def feature_statistics(
    extractor: FeatureExtractor, batches: Iterable[Shaped[AnyArray, "b h w c"]]
) -> GaussianStatistics:
    """Mean and covariance of the features of `batches`, holding one batch at a time.

    Args:
        extractor: Makes the features; its fingerprint goes into the statistics.
        batches: Any iterable of image batches, e.g. `batches_of(images, 500)` or a data loader.
    """
    statistics = GaussianStatistics(extractor.dim, extractor.fingerprint)
    for batch in batches:
        statistics.update(_features_of(extractor, batch))
    return statistics


def _features_of(extractor: FeatureExtractor, batch: AnyArray) -> np.ndarray:
    features = np.asarray(extractor(batch))
    if features.shape != (len(batch), extractor.dim):
        raise ValueError(
            f"feature extractor {extractor.name!r} returned shape {features.shape} for "
            f"{len(batch)} images; expected {(len(batch), extractor.dim)}"
        )
    return features
