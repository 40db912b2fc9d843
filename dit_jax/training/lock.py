"""One training at a time in a workdir, on one machine and on a file system that several share.

The lock is the file `.lock` in the workdir. Its holder keeps it under flock, which the system ends
with the process, however that ends; and writes into it who it is, and every few seconds that it is
still there. Where another machine cannot see the flock (some shared file systems keep it to
themselves), it watches those beats: they need no clock that both agree on.
"""

import contextlib
import dataclasses
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from dit_jax.training import workdir as workdir_lib
from dit_jax.training.workdir import WorkdirError

LOCK_FILE = ".lock"
BEAT_SECONDS = 5.0
# Without a beat for so long the holder on another machine is gone.
_SILENCE_SECONDS = 4 * BEAT_SECONDS
_SIZE = 1024  # bytes of the file, so that a beat replaces the one before it
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who has a lock.

    Attributes:
        host: name of its machine.
        pid: number of its process there.
        started: when the process started, in the system's own units; 0 where it does not say.
        machine: identity of the running system and its process numbers.
        since: when it took the lock, as people read it.
        token: different for every lock taken.
    """

    host: str
    pid: int
    started: int
    machine: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def _this_process() -> Holder:
    return Holder(
        socket.gethostname(),
        os.getpid(),
        _started(os.getpid()),
        _machine(),
        time.strftime("%Y-%m-%d %H:%M:%S %z"),
        uuid.uuid4().hex,
    )


def _started(pid: int) -> int:
    """When a process of this machine started, so that a number given again is not taken for it."""
    try:  # the name before it may have spaces and brackets
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # containers count processes anew
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _runs_here(holder: Holder) -> bool:
    """Whether a holder of this machine is a process that still runs."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return _started(holder.pid) == holder.started


class WorkdirLock:
    """The lock of a workdir, held from construction to `release`.

    Args:
        directory: an existing one.

    Raises:
        WorkdirError: another process has it, which is named.
        OSError: the file cannot be written.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._path = self.directory / LOCK_FILE
        self._holder = _this_process()
        self._file, flocked = self._open()
        try:
            self._require_free(flocked)
            self._write(beat=0)
            if not flocked:  # two may have found it free at the same moment: the last one has it
                time.sleep(1)
                if self._read()[0] != self._holder:
                    raise self._refusal()
        except BaseException:
            os.close(self._file)
            raise
        self._end, self._turn = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep_beating, name="lock", daemon=True)
        self._thread.start()

    def _open(self) -> tuple[int, bool]:
        """The open file and whether it is under flock."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                flocked = _flock(file)
            except BlockingIOError:
                error = self._refusal()
                os.close(file)
                raise error from None
            if _is_file(file, self._path):
                return file, flocked
            os.close(file)  # its holder removed it between our two calls

    def _require_free(self, flocked: bool) -> None:
        holder, beat = self._read()
        if holder is None:
            return
        if holder.machine == self._holder.machine:
            # Under flock the system has answered already.
            if not flocked and _runs_here(holder):
                raise self._refusal()
            return
        print(
            f"{self.directory} was last used by {holder}: looking whether it still is ...",
            flush=True,
        )
        silent_from = time.monotonic()
        while time.monotonic() - silent_from < _SILENCE_SECONDS:
            time.sleep(BEAT_SECONDS / 10)
            found = self._read()
            if found[0] is None:  # it ended
                return
            if found != (holder, beat):
                raise self._refusal()

    def _refusal(self) -> WorkdirError:
        holder, _ = self._read()
        who = f"by {holder}" if holder else "by another process"
        return WorkdirError(
            f"{self.directory} is in use {who}: wait for it to end, or choose another --workdir"
        )

    def _read(self) -> tuple[Holder | None, int]:
        """Who has it, and the number of its last beat; None for nobody."""
        try:
            # Opened anew: so shared file systems look at what others wrote.
            record = json.loads(self._path.read_text())
            return Holder(**record["holder"]), int(record["beat"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, 0

    def _write(self, beat: int) -> None:
        record = {"holder": dataclasses.asdict(self._holder), "beat": beat}
        os.pwrite(self._file, json.dumps(record).ljust(_SIZE).encode(), 0)
        os.fsync(self._file)

    def _keep_beating(self) -> None:
        beat = 0
        while not self._end.wait(BEAT_SECONDS):
            beat += 1
            # A full or absent disk is told where the run's own files are written.
            with contextlib.suppress(OSError), self._turn:
                if self.is_held():
                    self._write(beat)

    def is_held(self) -> bool:
        """Whether it is still this process's, and not removed or taken since."""
        return _is_file(self._file, self._path) and self._read()[0] == self._holder

    def retake(self) -> None:
        """Takes it again where its file was removed, as with the whole workdir.

        Raises:
            WorkdirError: another process was quicker.
        """
        with self._turn:
            if self.is_held():
                return
            if self._read()[0] is not None:
                raise self._refusal()
            if not _is_file(self._file, self._path):
                previous = self._file
                self._file, _ = self._open()
                os.close(previous)
            self._write(beat=0)

    def release(self) -> None:
        """Gives it back; the file is removed."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self.is_held():
                self._path.unlink()
        os.close(self._file)


def _flock(file: int) -> bool:
    """Locks an open file; False where its file system cannot.

    Raises:
        BlockingIOError: another has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return False
        raise
    return True


def _is_file(file: int, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


@contextlib.contextmanager
def held(directory: Path) -> Iterator[WorkdirLock]:
    """Holds the lock of a workdir, which is created if missing; if nothing was put in it, it goes.

    Raises:
        WorkdirError: it cannot be written, or another process has it.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    workdir_lib.require_writable(directory)
    lock = WorkdirLock(directory)
    try:
        yield lock
    finally:
        lock.release()
        for path in missing:
            with contextlib.suppress(OSError):  # not empty: a run's
                path.rmdir()
