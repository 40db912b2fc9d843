"""The flags of commands that take an experiment: --config=FILE, --config.key=value, by absl."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from dit_jax import abbreviations
from dit_jax import config as config_lib
from launch import command

flags.disclaim_key_flags()  # --help lists a command's own flags, of which these are a part


def define_config() -> flags.FlagHolder:
    """Defines --config, and --help_config, which explains its keys."""
    flags.DEFINE_string(
        "help_config",
        None,
        "Show the keys of the configuration with defaults and meanings; --help_config=WORD those "
        "that have it in their name or meaning.",
    )
    return config_flags.DEFINE_config_file(
        "config", None, "The experiment, a file of configs/; override with --config.key=value."
    )


def run(main: Callable[[list[str]], object], required: tuple[str, ...] = ()) -> None:
    """Parses the flags and runs `main`, as `command.run` does with those of other commands.

    Args:
        main: is given what absl leaves of the command line, the name of the program.
        required: names of the flags that have to be given as --config has.
    """
    logging.set_verbosity(logging.WARNING)
    flags.mark_flags_as_required(required)
    command.run(lambda: app.run(main, flags_parser=parse))


def config_name() -> str:
    """The name of the file of --config, without folder and suffix."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def parse(argv: list[str]) -> list[str]:
    """absl's parsing, with mistakes reported as all others are."""
    show_help_config(argv[1:])
    known = {path for path, _ in config_lib.flatten(config_lib.default_config())}
    argv = [argv[0], *map(_with_todays_key, argv[1:])]
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
        if flags.FLAGS["config"].value is None:
            raise ValueError("--config is missing, for example --config=configs/digits.py")
        if rest:
            raise ValueError(f"unexpected arguments: {' '.join(rest)}")
    return argv[:1]


def show_help_config(arguments: list[str]) -> None:
    """Answers --help_config, --help_config=WORD and --help_config WORD, and ends."""
    for position, argument in enumerate(arguments):
        name, equals, word = argument.partition("=")
        if name not in ("--help_config", "-help_config"):
            continue
        following = arguments[position + 1 :]
        if not equals and following and not following[0].startswith("-"):
            word = following[0]
        from dit_jax import config_help

        with command.readable_errors():
            print(config_help.explain(word))
        sys.exit(0)


def _with_todays_key(argument: str) -> str:
    """The argument, with the name that a renamed key has now."""
    flag, equals, value = argument.partition("=")
    dashes, no, key = re.match(r"(-*)((?:no)?)(?:config\.)?(.*)", flag).groups()
    new = config_lib.RENAMED.get(key)
    return f"{dashes}{no}config.{new}{equals}{value}" if new and "config." in flag else argument
