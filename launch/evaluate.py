"""Scores a model's samples against real images.

  python launch/evaluate.py --workdir=runs/digits --num_images=1000 --out=metrics.json
  python launch/evaluate.py --init_from=DiT-XL-2-256x256.pt --vae=sd-vae-ft-ema \\
      --protocol=dit_final --reference=VIRTUAL_imagenet256_labeled.npz --out=scores.json
  python launch/evaluate.py --samples=samples.npz --reference=imagenet/val --out=scores.json

Without --reference, for small images: features and label accuracy come from a classifier trained on
the run's training split (kept in the workdir), the reference is its held-out split. With it: FID,
sFID, Inception Score, precision, recall and KID by Inception-V3. The scores go to --out as one JSON
record that says how they were made.
"""

import argparse
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.training import workdir as workdir_lib
from launch import inception_scores, loading, wiring


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    loading.add_model_arguments(parser)
    wiring.add_sampling_arguments(parser)
    inception_scores.add_arguments(parser)
    parser.add_argument("--num_images", type=int, help="samples; default: as configured")
    parser.add_argument("--out", type=Path, help="JSON file; default: WORKDIR/metrics_STEP.json")
    parser.add_argument("--picture", type=Path, help="PNG of samples beside real images")
    parser.add_argument(
        "--rounding", choices=evaluation.ROUNDING_RULES, help="to bytes; default: nearest"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser.parse_args(argv)


def evaluate(
    model: loading.TrainedModel,
    workdir: Path,
    *,
    num_images: int,
    seed: int = 0,
    rounding: str = "nearest",
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Samples and scores.

    Args:
        model: to sample.
        workdir: where the classifier is kept, or was kept before.
        num_images: samples.
        seed: image i depends on it and i only.
        rounding: of samples to bytes.

    Returns:
        The record, the samples, their labels, and (held-out images, their labels).
    """
    config = model.config
    images = real_images(config)
    train = data_lib.to_arrays(experiment.open_data(images, "train"))
    test = data_lib.to_arrays(experiment.open_data(images, "test"))
    if train[0].dtype != np.uint8:
        raise ValueError(
            "the run's data are latents, which the classifier cannot see: score its pictures with "
            "--reference=IMAGES --vae=FOLDER"
        )
    if not config.model.num_classes:
        raise ValueError("the classifier's features need labelled data; this model has no classes")
    classifier = evaluation.train_classifier(
        *train,
        config.model.num_classes,
        seed=0,
        test_images=test[0],
        test_labels=test[1],
        cache_dir=workdir / "evaluation",
    )
    labels = wiring.balanced_labels(num_images, config.model.num_classes)
    samples = wiring.sample_images(
        experiment.build_sampling(config),
        model.params,
        labels,
        seed=seed,
        placement=wiring.create_placement(config),
        batch_size=config.sampling.batch_size,
    )
    record = evaluation.evaluate_samples(
        samples,
        labels,
        extractor=classifier,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        rounding=rounding,
        seeds=seed,
        provenance=loading.provenance(model),
    )
    return record, samples, labels, test


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


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with wiring.readable_errors(traceback=args.traceback):
        inception_scores.check_arguments(args)
        for path in (args.out, args.picture):
            if path:
                evaluation.check_destination(path, overwrite=args.overwrite)
        if args.reference:
            record, text = inception_scores.score(args)
            out = args.out or args.workdir / f"inception_{record['provenance']['step']}.json"
            evaluation.save_json(out, record, overwrite=args.overwrite or args.out is None)
            print(f"{text}\nrecord: {out}")
            return
        if args.workdir is None:
            raise ValueError(
                "give --workdir (scores by a classifier of the run's data) or --reference (FID)"
            )
        model = loading.load_from_arguments(args, wiring.sampling_overrides(args))
        num_images = args.num_images or model.config.evaluation.num_images
        record, samples, labels, test = evaluate(
            model,
            args.workdir,
            num_images=num_images,
            seed=args.seed,
            rounding=args.rounding or "nearest",
        )
        out = args.out or args.workdir / f"metrics_{model.step}.json"
        evaluation.save_json(out, record, overwrite=args.overwrite or args.out is None)
        if args.picture:
            save_picture(args.picture, samples, labels, test, overwrite=args.overwrite)
        scores = record["scores"]
        print(
            f"{num_images} images of {model.weights}, step {model.step}\n"
            f"  Fréchet distance to held-out images  {scores['frechet_distance']:.4f}"
            f"  (real training images: {scores['frechet_distance_floor']:.4f})\n"
            f"  label accuracy                       {scores['label_accuracy']['overall']:.2%}"
            f"  (real held-out images: {scores['classifier_test_accuracy']:.2%})\n"
            f"  record: {out}"
        )


if __name__ == "__main__":
    main()
