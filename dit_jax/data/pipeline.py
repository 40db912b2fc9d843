"""From a source to a stream of batches: shuffled, sharded, prefetched, resumable.

Grain shards the stream between processes, runs it in threads or worker processes and prefetches.
What it handles here are *batches*: the order of the examples and their randomness come from
counter-based generators, a batch at a time, since Grain's own per-example shuffling and mapping
cost about 50 microseconds an example, more than a small model's whole training step.

Batch k of the stream is a function of (source, batch_size, seed, k) only. (Of a source with buckets
it holds images of one of them: `dit_jax.data.buckets`.) So resuming at batch k
gives the same bits, and so does any number of workers or threads; with more processes, each
gets a stretch of the same global batch, so that the stream as a whole stays the same too.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Int64

from dit_jax.data.buckets import Turns
from dit_jax.data.labels import validate_labels
from dit_jax.data.source import Batch, Source
from dit_jax.data.transforms import epoch_order, random_words, to_float

# Where an endless stream ends: far beyond any training run, and within 64-bit indices.
_ENDLESS = 2**60


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    horizontal_flip: bool = False,
    num_workers: int = 0,
    num_threads: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    drop_remainder: bool = True,
) -> Loader:
    """Make the stream of batches that trains or evaluates a model.

    Args:
        source: Where examples come from.
        batch_size: Examples in a *global* batch. Each process gets batch_size / process_count of
            them, process p the p-th stretch.
        seed: Decides order and augmentation; 0 or positive.
        shuffle: Visit the examples in a new random order in each epoch.
        repeat: Go on for ever. Batches run across the ends of epochs, so none is short and every
            epoch visits every example exactly once.
        horizontal_flip: Mirror each image with probability 1/2.
        num_workers: Worker processes (worth their start-up for large images); 0 for none.
        num_threads: Threads that prefetch, each a batch of its own (in each worker if there are
            any); default: 1 for data in memory, otherwise one for each CPU, at most 8.
        process_index: Which process this is.
        process_count: How many processes share the stream.
        drop_remainder: Without `repeat`: leave out the last, short batch. If false, it is
            delivered (to each process its own stretch of it, perhaps of length 0, so that all
            processes make the same number of steps).

    Returns:
        An iterable of {"image": float32 [b, h, w, c] in [-1, 1] (or scaled latents),
        "conditions": {"label": int32 [b], ...}}, the latter as `DatasetInfo.conditions` names them.
        Its iterators have `get_state` and `set_state`.

    Raises:
        ValueError: batch_size does not divide among the processes or exceeds the data; the
            source cannot be mirrored; one with buckets is not repeated; an argument is out of its
            range.
    """
    _validate(batch_size, seed, num_workers, num_threads, process_index, process_count)
    if horizontal_flip:
        source.require_horizontal_flip()
    if not repeat and drop_remainder and batch_size > len(source):
        raise ValueError(
            f"batch_size={batch_size} leaves no complete batch in the {len(source)} examples of "
            f"{source.info.name}/{source.info.split}: lower it"
        )
    piece_size = batch_size // process_count
    num_positions = _ENDLESS if repeat else len(source)
    how = (source, piece_size, seed, shuffle, horizontal_flip, num_positions)
    reader = _BatchReader(*how)
    if source.info.buckets:
        if not repeat:
            raise ValueError(
                f"{source.info.name} has images of {len(source.info.buckets)} sizes, and a batch "
                "holds one: such a stream has no last batch (repeat=True)"
            )
        turns = Turns(tuple(bucket.count for bucket in source.info.buckets), seed, shuffle)
        reader = _BucketReader(*how, turns, process_count)
    if num_threads is None:
        num_threads = min(8, os.cpu_count() or 1) if source.slow_to_read else 1
    return Loader(
        reader, batch_size, drop_remainder, process_index, process_count, num_workers, num_threads
    )


@dataclass(frozen=True)
class Loader:
    """A stream of batches; see `make_loader`. Each `iter()` starts at its first batch."""

    reader: _BatchReader
    batch_size: int
    drop_remainder: bool
    process_index: int
    process_count: int
    num_workers: int
    num_threads: int

    @property
    def source(self) -> Source:
        """Where the examples come from."""
        return self.reader.source

    @property
    def steps_per_epoch(self) -> float:
        """Global batches in one pass over the source."""
        return len(self.source) / self.batch_size

    def __len__(self) -> int:
        """Number of batches; endless streams have no length.

        Raises:
            TypeError: The stream repeats for ever.
        """
        if self.reader.num_positions == _ENDLESS:
            raise TypeError("an endless stream (repeat=True) has no length")
        return self.num_batches

    @property
    def num_batches(self) -> int:
        """Number of batches until the stream ends (astronomical if it repeats)."""
        rounding = 0 if self.drop_remainder else self.batch_size - 1
        return (self.reader.num_positions + rounding) // self.batch_size

    def __iter__(self) -> BatchIterator:
        """Start at the first batch."""
        return BatchIterator(self)

    def grain_dataset(self, start: int) -> Any:
        """Return this process's batches from global batch `start` on, as a Grain dataset."""
        import grain

        pieces = grain.MapDataset.range(
            start * self.process_count, self.num_batches * self.process_count
        )
        batches = pieces[self.process_index :: self.process_count].map(self.reader)
        dataset = batches.to_iter_dataset(
            grain.ReadOptions(
                num_threads=self.num_threads,
                prefetch_buffer_size=self.num_threads + 1 if self.num_threads else 0,
            )
        )
        if self.num_workers:
            if not flags.FLAGS.is_parsed():
                # Grain's workers read absl flags; outside absl.app.run take their defaults.
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self.num_workers, per_worker_buffer_size=2
                ),
                worker_init_fn=_ignore_interrupts,
            )
        return dataset


