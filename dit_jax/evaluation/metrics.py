"""Scores of samples against real images, gathered into one stamped record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from dit_jax.evaluation.features import FeatureExtractor, batches_of, feature_statistics
from dit_jax.evaluation.frechet import frechet_distance
from dit_jax.evaluation.images import AnyArray, to_uint8
from dit_jax.evaluation.memorization import memorization_summary
from dit_jax.evaluation.record import build_record, content_hash

# The random part of the training set that gives the floor; recorded by its being constant.
FLOOR_SEED = 0


@runtime_checkable
class LabelPredictor(Protocol):
    """What label accuracy needs of a classifier."""

    def predict(self, images: Shaped[AnyArray, "n h w c"]) -> Int[np.ndarray, " n"]:
        """The class of each image."""
        ...


def label_accuracy(
    predictor: LabelPredictor,
    images: AnyArray,
    labels: AnyArray,
) -> dict[str, Any]:
    """Fraction of images that a classifier recognises as their label, overall and by class.

    Returns:
        {"overall": float, "per_class": {"0": float, ...}} over the classes that occur.
    """
    labels = np.asarray(labels)
    if len(labels) != len(images) or len(labels) == 0:
        raise ValueError(f"expected as many labels as images, got {len(labels)} and {len(images)}")
    right = np.asarray(predictor.predict(images)) == labels
    per_class = {str(label): float(right[labels == label].mean()) for label in np.unique(labels)}
    return {"overall": float(right.mean()), "per_class": per_class}


def evaluate_samples(
    samples: AnyArray,
    labels: AnyArray | None = None,
    *,
    extractor: FeatureExtractor,
    train_images: AnyArray,
    test_images: AnyArray,
    train_labels: AnyArray | None = None,
    test_labels: AnyArray | None = None,
    classifier: LabelPredictor | None = None,
    rounding: str = "nearest",
    seeds: int | Sequence[int] | None = None,
    allow_singular: bool = False,
    batch_size: int = 500,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores samples against held-out real images; the result goes into JSON as it is.

    All images are rounded to bytes first: what is scored is what would be saved.

    Scores (`record["scores"]`):
        frechet_distance: Between samples and held-out images, in the extractor's features.
        frechet_distance_floor: The same for as many random training images as there are samples
            (all, if there are fewer): what real images score. A model much below it is not better
            than real images; it is narrow, or close to the test set.
        label_accuracy: See `label_accuracy`; None without labels or classifier.
        classifier_test_accuracy: The classifier on held-out images, the yardstick of the above.
        memorization: See `MemorizationSummary`; neighbours are sought among all classes, as a copy
            under a wrong label is a copy too.

    Args:
        samples: Generated images [n, h, w, c], uint8 or [-1, 1].
        labels: The classes they were asked to show, integers [n].
        extractor: Makes the features.
        train_images: The generator's training images.
        test_images: Held-out real images, the reference.
        train_labels: Integer classes; enter the reference hash.
        test_labels: Integer classes; needed for classifier_test_accuracy.
        classifier: Judges labels; None takes the extractor if it can predict.
        rounding: A rule of `to_uint8`.
        seeds: Of the samples, for the record.
        allow_singular: See `frechet_distance`.
        batch_size: Images an extractor sees at once.
        provenance: More to record: solver, steps, guidance scale, checkpoint, ...

    Raises:
        ValueError: Images of different shapes, labels that do not fit, or nothing to score.
        TooFewSamplesError: Fewer images in a set than features + 1, and not `allow_singular`.
    """
    samples = to_uint8(samples, rounding)
    train_images, test_images = to_uint8(train_images, rounding), to_uint8(test_images, rounding)
    if not samples.shape[1:] == train_images.shape[1:] == test_images.shape[1:]:
        raise ValueError(
            f"images of different shapes: samples {samples.shape[1:]}, training "
            f"{train_images.shape[1:]}, test {test_images.shape[1:]}"
        )
    if classifier is None and isinstance(extractor, LabelPredictor):
        classifier = extractor
    labels_and_owners = (
        ("samples", labels, samples),
        ("training images", train_labels, train_images),
        ("test images", test_labels, test_images),
    )
    for owner, given, images in labels_and_owners:
        if given is not None and np.shape(given) != (len(images),):
            raise ValueError(f"{len(images)} {owner} with labels of shape {np.shape(given)}")

    floor_count = min(len(samples), len(train_images))
    chosen = np.random.default_rng(FLOOR_SEED).permutation(len(train_images))[:floor_count]
    statistics = {
        name: feature_statistics(extractor, batches_of(images, batch_size))
        for name, images in (
            ("samples", samples),
            ("test", test_images),
            ("floor", train_images[np.sort(chosen)]),
        )
    }

    def distance_to_test(name: str) -> float:
        return frechet_distance(statistics[name], statistics["test"], allow_singular=allow_singular)

    judged = classifier is not None and labels is not None
    yardstick = classifier is not None and test_labels is not None
    scores = {
        "frechet_distance": distance_to_test("samples"),
        "frechet_distance_floor": distance_to_test("floor"),
        "label_accuracy": label_accuracy(classifier, samples, labels) if judged else None,
        "classifier_test_accuracy": (
            label_accuracy(classifier, test_images, test_labels)["overall"] if yardstick else None
        ),
        "memorization": memorization_summary(samples, train_images, test_images).as_dict(),
    }
    reference = [train_images, test_images]
    reference += [np.asarray(x, np.int64) for x in (train_labels, test_labels) if x is not None]
    return build_record(
        scores,
        extractor=extractor,
        reference_hash=content_hash(*reference),
        sample_hash=content_hash(samples),
        counts={
            "samples": len(samples),
            "train_images": len(train_images),
            "test_images": len(test_images),
            "floor_images": floor_count,
        },
        seeds=seeds,
        rounding=rounding,
        provenance={"allow_singular": allow_singular} | dict(provenance or {}),
    )
