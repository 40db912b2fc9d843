"""What a teacher makes of given noise: pairs and trajectories for distillation, on disk.

A set of pairs is a folder:

    header.json               `PairsHeader`: teacher, sampling, times, and the list of shards
    shard-00000.noise.npy     [count, h, w, c], float32 or float16: standard normal
    shard-00000.x0.npy        [count, h, w, c], where the teacher's sampler ended
    shard-00000.labels.npy    [count], int32
    shard-00000.path.npy      [count, k, h, w, c], states at path_times[1:], if there are any
    shard-00001.noise.npy     ...

The noise itself is stored, not only its seed: what a key gives may differ between versions and
devices. The sampler started at path_times[0] from start_scale * noise. Plain .npy files are
memory-mapped, so that an example read at random costs a few page faults and no parsing.

header.json is written last: a folder without it is unfinished (`dit_jax.data.pairs_writer`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from dit_jax.data.shards import (
    HEADER,
    MAX_CLASSES,
    MAX_EXAMPLES,
    MAX_SIDE,
    UNFINISHED,
    StoredFile,
    check_sizes,
    read_header,
    read_stored_file,
    validate_file,
)
from dit_jax.data.source import Batch, DatasetInfo, Example, Source, fingerprint, validate_labels
from dit_jax.untrusted import Fields, map_array

FORMAT, VERSION = "dit_jax.pairs", 1
REMEDY = "write the pairs again"
_MAX_TIMES = 10_000


@dataclass(frozen=True)
class PairsShard:
    """Number of examples and files of one shard; `path` is None where no states are stored."""

    count: int
    noise: StoredFile
    x0: StoredFile
    labels: StoredFile
    path: StoredFile | None = None


@dataclass(frozen=True)
class PairsHeader:
    """What header.json says.

    Attributes:
        teacher_source: Where the teacher's parameters were from, for people.
        teacher_hash: Hash of its parameters.
        process: The process's name and options, {"name": "edm", "sigma_data": 0.5, ...}.
        sampling: How the teacher was sampled: solver with its options, steps, guidance, ...
        times: The solver's times, of the process, from noise to clean.
        path_times: Times of which states are stored, from noise; the first is times[0], whose state
            is start_scale * noise.
        start_scale: Standard deviation of the state at times[0].
        seed: Example i depends on it, i and its label only.
        batch_size: Examples the teacher sampled at once; rounding depends on it.
        sample_shape: (height, width, channels).
        num_classes: Labels lie in 0..num_classes-1; 0 for an unconditional teacher.
        dtype: Of noise, states and samples: "float32" or "float16".
        count: Number of examples.
        shards: The files.
    """

    teacher_source: str
    teacher_hash: str
    process: Mapping[str, Any]
    sampling: Mapping[str, Any]
    times: tuple[float, ...]
    path_times: tuple[float, ...]
    start_scale: float
    seed: int
    batch_size: int
    sample_shape: tuple[int, int, int]
    num_classes: int
    dtype: str = "float32"
    count: int = 0
    shards: tuple[PairsShard, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values the format does not have."""
        if self.dtype not in ("float16", "float32"):
            raise ValueError(
                f"pairs header: dtype must be 'float16' or 'float32', not {self.dtype!r}"
            )
        if len(self.sample_shape) != 3 or min(self.sample_shape) < 1:
            raise ValueError(
                "pairs header: sample_shape must be (height, width, channels), not "
                f"{self.sample_shape}"
            )
        if not self.path_times or self.path_times[0] != self.times[0]:
            raise ValueError(
                f"pairs header: path_times must begin with the solver's first time, "
                f"{self.times[0]}; they are {list(self.path_times)}"
            )
        positions_of(self.times, self.path_times)

    def arrays(self, count: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of every array of a shard of `count` examples."""
        shape, dtype = self.sample_shape, np.dtype(self.dtype)
        arrays = {
            "noise": ((count, *shape), dtype),
            "x0": ((count, *shape), dtype),
            "labels": ((count,), np.dtype(np.int32)),
        }
        states = len(self.path_times) - 1
        return arrays | ({"path": ((count, states, *shape), dtype)} if states else {})

    def to_json(self) -> str:
        """Write the header as the text of header.json."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> PairsHeader:
        """Read header.json.

        Raises:
            ValueError: Not such a file, of another version, or with missing or unknown fields.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        fields = read_header(path, names, FORMAT, VERSION)
        times = {name: fields.numbers(name) for name in ("times", "path_times")}
        for name, values in times.items():
            if not 1 <= len(values) <= _MAX_TIMES:
                raise ValueError(f"{path}: {len(values)} {name}; expected 1 to {_MAX_TIMES}")
        states = len(times["path_times"]) > 1
        header = cls(
            **{name: fields.text(name) for name in ("teacher_source", "teacher_hash", "dtype")},
            process=fields.mapping("process"),
            sampling=fields.mapping("sampling"),
            **times,
            start_scale=fields.number("start_scale"),
            seed=fields.count("seed", 0, 2**64),
            batch_size=fields.count("batch_size", 1),
            sample_shape=fields.counts("sample_shape", 3, 1, MAX_SIDE),
            num_classes=fields.count("num_classes", 0, MAX_CLASSES),
            count=fields.count("count", 0, MAX_EXAMPLES),
            shards=tuple(_read_shard(shard, states) for shard in fields.objects("shards")),
        )
        record = (max(1, len(header.path_times) - 1), *header.sample_shape)
        check_sizes(path, "pairs", record, [shard.count for shard in header.shards], header.count)
        return header


def _read_shard(fields: Fields, states: bool) -> PairsShard:
    names = ("noise", "x0", "labels", *(("path",) if states else ()))
    files = [fields.object(name) for name in names]
    return PairsShard(
        fields.count("count", 1, MAX_EXAMPLES),
        *(read_stored_file(file, "name", "bytes", "sha256") for file in files),
    )


def positions_of(stored: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...]:
    """Where `wanted` times stand among `stored` ones, equal up to rounding (1e-4 relative).

    Raises:
        ValueError: One is not there; lists those that are.
    """
    stored_times = np.asarray(stored, np.float64)
    found = []
    for time in wanted:
        equal = np.isclose(stored_times, time, rtol=1e-4, atol=1e-6)
        if not equal.any():
            raise ValueError(
                f"time {time:g} is not among the stored times "
                f"{', '.join(f'{stored_time:g}' for stored_time in stored_times)}"
            )
        found.append(int(np.argmax(equal)))
    return tuple(found)


def open_pairs(
    split: str,
    *,
    path: str,
    times: Sequence[float] = (),
    process: Mapping[str, Any] | None = None,
    verify_checksums: bool = False,
) -> Pairs:
    """Open a set of pairs.

    Args:
        split: "train"; there is no other.
        path: The folder.
        times: The times of a student's steps, of the process, the clean end left out. With several,
            batches have "path", the states at these times; else "noise" alone.
        process: Name and options of the student's process, compared with the teacher's.
        verify_checksums: Read all files once and compare their SHA-256 with the header's.

    Raises:
        FileNotFoundError: No pairs there, or an unfinished set.
        ValueError: Another split than "train"; a file is truncated or damaged; states of one of
            `times` are not stored; the teacher's process is another.
    """
    if split != "train":
        raise ValueError(f"pairs have the split 'train' only, not {split!r}: a teacher made them")
    folder = Path(path).expanduser()
    if not (folder / HEADER).is_file():
        if (folder / UNFINISHED).is_file():
            partial = PairsHeader.from_file(folder / UNFINISHED)
            raise FileNotFoundError(
                f"the set of pairs in {folder} is unfinished ({partial.count} so far): run "
                "launch/write_pairs.py again, it continues where it stopped"
            )
        raise FileNotFoundError(
            f"no pairs in {path}: {HEADER} is missing. A trained teacher writes them: python "
            f"launch/write_pairs.py --workdir=TEACHER --num_pairs=20000 --out={path}"
        )
    header = PairsHeader.from_file(folder / HEADER)
    # An option that the header does not know of came later, and was not in effect then.
    differing = [
        f"{name}: {value!r} -> {process.get(name)!r}"
        for name, value in header.process.items()
        if process is not None and process.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"the pairs in {folder} are of another process than the student's "
            f"({'; '.join(differing)})"
        )
    try:
        positions = positions_of(header.path_times, times)
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}, but the student's steps start at "
            f"{', '.join(f'{time:g}' for time in times)}. Write pairs with --path_times, or set "
            "config.sampling.times to stored times, the clean time last"
        ) from error
    for shard in header.shards:
        for name, (shape, dtype) in header.arrays(shard.count).items():
            stored = getattr(shard, name)
            validate_file(folder, stored, shape, dtype, remedy=REMEDY, checksum=verify_checksums)
    return Pairs(folder, header, positions)


class Pairs(Source):
    """See `open_pairs`. Shards are memory-mapped when first read.

    Batches are {"image": the teacher's sample, "label", and "noise" [b, h, w, c] or, for several
    steps, "path" [b, steps, h, w, c]}.

    Attributes:
        header: What the pairs are.
    """

    slow_to_read = True

    def __init__(self, folder: Path, header: PairsHeader, positions: tuple[int, ...] = ()):
        self.header = header
        self._folder, self._positions = folder, positions
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        counts = [shard.count for shard in header.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._labels = np.concatenate(
            [map_array(folder / shard.labels.name) for shard in header.shards]
        )
        validate_labels(self._labels, header.num_classes, self.describe)
        self.info = DatasetInfo(
            name=f"pairs/{folder.name}",
            split="train",
            image_shape=header.sample_shape,
            num_classes=header.num_classes,
            num_examples=header.count,
            class_names=(),
            # The header holds the hash of every file.
            fingerprint=fingerprint("pairs", header.to_json(), positions),
        )

    def __getstate__(self) -> dict:
        """Leave the memory maps behind: a pickled map is a copy of the data."""
        return {**self.__dict__, "_maps": {}}

    def __getitem__(self, index: int) -> Example:
        """Return the teacher's sample number `index` and its label."""
        shard, offset = self._locate(np.array([index]))
        image = self._map(int(shard[0]), "x0")[offset[0]].astype(np.float32)
        return {"image": image, "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        """Name an example by its folder and position."""
        return f"pair {index} of {self._folder}"

    def require_horizontal_flip(self) -> None:
        """Raise a ValueError: a mirrored sample is not what the teacher makes of mirrored noise."""
        raise ValueError(
            "pairs cannot be mirrored: the teacher does not make the mirror image of mirrored "
            "noise. Set config.data.horizontal_flip=False"
        )

    def require_teacher(self, weights_hash: str, source: str) -> None:
        """Refuses another teacher than the one that made the pairs.

        Args:
            weights_hash: Of the teacher's parameters.
            source: Where they are from, for the message.

        Raises:
            ValueError: The hashes differ; gives both.
        """
        if weights_hash != self.header.teacher_hash:
            raise ValueError(
                f"the pairs in {self._folder} were made by {self.header.teacher_source} with the "
                f"weights {self.header.teacher_hash}; the teacher {source} has the weights "
                f"{weights_hash}. Write its own pairs (launch/write_pairs.py), or set "
                "config.teacher.path and config.teacher.weights to the teacher that made these"
            )

    def batch(
        self,
        indices: Int[np.ndarray, " b"],
        *,
        draws: UInt64[np.ndarray, " b"] | None = None,
        horizontal_flip: bool = False,
    ) -> Batch:
        """Read several examples; see the class and `Source.batch`."""
        if horizontal_flip:
            self.require_horizontal_flip()
        batch = {"image": self._read("x0", indices), "label": self._labels[indices]}
        if len(self._positions) < 2:
            return {**batch, "noise": self._read("noise", indices)}
        start = np.float32(self.header.start_scale) * self._read("noise", indices)[:, None]
        states = start
        if "path" in self.header.arrays(0):
            states = np.concatenate([start, self._read("path", indices)], axis=1)
        return {**batch, "path": states[:, self._positions]}

    def _locate(self, indices: Int[np.ndarray, " b"]) -> tuple[np.ndarray, np.ndarray]:
        """Shard and place in it of every index."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return shards, indices - self._starts[shards]

    def _read(self, name: str, indices: Int[np.ndarray, " b"]) -> np.ndarray:
        """Rows of one of a shard's arrays, float32."""
        shape = self.header.arrays(len(indices))[name][0]
        rows = np.empty(shape, np.float32)
        for row, (shard, offset) in enumerate(zip(*self._locate(indices), strict=True)):
            rows[row] = self._map(int(shard), name)[offset]
        return rows

    def _map(self, shard: int, name: str) -> np.ndarray:
        if (shard, name) not in self._maps:
            file = getattr(self.header.shards[shard], name).name
            self._maps[shard, name] = map_array(self._folder / file)
        return self._maps[shard, name]
