"""Compares two sets of images pair by pair, or one model under two ways of sampling.

  python launch/compare.py one.npz other.npz --out=compare.html
  python launch/compare.py --workdir=runs/digits --a='steps=50' --b='steps=10 solver=euler' \\
      --num_images=256 --out=compare.html --picture=compare.png --json=compare.json
  python launch/compare.py --workdir=runs/digits --a='' \\
      --b='parallel=displaced patch_devices=4 warmup_steps=4'

A set is a folder of images or an .npz as launch/sample.py writes them. --a and --b are options of
launch/sample.py, without their dashes; both sample the same noise and the same classes. Scores:
PSNR, SSIM, LPIPS (with its package and weights), the largest difference of a pixel, and the Fréchet
distance between the sets; whatever cannot be computed is said to be left out, and why.
"""

import argparse
from pathlib import Path

from dit_jax.launch import argument_types, arguments, command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("sets", nargs="*", type=Path, metavar="A B", help="two sets of images")
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("two ways of sampling (with a model)")
    group.add_argument("--a", help="sampling options of A, as 'steps=50 solver=heun'; '' for none")
    group.add_argument("--b", help="sampling options of B")
    group.add_argument("--num_images", type=argument_types.count, help="of either; default: 256")
    group.add_argument(
        "--seed", type=argument_types.seed, help="of both, unless --a or --b has its own; default 0"
    )
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--classifier",
        type=Path,
        metavar="WORKDIR",
        help="Fréchet distance in the features of a classifier of that run's data; default: the "
        "run of --workdir, if its images are small and labelled",
    )
    group.add_argument("--inception", type=Path, help="Fréchet distance by these Inception weights")
    group.add_argument(
        "--other_inception_weights", action="store_true", help="accept other than the published"
    )
    group.add_argument(
        "--allow_singular", action="store_true", help="fewer images than features; a guess"
    )
    group.add_argument("--lpips", default="alex", choices=["alex", "vgg", "none"])
    group.add_argument("--lpips_weights", type=Path, help="default: where torchvision keeps them")
    parser.add_argument(
        "--out", type=argument_types.html_file, default=Path("compare.html"), help="HTML, one file"
    )
    parser.add_argument(
        "--picture", type=argument_types.picture, help="the worst pairs: x.png, .jpg or .webp"
    )
    parser.add_argument("--json", type=argument_types.json_file, help="all scores, of every pair")
    parser.add_argument(
        "--pairs", type=argument_types.count, default=32, help="in the HTML, the worst ones"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses what does not say two sets of images.

    Raises:
        ValueError: naming what is missing, or would do nothing.
        FileExistsError: a result is there already.
    """
    if args.pairs < 1:
        raise ValueError(f"--pairs={args.pairs}: expected at least 1")
    if args.inception and args.classifier:
        raise ValueError("give one of --inception and --classifier: one Fréchet distance is made")
    if args.other_inception_weights and not args.inception:
        raise ValueError("--other_inception_weights does nothing without --inception=FILE")
    if args.lpips == "none" and args.lpips_weights:
        raise ValueError("--lpips_weights does nothing with --lpips=none")
    has_model = args.workdir or args.init_from
    if args.sets:
        if len(args.sets) != 2:
            raise ValueError(f"expected two sets of images, A and B, got {len(args.sets)}")
        names = ("workdir", "init_from", "step", "weights", "num_heads", "vae")
        names += ("param_dtype", "quantization", "a", "b", "num_images", "seed")
        given = [name for name in names if getattr(args, name) not in (None, "")]
        if given:
            raise ValueError(f"--{given[0]} is for a model; the images of A and B are made already")
    elif not has_model:
        raise ValueError("give two sets of images, A B, or a model (--workdir) with --a and --b")
    elif args.a is None or args.b is None:
        raise ValueError(
            "say the two ways of sampling: --a='...' and --b='...', '' for the model's own"
        )


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with command.readable_errors(traceback=args.traceback):
        check_arguments(args)
        from dit_jax import evaluation
        from dit_jax.evaluation.comparison_report import (
            save_comparison_html,
            save_comparison_png,
        )
        from dit_jax.launch import comparing

        for path in (args.out, args.picture, args.json):
            if path:
                evaluation.check_destination(path, overwrite=args.overwrite)
        if args.sets:
            comparison = comparing.compare(args, args.sets, (str(args.sets[0]), str(args.sets[1])))
        else:
            with command.temporary_folder("compare-") as folder:
                paths = comparing.sample_both(args, folder)
                names = (args.a or "as configured", args.b or "as configured")
                comparison = comparing.compare(args, paths, names)
        save_comparison_html(args.out, comparison, overwrite=args.overwrite)
        if args.picture:
            save_comparison_png(args.picture, comparison, overwrite=args.overwrite)
        if args.json:
            evaluation.save_json(args.json, comparison.record(), overwrite=args.overwrite)
        print(f"A: {comparison.names[0]}\nB: {comparison.names[1]}")
        summary = comparison.summary()
        width = max(len(name) for name, _ in summary)
        for name, value in summary:
            print(f"  {name:<{width}}  {value}")
        print(f"pairs side by side: {args.out}")


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
