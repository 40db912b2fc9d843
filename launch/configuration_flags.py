"""The flags of commands that take an experiment: --config=FILE, --config.key=value, by absl."""

from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from dit_jax import abbreviations
from dit_jax import config as config_lib
from launch import command


def define_config() -> flags.FlagHolder:
    """Defines --config."""
    return config_flags.DEFINE_config_file(
        "config", None, "The experiment, a file of configs/; override with --config.key=value."
    )


def run(main: Callable[[list[str]], object], required: list[str]) -> None:
    """Parses the flags and runs `main`, as `command.run` does with those of other commands.

    Args:
        main: is given what absl leaves of the command line, the name of the program.
        required: names of the flags that have to be given.
    """
    logging.set_verbosity(logging.WARNING)
    flags.mark_flags_as_required(required)
    command.run(lambda: app.run(main, flags_parser=parse))


def parse(argv: list[str]) -> list[str]:
    """absl's parsing, with mistakes reported as all others are."""
    known = {path for path, _ in config_lib.flatten(config_lib.default_config())}
    with command.readable_errors():
        for argument in argv[1:]:
            key = argument.lstrip("-").partition("=")[0].removeprefix("no")
            if key.startswith("config.") and key.removeprefix("config.") not in known:
                hint = config_lib.nearest_key(key.removeprefix("config."))
                raise config_lib.ConfigError(f"unknown key {key}{hint}")
            meant = abbreviations.meant_by(key)
            if argument.startswith("--") and key not in flags.FLAGS and meant:
                raise config_lib.ConfigError(
                    f"unknown flag --{key}; did you mean --config.{meant[0]}?"
                )
        try:
            rest = flags.FLAGS(argv)[1:]
        except flags.Error as error:
            raise ValueError(f"{error} (see --help)") from error
        if rest:
            raise ValueError(f"unexpected arguments: {' '.join(rest)}")
    return argv[:1]
