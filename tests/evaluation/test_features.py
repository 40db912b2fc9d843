from dataclasses import dataclass

import numpy as np
import pytest

from dit_jax.evaluation import (
    Classifier,
    FeatureExtractor,
    batches_of,
    extract_features,
    feature_statistics,
)
from dit_jax.evaluation.images import to_float


@dataclass
class RandomProjection:
    """The smallest thing that is a feature extractor."""

    name: str = "random-projection"
    fingerprint: str = "seed-0"
    dim: int = 5
    largest_batch: int = 0

    def __call__(self, images):
        self.largest_batch = max(self.largest_batch, len(images))
        flat = to_float(images).reshape(len(images), -1)
        return flat @ np.random.default_rng(0).normal(size=(flat.shape[1], self.dim))


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (103, 4, 4, 3), dtype=np.uint8)


def test_streaming_equals_one_batch_and_holds_one_batch(images):
    extractor = RandomProjection()
    streamed = feature_statistics(extractor, (batch for batch in batches_of(images, 10)))
    assert extractor.largest_batch == 10
    features = extract_features(extractor, batches_of(images, 7))
    np.testing.assert_allclose(features, extractor(images))
    assert (streamed.count, streamed.fingerprint) == (103, "seed-0")
    np.testing.assert_allclose(streamed.mean, features.mean(0))
    np.testing.assert_allclose(streamed.covariance, np.cov(features, rowvar=False))


def test_no_batches_is_an_empty_result():
    assert extract_features(RandomProjection(), []).shape == (0, 5)
    assert feature_statistics(RandomProjection(), []).count == 0


def test_the_seam_is_structural(classifier):
    assert isinstance(RandomProjection(), FeatureExtractor)
    assert isinstance(classifier, FeatureExtractor)
    assert isinstance(classifier, Classifier)
    assert not isinstance(len, FeatureExtractor)


def test_a_broken_extractor_is_named(images):
    broken = RandomProjection()
    broken.dim = 6
    wrong = RandomProjection(name="wrong")
    wrong.__class__ = type("Wrong", (RandomProjection,), {"__call__": lambda s, x: np.zeros(3)})
    with pytest.raises(ValueError, match=r"'wrong' returned shape \(3,\).*\(103, 5\)"):
        feature_statistics(wrong, [images])
    with pytest.raises(ValueError, match="batch_size must be"):
        list(batches_of(images, 0))
