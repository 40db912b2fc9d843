"""Making, opening and scoring the two sets of images: the work of launch/compare.py."""

import argparse
import shlex
from pathlib import Path

from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.evaluation.comparison import (
    Comparison,
    compare_images,
    open_images,
    require_same_count,
)
from dit_jax.interop.inception import load_extractor
from dit_jax.launch import classifier_scores, sample, wiring
from dit_jax.parallel.mesh import create_mesh
from dit_jax.training import workdir

# Options of launch/sample.py that must be the same for both sets, and so are options here.
_COMMON = ("out", "num_images", "labels", "overwrite", "traceback", "workdir", "init_from")


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
    of_model = ("workdir", "init_from", "step", "weights", "num_heads", "num_classes", "vae")
    for name in (*of_model, "param_dtype", "quantization"):
        if getattr(args, name) not in (None, ""):
            options.append(f"--{name}={getattr(args, name)}")
    if args.allow_nonfinite:
        options.append("--allow_nonfinite")
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
    config = experiment.resolve_config(workdir.load_config(run).to_dict())
    config = classifier_scores.real_images(config)
    wanted = experiment.build_network(config).sample_shape
    why = ""
    if not config.model.num_classes:
        why = f"the data of {run} have no classes to learn features from; give --inception=FILE"
    elif config.data.get(config.data.name, {}).get("buckets"):
        why = f"the data of {run} are of several sizes; give --inception=FILE"
    elif tuple(shape) != wanted:
        why = f"the images are not of the size of {run}'s data; give --inception=FILE"
    elif min(shape[:2]) >= 16 and not args.classifier:
        why = "training a classifier takes long at this size; ask for it with "
        why += shlex.quote(f"--classifier={run}")
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
