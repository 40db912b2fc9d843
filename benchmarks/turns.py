"""Programs that take turns, each in a process of its own: nobody's memory or threads are shared."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

_MENDABLE = 2  # the status of `readable_errors`, after a message


class Turns:
    """A process of this benchmark that works for each line it is sent, and answers in JSON.

    Attributes:
        facts: its first answer, sent when it is ready.
        start_seconds: from the start of the process to that answer.
    """

    def __init__(
        self, script: str, arguments: Sequence[str], environment: dict[str, str] | None = None
    ):
        """Starts `script` with `arguments`; `environment` replaces this process's."""
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.facts = self._answer()
        self.start_seconds = time.perf_counter() - started

    def run(self, line: str = "run") -> dict[str, Any]:
        """One turn; returns its answer.

        Raises:
            ChildProcessError: the process ended, by a signal or with a stack trace.
            SystemExit: it ended with an error that a user can mend, which it has printed.
        """
        with contextlib.suppress(BrokenPipeError):  # it ended; `_answer` says how
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        if status == _MENDABLE:
            sys.exit(status)
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        raise ChildProcessError(
            f"a process of the benchmark ended early, {how}: what it printed is above"
        )


def serve(facts: dict[str, Any], turn: Callable[[str], dict[str, Any]]) -> None:
    """The process's side: says that it is ready, then answers each line by `turn`.

    Answers go to the standard output that the process began with, whatever `sys.stdout` is by now.
    """
    print(json.dumps(facts), file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(line.strip())), file=sys.__stdout__, flush=True)


def torch_device() -> Any:
    """PyTorch's device for the other side of a comparison: the GPU where JAX has one, else CPU."""
    import torch

    both = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return torch.device("cuda" if both else "cpu")


def peak_resident_bytes() -> int:
    """Peak resident memory of this program (Linux; getrusage's would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def peak_bytes() -> int:
    """Peak memory of this process: of the GPU that JAX uses if there is one, else resident."""
    if jax.default_backend() != "gpu":
        return peak_resident_bytes()
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
