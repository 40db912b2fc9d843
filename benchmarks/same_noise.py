"""One model sampled in several ways from the same noise: images drawn, kept, judged and shown.

What two ways of sampling differ by is seen best on the same noise: most of the sampling error of a
Fréchet distance is then common to both, and what is left of it in their ratio is estimated
(`Judge.change`).
"""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.atomic import atomic_file
from dit_jax.launch import argument_types, classifier_scores, wiring
from dit_jax.sampling import image_keys

SMALL = dataclasses.replace(
    evaluation.CIFAR10, stages=((16,), (32,), (64,)), feature_dim=64, steps=700, dropout=0.1
)
"""A judge of colour images for CPUs: a fraction of the convolutions, 1.8 epochs of CIFAR-10."""

GROUPS = 10  # of images, of which each is left out once
SHOWN = 4  # images a class


def add_arguments(parser: argparse.ArgumentParser, num_images: int) -> None:
    """How many images, by which judge, and where they are kept."""
    parser.add_argument("--num_images", type=argument_types.count, default=num_images)
    parser.add_argument(
        "--batch_size", type=argument_types.count, default=250, help="images sampled at once"
    )
    parser.add_argument(
        "--judge",
        choices=["preset", "small"],
        default="preset",
        help="the classifier whose features are compared; small: for 32x32 colour on a CPU",
    )
    parser.add_argument(
        "--keep", type=Path, help="a folder of images drawn so far: an interrupted study goes on"
    )


