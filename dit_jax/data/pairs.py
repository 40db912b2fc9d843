"""What a teacher makes of given noise, for distillation: records of the kind "pairs".

Fields `noise` [h, w, c], standard normal; `x0` [h, w, c], where the teacher's sampler ended; `path`
[k, h, w, c], states at path_times[1:], if there are any; and the conditions that the teacher was
told. The noise itself is stored, not only its seed: what a key gives may differ between versions
and devices. The sampler started at path_times[0] from start_scale * noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from dit_jax.data.record_source import RecordSource
from dit_jax.data.records import Field, Header, Records, open_records
from dit_jax.data.records.header import HEADER, LABEL
from dit_jax.data.source import Batch
from dit_jax.options import option
from dit_jax.untrusted import Fields, FileRefusedError

KIND = "pairs"
_MAX_TIMES = 10_000


@dataclass(frozen=True)
class Teaching:
    """How a set of pairs was made: the provenance in its header.

    Attributes:
        teacher_source: Where the teacher's parameters were from, for people.
        teacher_hash: Hash of its parameters.
        process: The process's name and options, {"name": "edm", "sigma_data": 0.5, ...}.
        sampling: How the teacher was sampled: solver with its options, steps, guidance, ...
        times: The solver's times, of the process, from noise to clean.
        path_times: Times of which states are stored, from noise; the first is times[0], whose state
            is start_scale * noise.
        start_scale: Standard deviation of the state at times[0].
        seed: Example i depends on it, i and its conditions only.
        batch_size: Examples the teacher sampled at once; rounding depends on it.
        conditions: Fingerprint of the records of what the teacher was told; "" for its classes in
            turn.
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
    conditions: str = ""

    def __post_init__(self) -> None:
        """Refuse times that contradict each other."""
        for name in ("times", "path_times"):
            if not 1 <= len(getattr(self, name)) <= _MAX_TIMES:
                raise ValueError(f"{len(getattr(self, name))} {name}; expected 1 to {_MAX_TIMES}")
        if self.path_times[0] != self.times[0]:
            raise ValueError(
                f"path_times of pairs must begin with the solver's first time, {self.times[0]}; "
                f"they are {list(self.path_times)}"
            )
        positions_of(self.times, self.path_times)

    @classmethod
    def parse(cls, header: Header, where: str) -> Teaching:
        """The provenance in a header.

        Raises:
            FileRefusedError: It is not of pairs.
        """
        fields = Fields(header.provenance, f"{where}: provenance")
        fields.check_names([field.name for field in dataclasses.fields(cls)])
        try:
            teaching = cls(
                teacher_source=fields.text("teacher_source"),
                teacher_hash=fields.text("teacher_hash"),
                process=fields.mapping("process"),
                sampling=fields.mapping("sampling"),
                times=fields.numbers("times"),
                path_times=fields.numbers("path_times"),
                start_scale=fields.number("start_scale"),
                seed=fields.count("seed", 0, 2**64),
                batch_size=fields.count("batch_size", 1),
                conditions=fields.text("conditions"),
            )
        except FileRefusedError:
            raise
        except ValueError as error:
            raise FileRefusedError(f"{where}: {error}") from None
        image, states = header.fields["x0"].shape, len(teaching.path_times) - 1
        arrays = {"noise": image, "x0": image} | ({"path": (states, *image)} if states else {})
        found = {name: f.shape for name, f in header.fields.items() if not f.condition}
        if found != arrays:
            raise FileRefusedError(f"{where}: pairs of fields {found}, expected {arrays}")
        return teaching


def pairs_header(
    sample_shape: tuple[int, int, int],
    teaching: Teaching,
    *,
    dtype: str = "float32",
    conditions: Mapping[str, Field] | None = None,
    **others: Any,
) -> Header:
    """The header of a set of pairs.

    Args:
        sample_shape: (height, width, channels).
        teaching: How they are made.
        dtype: Of noise, states and samples: "float32" or "float16".
        conditions: Fields that the teacher is told; default: a class, "label".
        **others: Of `Header`: num_classes, shard_size.

    Raises:
        ValueError: A value that the format does not have.
    """
    fields = {"noise": Field(sample_shape, dtype), "x0": Field(sample_shape, dtype)}
    if states := len(teaching.path_times) - 1:
        fields["path"] = Field((states, *sample_shape), dtype)
    fields |= {"label": LABEL} if conditions is None else conditions
    return Header(KIND, fields, dataclasses.asdict(teaching), **others)


def positions_of(stored: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...]:
    """Places of times among others, up to rounding.

    Raises:
        ValueError: One is not among them.
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


@dataclasses.dataclass(frozen=True)
class PairsOptions:
    """Keys of config.data.pairs."""

    path: str = option(
        "",
        "noise and a teacher's samples, of launch/write_pairs.py",
        expected="PAIRS, which a trained teacher fills: python launch/write_pairs.py "
        "--workdir=RUN --num_pairs=50000 --out=PAIRS",
    )


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
    records = open_records(
        path,
        KIND,
        "noise",
        "x0",
        how="A trained teacher writes them: python launch/write_pairs.py --workdir=TEACHER "
        f"--num_pairs=20000 --out={path}",
        command="write the pairs again",
        verify_checksums=verify_checksums,
    )
    folder = records.folder
    teaching = Teaching.parse(records.header, str(folder / HEADER))
    # An option that the header does not know of came later, and was not in effect then.
    differing = [
        f"{name}: {value!r} -> {process.get(name)!r}"
        for name, value in teaching.process.items()
        if process is not None and process.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"the pairs in {folder} are of another process than the student's "
            f"({'; '.join(differing)})"
        )
    try:
        positions = positions_of(teaching.path_times, times)
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}, but the student's steps start at "
            f"{', '.join(f'{time:g}' for time in times)}. Write pairs with --path_times, or set "
            "config.sampling.times to stored times, the clean time last"
        ) from error
    return Pairs(records, teaching, positions)


class Pairs(RecordSource):
    """See `open_pairs`.

    Batches are {"image": the teacher's sample, the conditions by name, and "noise" [b, h, w, c] or,
    for several steps, "path" [b, steps, h, w, c]}.

    Attributes:
        teaching: How the pairs were made.
    """

    def __init__(self, records: Records, teaching: Teaching, positions: tuple[int, ...] = ()):
        super().__init__(records, "x0", positions)
        self.teaching, self._positions = teaching, positions

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
        made_by = self.teaching
        if weights_hash != made_by.teacher_hash:
            raise ValueError(
                f"the pairs in {self.records.folder} were made by {made_by.teacher_source} with "
                f"the weights {made_by.teacher_hash}; the teacher {source} has the weights "
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
        read = self.records.read
        batch = {"image": read("x0", indices), **self.conditions(indices)}
        if len(self._positions) < 2:
            return {**batch, "noise": read("noise", indices)}
        states = np.float32(self.teaching.start_scale) * read("noise", indices)[:, None]
        if "path" in self.header.fields:
            states = np.concatenate([states, read("path", indices)], axis=1)
        return {**batch, "path": states[:, self._positions]}
