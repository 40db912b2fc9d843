"""Reading records: the folder is checked at the door, its arrays are memory-mapped."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt64

from dit_jax.data.labels import validate_labels
from dit_jax.data.records import version0
from dit_jax.data.records.header import (
    DTYPES,
    FORMAT,
    HEADER,
    UNFINISHED,
    VERSION,
    Field,
    Header,
    StoredFile,
    parse_header,
)
from dit_jax.untrusted import (
    Fields,
    FileRefusedError,
    check_file_name,
    check_regular,
    check_within,
    map_array,
    parse_json,
    read_json_text,
    shown,
)

_MAX_NPY_HEADER = 2**14


def open_records(
    path: str | Path,
    kind: str,
    *fields: str,
    how: str,
    command: str,
    split: str = "train",
    verify_checksums: bool = False,
) -> Records:
    """Opens a folder of records, of this version or the one before, after checking all its files.

    Args:
        path: The folder, or one with such a folder for each split.
        kind: What the records have to be, as "latents".
        *fields: Fields that they have to have.
        how: How such records are made, for the message where there are none.
        command: What to do where a set is unfinished or damaged, as "extract the latents again".
        split: "train" or "test".
        verify_checksums: Read all files once and compare their SHA-256 with the header's.

    Raises:
        FileNotFoundError: There are none, or they are unfinished.
        ValueError: They are others, or a file is truncated, damaged or something else.
    """
    folder = Path(path).expanduser()
    if not (folder / HEADER).exists() and (folder / split).is_dir():
        folder = folder / split
    if not (folder / HEADER).exists():
        if (folder / UNFINISHED).is_file():
            count = read_header(folder / UNFINISHED)[0].count
            raise FileNotFoundError(
                f"the set of {kind} in {folder} is unfinished ({count} so far): run the command "
                "that writes it again, it continues where it stopped"
            )
        raise FileNotFoundError(
            f"no {kind} for split {split!r} in {path}: {HEADER} is missing. {how}"
        )
    header, text = read_header(folder / HEADER)
    if header.kind != kind:
        raise ValueError(f"{folder} holds {header.kind}, not {kind}")
    if header.split != split:
        raise ValueError(f"the {kind} in {folder} are of split {header.split!r}, not {split!r}")
    missing = [name for name in fields if name not in header.fields]
    if missing:
        raise ValueError(f"the {kind} in {folder} have no field {', '.join(missing)}. {how}")
    for number, shard in enumerate(header.shards):
        for name, field in header.fields.items():
            shape = (shard.count, *field.stored_shape(header.shape_of(name, number)))
            check_file(folder, shard.files[name], shape, field, command, verify_checksums)
    for name, null in header.nulls.items():
        check_file(folder, null.file, null.shape, header.fields[name], command, verify_checksums)
    return Records(folder, header, text)


class Records:
    """Random access to the fields of records. Read by several threads at once; cheap to pickle.

    Attributes:
        folder: Where they are.
        header: What they are.
        text: The header as it is in the file, which holds the hash of every other file.
    """

    def __init__(self, folder: Path, header: Header, text: str):
        self.folder, self.header, self.text = folder, header, text
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        counts = [shard.count for shard in header.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.labels = self._labels() if "label" in header.fields else None

    def _labels(self) -> np.ndarray:
        found = [self._map(shard, "label") for shard in range(len(self.header.shards))]
        labels = np.concatenate(found) if found else np.zeros(0, np.int32)
        validate_labels(labels, self.header.num_classes, self.describe)
        return labels

    def __len__(self) -> int:
        """Number of records."""
        return self.header.count

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the memory maps behind: a pickled map is a copy of the data."""
        return {**self.__dict__, "_maps": {}}

    def describe(self, index: int) -> str:
        """Names a record by its folder and position."""
        return f"{self.header.kind.removesuffix('s')} {index} of {self.folder}"

    def shapes(self, name: str) -> dict[tuple[int, ...], Int[np.ndarray, " n"]]:
        """The records of every shape that a field has, by their numbers."""
        found: dict[tuple[int, ...], list[np.ndarray]] = {}
        for shard in range(len(self.header.shards)):
            numbers = np.arange(self._starts[shard], self._starts[shard + 1])
            found.setdefault(self.header.shape_of(name, shard), []).append(numbers)
        return {shape: np.concatenate(numbers) for shape, numbers in found.items()}

    def read(
        self,
        name: str,
        indices: Int[np.ndarray, " b"],
        *,
        versions: Int[np.ndarray, " b"] | None = None,
        draws: UInt64[np.ndarray, " b"] | None = None,
    ) -> Shaped[np.ndarray, "b ..."]:
        """Some records' arrays of a field, as `Field` says: floating ones become float32.

        Args:
            name: The field.
            indices: Which records; all of one shape.
            versions: Which version of each; None for the first.
            draws: One random word a record, of which a posterior is sampled; None for its mean.

        Raises:
            ValueError: Records of several shapes, which are no one array.
        """
        field = self.header.fields[name]
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        offsets = indices - self._starts[shards]
        shapes = {self.header.shape_of(name, int(shard)) for shard in np.unique(shards)}
        if len(shapes) > 1:
            raise ValueError(f"{name} has several shapes in {self.folder}: {sorted(shapes)}")
        shape = shapes.pop() if shapes else tuple(axis or 0 for axis in field.shape)
        stored = field.stored_shape(shape)[bool(field.versions) :]
        rows = np.empty((len(indices), *stored), DTYPES[field.dtype])
        if field.versions:
            versions = np.zeros(len(indices), np.int64) if versions is None else versions
            places = zip(offsets, versions, strict=True)
        else:
            places = iter(offsets)
        for row, (shard, place) in enumerate(zip(shards, places, strict=True)):
            rows[row] = self._map(int(shard), name)[place]
        return decode(field, rows, draws)

    def null(self, name: str) -> Shaped[np.ndarray, ...]:
        """What stands for "no condition" of a field."""
        stored = map_array(self.folder / self.header.nulls[name].file.name)
        return np.array(decode(self.header.fields[name], stored[None], None)[0])

    def _map(self, shard: int, name: str) -> np.ndarray:
        if (shard, name) not in self._maps:
            file = self.header.shards[shard].files[name].name
            self._maps[shard, name] = map_array(self.folder / file)
        return self._maps[shard, name]


