"""Samples images from a trained model.

  python launch/sample.py --workdir=runs/digits --num_images=100 --out=samples.png
  python launch/sample.py --workdir=runs/digits --labels 3 7 --guidance_scale=2 --out=threes.png
  python launch/sample.py --workdir=runs/digits --num_images=50000 --out=samples.npz

  python launch/sample.py --init_from=DiT-XL-2-256x256.pt \\
      --vae=hub:stabilityai/sd-vae-ft-mse --out=samples.png

  python launch/sample.py --workdir=runs/digits --parallel=displaced --patch_devices=4 \\
      --warmup_steps=4 --out=samples.png

  python launch/sample.py --pretrained=FLUX.1-schnell --prompt="a cat holding a sign" \\
      --height=1024 --width=1024 --steps=4 --out=cat.png

What --out names decides the format: a .png (or .jpg, .webp) is a grid, a .npz the ADM evaluator's
format (arr_0 images, arr_1 labels), anything else a folder of numbered PNG files. A .npz or folder
is written as images are made, with a .json beside it that says how; interrupted, the same command
goes on.

With --programs=FOLDER the compiled sampler is kept, and later runs start without compiling
(launch/compile.py makes it ahead of time).
"""

import argparse

from dit_jax.launch import argument_types, arguments, command, pretrained_arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    arguments.add_samples_arguments(parser)
    pretrained_arguments.add_pretrained_arguments(parser)
    arguments.add_programs_argument(parser)
    parser.add_argument(
        "--out",
        type=argument_types.samples,
        required=True,
        help="x.png (or .jpg, .webp), x.npz or a folder",
    )
    parser.add_argument("--rounding", default="nearest", choices=arguments.ROUNDING_RULES)
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with command.readable_errors(traceback=args.traceback):
        pretrained_arguments.check_pretrained(args)
        if args.pretrained is None:
            arguments.check_model(args)
            arguments.check_parallel(args)
            from dit_jax.launch import sampling as work
        else:
            from dit_jax.launch import prompting as work

        work.run(args)


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
