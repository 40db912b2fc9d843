"""The console command: dit-jax COMMAND [options].

Each COMMAND is the file of the same name in `launch/`, with the same options, messages and status.
"""

import importlib
import sys

import dit_jax
from dit_jax.launch import command, spelling
from dit_jax.nearest import did_you_mean

PROGRAM = "dit-jax"
# Their files' first lines, said once more so that --help need not import them; a test compares.
COMMANDS = {
    "train": "Trains a model.",
    "sample": "Samples images from a trained model.",
    "serve": "Serves a web page on which a pretrained pipeline makes pictures of prompts.",
    "compile": "Compiles a model's sampler ahead of time, so that sampling starts at once.",
    "evaluate": "Scores a model's samples against real images.",
    "convert": "Converts a model between this library, PyTorch state dicts and diffusers.",
    "compare": "Compares two sets of images pair by pair, or one model under two ways of sampling.",
    "plan": "Tells what an experiment needs on devices that are not there, and how fast it can be "
    "on them.",
    "extract-features": "Encodes images with a VAE once, so that training need not: writes the "
    "latents format.",
    "write-pairs": "Samples a teacher and keeps noise, samples and states between them, to distil "
    "from.",
    "demo": "The demo: trains on handwritten digits, distils to one step, and shows both.",
    "demo-flux": "Text to image in minutes: trains a small FLUX on captioned digits, distils it, "
    "shows prompts.",
}


def usage() -> str:
    """What --help says."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [options]",
            "",
            "Diffusion transformers in JAX: train, distil, sample across devices, exchange with",
            "PyTorch.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help shows a command's options, {PROGRAM} --version the version.",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: the command and its options; by default those of this process.
    """
    command.listen()
    name, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help"):
        command.print_for_pipe(usage())
        return
    if name == "--version":
        print(f"{PROGRAM} {dit_jax.__version__}")
        return
    chosen = name.replace("_", "-")  # as the files are called
    if chosen not in COMMANDS:
        print(f"error: {_unknown(name)}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"dit_jax.launch.{chosen.replace('-', '_')}")
    sys.argv[:] = [f"{PROGRAM} {chosen}", *options]
    spelling.name_commands_as(PROGRAM)
    module.start()


def _unknown(name: str) -> str:
    known = ", ".join(COMMANDS)
    if not name or name.startswith("-"):
        what = f"{name} is no command" if name else "no command is given"
        return f"{what}: {PROGRAM} COMMAND [options], COMMAND one of {known}"
    hint = did_you_mean(name.replace("_", "-"), COMMANDS) or ":"
    return f"unknown command {name}{hint} the commands are {known}"
