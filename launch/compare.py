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
import shlex
import tempfile
from pathlib import Path

from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.evaluation.comparison import (
    Comparison,
    compare_images,
    open_images,
    require_same_count,
)
from dit_jax.evaluation.comparison_report import save_comparison_html, save_comparison_png
from dit_jax.training import workdir
from interop.inception import load_extractor
from launch import evaluate, loading, methods, sample, wiring
from parallel.mesh import create_mesh

# Options of launch/sample.py that must be the same for both sets, and so are options here.
_COMMON = ("out", "num_images", "labels", "overwrite", "traceback", "workdir", "init_from")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", type=Path, metavar="A B", help="two sets of images")
    loading.add_model_arguments(parser)
    group = parser.add_argument_group("two ways of sampling (with a model)")
    group.add_argument("--a", help="sampling options of A, as 'steps=50 solver=heun'; '' for none")
    group.add_argument("--b", help="sampling options of B")
    group.add_argument("--num_images", type=int, help="of either; default: 256")
    group.add_argument("--seed", type=int, help="of both, unless --a or --b has its own; default 0")
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
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="HTML, one file")
    parser.add_argument("--picture", type=Path, help="PNG of the worst pairs")
    parser.add_argument("--json", type=Path, help="all scores, of every pair")
    parser.add_argument("--pairs", type=int, default=32, help="in the HTML, the worst ones")
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
    for path in (args.out, args.picture, args.json):
        if path:
            evaluation.check_destination(path, overwrite=args.overwrite)
    has_model = args.workdir or args.init_from
    if args.sets:
        if len(args.sets) != 2:
            raise ValueError(f"expected two sets of images, A and B, got {len(args.sets)}")
        names = ("workdir", "init_from", "step", "weights", "num_heads", "vae")
        names += ("a", "b", "num_images", "seed")
        given = [name for name in names if getattr(args, name) not in (None, "")]
        if given:
            raise ValueError(f"--{given[0]} is for a model; the images of A and B are made already")
    elif not has_model:
        raise ValueError("give two sets of images, A B, or a model (--workdir) with --a and --b")
    elif args.a is None or args.b is None:
        raise ValueError(
            "say the two ways of sampling: --a='...' and --b='...', '' for the model's own"
        )


def sample_options(args: argparse.Namespace, settings: str, out: Path) -> list[str]:
    """The command line of launch/sample.py for one of the two settings.

    Args:
        args: of this command.
        settings: 'steps=10 solver=euler split_guidance', or '' for the model's own.
        out: where the images are to go.

    Raises:
        ValueError: a setting that must be common to both.
    """
    options = [f"--num_images={256 if args.num_images is None else args.num_images}"]
    options += [f"--out={out}", f"--seed={args.seed or 0}"]
    for name in ("workdir", "init_from", "step", "weights", "num_heads", "vae"):
        if getattr(args, name) not in (None, ""):
            options.append(f"--{name}={getattr(args, name)}")
    if args.traceback:
        options.append("--traceback")
    for setting in shlex.split(settings):
        name, equals, value = setting.partition("=")
        name = name.removeprefix("--")
        if name in _COMMON:
            raise ValueError(f"{setting!r}: --{name} is the same for A and B, give it by itself")
        if not equals:
            options.append(f"--{name}")
        elif "," in value:  # options of several values, as guidance_interval=0.2,0.8
            options += [f"--{name}", *value.split(",")]
        else:
            options.append(f"--{name}={value}")
    return options


def sample_both(args: argparse.Namespace, folder: Path) -> list[Path]:
    """Samples both settings by launch/sample.py itself, whose options and messages they share."""
    paths = [folder / "a.npz", folder / "b.npz"]
    commands = [
        sample_options(args, text, path) for text, path in zip((args.a, args.b), paths, strict=True)
    ]
    for command in commands:  # what is wrong with B is told before A is sampled
        wiring.image_parallel(sample.parse_arguments(command))
    for name, text, command in zip("AB", (args.a, args.b), commands, strict=True):
        print(f"{name}: {text or 'as configured'}", flush=True)
        sample.main(command)
    return paths


def choose_features(
    args: argparse.Namespace, shape: tuple[int, ...]
) -> tuple[evaluation.FeatureExtractor | None, str]:
    """The features of the Fréchet distance, or None and why.

    Args:
        args: of this command.
        shape: (height, width, channels) of the images.

    Raises:
        ValueError: --classifier names a run whose classifier cannot see these images.
    """
    if args.inception:
        mesh = create_mesh()
        extractor = load_extractor(
            args.inception,
            allow_other=args.other_inception_weights,
            flag="--inception",
            batch_size=-(-64 // mesh.size) * mesh.size,
            mesh=mesh,
            grey="repeat",
        )
        return extractor, ""
    run = args.classifier or args.workdir
    if run is None:
        return None, "no features; give --inception=FILE, or --classifier=WORKDIR for small images"
    config = methods.resolve_config(workdir.load_config(run).to_dict())
    config = evaluate.real_images(config)
    wanted = (config.model.image_size, config.model.image_size, config.model.in_channels)
    why = ""
    if not config.model.num_classes:
        why = f"the data of {run} have no classes to learn features from; give --inception=FILE"
    elif tuple(shape) != wanted:
        why = f"the images are not of the size of {run}'s data; give --inception=FILE"
    elif min(shape[:2]) >= 16 and not args.classifier:
        why = f"training a classifier takes long at this size; ask for it with --classifier={run}"
    if why and args.classifier:
        raise ValueError(f"--classifier: {why}")
    if why:
        return None, why
    train = data_lib.to_arrays(experiment.open_data(config, "train"))
    options = {"seed": 0, "cache_dir": run / "evaluation"}
    return evaluation.train_classifier(*train, config.model.num_classes, **options), ""


def compare(args: argparse.Namespace, paths: list[Path], names: tuple[str, str]) -> Comparison:
    """Compares two sets on disk by all scores that can be computed."""
    a, b = (open_images(path) for path in paths)
    require_same_count(a, b, names)
    left_out = {}
    perceptual = None
    if args.lpips == "none":
        left_out["LPIPS"] = "--lpips=none"
    else:
        try:
            perceptual = evaluation.load_lpips(args.lpips, weights=args.lpips_weights)
        except (ImportError, FileNotFoundError) as error:
            if args.lpips_weights:
                raise
            left_out["LPIPS"] = str(error)
    shape = next(iter(a.batches(1))).shape[1:]
    extractor, why = choose_features(args, shape)
    if why:
        left_out["Fréchet distance"] = why
    return compare_images(
        a,
        b,
        names=names,
        extractor=extractor,
        perceptual=perceptual,
        left_out=left_out,
        allow_singular=args.allow_singular,
        kept=args.pairs,
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with wiring.readable_errors(traceback=args.traceback):
        check_arguments(args)
        if args.sets:
            comparison = compare(args, args.sets, (str(args.sets[0]), str(args.sets[1])))
        else:
            with tempfile.TemporaryDirectory() as folder:
                paths = sample_both(args, Path(folder))
                names = (args.a or "as configured", args.b or "as configured")
                comparison = compare(args, paths, names)
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


if __name__ == "__main__":
    main()
