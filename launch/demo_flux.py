"""Text to image in minutes: trains a small FLUX on captioned digits, distils it, shows prompts.

python launch/demo_flux.py

Everything goes to runs/demo_flux (or --workdir): pictures with captions, text encoders, their
features, the run of the teacher and that of the student, and pipeline/, the folder of a pipeline
that launch/sample.py --pretrained and diffusers read. Running it again starts afresh there.
"""

import argparse
import time
from pathlib import Path

from dit_jax.launch import argument_types, command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo_flux"))
    parser.add_argument(
        "--steps", type=int, default=1, choices=[1, 4], help="in which the student makes pictures"
    )
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    started = time.perf_counter()
    args = parse_arguments(argv)
    with command.readable_errors(traceback=args.traceback):
        from dit_jax.launch import flux_demonstration

        flux_demonstration.run(args.workdir, args.steps, started)


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
