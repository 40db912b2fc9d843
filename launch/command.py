"""How a command begins and ends: nothing heavy is imported before its flags are understood.

Every command calls `run(main)`, whose `main` imports JAX and the rest once the flags are read, so
that --help and mistakes are answered at once. Ctrl-C ends it at once with status 130 and SIGTERM
with 143, from the import of this module on, except where a training loop has taken the signals to
save first.
"""

import atexit
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging as absl_logging

from dit_jax.launch.spelling import spelled

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# How long `cleaning_up` may take to remove what was half written.
_CLEANING_SECONDS = 2.0

_leaving = threading.Lock()
_listening: list[int] = []  # the pipe's end that is read
_to_remove: set[Path] = set()


def print_for_pipe(text: str) -> None:
    """Prints for a reader that may go before the end, as `| head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # and Python's own flush at exit must not meet it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[], object]) -> None:
    """Runs a command: `main` imports what it needs, its errors and signals end politely."""
    if not _listening:
        listen()
    quieten()
    keep_compiled()
    main()
    # Whoever reads through a pipe, as `| head`, may have gone.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()


class _Formatter(logging.Formatter):
    """Messages of loggers as the commands' own: 'warning: ...'."""

    def format(self, record: logging.LogRecord) -> str:
        """The message after its level's name."""
        return spelled(f"{record.levelname.lower()}: {super().format(record)}")


def quieten() -> None:
    """Keeps libraries' remarks that are no errors off the screen; to be called before JAX loads.

    What is logged all the same looks alike in all commands: 'warning: ...'.

    Variables that the user has set stay as they are.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's and TensorFlow's C++: errors only
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Orbax's hints, as of how long a save took; through a logger that other modules share.
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno >= logging.ERROR or "orbax" not in record.pathname
    )
    absl_logging.get_absl_handler().setFormatter(_Formatter())  # of commands with absl's flags
    if not logging.getLogger().handlers:  # of the others; absl takes it out where it comes in
        handler = logging.StreamHandler()
        handler.setLevel(logging.WARNING)
        handler.setFormatter(_Formatter())
        logging.getLogger().addHandler(handler)


def keep_compiled() -> None:
    """Lets XLA keep what it compiles from one process to the next; to be called before JAX loads.

    In JAX_COMPILATION_CACHE_DIR if that is set (to nothing: not at all), else in the user's cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "dit_jax" / "xla"
    with contextlib.suppress(OSError):  # no home, or one that cannot be written: not kept
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def listen() -> None:
    """Lets SIGINT and SIGTERM end the process at once, even while XLA compiles.

    Called by the import of this module where Python runs a file beside it, so that the imports that
    follow can be interrupted, too.

    Python runs its handlers in the main thread between two of its own instructions, and a
    compilation is one call of many seconds. So a thread is told as well, through a pipe. The end
    is `os._exit`: Python's orderly one would take XLA's threads down in the middle of their work,
    which crashes. Handlers that others install, as the training loop does, are left to them.
    """
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing and multiprocessing.parent_process():
        # A worker that decodes images: Ctrl-C in a terminal reaches it, too, and while its parent
        # saves it has to go on. It ends with its parent.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    reading, writing = os.pipe()
    _listening.append(reading)
    os.set_blocking(writing, False)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # of nohup, or a shell's background job
            signal.signal(number, _leave)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # A forked child has the pipe, too; its signals are not this process's.
    os.register_at_fork(after_in_child=_forget)
    # In the last moments no handler of ours can run: the work is done, and the status says so.
    atexit.register(_ignore)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


def _watch(reading: int) -> None:
    while True:
        for number in os.read(reading, 64):
            handler = signal.getsignal(number) if number in _SIGNALS else None
            if handler is _unwind:
                time.sleep(_CLEANING_SECONDS)
            if handler in (_leave, _unwind):
                _leave(number)


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) in (_leave, _unwind):
            signal.signal(number, signal.SIG_DFL)


def _ignore() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave(number: int, frame: object = None) -> None:
    """Ends the process, from whichever thread comes first."""
    if _leaving.acquire(blocking=False):
        _end(signal.Signals(number))


class _SignalledError(KeyboardInterrupt):
    """Unwinds the stack because of the signal that is its argument."""


def _unwind(number: int, frame: object) -> None:
    raise _SignalledError(number)


def leave(number: signal.Signals) -> None:
    """Ends the process as one that a signal ended: with status 128 + number, nothing else."""
    if not _leaving.acquire(blocking=False):
        time.sleep(60)  # another thread is at it
    _end(number)


def _end(number: signal.Signals) -> None:
    word = "interrupted" if number == signal.SIGINT else "terminated"
    with contextlib.suppress(OSError):
        os.write(2, f"{word}\n".encode())
    for path in tuple(_to_remove):
        shutil.rmtree(path, ignore_errors=True)
    multiprocessing = sys.modules.get("multiprocessing")
    for child in multiprocessing.active_children() if multiprocessing else ():
        child.kill()
    os._exit(128 + number)


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """Inside, a signal unwinds the stack, so that half-written files are removed on the way.

    For work that is Python's own; it has two seconds.
    """
    previous = {}
    hook = sys.unraisablehook
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) is _leave:
                previous[number] = signal.signal(number, _unwind)
        if previous:  # raised where Python can only report it, as in a callback of JAX
            sys.unraisablehook = _leave_or(hook)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _leave_or(hook):
    def report(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            leave(signal.SIGINT)
        hook(unraisable)

    return report


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder that is gone afterwards, however the command ends."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    _to_remove.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _to_remove.discard(folder)


@contextlib.contextmanager
def readable_errors(*, traceback: bool = False) -> Iterator[None]:
    """Ends the process with a message and status 2 on errors a user can mend.

    Args:
        traceback: let them through with their stack trace (the flag --traceback).
    """
    try:
        yield
    except _SignalledError as error:
        leave(signal.Signals(error.args[0]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if traceback or not _is_users(error):
            raise
        print(f"error: {spelled(str(error))}", file=sys.stderr)
        print("(--traceback shows where it came from)", file=sys.stderr)
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    """Whether a user can have caused it, and can mend it."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    # Raised by modules that are imported by now; they are not, for the sake of a mistyped flag.
    from dit_jax.parallel.distributed import DistributedError
    from dit_jax.training.checkpoints import CheckpointError
    from dit_jax.training.workdir import WorkdirError

    return isinstance(error, (CheckpointError, FloatingPointError, WorkdirError, DistributedError))


# Folders of programs that are interrupted as one; imported elsewhere, this module changes nothing.
_PROGRAMS = (Path(__file__).parent, Path(__file__).parents[1] / "benchmarks")
if Path(getattr(sys.modules["__main__"], "__file__", None) or "").parent in _PROGRAMS:
    listen()
