"""Scores of small images by a classifier of their data, gathered into one stamped record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dit_jax.evaluation.digits.classifier import INFERENCE_BATCH, Classifier
from dit_jax.evaluation.digits.memorization import memorization_summary
from dit_jax.evaluation.features import batches_of, feature_statistics
from dit_jax.evaluation.frechet import frechet_distance
from dit_jax.evaluation.images import AnyArray, to_uint8
from dit_jax.evaluation.record import build_record, content_hash

# The random part of the training set that gives the floor; recorded by its being constant.
FLOOR_SEED = 0


def evaluate_samples(
    classifier: Classifier,
    samples: AnyArray,
    labels: AnyArray,
    *,
    train: tuple[AnyArray, AnyArray],
    test: tuple[AnyArray, AnyArray],
    rounding: str = "nearest",
    seeds: int | Sequence[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores samples against held-out real images; the result goes into JSON as it is.

    All images are rounded to bytes first: what is scored is what would be saved.

    Scores (`record["scores"]`):
        frechet_distance: Between samples and held-out images, in the classifier's features.
        frechet_distance_floor: The same for as many random training images as there are samples
            (all, if there are fewer): what real images score. A model much below it is not better
            than real images; it is narrow, or close to the test set.
        label_accuracy: Fraction of samples recognised as their label, overall and by class.
        classifier_test_accuracy: The same on held-out images, the yardstick of the above.
        memorization: See `memorization_summary`; neighbours are sought among all classes, as a copy
            under a wrong label is a copy too.

    Args:
        classifier: Trained on `train`.
        samples: Generated images [n, h, w, c], uint8 or [-1, 1].
        labels: The classes they were asked to show, integers [n].
        train: The generator's training images, and their classes.
        test: Held-out real images, the reference, and their classes.
        rounding: A rule of `to_uint8`.
        seeds: Of the samples, for the record.
        provenance: More to record: solver, steps, guidance scale, checkpoint, ...

    Raises:
        ValueError: Images of different shapes, labels that do not fit, or nothing to score.
        TooFewSamplesError: Fewer images in a set than features + 1.
    """
    given = {"samples": (samples, labels), "training images": train, "test images": test}
    images = {name: to_uint8(array, rounding) for name, (array, _) in given.items()}
    samples, train_images, test_images = images.values()
    if len({array.shape[1:] for array in images.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape[1:]}" for name, array in images.items())
        raise ValueError(f"images of different shapes: {shapes}")
    for name, (array, its_labels) in given.items():
        if np.shape(its_labels) != (len(array),):
            raise ValueError(f"{len(array)} {name} with labels of shape {np.shape(its_labels)}")
    floor_count = min(len(samples), len(train_images))
    chosen = np.random.default_rng(FLOOR_SEED).permutation(len(train_images))[:floor_count]

    def statistics(images: np.ndarray) -> Any:
        return feature_statistics(classifier, batches_of(images, INFERENCE_BATCH))

    reference = statistics(test_images)
    floor = statistics(train_images[np.sort(chosen)])
    scores = {
        "frechet_distance": frechet_distance(statistics(samples), reference),
        "frechet_distance_floor": frechet_distance(floor, reference),
        "label_accuracy": label_accuracy(classifier, samples, labels),
        "classifier_test_accuracy": label_accuracy(classifier, test_images, test[1])["overall"],
        "memorization": memorization_summary(samples, train_images, test_images),
    }
    its_labels = [np.asarray(classes, np.int64) for _, classes in (train, test)]
    return build_record(
        scores,
        extractor=classifier,
        reference_hash=content_hash(train_images, test_images, *its_labels),
        sample_hash=content_hash(samples),
        counts={
            "samples": len(samples),
            "train_images": len(train_images),
            "test_images": len(test_images),
            "floor_images": floor_count,
        },
        seeds=seeds,
        rounding=rounding,
        provenance=provenance,
    )


def label_accuracy(classifier: Classifier, images: AnyArray, labels: AnyArray) -> dict[str, Any]:
    """Fraction of images [n, h, w, c] that a classifier recognises as their label.

    Returns:
        {"overall": float, "per_class": {"0": float, ...}} over the classes that occur.
    """
    labels = np.asarray(labels)
    if len(labels) != len(images) or len(labels) == 0:
        raise ValueError(f"expected as many labels as images, got {len(labels)} and {len(images)}")
    right = classifier.predict(images) == labels
    per_class = {str(label): float(right[labels == label].mean()) for label in np.unique(labels)}
    return {"overall": float(right.mean()), "per_class": per_class}
