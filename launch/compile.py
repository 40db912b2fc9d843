"""Compiles a model's sampler ahead of time, so that sampling starts at once.

  python launch/compile.py --workdir=runs/digits --num_images=100 --programs=programs
  python launch/sample.py --workdir=runs/digits --num_images=100 --programs=programs --out=x.png

Give the options of launch/sample.py: the number of images at once, the solver and its steps, the
devices and the checkpoint's shapes decide the program; its weights, the seed, labels and the
guidance's scale do not. A program is used on the same kind of device by the same versions of JAX
and dit_jax; where one is missing sample.py says what differs, compiles and keeps it.

For NVIDIA GPUs that are not here (the extra 'plan'; --devices of them):

  python launch/compile.py --workdir=runs/digits --programs=programs --accelerator=h100

Of a pretrained pipeline, for so many pictures at once:

  python launch/compile.py --pretrained=FLUX.1-dev --steps=28 --num_images=1 --programs=programs
"""

import argparse

from dit_jax.launch import argument_types, arguments, command, pretrained_arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    arguments.add_samples_arguments(parser)
    pretrained_arguments.add_pretrained_arguments(parser)
    arguments.add_programs_argument(parser, required=True)
    parser.add_argument(
        "--accelerator",
        choices=[name for name in arguments.ACCELERATORS if not name.startswith("tpu")],
        help="for GPUs that are not here; default: for this machine's devices",
    )
    parser.add_argument(
        "--devices", type=argument_types.count, help="of --accelerator, how many; default: 1"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with command.readable_errors(traceback=args.traceback):
        pretrained_arguments.check_pretrained(args, prompts=False)
        if args.pretrained is None:
            arguments.check_model(args)
            arguments.check_parallel(args)
        elif args.accelerator:
            raise ValueError(
                "--accelerator does not apply to --pretrained: compile where it is to run"
            )
        if args.devices and not args.accelerator:
            raise ValueError(
                f"--devices={args.devices} is of --accelerator; a program for this machine is for "
                "the devices it has"
            )
        if args.accelerator:
            from dit_jax.launch import compiling_elsewhere

            compiling_elsewhere.set_environment()  # before JAX loads
            compiling_elsewhere.run(args)
            return
        if args.pretrained is None:
            from dit_jax.launch import sampling as work
        else:
            from dit_jax.launch import prompting as work

        work.compile_programs(args)


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
