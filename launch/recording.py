"""The one loop that computes records: latents of images, a teacher's samples.

Batch after batch is computed on all devices while the last one is written; ended at any moment, the
same command goes on and ends with the same bits. With several processes each computes its share of
every batch, and the first one writes.
"""

import argparse
import contextlib
import itertools
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax.data.records import Header, RecordWriter
from dit_jax.launch import arguments, command, wiring
from dit_jax.parallel import distributed
from dit_jax.quantities import counted, format_bytes
from dit_jax.training.interruption import Interruption
from dit_jax.training.metrics import format_duration

SECONDS_BETWEEN_REPORTS = 10.0


class StoppedError(Exception):
    """A signal ended the work, and what was computed is safe.

    Attributes:
        signal: Which one.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


def run_command(args: argparse.Namespace, work: Callable[[argparse.Namespace], None]) -> None:
    """Runs `work(args)`, alone or as one of several processes; stopped, exits with 128 + signal."""
    stopped = None
    with distributed.ending_together(), command.readable_errors(traceback=args.traceback):
        arguments.join_processes(args)
        try:
            work(args)
        except StoppedError as error:
            stopped = error.signal
    if stopped is not None:
        sys.exit(128 + stopped)


def record(
    folder: Path,
    header: Header,
    batches: Callable[[int], Iterator[Any]],
    compute: Callable[[Any], dict[str, jax.Array]],
    *,
    what: str,
    done: str,
    unit: str,
    total: int,
    batch_size: int,
    counts: Sequence[int] = (),
    nulls: Mapping[str, np.ndarray] | None = None,
    remedy: str = "give another --out",
) -> Header:
    """Computes and writes what a folder of records lacks.

    Args:
        folder: where the records go.
        header: what they will be.
        batches: (number of the first record wanted) -> what `compute` makes records of, batch after
            batch; every process its own share of each.
        compute: starts one batch on the devices: fields by name, `batch_size` records, the last
            ones of the last batch fillings.
        what: is done, for the first screen.
        done: to a record, for the lines of progress: "encoded".
        unit: a record: "image".
        total: records in all.
        batch_size: records a call of `compute`, over all processes.
        counts: records of each batch without fillings; () where only the last batch has any.
        nulls: "no condition" of the fields that need to be told.
        remedy: for a disk without the room.

    Returns:
        The header of the finished set.

    Raises:
        StoppedError: a signal came; the same command goes on.
        FileExistsError: the folder holds a finished set or other things.
        ValueError: it was begun with other settings.
        OSError: the disk has no room for them.
    """
    distributed.require_agreement(header.to_json(), "what to write")
    writer = distributed.on_first(lambda: RecordWriter(folder, header, nulls=nulls))
    begun = distributed.from_first(writer.count if writer else 0)
    counts = list(counts) or [min(batch_size, total - n) for n in range(0, total, batch_size)]
    ends = [0, *itertools.accumulate(counts)]
    if begun not in ends:
        raise ValueError(
            f"{folder} has {counted(begun, unit)} already, written for another number of them than "
            f"{total}: ask for that, or give another --out"
        )
    distributed.on_first(lambda: require_space(folder, header, total - begun, unit, remedy))
    tell = _Teller(done, unit, begun, total)
    tell.line(wiring.first_screen(what, folder, "time left: every 10 seconds"))
    if begun:
        tell.line(f"continuing after {counted(begun, unit)}")
    number, pending, done_batches = begun, None, ends.index(begun)

    def store() -> int:
        """Writes the pending batch; the number of records there are then."""
        nonlocal done_batches
        count = counts[done_batches]
        done_batches += 1
        arrays = {name: distributed.gathered(array) for name, array in pending.items()}
        if writer:
            writer.add(**{name: array[:count] for name, array in arrays.items()})
        return number + count

    with contextlib.ExitStack() as stack, contextlib.closing(batches(begun)) as inputs:
        interruption = Interruption("batch")
        for given in inputs:
            computed = compute(given)
            if pending is None:  # until now there was nothing to save
                stack.enter_context(interruption)
            else:
                number = store()
                tell.progress(number)
            pending = computed
            if distributed.any_says(interruption.signal is not None):
                break
        if pending is not None:
            number = store()
        if number < total:
            distributed.on_first(lambda: writer.save())
            tell.line(f"saved {number}/{total} in {folder}; the same command goes on")
            raise StoppedError(interruption.signal or signal.SIGTERM)
    tell.end()
    finished = distributed.on_first(lambda: writer.finish())
    return finished if finished else header


def require_space(folder: Path, header: Header, missing: int, unit: str, remedy: str) -> None:
    """Refuses a disk that so many more records do not fit.

    Raises:
        OSError: how much there is, and how much is needed.
    """
    wanted, free = missing * header.record_bytes, shutil.disk_usage(folder).free
    if wanted > free:
        raise OSError(
            f"{folder} has {format_bytes(free)} free; {counted(missing, unit)} need "
            f"{format_bytes(wanted)} ({remedy})"
        )


class _Teller:
    """Progress for the person watching, from the first process."""

    def __init__(self, done: str, unit: str, first: int, total: int):
        self._done, self._unit, self._first, self._total = done, unit, first, total
        self._begun = self._reported = time.perf_counter()
        self._tells = distributed.is_first()

    def line(self, text: str) -> None:
        if self._tells:
            print(text, flush=True)

    def progress(self, number: int) -> None:
        now = time.perf_counter()
        if now - self._reported >= SECONDS_BETWEEN_REPORTS:
            rate = self._rate(number)
            left = format_duration((self._total - number) / rate)
            self.line(f"{self._so_far(number)}  {rate:.4g} {self._unit}s/s  ETA {left}")
            self._reported = now

    def end(self) -> None:
        rate = self._rate(self._total)
        self.line(f"{self._so_far(self._total)}  {rate:.4g} {self._unit}s/s")

    def _so_far(self, number: int) -> str:
        return f"{self._done} {number}/{self._total}"

    def _rate(self, number: int) -> float:
        return (number - self._first) / (time.perf_counter() - self._begun)
