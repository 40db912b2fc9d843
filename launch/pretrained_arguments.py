"""The options of a pretrained pipeline, which makes pictures of prompts.

Like `arguments` it imports nothing that takes time, so that mistakes are answered at once.
"""

import argparse
from pathlib import Path

from dit_jax.launch import argument_types
from dit_jax.launch.arguments import check_parallel, is_given


def add_pretrained_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a pretrained pipeline, which makes pictures of prompts."""
    group = parser.add_argument_group("text to image (docs/text_to_image.md)")
    group.add_argument(
        "--pretrained",
        metavar="DIR",
        help="a FLUX pipeline of diffusers, or hub:owner/name[@revision]; with --workdir or "
        "--init_from, whose transformer (or LoRA) is used in it",
    )
    group.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or several prompts")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="of prompts, one a line")
    group.add_argument(
        "--image", type=Path, metavar="FILE", help="of FLUX.1 Kontext: what the prompts edit"
    )
    group.add_argument(
        "--keep_image_size",
        action="store_true",
        help="show it --image at its own size (multiples of 16), not at one it was trained on",
    )
    add_pipeline_arguments(group)


def add_pipeline_arguments(group: argparse._ActionsContainer) -> None:
    """How a pretrained pipeline runs."""
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help="of its products; default auto: bfloat16 on accelerators",
    )
    group.add_argument(
        "--offload",
        action="store_true",
        help="keep the text encoders' weights in host memory but while prompts are encoded",
    )
    group.add_argument(
        "--fsdp",
        type=argument_types.count,
        metavar="DEVICES",
        help="over which the weights of the transformer and the text encoders are divided",
    )
    group.add_argument(
        "--tensor",
        type=argument_types.count,
        metavar="DEVICES",
        help="likewise, each computing its heads and channels; times --fsdp",
    )
    group.add_argument(
        "--vae_tile",
        type=argument_types.tile,
        metavar="LATENTS",
        help="decode in tiles of so many latents a side: less memory, other pixels",
    )
    group.add_argument(
        "--max_sequence_length",
        type=argument_types.count,
        metavar="TOKENS",
        help="of T5; default 512, of FLUX.1 schnell 256",
    )
    group.add_argument(
        "--lora",
        action="append",
        type=argument_types.adapter,
        metavar="FILE[:WEIGHT]",
        help="change the pipeline by a LoRA, or by several (docs/lora.md)",
    )
    group.add_argument(
        "--lora_ignore_text_encoders",
        action="store_true",
        help="leave out what a LoRA changes in text encoders",
    )


# Options of launch/sample.py and compile.py that a pretrained pipeline has no use for.
_OF_TRAINED_MODELS = (
    *("num_heads", "num_classes"),
    *("vae", "solver", "spacing", "guidance_interval", "guidance_channels", "split_guidance"),
    "labels",
)
_OF_PIPELINES = (
    *(
        "prompt",
        "prompts",
        "image",
        "keep_image_size",
        "dtype",
        "fsdp",
        "tensor",
        "offload",
        "vae_tile",
        "max_sequence_length",
    ),
    *("lora", "lora_ignore_text_encoders"),
)


def check_pretrained(args: argparse.Namespace, *, prompts: bool = True) -> None:
    """Refuses what `add_pretrained_arguments`' options cannot mean, alone and with the others.

    Args:
        args: the command line.
        prompts: whether they are needed.

    Raises:
        ValueError: options of trained models beside --pretrained, or of pipelines without it; no
            prompt, or both ways to give them.
    """
    others = _OF_PIPELINES if args.pretrained is None else _OF_TRAINED_MODELS
    given = [f"--{name}" for name in others if is_given(getattr(args, name))]
    if args.pretrained is None and given:
        raise ValueError(
            f"{', '.join(given)}: give a pipeline that takes prompts, --pretrained=DIR"
        )
    if args.pretrained is None:
        return
    if given:
        raise ValueError(
            f"{', '.join(given)} would do nothing beside --pretrained, which brings its own parts"
        )
    _check_tuned(args)
    check_adapters(args)
    check_execution(args)
    if getattr(args, "rounding", "nearest") != "nearest":
        raise ValueError("--rounding would do nothing beside --pretrained: bytes are the nearest")
    check_parallel(args)
    if args.keep_image_size and args.image is None:
        raise ValueError("--keep_image_size is of --image, which is not given")
    if args.image is not None and not prompts:
        raise ValueError("--image does not apply: pictures that edit one are compiled when made")
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("--prompt and --prompts: give one of them")
    if prompts and args.prompt is None and args.prompts is None:
        raise ValueError("--pretrained needs either --prompt or --prompts")


def _check_tuned(args: argparse.Namespace) -> None:
    """Refuses what cannot take the place of a pipeline's transformer."""
    if args.workdir and args.init_from:
        raise ValueError("--workdir and --init_from: give one of them beside --pretrained")
    idle = [name for name in ("weights", "step") if is_given(getattr(args, name))]
    if idle and not (args.workdir or args.init_from):
        raise ValueError(
            f"--{idle[0]} would do nothing beside --pretrained without --workdir, the run whose "
            "transformer or LoRA is to be used"
        )


def check_adapters(args: argparse.Namespace) -> None:
    """Refuses what options of LoRA cannot mean beside --pretrained.

    Raises:
        ValueError: an option of --lora without it.
    """
    if args.allow_nonfinite and not (args.lora or args.init_from):
        raise ValueError(
            "--allow_nonfinite is of --lora and --init_from beside --pretrained, whose own parts "
            "have to be whole"
        )
    if args.lora_ignore_text_encoders and not args.lora:
        raise ValueError("--lora_ignore_text_encoders is of --lora, which is not given")


def check_execution(args: argparse.Namespace) -> None:
    """Refuses ways to run a pipeline that exclude each other.

    Raises:
        ValueError: with the options of which one is to go.
    """
    divided = [f"--{name}" for name in ("fsdp", "tensor") if (getattr(args, name) or 1) > 1]
    if divided and args.parallel:
        raise ValueError(
            f"{divided[0]} divides weights over devices, --parallel={args.parallel} pictures over "
            "devices of its own: give one of the two"
        )
    if divided and args.programs:
        raise ValueError(
            f"--programs: of weights that {divided[0]} divides none are kept: leave it out (JAX's "
            "own cache, JAX_COMPILATION_CACHE_DIR, keeps them, too)"
        )
    if divided and args.offload:
        raise ValueError(
            f"--offload keeps the encoders' weights on the host, {divided[0]} divides them over "
            "devices: give one of the two"
        )
    idle = [f"--{name}" for name in ("vae_devices", "programs") if is_given(getattr(args, name))]
    if args.vae_tile and idle:
        raise ValueError(
            f"--vae_tile={args.vae_tile} decodes by several small programs on one device: leave "
            f"{' and '.join(idle)} out"
        )
