"""Several processes: starting them together, agreeing, and ending together."""

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that says nothing for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 30
# How long a process that failed waits for the others to tell their errors too, and how much longer
# the first one, in which the coordinator lives: the others are aborted where it is gone.
_PARTING_SECONDS = 5
_LAST_SECONDS = 2
# Of the error of one process that the others are told.
_MESSAGE_BYTES = 4096

T = TypeVar("T")


class DistributedError(RuntimeError):
    """Processes that could not start together, or do not belong together."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
) -> None:
    """Joins the other processes of a run; to be called before JAX is used.

    Without arguments SLURM, Open MPI and Kubernetes are asked (by JAX, from their environment).

    Args:
        coordinator_address: host:port of process 0.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        initialization_timeout: seconds in which all have to come.

    Raises:
        ValueError: some of the three are given and others not, or out of range.
        DistributedError: there is no such environment, or not all came.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(missing)} missing: give all of {', '.join(given)}, or --distributed "
            "alone where SLURM, Open MPI or Kubernetes tell them"
        )
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id}: expected 0 to {num_processes - 1}, as "
            f"--num_processes={num_processes}"
        )
    # On CPUs collectives between processes go through gloo; other backends ignore it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # SIGTERM is the training loop's: it saves, and all processes stop at the same step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        where = "" if missing else f" at {coordinator_address}"
        raise DistributedError(
            f"the processes could not start together{where}: {reason}\n"
            "Give --coordinator_address=HOST:PORT --num_processes=N --process_id=I to each, or run "
            "under SLURM, Open MPI or Kubernetes (pip install kubernetes)"
        ) from error


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def require_agreement(text: str, what: str) -> None:
    """Refuses to go on unless all processes have the same `text`.

    Raises:
        DistributedError: in all of them, with the hashes of all.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint8)
    digests = [bytes(d).hex() for d in np.asarray(multihost_utils.process_allgather(digest))]
    if len(set(digests)) > 1:
        listed = "\n".join(f"  process {i}: {d}" for i, d in enumerate(digests))
        raise DistributedError(
            f"the processes do not agree on {what}; hashes:\n{listed}\n"
            "Start all of them with the same command"
        )


def on_first(action: Callable[[], T]) -> T | None:
    """What `action()` returns in the first process, None in the others.

    Raises:
        Exception: what it raises there; in the others a DistributedError that quotes it.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    if is_first():
        try:
            result = action()
        except Exception as raised:
            error = raised
    text = repr(error) if error and not str(error) else str(error or "")
    sent = np.frombuffer(text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    received = bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).rstrip(b"\0")
    if error:
        raise error
    if received:
        raise DistributedError(f"process 0: {received.decode(errors='replace')}")
    return result


def from_first(number: int) -> int:
    """The first process's number, in all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def any_says(flag: bool) -> bool:
    """Whether any process says yes; all of them have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    multihost_utils.sync_global_devices(name)


def gathered(array: Any) -> np.ndarray:
    """The whole of an array, on every process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """One of several processes that fails says so and ends at once, and so the others do.

    Otherwise it would wait at its end for processes that wait for it.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        status = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        if status:
            print(
                f"process {jax.process_index()} of {jax.process_count()} ends because of the error "
                "above; the others will, too. The same command continues from the newest "
                "checkpoint",
                file=sys.stderr,
            )
            _part()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _part() -> None:
    # Errors that all have are told by all: the first to end takes the others with it. JAX has no
    # public barrier with a time limit.
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        from jax._src.distributed import global_state

        global_state.client.wait_at_barrier("ending", 1000 * _PARTING_SECONDS)
    if is_first():
        time.sleep(_LAST_SECONDS)
