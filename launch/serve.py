"""Serves a web page on which a pretrained pipeline makes pictures of prompts.

  python launch/serve.py FLUX.1-schnell
  python launch/serve.py FLUX.1-dev --steps=28 --compile 1024x1024 768x1344 --programs=programs

The page is at http://127.0.0.1:7860, for this machine alone unless --host says otherwise. Pictures
are made one at a time, others wait; they are kept in memory until the server ends, and their files
say how they were made. --height, --width, --steps, --guidance_scale and the weights of --lora are
what the page begins with. A size and a number of steps is compiled for at its first picture, those
of --compile at once.

The same as JSON over HTTP: docs/text_to_image.md.
"""

import argparse
import errno
import importlib.util
import os
import socket
from pathlib import Path

from dit_jax.launch import argument_types, arguments, command, pretrained_arguments

DEFAULT_PIXELS = 2048 * 2048
NEEDED = ("starlette", "uvicorn", "tokenizers")  # the extra 'serve'
_port = argument_types.number(argument_types.Range(0, 65535, whole=True))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument(
        "pretrained",
        metavar="DIR",
        help="a FLUX pipeline of diffusers, or hub:owner/name[@revision]",
    )
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 opens it to others"
    )
    group.add_argument("--port", type=_port, default=7860, help="0: any that is free")
    group.add_argument(
        "--max_pixels",
        type=argument_types.count,
        default=DEFAULT_PIXELS,
        help=f"of a picture, height times width; default {DEFAULT_PIXELS}",
    )
    group.add_argument(
        "--compile",
        type=argument_types.image_size,
        nargs="+",
        default=[],
        metavar="HEIGHTxWIDTH",
        help="sizes to compile for before the first picture",
    )
    group = parser.add_argument_group("what the page begins with (defaults: the pipeline's)")
    arguments.add_size_arguments(group, "default: 1024")
    group.add_argument("--steps", type=argument_types.solver_steps, help="solver steps")
    group.add_argument(
        "--guidance_scale", type=argument_types.guidance_scale, help="not of FLUX.1 schnell"
    )
    group = parser.add_argument_group("pipeline")
    group.add_argument(
        "--workdir",
        type=Path,
        help="directory of a training run, whose transformer (or LoRA) is used in the pipeline",
    )
    parser.set_defaults(init_from=None, weights="", step=None)
    arguments.add_allow_nonfinite_argument(group)
    arguments.add_storage_arguments(group)
    pretrained_arguments.add_pipeline_arguments(group)
    arguments.add_step_cache_argument(group)
    arguments.add_vae_devices_argument(group)
    arguments.add_programs_argument(group)
    arguments.add_parallel_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with command.readable_errors(traceback=args.traceback):
        arguments.check_parallel(args)
        pretrained_arguments.check_adapters(args)
        pretrained_arguments.check_execution(args)
        require_extra()
        listening = listen_at(args.host, args.port)  # before anything is read
        from dit_jax.launch import serving

        serving.run(args, listening)


def require_extra() -> None:
    """Refuses to begin without what a server is made of.

    Raises:
        ImportError: says how to install it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the page needs {' and '.join(missing)}: pip install 'dit-jax[serve]'")


def listen_at(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: the port is taken, or the address is not of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        known = error.errno in errno.errorcode  # else of a name that is none
        reason = os.strerror(error.errno) if known else error.strerror or str(error)
        raise ValueError(
            f"--host={host} --port={port} cannot be listened at ({reason.lower()}): choose "
            "another, as --port=0 for any that is free"
        ) from error


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
