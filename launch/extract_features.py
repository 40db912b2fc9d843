"""Encodes images with a VAE once, so that training need not: writes the latents format.

  python launch/extract_features.py --data=image_folder --path=imagenet \\
      --vae=hub:stabilityai/sd-vae-ft-mse --image_size=256 --flip=pairs --out=latents/imagenet256
  python launch/extract_features.py --data=tfds --dataset=imagenet2012 --path=TFDS_DIR ...
  python launch/extract_features.py --data=jpeg_npz --path='cifar10_{split}.npz' ...
  python launch/extract_features.py --data=captioned_folder --path=pictures --image_size=512 \\
      --vae=FLUX.1-dev --text_encoders=FLUX.1-dev --compute_dtype=bfloat16 --out=features

Of a captioned_folder (pictures with metadata.jsonl) and of captioned_shards (tar archives of
pictures and captions, docs/data.md) the embeddings of the captions are written beside the latents,
T5's states and CLIP's vector, and those of the empty prompt.

The latents of a split go to OUT/SPLIT. Interrupted or killed, the same command goes on where it
was, and ends with the same bits. Then train with

  --config.data.name=latents --config.data.latents.path=OUT
"""

import argparse
import math
import shlex
from typing import TYPE_CHECKING

from dit_jax.launch import argument_types, arguments, command, spelling

if TYPE_CHECKING:
    from dit_jax.data import Header

_PUBLISHED_FLUX = "hub:black-forest-labs/FLUX.1-dev"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data",
        required=True,
        choices=[
            *("image_folder", "captioned_folder", "captioned_shards"),
            *("tfds", "jpeg_npz", "digits"),
        ],
    )
    images.add_argument(
        "--path",
        default="",
        help="folder, shards as 'pictures-{00000..00012}.tar', .npz with {split}, or TFDS data_dir",
    )
    images.add_argument("--dataset", default="", help="the TFDS data set")
    images.add_argument("--split", default="train", help="train or test; any of TFDS's own")
    images.add_argument(
        "--test_fraction",
        type=argument_types.share_below_one,
        help="of folders and shards: share held out",
    )
    images.add_argument(
        "--image_size",
        type=argument_types.image_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="after ADM's scale and crop; default: as they are",
    )
    images.add_argument(
        "--buckets",
        default="",
        help="of folders and shards: sizes of which each image gets the one of nearest aspect "
        "ratio, '192x320,256x256,320x192', or auto:64 (docs/data.md)",
    )
    vae = parser.add_argument_group("VAE")
    vae.add_argument(
        "--vae",
        required=True,
        help="a VAE's or a pipeline's folder, a file, or hub:stabilityai/sd-vae-ft-mse",
    )
    vae.add_argument(
        "--compute_dtype", default="float32", help="bfloat16, float16 or auto (bfloat16 on GPUs)"
    )
    text = parser.add_argument_group("captions, of captioned_folder and captioned_shards")
    text.add_argument(
        "--text_encoders", help="a FLUX pipeline's folder or hub:owner/name, of which CLIP and T5"
    )
    text.add_argument(
        "--text_length", type=argument_types.count, help="of T5's states in tokens; default 512"
    )
    text.add_argument(
        "--text_dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of T5's states on disk; default bfloat16",
    )
    out = parser.add_argument_group("latents")
    out.add_argument(
        "--out", type=argument_types.folder, required=True, help="folder; a split's go to OUT/SPLIT"
    )
    out.add_argument(
        "--flip",
        choices=["pairs", "none"],
        help="mirror images too; default pairs, with captions none, which tell left from right",
    )
    out.add_argument("--kind", default="moments", choices=["moments", "samples"])
    out.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    out.add_argument(
        "--shard_size",
        type=argument_types.count,
        help="images a file, a multiple of the batch size",
    )
    out.add_argument("--seed", type=argument_types.seed, default=0, help="of --kind=samples")
    run = parser.add_argument_group("execution")
    run.add_argument(
        "--batch_size", type=argument_types.count, help="images at once, over all devices"
    )
    run.add_argument(
        "--num_workers",
        type=argument_types.count_or_none,
        default=0,
        help="processes that decode; 0: threads",
    )
    run.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    arguments.add_process_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    from dit_jax.launch import recording

    recording.run_command(args, extract)


def extract(args: argparse.Namespace) -> None:
    """Extracts, and tells what to do next."""
    from dit_jax.launch import extraction
    from dit_jax.parallel import distributed

    folder, header = extraction.run(args)
    if not distributed.is_first():
        return
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"done: {folder}, {size / 2**20:.4g} MiB")
    if header.split != "train":
        return
    shapes = [header.shape_of("latents", number) for number in range(len(header.shards))]
    height, width, channels = max(shapes, key=math.prod)
    square = height == width and len(set(shapes)) == 1
    size = f"image_size={height}" if square else f"input_size={height},{width}"
    config, more = "dit_b2", [f"--config.model.num_classes={header.num_classes}"]
    if args.text_encoders is not None:
        config, more = captioned_training(args.text_encoders, header)
    train = ["python", "launch/train.py", f"--config=configs/{config}.py"]
    train += ["--workdir=runs/latents"]
    train += [f"--config.data.latents.path={args.out}", f"--config.model.{size}"]
    train += [f"--config.model.in_channels={channels}", *more]
    if extraction.flip_of(args) != "pairs" and args.text_encoders is None:
        train.append("--config.data.horizontal_flip=False")
    print(f"next: {spelling.spelled(shlex.join(train))}")


def captioned_training(encoders: str, header: "Header") -> tuple[str, list[str]]:
    """What embeddings of captions are trained with: an experiment of configs/, and its options.

    Args:
        encoders: --text_encoders.
        header: of what was made.
    """
    from dit_jax import experiment
    from dit_jax.configs import flux_dev_sft
    from dit_jax.interop.models import open_model
    from dit_jax.launch.text_extraction import find_encoders

    published = flux_dev_sft.get_config()
    folder = find_encoders(encoders)
    if (folder / "transformer").is_dir():  # which they are told in its own pipeline
        found = open_model(folder).config
        sizes = experiment.network_differences(found, published)
        sizes = {key: its for key, (its, _) in sizes.items() if key.startswith("flux.")}
        start, config = [f"--init_from={encoders}"], "flux_dev_sft"
    else:
        sizes = {"flux.text_dim": header.fields["text"].shape[-1]}
        sizes["flux.pooled_dim"] = header.fields["pooled"].shape[-1]
        start, config = [f"--init_from={_PUBLISHED_FLUX}"], "flux_dev_sft"
        if sizes != {key: published.model.flux[key.partition(".")[2]] for key in sizes}:
            start, config = [], "flux_tiny"  # no published network is told states of these sizes
        else:
            sizes = {}
    return config, [*start, *(f"--config.model.{key}={size}" for key, size in sizes.items())]


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
