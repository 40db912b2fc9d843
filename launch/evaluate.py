"""Scores a model's samples against real images.

  python launch/evaluate.py --workdir=runs/digits --num_images=1000 --out=metrics.json
  python launch/evaluate.py --init_from=DiT-XL-2-256x256.pt --vae=hub:stabilityai/sd-vae-ft-ema \\
      --protocol=dit_final --reference=VIRTUAL_imagenet256_labeled.npz --out=scores.json
  python launch/evaluate.py --samples=samples.npz --reference=imagenet/val --out=scores.json

Without --reference, for small images: features and label accuracy come from a classifier trained on
the run's training split (kept in the workdir), the reference is its held-out split. With it: FID,
sFID, Inception Score, precision, recall and KID by Inception-V3. The scores go to --out as one JSON
record that says how they were made.
"""

import argparse
import functools
from pathlib import Path

from dit_jax.launch import argument_types, arguments, command

# Options that make samples, besides those of `arguments.sampling_overrides`.
_OF_SAMPLING = (
    "num_images",
    "height",
    "width",
    "rounding",
    "seed",
    "vae",
    "step",
    "weights",
    "num_heads",
    "num_classes",
    "allow_nonfinite",
    "param_dtype",
    "quantization",
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_sampling_arguments(parser)
    add_inception_arguments(parser)
    parser.add_argument(
        "--num_images", type=argument_types.count, help="samples; default: as configured"
    )
    parser.add_argument(
        "--out", type=argument_types.json_file, help="JSON file; default: WORKDIR/metrics_STEP.json"
    )
    parser.add_argument(
        "--picture",
        type=argument_types.picture,
        help="samples beside real images: x.png, .jpg, .webp",
    )
    parser.add_argument(
        "--rounding", choices=arguments.ROUNDING_RULES, help="to bytes; default: nearest"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser.parse_args(argv)


def add_inception_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the Inception scores."""
    group = parser.add_argument_group("FID, sFID, IS, precision, recall, KID (with --reference)")
    group.add_argument(
        "--reference", help="a folder of images, an ADM .npz (images or moments), or tfds:NAME"
    )
    group.add_argument(
        "--samples", type=Path, help="score these (a .npz or a folder) instead of sampling"
    )
    group.add_argument(
        "--protocol", choices=arguments.PROTOCOLS, help="as published, and beside it"
    )
    group.add_argument(
        "--inception", type=Path, help="the weights file; default: the cache, else a download"
    )
    group.add_argument(
        "--other_inception_weights",
        action="store_true",
        help="accept another file than the published one; scores then compare with nothing else",
    )
    group.add_argument("--reference_split", default="train", help="of tfds:NAME")
    group.add_argument(
        "--reference_size", type=argument_types.count, help="pixels; of a folder or tfds:NAME"
    )
    group.add_argument("--reference_resize", default="none", choices=["none", "adm"])
    group.add_argument("--grey", default="refuse", choices=["refuse", "repeat"])
    group.add_argument("--scores", nargs="+", choices=arguments.SCORES, help="default: all")
    group.add_argument(
        "--feature_batch_size", type=argument_types.count, default=64, help="over all devices"
    )
    group.add_argument(
        "--allow_singular", action="store_true", help="FID of fewer images than features; a guess"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses options that contradict each other or would do nothing.

    Raises:
        ValueError: naming them.
    """
    if not args.reference:
        parser = argparse.ArgumentParser()
        add_inception_arguments(parser)
        defaults = vars(parser.parse_args([]))
        given = [name for name, value in defaults.items() if getattr(args, name) != value]
        if given:
            raise ValueError(f"--{given[0]} needs --reference: what to compare with")
        for side in ("height", "width"):
            if getattr(args, side):
                raise ValueError(
                    f"--{side} needs --reference: the classifier of a run's data sees images of "
                    "their size alone"
                )
        if args.workdir is None:
            raise ValueError(
                "give --workdir (scores by a classifier of the run's data) or --reference (FID)"
            )
        arguments.check_model(args)
        return
    if args.picture:
        raise ValueError("--picture shows the classifier's data; it does not go with --reference")
    if args.samples and (args.workdir or args.init_from):
        raise ValueError("--samples are scored as they are; leave --workdir and --init_from out")
    if args.samples:
        given = [key.partition(".")[2] for key in arguments.sampling_overrides(args)]
        given = ["step_cache"] if args.step_cache is not None else given
        given += [name for name in _OF_SAMPLING if getattr(args, name)]
        if given:
            raise ValueError(
                f"--{given[0]} does not apply to --samples: they are made, and all are scored"
            )
    if not args.out and not args.workdir:
        raise ValueError("say where the record goes: --out=scores.json")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with command.readable_errors(traceback=args.traceback):
        check_arguments(args)
        from dit_jax import evaluation
        from dit_jax.launch import classifier_scores, inception_scores, loading, sampling
        from dit_jax.quantities import counted

        for path in (args.out, args.picture):
            if path:
                evaluation.check_destination(path, overwrite=args.overwrite)
        if args.reference:
            record, text = inception_scores.score(args)
            out = args.out or args.workdir / f"inception_{record['provenance']['step']}.json"
            evaluation.save_json(out, record, overwrite=args.overwrite or args.out is None)
            print(f"{text}\nrecord: {out}")
            return
        model = loading.load_from_arguments(
            args,
            arguments.sampling_overrides(args),
            functools.partial(sampling.require_labels, args),
        )
        num_images = args.num_images or model.config.evaluation.num_images
        out = args.out or args.workdir / f"metrics_{model.step}.json"
        print(sampling.describe(model, num_images, out), flush=True)
        record, samples, labels, test = classifier_scores.evaluate(
            model,
            args.workdir,
            num_images=num_images,
            seed=args.seed,
            rounding=args.rounding or "nearest",
        )
        if args.picture:
            classifier_scores.save_picture(
                args.picture, samples, labels, test, overwrite=args.overwrite
            )
            record["picture"] = str(args.picture.absolute())
        evaluation.save_json(out, record, overwrite=args.overwrite or args.out is None)
        scores = record["scores"]
        print(
            f"{counted(num_images, 'image')} of {model.weights}, step {model.step}\n"
            f"  Fréchet distance to held-out images  {scores['frechet_distance']:.4f}"
            f"  (real training images: {scores['frechet_distance_floor']:.4f})\n"
            f"  label accuracy                       {scores['label_accuracy']['overall']:.2%}"
            f"  (real held-out images: {scores['classifier_test_accuracy']:.2%})\n"
            f"  record: {out}" + (f"\n  picture: {args.picture}" if args.picture else "")
        )


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
