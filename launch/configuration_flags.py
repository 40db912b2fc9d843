"""The flags of commands that take an experiment: --config=FILE, --config.key=value, by absl."""

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from dit_jax import abbreviations, options, rooms
from dit_jax import config as config_lib
from dit_jax.launch import command, spelling
from dit_jax.nearest import nearest

flags.disclaim_key_flags()  # --help lists a command's own flags, of which these are a part


# The command line as it is parsed; what overrides the file is looked for in there, too.
_arguments: list[str] = []


def define_config() -> flags.FlagHolder:
    """Defines --config, and --help_config, which explains its keys."""
    flags.DEFINE_string(
        "help_config",
        None,
        "Show the keys of the configuration with defaults and meanings; --help_config=WORD those "
        "that have it in their name or meaning.",
    )
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "The experiment, a file or the name of one of configs/; override with --config.key=value.",
        sys_argv=_arguments,
    )


def run(
    main: Callable[[list[str]], object],
    required: Mapping[str, str] | None = None,
    *,
    announce: bool = True,
) -> None:
    """Parses the flags and runs `main`, as `command.run` does with those of other commands.

    Args:
        main: is given what absl leaves of the command line, the name of the program.
        required: names of the flags that have to be given as --config has, with an example each.
        announce: see `parse`.
    """
    if any(re.fullmatch(r"--?(h|help|helpshort|\?)", argument) for argument in sys.argv[1:]):
        show_help(main.__module__)
        sys.exit(0)
    logging.set_verbosity(logging.WARNING)
    parser = functools.partial(parse, required=required, announce=announce)
    command.run(lambda: app.run(main, flags_parser=parser))


def config_name() -> str:
    """The name of the file of --config, without folder and suffix."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def parse(
    argv: list[str], *, required: Mapping[str, str] | None = None, announce: bool = True
) -> list[str]:
    """absl's parsing, with mistakes reported as all others are.

    Args:
        argv: the program and its arguments.
        required: see `run`.
        announce: say what of the file of --config is left out (`settle`).
    """
    show_help_config(argv[1:])
    rooms.know_former_name("configs")  # in files of users
    argv = _arguments[:] = with_config_files([argv[0], *map(_with_todays_key, argv[1:])])
    with command.readable_errors():
        require_config_file(argv[1:])
        for argument in argv[1:]:
            key = argument.lstrip("-").partition("=")[0].removeprefix("no")
            if key.startswith("config.") and key.removeprefix("config.") not in options.schema():
                hint = config_lib.nearest_key(key.removeprefix("config."))
                raise config_lib.ConfigError(f"unknown key {key}{hint}")
            meant = abbreviations.meant_by(key)
            if argument.startswith("--") and key not in flags.FLAGS:
                named = any(path.rpartition(".")[2] == key for path in options.schema())
                hint = f"; did you mean --config.{meant[0]}?" if meant else ""
                hint = hint or (config_lib.nearest_key(key).replace("config", "--config", 1))
                if meant or named:
                    raise config_lib.ConfigError(f"unknown flag --{key}{hint}")
        try:
            rest = _parsed(argv)[1:]
        except flags.Error as error:
            raise ValueError(f"{_in_words(str(error))} (see --help)") from error
        if flags.FLAGS["config"].value is None:
            raise ValueError("--config is missing, for example --config=configs/digits.py")
        for name, example in (required or {}).items():
            if flags.FLAGS[name].value is None:
                raise ValueError(f"--{name} is missing, for example --{name}={example}")
        if rest:
            raise ValueError(f"unexpected arguments: {' '.join(rest)}")
    left_out = settle()
    if announce and left_out:
        print(left_out, flush=True)
    return argv[:1]


def _parsed(argv: list[str]) -> list[str]:
    """absl's parsing; its --help, which ends the process, ends it with success."""
    try:
        return flags.FLAGS(argv)
    except SystemExit:
        if any(re.fullmatch(r"--?(help\w*|\?)(=.*)?", argument) for argument in argv[1:]):
            sys.exit(0)
        raise


def _in_words(message: str) -> str:
    """absl's message with what Python says of a text that is no number in words."""
    message = re.sub(r"invalid literal for int\(\).*", "expected a whole number (1000)", message)
    return re.sub(r"could not convert string to float.*", "expected a number (0.001)", message)


def show_help(module: str) -> None:
    """Answers --help: the text of the command's module, and its flags."""
    name = sys.argv[0] if module == "__main__" else module  # what absl calls it
    command.print_for_pipe(
        f"{spelling.spelled(sys.modules[module].__doc__)}\nflags:\n"
        f"{flags.FLAGS.module_help(name)}\n\nTry --helpfull to get a list of all flags."
    )


def with_config_files(arguments: list[str]) -> list[str]:
    """The arguments, with the file of an experiment where --config gives the name of one.

    A file that is there under what was given comes first.
    """
    arguments = list(arguments)
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if not equals:
            position += 1
            value = "".join(arguments[position : position + 1])
        name, colon, rest = value.partition(":")
        file = None if Path(name).is_file() else spelling.experiment_file(name)
        if file:
            arguments[position] = f"{flag}{equals}" * bool(equals) + f"{file}{colon}{rest}"
    return arguments


def require_config_file(arguments: list[str]) -> None:
    """Refuses a --config that is no file, and names those there are.

    Raises:
        ValueError: there is no such file, or it is none that can be read to its end.
    """
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-config"):
            continue
        value = value if equals else "".join(arguments[position + 1 : position + 2])
        file = Path(value.partition(":")[0])  # behind the colon: an argument of get_config
        if file.is_file():
            continue
        what = "is not a regular file" if file.exists() else "does not exist"
        known = spelling.experiments()
        match = nearest(file.stem, known)
        hint = f"did you mean configs/{match[0]}.py? " if match else ""
        raise ValueError(f"--config={value} {what}; {hint}the experiments are {', '.join(known)}")


def settle() -> str:
    """Leaves out what the file of --config sets for choices that flags replace; says what."""
    flag = flags.FLAGS["config"]
    typed = config_flags.get_override_values(flag)
    lines = []
    for chosen, values in config_lib.leave_out_unchosen(flag.value, typed).items():
        listed = ", ".join(f"config.{path}={value!r}" for path, value in values.items())
        lines.append(
            f"note: --config.{chosen}={typed[chosen]} leaves out what "
            f"{config_flags.get_config_filename(flag)} sets for another: {listed}"
        )
    return "\n".join(lines)


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
            text = config_help.explain(word)
        given = any(argument.partition("=")[0].lstrip("-") == "config" for argument in arguments)
        command.print_for_pipe(
            "Defaults of all experiments"
            + (", not what the file of --config sets" if given else "")
            + f", and meanings:\n{spelling.spelled(text)}"
        )
        sys.exit(0)


def _with_todays_key(argument: str) -> str:
    """The argument, with the name that a renamed key has now."""
    flag, equals, value = argument.partition("=")
    dashes, no, key = re.match(r"(-*)((?:no)?)(?:config\.)?(.*)", flag).groups()
    new = config_lib.RENAMED.get(key)
    return f"{dashes}{no}config.{new}{equals}{value}" if new and "config." in flag else argument