def _ignore_interrupts(worker: int, num_workers: int) -> None:
    """Ctrl-C in a terminal reaches workers, too; the process that saves then still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class BatchIterator(Iterator[Batch]):
    """Iterates over a `Loader`, and can say where it is and go there."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self._next = 0
        self._iterator: Any = None

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            # Only now, so that `set_state` right after `iter` starts no workers in vain.
            self._iterator = iter(self._loader.grain_dataset(self._next))
        batch = next(self._iterator)
        self._next += 1
        return batch

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the batches to come, where they are of several; else ()."""
        return tuple(bucket.size for bucket in self._loader.source.info.buckets)

    def get_state(self) -> dict[str, Any]:
        """Return the position in the stream and what defines the stream, as a JSON-able dict.

        It does not depend on the numbers of processes, workers or threads: any process's state
        serves all, and a run may be resumed with other numbers of them.
        """
        reader, info = self._loader.reader, self._loader.source.info
        return {
            "next_batch": self._next,
            "batch_size": self._loader.batch_size,
            "seed": reader.seed,
            "shuffle": reader.shuffle,
            "repeat": reader.num_positions == _ENDLESS,
            "horizontal_flip": reader.horizontal_flip,
            "dataset": f"{info.name}/{info.split}",
            "num_examples": info.num_examples,
            "fingerprint": info.fingerprint,
        }

    def set_state(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Go to where `get_state` was called.

        Args:
            state: What `get_state` returned, perhaps in another process or run.
            strict: If false, accept the state of another stream (another batch size, say) and
                go to the batch at the same number of examples seen.

        Raises:
            ValueError: The state belongs to another stream; lists what differs.
        """
        mine = self.get_state()
        differing = [
            f"{key}: {state.get(key)!r} -> {mine[key]!r}"
            for key in mine
            if key != "next_batch" and state.get(key) != mine[key]
        ]
        if strict and differing:
            raise ValueError(
                f"the saved position belongs to another stream of data ({'; '.join(differing)}). "
                f"Continuing would not repeat the interrupted run: restore the former data and "
                f"settings, or go on with --force at the same number of examples "
                f"seen."
            )
        self.close()
        self._next = state["next_batch"] * state["batch_size"] // mine["batch_size"]

    def close(self) -> None:
        """Stop threads and workers. Iterating again restarts them at the same place."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


@dataclass(frozen=True)
class _BatchReader:
    """Maps the number of a piece (a process's part of a global batch) to its examples."""

    source: Source
    piece_size: int
    seed: int
    shuffle: bool
    horizontal_flip: bool
    num_positions: int

    def __call__(self, piece: int) -> Batch:
        start = piece * self.piece_size
        count = max(0, min(self.piece_size, self.num_positions - start))
        indices = self._indices(start, count)
        batch = self.source.batch(
            indices,
            draws=random_words(self.seed, start, count),
            horizontal_flip=self.horizontal_flip,
        )
        info, describe = self.source.info, self.source.describe
        if "label" in info.conditions:
            validate_labels(batch["label"], info.num_classes, describe, indices)
        if batch["image"].dtype == np.uint8:
            batch["image"] = to_float(batch["image"])
        rest = {name: value for name, value in batch.items() if name not in info.conditions}
        return {**rest, "conditions": {name: batch[name] for name in info.conditions}}

    def _indices(self, start: int, count: int) -> Int64[np.ndarray, " {count}"]:
        """Return which examples stand at positions start..start+count-1 of the stream."""
        return self._visited(start, count, len(self.source), 0)

    @property
    def streams(self) -> int:
        """How many orders of examples there are at a time."""
        return 1

    def _visited(
        self, start: int, count: int, length: int, stream: int
    ) -> Int64[np.ndarray, " {count}"]:
        """Return which of `length` things stand there in a stream of passes over them."""
        epochs, places = np.divmod(np.arange(start, start + count), length)
        if not self.shuffle:
            return places
        indices = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = _epoch_orders(self.streams)(self.seed, int(epoch), length, stream)
            indices[here] = order[places[here]]
        return indices


@dataclass(frozen=True)
class _BucketReader(_BatchReader):
    """Of a source with buckets: each bucket is a stream of its own, whose batches take turns."""

    turns: Turns
    num_pieces: int

    @property
    def streams(self) -> int:
        """One a bucket."""
        return len(self.turns.counts)

    def _indices(self, start: int, count: int) -> Int64[np.ndarray, " {count}"]:
        batch, part = divmod(start // self.piece_size, self.num_pieces)
        bucket, number = self.turns(batch)
        members = self.source.members(bucket)
        first = (number * self.num_pieces + part) * self.piece_size
        return members[self._visited(first, count, len(members), bucket + 1)]


@functools.cache
def _epoch_orders(streams: int) -> Callable[..., np.ndarray]:
    """`epoch_order` that remembers the last of so many streams.

    A few entries each: threads may straddle the end of an epoch while another loader runs.
    """
    return functools.lru_cache(maxsize=4 * streams)(epoch_order)


def _validate(
    batch_size: int,
    seed: int,
    num_workers: int,
    num_threads: int | None,
    process_index: int,
    process_count: int,
) -> None:
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} (the global batch) must be a positive multiple of "
            f"process_count={process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in 0..{process_count - 1}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be between 0 and 2**63 - 1")
    if num_workers < 0 or (num_threads is not None and num_threads < 0):
        raise ValueError(
            f"num_workers={num_workers} and num_threads={num_threads} must not be negative"
        )