@dataclasses.dataclass(frozen=True)
class Judge:
    """A small classifier of a run's data, and the features of its held-out images.

    Attributes:
        classifier: makes the features.
        held_out: [n, features].
        floor: Fréchet distance to those of as many training images as there are samples.
    """

    classifier: evaluation.Classifier
    held_out: np.ndarray
    floor: float

    @classmethod
    def open(
        cls, config: ml_collections.ConfigDict, size: str, num_images: int, folder: Path | None
    ) -> "Judge":
        """The judge of a run's data, trained or found in `folder`.

        Args:
            config: the run's.
            size: 'preset', or 'small'.
            num_images: that it is to judge at once.
            folder: of trained classifiers; None to train without keeping.

        Raises:
            ValueError: data without classes, or too few images for a distance.
        """
        if not config.model.num_classes:
            raise ValueError("the judge needs labelled data; this model has no classes")
        images = classifier_scores.real_images(config)
        train = data_lib.to_arrays(experiment.open_data(images, "train"))
        test = data_lib.to_arrays(experiment.open_data(images, "test"))
        classifier_scores.require_enough(
            num_images, len(train[0]), len(test[0]), train[0].shape[1:]
        )
        classifier = evaluation.train_classifier(
            *train,
            config.model.num_classes,
            seed=0,
            settings=SMALL if size == "small" else None,
            test_images=test[0],
            test_labels=test[1],
            cache_dir=folder,
        )
        chosen = np.random.default_rng(0).permutation(len(train[0]))[:num_images]
        judge = cls(classifier, classifier(test[0]), 0.0)
        return dataclasses.replace(judge, floor=judge.distance(classifier(train[0][chosen])))

    def distance(self, features: np.ndarray) -> float:
        """Fréchet distance to held-out images."""
        pair = (self._statistics(features), self._statistics(self.held_out))
        return float(evaluation.frechet_distance(*pair))

    def change(self, features: np.ndarray, base: np.ndarray) -> tuple[float, float]:
        """Relative change of the distance against that of `base`, and its standard error.

        Both are of the same noise, image by image. The error is the jackknife's: a tenth of the
        images is left out of both, in turn (Efron and Stein 1981).
        """

        def ratio(kept: np.ndarray) -> float:
            return self.distance(features[kept]) / self.distance(base[kept])

        classes = self.classifier.definition.num_classes
        group = np.arange(len(base)) // classes % GROUPS  # each of all classes alike
        left_out = np.asarray([ratio(group != number) for number in range(GROUPS)])
        error = np.sqrt((GROUPS - 1) * left_out.var())
        return ratio(group >= 0) - 1, float(error)

    def describe(self) -> dict[str, Any]:
        """For records."""
        return {
            "features": self.classifier.dim,
            "fingerprint": self.classifier.fingerprint,
            "steps": self.classifier.definition.settings.steps,
            "test_accuracy": self.classifier.test_accuracy,
            "floor": self.floor,
        }

    def sentence(self) -> str:
        """For tables."""
        return (
            f"Fréchet distance: to held-out images, in the {self.classifier.dim} features of a "
            f"small classifier of the data ({self.classifier.test_accuracy:.0%} of held-out images "
            f"right); as many training images score {self.floor:.2f}. ±: the change's standard "
            "error over the noise drawn."
        )

    def _statistics(self, features: np.ndarray) -> evaluation.GaussianStatistics:
        fingerprint = self.classifier.fingerprint
        return evaluation.GaussianStatistics.from_features(features, fingerprint)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Images of one way of sampling.

    Attributes:
        images: float32 in [-1, 1], [n, h, w, c].
        computed: share of the evaluations in which all blocks ran, [n].
    """

    images: np.ndarray
    computed: np.ndarray


def draw(
    plan: experiment.SamplingPlan,
    params: Any,
    labels: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    folder: Path | None = None,
) -> Drawn:
    """All images.

    Args:
        plan: how.
        params: the network's.
        labels: of every image.
        seed: of the noise: image i depends on it and i only.
        batch_size: images at once.
        folder: of batches, which are not drawn again where they are found; see `kept_folder`.
    """
    sample = plan.bind_counted(params) if plan.has_cache else plan.bind(params)
    parts = []
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        path = folder and folder / f"{seed}-{start}-{start + len(part)}.npz"
        if path and path.exists():
            with np.load(path) as found:
                parts.append((found["images"], found["computed"]))
            continue
        drawn = sample(image_keys(seed, np.arange(start, start + len(part))), part)
        images, computed = drawn if plan.has_cache else (drawn, np.ones(len(part)))
        parts.append((np.clip(np.asarray(images), -1, 1), np.asarray(computed)))
        if path:
            with atomic_file(path) as file:
                np.savez(file, images=parts[-1][0], computed=parts[-1][1])
    return Drawn(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def kept_folder(root: Path | None, config: ml_collections.ConfigDict, weights: str) -> Path | None:
    """Where a way of sampling keeps its images: a folder of `root` that no other one has.

    Args:
        root: of --keep; None: nowhere.
        config: the way, and the network.
        weights: a hash of the parameters.
    """
    if root is None:
        return None
    sections = {name: config[name].to_dict() for name in ("model", "process", "sampling", "cache")}
    text = json.dumps([sections, weights], sort_keys=True, default=repr)
    return root / hashlib.sha256(text.encode()).hexdigest()[:16]


def save_picture(
    path: Path, ways: dict[str, Drawn], labels: np.ndarray, names: tuple[str, ...] = ()
) -> None:
    """The first images of each class, one grid a way beside the others.

    Args:
        path: of the picture.
        ways: by title.
        labels: of every image.
        names: of the classes.
    """
    classes = np.unique(labels)[:10]
    chosen = np.concatenate([np.flatnonzero(labels == c)[:SHOWN] for c in classes])
    rows = [names[c] if names else str(c) for c in classes]
    panels = [
        evaluation.Panel(
            drawn.images[chosen],
            title,
            columns=min(SHOWN, len(labels) // len(classes)),
            row_labels=rows if number == 0 else None,
        )
        for number, (title, drawn) in enumerate(ways.items())
    ]
    evaluation.save_panels(path, panels, overwrite=True)


def labels_of(config: ml_collections.ConfigDict, num_images: int) -> np.ndarray:
    """Classes in turn."""
    return wiring.balanced_labels(num_images, config.model.num_classes)
