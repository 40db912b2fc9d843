"""A run's directory: its configuration, checkpoints, metrics and pictures.

Everything later commands need is in it: `config.json` (the resolved configuration), `checkpoints/`,
`metrics.jsonl`, `tensorboard/`, `previews/`.
"""

import contextlib
import errno
import json
import logging as std_logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
from absl import logging

from dit_jax import config as config_lib
from dit_jax import options
from dit_jax.atomic import save_text
from dit_jax.quantities import counted, format_bytes
from dit_jax.training.checkpoints import MismatchError
from dit_jax.untrusted import read_json, read_json_text

CONFIG_FILE = "config.json"
EXTENSIONS_FILE = "extensions.json"  # modules from outside the library that the run needs
CHECKPOINTS = "checkpoints"

# Keys that change nothing about what is learned, so that a run may go on with other values.
_FREE = (
    "name",
    "sampling.",
    "cache.",
    "evaluation.",
    "autoencoder.",
    "mesh.",
    "data.num_workers",
    "training.num_steps",
    "training.log_every",
    "training.preview_",
    "training.checkpoint_every",
    "training.keep_",
    "training.tensorboard",
    "training.wandb",
    "model.param_dtype",  # of sampling: trained parameters are float32 in any case
)


# Keys of the steps for which the students of some methods are trained.
_SCHEDULE = tuple(
    f"sampling.{key}"
    for key in ("solver", "steps", "times", "spacing", "shift", "shift_by_tokens", "rho")
)


class WorkdirError(RuntimeError):
    """A workdir that cannot be used as asked."""


def has_run(workdir: Path) -> bool:
    """Whether a run has begun there: it has a configuration and a checkpoint."""
    return (workdir / CONFIG_FILE).exists() and any((workdir / CHECKPOINTS).glob("[0-9]*"))


