"""The demo: trains on handwritten digits, distils to one step, and shows both.

python launch/demo.py

Everything goes to runs/demo (or --workdir): the teacher's run in teacher/, the student's in
student/. Running it again starts afresh there. At the end it says how good both are, and where the
time went. Batches are half those of configs/digits.py and configs/digits_cm.py, steps fewer than
half, learning rates higher, and the teacher is sampled in 8 steps instead of 25: quicker, and
hardly worse.
"""

import argparse
import time
from pathlib import Path

from dit_jax.launch import argument_types, command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--num_images", type=argument_types.count, default=1000, help="samples to evaluate"
    )
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    started = time.perf_counter()
    args = parse_arguments(argv)
    with command.readable_errors(traceback=args.traceback):
        if args.num_images < 100:
            raise ValueError(f"--num_images={args.num_images}: expected at least 100, for a score")
        from dit_jax.launch import demonstration

        demonstration.run(args.workdir, args.num_images, started)


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