def unfinished_nulls(folder: Path) -> dict[str, Shaped[np.ndarray, ...]]:
    """What stands for "no condition" in a set that is being written; {} before it is begun.

    Raises:
        ValueError: A file of it is damaged, or it is no such set.
    """
    if not (folder / UNFINISHED).exists():
        return {}
    header, text = read_header(folder / UNFINISHED)
    command = f"delete {folder} and begin anew"
    for name, null in header.nulls.items():
        check_file(folder, null.file, null.shape, header.fields[name], command, checksum=True)
    records = Records(folder, header, text)
    return {name: records.null(name) for name in header.nulls}


def decode(
    field: Field, rows: Shaped[np.ndarray, "b ..."], draws: UInt64[np.ndarray, " b"] | None
) -> Shaped[np.ndarray, "b ..."]:
    """What is read of numbers as they are stored, one version of each record."""
    if not field.is_floating:
        return rows
    if field.dtype == "bfloat16":
        values = (rows.astype(np.uint32) << 16).view(np.float32)
    else:
        values = rows.astype(np.float32)
    if field.posterior:
        values = _posterior(values, draws)
    if (field.shift, field.scale) != (0, 1):
        values -= np.float32(field.shift)
        values *= np.float32(field.scale)
    return values


def encode(field: Field, values: Shaped[np.ndarray, "b ..."]) -> Shaped[np.ndarray, "b ..."]:
    """Numbers as they are stored, of those that reading shifts and scales; not the inverse of that.

    bfloat16 is rounded to nearest, ties to even.

    Raises:
        ValueError: Fractions where there are integers, or numbers where there are truth values.
    """
    if not np.can_cast(values.dtype, field.read_dtype, "same_kind"):
        raise ValueError(f"{values.dtype} is not stored as {field.dtype}")
    if field.dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(DTYPES[field.dtype])
    import ml_dtypes

    return values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def _posterior(
    moments: Float32[np.ndarray, b * axes], draws: UInt64[np.ndarray, " b"] | None
) -> Float32[np.ndarray, b * axes]:
    """Sample N(mean, exp(logvar)), each record by its own random word; without words, the mean."""
    mean, logvar = np.split(moments, 2, axis=-1)
    if draws is None:
        return mean.copy()
    eps = np.empty(mean.shape, np.float32)
    for row, word in enumerate(draws):
        # A second key half other than those of transforms.py keeps this stream apart.
        generator = np.random.Generator(np.random.Philox(key=[int(word), 3]))
        generator.standard_normal(out=eps[row], dtype=np.float32)
    # In place, mean + exp(logvar / 2) * eps, clipped as diffusers and the original VAE do.
    sample = np.clip(logvar, -30.0, 20.0)
    sample *= np.float32(0.5)
    np.exp(sample, out=sample)
    sample *= eps
    sample += mean
    return sample