def keep_earlier(workdir: Path, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config` for the run in `workdir`, if there is one, which may be older than some keys.

    It goes on as it began: keys that its config.json is too old to have get the values that they
    stand for there, whatever `config` has. A line says so; `require_same_run` has the others.
    """
    now = dict(config_lib.flatten(config))
    earlier = _earlier_values(Path(workdir))
    changed = {key: value for key, value in earlier.items() if now[key] != value}
    if not changed:
        return config
    listed = ", ".join(f"config.{key}={value}" for key, value in changed.items())
    logging.warning("%s is of before there was such a key: it continues with %s", workdir, listed)
    return config_lib.from_json(config_lib.to_json(config, without=list(changed)))


def _earlier_values(workdir: Path) -> dict:
    file = workdir / CONFIG_FILE
    if not has_run(workdir):
        return {}
    try:
        return config_lib.earlier_values(read_json_text(file))
    except ValueError as error:
        raise _unusable(file, error) from error


def _unusable(file: Path, error: ValueError) -> WorkdirError:
    named = str(file) in str(error)  # as by what reads no pipes and folders
    message = str(error) if named else f"{file} cannot be used: {error}"
    recorded = file.parent / EXTENSIONS_FILE
    if recorded.is_file():
        modules = ",".join(map(str, read_json(recorded, list)))
        stop = "" if message.endswith("?") else "."
        message += f"{stop} The run was made with modules of its own: set "
        message += f"{options.EXTENSIONS}={modules}"
    return WorkdirError(message)


def extensions_text(config: ml_collections.ConfigDict) -> str:
    """What `EXTENSIONS_FILE` is to hold; '' where the run needs no module from outside."""
    found = options.extensions(config_lib.choices(config))
    return json.dumps(found) + "\n" if found else ""


def config_text(workdir: Path, config: ml_collections.ConfigDict) -> str:
    """What config.json of `workdir` is to hold; without keys that the run's own is too old for."""
    return config_lib.to_json(config, without=list(_earlier_values(workdir)))


def require_same_run(
    workdir: Path, config: ml_collections.ConfigDict, *, force: bool = False
) -> None:
    """Refuses a workdir that holds a run of another configuration; changes nothing there.

    Args:
        workdir: may be missing.
        config: resolved configuration.
        force: only warn.

    Raises:
        WorkdirError: it holds a run whose configuration differs in keys that matter to what is
            learned; they are listed.
    """
    if not has_run(workdir):
        return
    found = load_config(workdir)
    changed = _essential_differences(found, config)
    if not changed:
        return
    listed = "\n".join(
        f"  config.{key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items()
    )
    if force:
        logging.warning("continuing %s with another configuration:\n%s", workdir, listed)
        return
    if set(changed) == {"training.num_steps"}:
        raise WorkdirError(
            f"{workdir} holds a run of {found.training.num_steps} steps; with "
            f"{config.training.num_steps} its {config.optimizer.schedule} schedule of the learning "
            f"rate is another from here on:\n{listed}\n"
            "Add --force to go on with the new schedule, or use another --workdir"
        )
    raise WorkdirError(
        f"{workdir} holds a run of another configuration:\n{listed}\n"
        "Use another --workdir, the same values, or add --force to continue with the new ones"
    )


@contextlib.contextmanager
def mismatch_explained(workdir: Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """Names the keys of `config` that differ where the run's checkpoints are of another network.

    Raises:
        MismatchError: as raised inside, with the keys before the arrays' shapes.
    """
    try:
        yield
    except MismatchError as error:
        if not (workdir / CONFIG_FILE).exists():
            raise
        changed = _essential_differences(load_config(workdir), config)
        listed = "".join(
            f"  config.{key}: {old!r} there, {new!r} now\n" for key, (old, new) in changed.items()
        )
        if not listed:
            raise
        raise MismatchError(
            f"{workdir} holds a run of another configuration, from which this one cannot continue "
            f"(--force does not help):\n{listed}Use another --workdir, or the same values.\n{error}"
        ) from error


class RunFiles:
    """The small files of a run beside its checkpoints, kept so that they can be written again.

    Args:
        workdir: created when the first is written.
    """

    def __init__(self, workdir: Path):
        self.workdir = Path(workdir)
        self._texts: dict[str, str] = {}

    def write(self, name: str, text: str) -> None:
        """Writes a file, whole or not at all."""
        self._texts[name] = text
        save_text(self.workdir / name, text)

    def mend(self) -> list[str]:
        """Writes those again that are no longer there, and names them."""
        missing = [name for name in self._texts if not (self.workdir / name).exists()]
        for name in missing:
            self.write(name, self._texts[name])
        return missing


@contextlib.contextmanager
def readable_disk_errors(workdir: Path) -> Iterator[None]:
    """Names the workdir and what to do when its disk is full, whichever library noticed.

    Raises:
        WorkdirError: instead of any error that a full disk or an exceeded quota caused.
    """
    for name in ("asyncio", "absl"):
        std_logging.getLogger(name).addFilter(_is_news)
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise WorkdirError(
            f"no space is left on the disk of {workdir} ({_free(workdir)}): the run stopped, its "
            "complete checkpoints are whole. Free some space; then the same command continues from "
            "the newest of them. A lower config.training.keep_last needs less"
        ) from error


def _is_news(record: std_logging.LogRecord) -> bool:
    # Every array that orbax then cannot write is reported once more, with pages of detail.
    return not (record.exc_info and is_disk_full(record.exc_info[1]))


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or an exceeded quota is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in ("No space left on device", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free(directory: Path) -> str:
    try:
        return f"{format_bytes(shutil.disk_usage(directory).free)} free"
    except OSError:
        return "not to be looked at"


def _essential_differences(old, new) -> dict:
    changed = config_lib.differences(old, new)
    decays = new.optimizer.schedule != "constant"  # the schedule's length is then part of it
    learned = ("training.num_steps",) if decays else ()
    learned += _SCHEDULE if options.facts("method", new.method.name).get("scheduled") else ()
    return {
        key: values
        for key, values in changed.items()
        if not key.startswith(_FREE) or key in learned
    }


def load_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `workdir`.

    Raises:
        WorkdirError: there is none, or it cannot be used.
    """
    file = Path(workdir) / CONFIG_FILE
    if not file.exists():
        raise WorkdirError(
            f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}. "
            "Train one with launch/train.py --workdir=..."
        )
    try:
        return config_lib.from_json(read_json_text(file))
    except ValueError as error:
        raise _unusable(file, error) from error


def require_writable(directory: Path) -> None:
    """Creates `directory` and proves that files can be written there.

    Raises:
        WorkdirError: naming the directory and the system's reason.
    """
    probe = Path(directory) / f".write-test-{uuid.uuid4().hex[:8]}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise WorkdirError(
            f"cannot write to {directory}: {error.strerror or error}. Choose another directory or "
            "free some space"
        ) from error


def require_space(directory: Path, state, keep: int, keep_for_good: int = 0) -> None:
    """Refuses to start where the run's checkpoints will not fit.

    Args:
        directory: where checkpoints go; exists.
        state: tree of arrays or shapes that one checkpoint holds.
        keep: recent checkpoints kept at a time; one more is needed while it is written.
        keep_for_good: further checkpoints that stay.

    Raises:
        WorkdirError: with the space needed and the space free.
    """
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    held = sum(
        os.path.getsize(os.path.join(path, file))
        for path, _, files in os.walk(Path(directory) / CHECKPOINTS)
        for file in files
    )
    keep += keep_for_good
    needed, free = one * (keep + 1) - held, shutil.disk_usage(directory).free
    if needed > free:
        raise WorkdirError(
            f"{directory} has {format_bytes(free)} free, but {counted(keep, 'checkpoint')} and one "
            f"being written need {format_bytes(needed)} more: free some space, choose another "
            "--workdir, or lower config.training.keep_last"
            + (" or raise config.training.keep_every" if keep_for_good else "")
        )
