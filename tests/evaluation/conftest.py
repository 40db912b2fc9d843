from dataclasses import dataclass

import numpy as np
import pytest

from dit_jax.evaluation import Classifier, train_classifier
from dit_jax.evaluation.digits import classifier as classifier_lib
from tests.compilations import optimized


@dataclass(frozen=True)
class Split:
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@pytest.fixture(scope="session")
def digits() -> Split:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 8.0 - 1.0).astype(np.float32)[..., None]
    labels = data.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:360], order[360:]
    return Split(images[train], labels[train], images[test], labels[test])


@pytest.fixture(scope="session")
def classifier_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(scope="session")
def classifier(digits, classifier_cache) -> Classifier:
    """The digits classifier at its default settings, trained once for the whole session."""
    options = {"static_argnums": 0, "donate_argnums": 1}
    run_steps = optimized(classifier_lib._run_steps, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_lib, "_run_steps", run_steps)
        return train_classifier(
            digits.train_images,
            digits.train_labels,
            10,
            seed=0,
            test_images=digits.test_images,
            test_labels=digits.test_labels,
            cache_dir=classifier_cache,
        )
