"""Samples a teacher and keeps noise, samples and states between them, to distil from.

  python launch/write_pairs.py --workdir=runs/digits --num_pairs=20000 --solver=heun --steps=18 \\
      --out=pairs/digits
  python launch/write_pairs.py --init_from=DiT-XL-2-256x256.pt --solver=dpmpp_2m --steps=25 \\
      --guidance_scale=1.5 --path_times 749 499 249 --dtype=float16 --num_pairs=100000 \\
      --out=pairs/xl

A student of one step learns from the noise and the samples alone. For one of several steps name the
times at which its later steps start in --path_times: the solver stops there, if need be besides its
own times, and the states are kept. Classes take turns. Interrupted or killed, the same command goes
on where it was, and ends with the same files. Then train with

  --config.method.name=kd --config.data.name=pairs --config.data.pairs.path=OUT
"""

import argparse
import shlex

from dit_jax.launch import argument_types, arguments, command, spelling


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_sampling_arguments(parser)
    out = parser.add_argument_group("pairs")
    out.add_argument("--num_pairs", type=argument_types.count, required=True)
    out.add_argument(
        "--path_times",
        type=argument_types.time,
        nargs="+",
        default=[],
        metavar="T",
        help="process times between noise and data of which the states are kept",
    )
    out.add_argument(
        "--conditions",
        type=argument_types.folder,
        help="records of what the teacher is told, given in turn; default: its classes in turn",
    )
    out.add_argument("--dtype", default="float32", choices=["float32", "float16"])
    out.add_argument(
        "--shard_size", type=argument_types.count, help="pairs a file, a multiple of the batch size"
    )
    out.add_argument("--out", type=argument_types.folder, required=True, help="folder")
    arguments.add_process_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with command.readable_errors(traceback=args.traceback):
        arguments.check_model(args)
    from dit_jax.launch import recording

    recording.run_command(args, write)


def write(args: argparse.Namespace) -> None:
    """Writes the pairs, and tells what to do next."""
    from dit_jax.launch import pairs
    from dit_jax.parallel import distributed

    header = pairs.run(args)
    if not distributed.is_first():
        return
    size = sum(file.stat().st_size for file in args.out.expanduser().iterdir())
    print(f"done: {header.count} pairs in {args.out}, {size / 2**20:.4g} MiB")
    train = ["python", "launch/train.py", "--config=FILE", "--workdir=DIR"]
    train += ["--config.method.name=kd", "--config.data.name=pairs"]
    train.append(f"--config.data.pairs.path={args.out}")
    if args.height or args.width:
        height, width, _ = header.fields["x0"].shape
        train.append(f"--config.model.input_size={height},{width}")
    train += pairs.student_times(header)
    print(f"next: {spelling.spelled(shlex.join(train))}")


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
