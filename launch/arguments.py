"""Options that several commands share. Parsing them imports nothing heavy.

Names that the library knows stand here once more, so that --help can list them without it; a test
holds them to the library's.
"""

import argparse
from pathlib import Path
from typing import Any

from dit_jax.launch import argument_types

ROUNDING_RULES = ("nearest", "truncate")  # of dit_jax.evaluation, as the two below
PROTOCOLS = ("dit_400k", "dit_final")
SCORES = ("fid", "sfid", "inception_score", "precision_recall", "kid")
PARALLEL_MODES = (  # parallel.sampling.MODES
    *("displaced", "synchronous", "naive", "ulysses", "ring", "tensor"),
    *("full_sync", "corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "no_sync"),
)
KINDS = (
    "dit_jax",
    "dit_pt",
    "sit_pt",
    "diffusers",
    "edm_pkl",
    "edm_pt",
    "flux_pt",
)  # interop.kinds
DESTINATIONS = tuple(kind for kind in KINDS if kind != "edm_pkl")  # of interop.export
DTYPES = ("float32", "bfloat16", "float16")  # of interop.export
PARAM_DTYPES = ("auto", "float32", "bfloat16")  # of dit_jax.models.linear
QUANTIZATIONS = ("none", "fp8", "fp8_rowwise", "int8", "te")  # of dit_jax.models.quantization
ACCELERATORS = ("h100", "h200", "a100", "tpu_v5p", "cpu")  # of parallel.planning.accelerators


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose a trained model."""
    group = parser.add_argument_group("model (one of --workdir and --init_from)")
    group.add_argument("--workdir", type=Path, help="directory of a training run")
    group.add_argument(
        "--init_from",
        metavar="[KIND:]SRC",
        help="a checkpoint: .pt of DiT, SiT (sit_pt:FILE) or EDM, .pkl of EDM, diffusers folder, "
        "converted folder, workdir, hub:owner/name[@revision]",
    )
    group.add_argument(
        "--step",
        type=argument_types.count_or_none,
        help="of a workdir: which checkpoint; default: newest",
    )
    group.add_argument("--weights", default="", help="raw, ema (the first average) or its name")
    group.add_argument(
        "--num_heads", type=argument_types.count, help="of a .pt of a width not in the paper"
    )
    group.add_argument(
        "--num_classes",
        type=argument_types.count_or_none,
        help="of a .pt whose class table may have a null class or not",
    )
    add_allow_nonfinite_argument(group)
    add_storage_arguments(group)
    group.add_argument("--vae", help="VAE that decodes latents: a diffusers folder, or hub:...")


def add_allow_nonfinite_argument(group: argparse._ActionsContainer) -> None:
    """Whether damaged weights are read."""
    group.add_argument(
        "--allow_nonfinite",
        action="store_true",
        help="read a checkpoint, or a LoRA, that has NaN or infinity in it",
    )


def add_storage_arguments(group: argparse._ActionsContainer) -> None:
    """What weights are stored in."""
    group.add_argument(
        "--param_dtype",
        choices=PARAM_DTYPES,
        help="what parameters are stored in; default auto: as the checkpoint has them",
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of a transformer's products, see docs/precision.md; default: as configured",
    )


def is_given(value: Any) -> bool:
    """Whether an option's value is another than that of an option left out; 0 is."""
    return value is not None and value is not False and value != ""


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of how to sample; by default as the model was configured."""
    group = parser.add_argument_group("sampling (defaults: the model's config.sampling)")
    group.add_argument("--solver", help="one of config.sampling.solver's")
    group.add_argument("--steps", type=argument_types.solver_steps, help="solver steps")
    group.add_argument("--spacing", help="of the solver's times, see dit_jax.diffusion.schedules")
    group.add_argument(
        "--guidance_scale",
        type=argument_types.guidance_scale,
        help="1 for no guidance (of FLUX.1 dev: what it is told)",
    )
    group.add_argument(
        "--guidance_interval",
        type=argument_types.time,
        action=argument_types.Interval,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only at process times between these",
    )
    group.add_argument(
        "--guidance_channels", help="all, or first3 as the original DiT", choices=["all", "first3"]
    )
    add_size_arguments(group, "default: what the model was trained on")
    add_step_cache_argument(group)
    group.add_argument(
        "--batch_size", type=argument_types.count, help="images sampled at once, over all devices"
    )
    group.add_argument(
        "--seed", type=argument_types.seed, default=0, help="image i depends on seed and i only"
    )
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")


def add_size_arguments(group: argparse._ActionsContainer, default: str) -> None:
    """Height and width of images."""
    for side in ("--height", "--width"):
        group.add_argument(
            side,
            type=argument_types.count,
            metavar="PIXELS",
            help=f"{side[2:]} of the images; {default}",
        )


def add_step_cache_argument(group: argparse._ActionsContainer) -> None:
    """Whether blocks are skipped."""
    group.add_argument(
        "--step_cache",
        type=argument_types.share_below_one,
        metavar="THRESHOLD",
        help="skip blocks where the first changes less than this, as 0.1 (docs/speed.md); 0: never",
    )


def add_samples_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, how, on what devices, and which images: what decides the program of samples."""
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    add_parallel_arguments(parser)
    add_vae_devices_argument(parser)
    parser.add_argument(
        "--num_images",
        type=argument_types.count,
        help="default: 64, or one a label of --labels or a prompt",
    )
    parser.add_argument(
        "--labels",
        type=argument_types.label,
        nargs="+",
        help="classes (numbers, names), one an image (--num_images: in turn); default: all in turn",
    )


def add_vae_devices_argument(group: argparse._ActionsContainer) -> None:
    """How many devices decode an image."""
    group.add_argument(
        "--vae_devices",
        type=argument_types.count,
        help="devices over which the VAE splits an image's rows",
    )


def add_programs_argument(parser: argparse._ActionsContainer, **options: Any) -> None:
    """The folder of compiled programs."""
    parser.add_argument(
        "--programs",
        type=Path,
        metavar="FOLDER",
        help="of compiled programs, found there or kept there; they are code: name only a folder "
        "that you trust",
        **options,
    )


def add_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of one image on many devices."""
    group = parser.add_argument_group("one image on many devices (docs/parallel_sampling.md)")
    group.add_argument("--parallel", choices=PARALLEL_MODES, help="what the devices exchange")
    group.add_argument(
        "--patch_devices", type=argument_types.count, help="devices one image is split over"
    )
    group.add_argument(
        "--warmup_steps",
        type=argument_types.count,
        help="synchronous steps before displaced ones; default 4",
    )
    group.add_argument(
        "--split_guidance",
        action="store_true",
        help="the two evaluations of guidance on devices of their own, twice as many in all",
    )
    group.add_argument(
        "--ulysses_devices",
        type=argument_types.count,
        help="of --patch_devices, those that exchange heads; the others are a ring",
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a command that may be one of several processes."""
    group = parser.add_argument_group("several processes (each is given the same command)")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, which SLURM, Open MPI or Kubernetes started",
    )
    group.add_argument("--coordinator_address", help="host:port of the first")
    group.add_argument("--num_processes", type=argument_types.count, help="how many there are")
    group.add_argument(
        "--process_id", type=argument_types.count_or_none, help="which one this is, from 0"
    )


