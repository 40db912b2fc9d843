"""Samples images from a trained model.

  python launch/sample.py --workdir=runs/digits --num_images=100 --out=samples.png
  python launch/sample.py --workdir=runs/digits --labels 3 7 --guidance_scale=2 --out=threes.png
  python launch/sample.py --workdir=runs/digits --num_images=50000 --out=samples.npz

What --out names decides the format: a .png is a grid, a .npz the ADM evaluator's format (arr_0
images, arr_1 labels), anything else a folder of numbered PNG files.
"""

import argparse
from pathlib import Path

import numpy as np

from dit_jax import evaluation, experiment
from launch import wiring


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    wiring.add_sampling_arguments(parser)
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument(
        "--labels", type=int, nargs="+", help="classes, repeated in turn; default: all in turn"
    )
    parser.add_argument("--out", type=Path, required=True, help="x.png, x.npz or a folder")
    parser.add_argument("--rounding", default="nearest", choices=evaluation.ROUNDING_RULES)
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser.parse_args(argv)


def choose_labels(args: argparse.Namespace, num_classes: int) -> np.ndarray:
    """One label an image.

    Raises:
        ValueError: labels of an unconditional model, or out of range.
    """
    if args.num_images < 1:
        raise ValueError(f"--num_images={args.num_images}: expected at least 1")
    if args.labels is None:
        return wiring.balanced_labels(args.num_images, num_classes)
    if not num_classes:
        raise ValueError("--labels: the model is unconditional, it has no classes")
    outside = [label for label in args.labels if not 0 <= label < num_classes]
    if outside:
        raise ValueError(f"--labels {outside[0]}: the model's classes are 0 to {num_classes - 1}")
    return np.resize(np.asarray(args.labels, np.int32), args.num_images)


def save(path: Path, images: np.ndarray, labels: np.ndarray, *, rounding: str, overwrite: bool):
    """Writes images in the format that `path` names."""
    options = {"rounding": rounding, "overwrite": overwrite}
    if path.suffix == ".npz":
        return evaluation.save_adm_npz(path, images, labels, **options)
    if path.suffix == ".png":
        return evaluation.save_grid(path, images, **options)
    return evaluation.save_png_folder(path, images, **options)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with wiring.readable_errors(traceback=args.traceback):
        evaluation.check_destination(args.out, overwrite=args.overwrite)
        model = wiring.load_model(
            args.workdir,
            weights=args.weights,
            step=args.step,
            overrides=wiring.sampling_overrides(args),
        )
        labels = choose_labels(args, model.config.model.num_classes)
        if model.config.model.in_channels not in (1, 3):
            raise ValueError(
                f"the model makes latents of {model.config.model.in_channels} channels, not "
                "pictures; decoding them needs a VAE"
            )
        images = wiring.sample_images(
            experiment.build_sampling(model.config),
            model.params,
            labels,
            seed=args.seed,
            placement=wiring.create_placement(model.config),
            batch_size=model.config.sampling.batch_size,
        )
        save(args.out, images, labels, rounding=args.rounding, overwrite=args.overwrite)
        print(f"{len(images)} images of {model.weights}, step {model.step}: {args.out}")


if __name__ == "__main__":
    main()
