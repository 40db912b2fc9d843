"""How commands and experiments are called: as files of a checkout, or by the console command.

Texts say `python launch/sample.py` and `--config=configs/digits.py`. Where this process was started
as `dit-jax train` they become `dit-jax sample` and `--config=digits`: an installation has no such
folders.
"""

import re
import sys
from pathlib import Path

from dit_jax import rooms

_EXPERIMENTS = rooms.folder("configs")

_program = ""  # the console command; '' where files are run


def name_commands_as(program: str) -> None:
    """Says how this process was started: `program` COMMAND, not python launch/COMMAND.py."""
    global _program
    _program = program


def spelled(text: str) -> str:
    """`text` with every command and experiment named as this process was started."""
    if not _program:
        return text

    def console(found: re.Match) -> str:
        return f"{_program} {found[1].replace('_', '-')}"

    def experiment(found: re.Match) -> str:
        return found[1] if experiment_file(found[1]) else found[0]

    text = re.sub(r"(?:\bpython )?\blaunch/(\w+)\.py\b", console, text)
    return re.sub(r"(?<![\w/.])configs/(\w+)\.py\b", experiment, text)


def started_as(file: Path) -> list[str]:
    """The beginning of a command line that runs the command of `file` once more."""
    if _program:
        return [sys.executable, "-m", "dit_jax.launch", file.stem]
    return [sys.executable, str(file.absolute())]


def experiments() -> list[str]:
    """Names of the experiments that the package brings, the files of configs/."""
    return sorted(path.stem for path in _EXPERIMENTS.glob("*.py") if path.stem != "__init__")


def experiment_file(name: str) -> Path | None:
    """The file of the experiment `name`, also written name.py or configs/name.py; None if none."""
    stem = name.removeprefix("configs/").removesuffix(".py")
    file = _EXPERIMENTS / f"{stem}.py"
    return file if stem.isidentifier() and file.is_file() and stem != "__init__" else None