def read_header(path: Path) -> tuple[Header, str]:
    """The header in a file, of this format or one of those before, and the file's text.

    Raises:
        ValueError: Not such a file, of a later version, or with missing or unknown entries.
        OSError: It cannot be read.
    """
    text = read_json_text(path)
    content = parse_json(text, path)
    found, version = content.pop("format", None), content.pop("version", None)
    readers = {FORMAT: parse_header, **version0.READERS}
    if not isinstance(found, str) or found not in readers:
        raise FileRefusedError(
            f"{path} is not the header of a set of records: its format is {shown(found)}; expected "
            f"{FORMAT!r}"
        )
    if version != VERSION:
        raise FileRefusedError(
            f"{path} has format {found!r} version {shown(version)}; this code reads version "
            f"{VERSION}. Write the set again, or read it with a newer version of this code."
        )
    return readers[found](Fields(content, path)), text


def check_file(
    folder: Path,
    stored: StoredFile,
    shape: tuple[int, ...],
    field: Field,
    command: str,
    checksum: bool = False,
) -> None:
    """Checks that a file is what the header says, and lies in the folder.

    Args:
        folder: Of the set.
        stored: The file, as written.
        shape: Of its array.
        field: Of its array.
        command: How to make the set anew, for messages.
        checksum: Read the whole file and compare its SHA-256.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is truncated or damaged, or holds something else.
    """
    dtype = DTYPES[field.dtype]
    file = folder / check_file_name(stored.name, folder / HEADER)
    if not file.exists():
        raise FileNotFoundError(f"shard {file} is missing. {command.capitalize()}.")
    check_within(file, folder)
    check_regular(file)
    least = math.prod(shape) * dtype.itemsize
    if not least < stored.bytes <= least + _MAX_NPY_HEADER:
        raise ValueError(
            f"{folder / HEADER} contradicts itself: {stored.bytes} bytes for {stored.name}, which "
            f"holds {dtype}{list(shape)}. {command.capitalize()}."
        )
    found = file.stat().st_size
    if found != stored.bytes:
        raise ValueError(
            f"shard {file} is truncated or damaged: {found} bytes instead of {stored.bytes}. Copy "
            f"it again, or {command}."
        )
    array = map_array(file)
    if (array.shape, array.dtype) != (shape, dtype):
        raise ValueError(
            f"shard {file} holds {array.dtype}{list(array.shape)}, the header says "
            f"{dtype}{list(shape)}"
        )
    if checksum and file_sha256(file) != stored.sha256:
        raise ValueError(
            f"shard {file} is damaged: its SHA-256 differs from the header's. Copy it again, or "
            f"{command}."
        )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
