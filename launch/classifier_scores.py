"""Scores by a classifier of the run's own data: the part of launch/evaluate.py for small images."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.launch import loading, sampling, wiring
from dit_jax.training import workdir as workdir_lib


def evaluate(
    model: loading.TrainedModel,
    workdir: Path,
    *,
    num_images: int,
    seed: int = 0,
    rounding: str = "nearest",
    phase: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Samples and scores.

    Args:
        model: to sample.
        workdir: where the classifier is kept, or was kept before.
        num_images: samples.
        seed: image i depends on it and i only.
        rounding: of samples to bytes.
        phase: a context for each of "classifier", "sampling" and "scoring", to time them.

    Returns:
        The record, the samples, their labels, and (held-out images, their labels).
    """
    config = model.config
    images = real_images(config)
    source = experiment.open_data(images, "train")
    if source.info.buckets:
        raise ValueError(
            "the run's data are of several sizes, which the classifier cannot see: score with "
            "--reference=IMAGES"
        )
    train = data_lib.to_arrays(source)
    test = data_lib.to_arrays(experiment.open_data(images, "test"))
    if train[0].dtype != np.uint8:
        raise ValueError(
            "the run's data are latents, which the classifier cannot see: score its pictures with "
            "--reference=IMAGES --vae=FOLDER"
        )
    if not config.model.num_classes:
        raise ValueError("the classifier's features need labelled data; this model has no classes")
    shape = train[0].shape[1:]
    require_enough(num_images, len(train[0]), len(test[0]), shape)
    sampling.require_memory(num_images, shape)
    with phase("classifier"):
        classifier = evaluation.train_classifier(
            *train,
            config.model.num_classes,
            seed=0,
            test_images=test[0],
            test_labels=test[1],
            cache_dir=workdir / "evaluation",
        )
    labels = wiring.balanced_labels(num_images, config.model.num_classes)
    with phase("sampling"):
        samples = wiring.sample_images(
            experiment.build_sampling(config),
            model.params,
            labels,
            seed=seed,
            placement=wiring.create_placement(config),
            batch_size=config.sampling.batch_size,
        )
    with phase("scoring"):
        record = evaluation.evaluate_samples(
            classifier,
            samples,
            labels,
            train=train,
            test=test,
            rounding=rounding,
            seeds=seed,
            provenance=loading.provenance(model),
        )
    return record, samples, labels, test


def require_enough(num_images: int, train: int, test: int, shape: tuple[int, int, int]) -> None:
    """Refuses, before anything is trained or sampled, too few images for a Fréchet distance.

    Args:
        num_images: samples.
        train: images of the training split.
        test: images of the held-out split.
        shape: (height, width, channels).

    Raises:
        TooFewSamplesError: naming the least number.
    """
    features = evaluation.ClassifierSettings.for_images(shape).feature_dim
    least = features + 1
    why = f"the Fréchet distance of the classifier's {features} features needs at least {least}"
    if num_images < least:
        raise evaluation.TooFewSamplesError(
            f"--num_images={num_images}: {why} images: give --num_images={least} or, for a stable "
            "score, many times that"
        )
    for split, count in (("training", train), ("held-out", test)):
        if count < least:
            raise evaluation.TooFewSamplesError(
                f"the {split} split of the run's data has {count} images, and {why}: score with "
                "--reference=IMAGES instead"
            )


def real_images(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration whose data are the real images to compare with.

    A student that learned from pairs saw none: its teacher did.

    Raises:
        ValueError: the teacher's data are not known.
    """
    while config.data.name == "pairs":
        directory = Path(config.teacher.path)
        if not (directory / workdir_lib.CONFIG_FILE).is_file():
            raise ValueError(
                "the model learned from a teacher's pairs, and config.teacher.path="
                f"{config.teacher.path!r} is not the workdir of a run whose data could be "
                "compared with: give that workdir, or score with --reference=IMAGES"
            )
        config = workdir_lib.load_config(directory)
    return config


def save_picture(path: Path, samples, labels, test, *, overwrite: bool) -> None:
    """Ten samples a class beside ten held-out images a class."""
    classes = np.unique(labels)[:10]

    columns = min(10, *(int((labels == c).sum()) for c in classes))
    names = [str(c) for c in classes]
    panels = []
    for title, images, its_labels in (("samples", samples, labels), ("real (held out)", *test)):
        images = np.concatenate([images[its_labels == c][:columns] for c in classes])
        panels.append(evaluation.Panel(images, title, columns=columns, row_labels=names))
    evaluation.save_panels(path, panels, overwrite=overwrite)