def join_processes(args: argparse.Namespace) -> None:
    """Joins the others where `add_process_arguments`' options say so; before JAX is used."""
    explicit = (args.coordinator_address, args.num_processes, args.process_id)
    if args.distributed or any(value is not None for value in explicit):
        from dit_jax.parallel import distributed

        distributed.initialize(*explicit)


def check_model(args: argparse.Namespace) -> None:
    """Refuses what `add_model_arguments`' options cannot mean.

    Raises:
        ValueError: neither or both of --workdir and --init_from; options of the latter alone.
    """
    if (args.workdir is None) == (args.init_from is None):
        raise ValueError("give one of --workdir (a training run) and --init_from (a checkpoint)")
    for name in ("num_heads", "num_classes", "allow_nonfinite"):
        if args.workdir and is_given(getattr(args, name)):
            raise ValueError(f"--{name} does not apply to --workdir: its config.json knows")


def check_parallel(args: argparse.Namespace) -> None:
    """Refuses what `add_parallel_arguments`' options cannot mean.

    Raises:
        ValueError: options that do nothing, or not together.
    """
    if args.parallel is None:
        names = ("patch_devices", "warmup_steps", "split_guidance", "ulysses_devices")
        for name in names:
            if is_given(getattr(args, name)):
                modes = "|".join(PARALLEL_MODES)
                raise ValueError(f"--{name} would do nothing without --parallel={modes}")
    elif args.patch_devices is None and not args.split_guidance:
        raise ValueError(f"--parallel={args.parallel} needs --patch_devices (or --split_guidance)")


def sampling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration values that `add_sampling_arguments`' options replace."""
    names = ("solver", "steps", "spacing", "guidance_scale", "guidance_channels", "batch_size")
    overrides = {f"sampling.{n}": getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.guidance_interval:
        overrides["sampling.guidance_interval"] = tuple(args.guidance_interval)
    elif args.guidance_scale == 1.0:  # no guidance: then not the run's interval and channels either
        overrides["sampling.guidance_interval"] = ()
        overrides.setdefault("sampling.guidance_channels", "all")
    if args.step_cache:
        overrides["cache.name"] = "first_block"
        overrides["cache.first_block.threshold"] = args.step_cache
    elif args.step_cache == 0:
        overrides["cache.name"] = "none"
    return overrides
