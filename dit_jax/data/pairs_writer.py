"""Writing a set of pairs (format: `dit_jax.data.pairs`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer

from dit_jax.data.pairs import PairsHeader, PairsShard
from dit_jax.data.shards import HEADER, UNFINISHED, save_array, save_text
from dit_jax.data.source import validate_labels


class PairsWriter:
    """Writes a folder of pairs, shard by shard; survives being killed.

    After a kill, a new writer says in `count` how many examples are safely on disk: continue with
    the next one. If shards hold whole batches of the sampler, the files are then the same, bit for
    bit, as without the interruption.

    Args:
        folder: The set's; made if it is not there.
        header: What the pairs will be; its count and shards are ignored.
        shard_size: Examples a shard.

    Attributes:
        count: Examples in the shards on disk.

    Raises:
        FileExistsError: The folder holds a finished set, or other files.
        ValueError: An unfinished set was begun with another header; lists what differs.
    """

    def __init__(self, folder: str | Path, header: PairsHeader, *, shard_size: int = 4096):
        if shard_size < 1:
            raise ValueError(f"shard_size must be a positive number of pairs, not {shard_size}")
        self._folder, self._shard_size = Path(folder), shard_size
        self._header = dataclasses.replace(header, count=0, shards=())
        self._rows: list[dict[str, np.ndarray]] = []
        check_destination(self._folder)
        unfinished = self._folder / UNFINISHED
        if unfinished.exists():
            self._header = _continued(unfinished, self._header)
        self._folder.mkdir(parents=True, exist_ok=True)
        save_text(unfinished, self._header.to_json())

    @property
    def count(self) -> int:
        """Number of examples in the shards on disk."""
        return self._header.count

    def add(
        self,
        noise: Float[np.ndarray, "b h w c"],
        x0: Float[np.ndarray, "b h w c"],
        labels: Integer[np.ndarray, " b"],
        path: Float[np.ndarray, "b k h w c"] | None = None,
    ) -> None:
        """Append examples; they reach the disk when a shard is full, or at `finish`.

        Args:
            noise: Standard normal noise the sampler started from (before start_scale).
            x0: Where it ended.
            labels: Class indices.
            path: States at header.path_times[1:], if there are any.

        Raises:
            ValueError: A wrong shape, a value that is not finite in the header's dtype, or a label
                out of range.
        """
        given = {"noise": noise, "x0": x0, "labels": labels}
        given |= {} if path is None else {"path": path}
        expected = self._header.arrays(len(labels))
        shapes = {name: array.shape for name, array in given.items()}
        wanted = {name: shape for name, (shape, _) in expected.items()}
        if shapes != wanted:
            raise ValueError(f"pairs have shapes {shapes}, expected {wanted}")
        first = self.count + sum(len(rows["labels"]) for rows in self._rows)
        validate_labels(labels, self._header.num_classes, lambda row: f"pair {first + row}")
        with np.errstate(over="ignore"):
            rows = {name: given[name].astype(dtype) for name, (_, dtype) in expected.items()}
        for name, array in rows.items():
            finite = np.isfinite(array).reshape(len(labels), -1).all(axis=1)
            if not finite.all():
                raise ValueError(
                    f"{name} of pair {first + int(np.argmin(finite))} is not finite in "
                    f"{self._header.dtype}: check the teacher, or store float32"
                )
        self._rows.append(rows)
        while sum(len(rows["labels"]) for rows in self._rows) >= self._shard_size:
            self._flush()

    def finish(self) -> PairsHeader:
        """Write what remains, then the header.

        Returns:
            The header of the finished set.

        Raises:
            ValueError: Nothing was added.
        """
        self._flush()
        if not self._header.count:
            raise ValueError(f"no pairs were added to {self._folder}")
        save_text(self._folder / HEADER, self._header.to_json())
        (self._folder / UNFINISHED).unlink()
        return self._header

    def _flush(self) -> None:
        """Write up to a shard's size of the waiting examples as one shard."""
        if not self._rows:
            return
        waiting = {
            name: np.concatenate([rows[name] for rows in self._rows]) for name in self._rows[0]
        }
        size = self._shard_size
        self._rows = [{name: rows[size:] for name, rows in waiting.items()}]
        count = len(waiting["labels"][:size])
        if not count:
            return
        stem = f"shard-{len(self._header.shards):05d}"
        files = {
            name: save_array(self._folder, f"{stem}.{name}.npy", rows[:size])
            for name, rows in waiting.items()
        }
        self._header = dataclasses.replace(
            self._header,
            count=self._header.count + count,
            shards=(*self._header.shards, PairsShard(count, **files)),
        )
        save_text(self._folder / UNFINISHED, self._header.to_json())


def check_destination(folder: Path) -> None:
    """Refuses a folder that a set of pairs cannot be written to.

    Raises:
        FileExistsError: A finished set or other files are there.
    """
    if (folder / HEADER).exists():
        raise FileExistsError(
            f"{folder} holds a finished set of pairs: delete it or choose another folder"
        )
    if not folder.exists() or (folder / UNFINISHED).exists():
        return
    # A program killed right at its start leaves nothing else than a temporary file.
    if not folder.is_dir() or any(file.suffix != ".tmp" for file in folder.iterdir()):
        raise FileExistsError(f"{folder} exists and holds other things: choose another folder")


def _continued(unfinished: Path, header: PairsHeader) -> PairsHeader:
    """Return the header of an unfinished set after comparing it with the one asked for."""
    found = PairsHeader.from_file(unfinished)
    begun = dataclasses.asdict(dataclasses.replace(found, count=0, shards=()))
    # As it was written: JSON knows lists only.
    begun, asked = (json.loads(json.dumps(h)) for h in (begun, dataclasses.asdict(header)))
    differing = [
        f"{name}: {begun[name]!r} -> {asked[name]!r}"
        for name in asked
        if begun[name] != asked[name]
    ]
    if differing:
        raise ValueError(
            f"{unfinished.parent} was begun with other settings ({'; '.join(differing)}): use "
            "those, or another folder"
        )
    return found
