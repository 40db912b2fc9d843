"""What a folder of records says of itself: fields, origin and files, as header.json holds them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_jax.untrusted import Fields, FileRefusedError, check_file_name, shown

FORMAT, VERSION = "dit_jax.records", 1
HEADER, UNFINISHED = "header.json", "unfinished.json"
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # its bits; .npy has no such numbers
    "int32": np.dtype(np.int32),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
"""What a field's numbers are, and what they are in the .npy."""

# What a header may say: more, and its labels alone would fill the memory.
MAX_RECORDS, MAX_CLASSES, MAX_SIDE = 10**8, 10**6, 2**14
_MAX_RECORD_BYTES = 2**28
_MAX_AXES, _MAX_FIELDS, _MAX_VERSIONS = 6, 32, 16
_NAME = re.compile("[a-z][a-z0-9_]{0,40}")


@dataclass(frozen=True)
class StoredFile:
    """One file of a set, by name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Field:
    """One array of every record.

    Attributes:
        shape: As it is read, of one record; None for an axis whose length each shard tells.
        dtype: One of `DTYPES`: of the numbers on disk. Floating ones are read as float32.
        versions: Names of the versions of which a reader takes one, along an axis of their own
            before `shape`: ("plain", "mirrored"). () for one version without such an axis.
        posterior: Whether the last axis on disk holds a Gaussian's means, then as many log
            variances: reading gives a sample of it, or the means.
        shift: What is read is (number - shift) * scale.
        scale: See `shift`; neither zero nor infinite.
        condition: Whether it tells a network what the record shows.
    """

    shape: tuple[int | None, ...]
    dtype: str
    versions: tuple[str, ...] = ()
    posterior: bool = False
    shift: float = 0.0
    scale: float = 1.0
    condition: bool = False

    def __post_init__(self) -> None:
        """Refuse values the format does not have."""
        if self.dtype not in DTYPES:
            raise ValueError(f"a field's dtype must be one of {list(DTYPES)}, not {self.dtype!r}")
        plain = not self.posterior and (self.shift, self.scale) == (0, 1)
        if not self.is_floating and not plain:
            raise ValueError(f"numbers of {self.dtype} have no posterior, shift or scale")
        if self.posterior and (not self.shape or self.shape[-1] is None):
            raise ValueError(f"a posterior needs a last axis of known length, not {self.shape}")
        if not math.isfinite(self.shift) or not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"shift={self.shift} and scale={self.scale} make nothing of a number")

    @property
    def is_floating(self) -> bool:
        """Whether it is read as float32."""
        return self.dtype in ("float32", "float16", "bfloat16")

    @property
    def is_of_one_shape(self) -> bool:
        """Whether it has the same shape in every shard."""
        return None not in self.shape

    @property
    def read_dtype(self) -> np.dtype:
        """Of what is read."""
        return np.dtype(np.float32) if self.is_floating else DTYPES[self.dtype]

    def stored_shape(self, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Shape of one record on disk, for that of what is read (needed where an axis is None)."""
        shape = self.shape if shape is None else shape
        if self.posterior:
            shape = (*shape[:-1], 2 * shape[-1])
        return (len(self.versions), *shape) if self.versions else shape

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether records of this shape, as they are read, are of this field."""
        return len(shape) == len(self.shape) and all(
            axis in (None, size) for axis, size in zip(self.shape, shape, strict=True)
        )

    def read_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """The inverse of `stored_shape`; None for what is no record of this field."""
        if len(stored) != len(self.shape) + bool(self.versions):
            return None
        shape = stored[1:] if self.versions else stored
        if self.posterior:
            shape = (*shape[:-1], shape[-1] // 2)
        return shape if self.accepts(shape) and self.stored_shape(shape) == stored else None


@dataclass(frozen=True)
class Shard:
    """One shard: how many records, the file of each field, and shapes that the fields leave open.

    Shapes are of one record, as it is read.
    """

    count: int
    files: Mapping[str, StoredFile]
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Null:
    """What stands for "no condition": a file that holds one array, and the array's shape."""

    file: StoredFile
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What header.json says.

    Attributes:
        kind: What the records are: "latents", "pairs", ...
        fields: A record's arrays by name. One called "label" holds classes.
        provenance: What they were made of and how: JSON, of the kind's own.
        split: "train" or "test".
        num_classes: Labels lie in 0..num_classes-1; 0 for unlabelled records.
        class_names: One name a class, or none.
        shard_size: Records of a shard, of the last one of each shape excepted.
        nulls: "No condition", of fields that need to be told.
        count: Number of records.
        shards: The files.
    """

    kind: str
    fields: Mapping[str, Field]
    provenance: Mapping[str, Any]
    split: str = "train"
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    shard_size: int = 4096
    nulls: Mapping[str, Null] = dataclasses.field(default_factory=dict)
    count: int = 0
    shards: tuple[Shard, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values the format does not have."""
        wrong = [name for name in (self.kind, *self.fields) if not _NAME.fullmatch(name)]
        if wrong or not 1 <= len(self.fields) <= _MAX_FIELDS:
            raise ValueError(
                f"records have 1 to {_MAX_FIELDS} fields with names of small letters, digits and _;"
                f" got {shown(wrong) if wrong else len(self.fields)}"
            )
        if self.split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {shown(self.split)}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for {self.num_classes} classes")
        idle = [n for n in self.nulls if n not in self.fields or not self.fields[n].condition]
        if idle:
            raise ValueError(f"nulls of {shown(idle)}, which are no conditions")
        label = self.fields.get("label")
        if label is not None and label != LABEL:
            raise ValueError(
                "the field label must be a condition, one plain int32 a record; it is "
                f"{label.dtype} {list(label.shape)}"
            )

    def shape_of(self, name: str, shard: int) -> tuple[int, ...]:
        """Shape of a field of one record of a shard, as it is read."""
        return self.shards[shard].shapes.get(name, self.fields[name].shape)

    @property
    def record_bytes(self) -> int:
        """Of one record on disk, without fields whose shape each shard tells."""
        return sum(
            math.prod(field.stored_shape()) * DTYPES[field.dtype].itemsize
            for field in self.fields.values()
            if field.is_of_one_shape
        )

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the fields that tell a network what a record shows."""
        return tuple(name for name, field in self.fields.items() if field.condition)

    def to_json(self) -> str:
        """Write the header as the text of header.json."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1) + "\n"

    def without_files(self) -> Header:
        """What the records are, whatever of them is written."""
        return dataclasses.replace(self, count=0, shards=())


LABEL = Field((), "int32", condition=True)
"""The class of a record."""


def parse_header(fields: Fields) -> Header:
    """The header of an object of JSON without "format" and "version".

    Raises:
        FileRefusedError: Missing or unknown entries, or others than a header has.
    """
    fields.check_names([field.name for field in dataclasses.fields(Header)])
    if len(fields.mapping("fields")) > _MAX_FIELDS:
        raise FileRefusedError(f"{fields.where}: more than {_MAX_FIELDS} fields")
    parsed = {name: _parse_field(entry) for name, entry in _named(fields, "fields").items()}
    shards = tuple(_parse_shard(shard, parsed) for shard in fields.objects("shards"))
    try:
        header = Header(
            kind=fields.text("kind"),
            fields=parsed,
            provenance=fields.mapping("provenance"),
            split=fields.text("split"),
            num_classes=fields.count("num_classes", 0, MAX_CLASSES),
            class_names=fields.texts("class_names"),
            shard_size=fields.count("shard_size", 1, MAX_RECORDS),
            nulls={
                name: _parse_null(null, parsed, name)
                for name, null in _named(fields, "nulls").items()
            },
            count=fields.count("count", 0, MAX_RECORDS),
            shards=shards,
        )
    except FileRefusedError:
        raise
    except ValueError as error:
        raise FileRefusedError(f"{fields.where}: {error}") from None
    check_counts(header, fields.where, "records")
    return header


def check_counts(header: Header, where: str, what: str) -> None:
    """Refuse a header whose records are absurdly large, or whose counts contradict each other.

    Args:
        header: As parsed.
        where: The file, for messages.
        what: What it counts, for messages.
    """
    shapes = [(field, field.shape) for field in header.fields.values() if field.is_of_one_shape]
    for shard in header.shards:
        shapes += [(header.fields[name], shape) for name, shape in shard.shapes.items()]
    for field, shape in shapes:
        if 4 * math.prod(field.stored_shape(shape)) > _MAX_RECORD_BYTES:
            raise FileRefusedError(f"{where}: one record of shape {list(shape)} is beyond any use")
    counted = sum(shard.count for shard in header.shards)
    if counted != header.count:
        raise FileRefusedError(
            f"{where}: the header counts {header.count} {what}, its shards {counted}"
        )


def _named(fields: Fields, name: str) -> dict[str, Fields]:
    """An object of objects."""
    return {key: fields.object(name).object(key) for key in fields.mapping(name)}


def _parse_field(entry: Fields) -> Field:
    entry.check_names([field.name for field in dataclasses.fields(Field)])
    versions = entry.texts("versions")
    if len(versions) > _MAX_VERSIONS:
        raise FileRefusedError(f"{entry.where}: {len(versions)} versions of a record")
    try:
        return Field(
            shape=entry.axes("shape", _MAX_AXES, MAX_SIDE),
            dtype=entry.text("dtype"),
            versions=versions,
            posterior=entry.flag("posterior"),
            shift=entry.number("shift"),
            scale=entry.number("scale"),
            condition=entry.flag("condition"),
        )
    except FileRefusedError:
        raise
    except ValueError as error:
        raise FileRefusedError(f"{entry.where}: {error}") from None


def _parse_shard(entry: Fields, fields: Mapping[str, Field]) -> Shard:
    entry.check_names([field.name for field in dataclasses.fields(Shard)])
    files, shapes = entry.object("files"), entry.object("shapes")
    files.check_names(list(fields))
    shapes.check_names([name for name, field in fields.items() if not field.is_of_one_shape])
    found = {}
    for name in entry.mapping("shapes"):
        found[name] = shapes.axes(name, _MAX_AXES, MAX_SIDE)
        if None in found[name] or not fields[name].accepts(found[name]):
            raise FileRefusedError(
                f"{shapes.where}: {name} is {shown(found[name])}; the field's shape is "
                f"{shown(fields[name].shape)}"
            )
    return Shard(
        entry.count("count", 1, MAX_RECORDS),
        {name: parse_file(files.object(name)) for name in fields},
        found,
    )


def _parse_null(entry: Fields, fields: Mapping[str, Field], name: str) -> Null:
    entry.check_names(["file", "shape"])
    shape = entry.axes("shape", _MAX_AXES, MAX_SIDE)
    if name not in fields or None in shape or len(shape) != len(fields[name].shape):
        raise FileRefusedError(f"{entry.where}: a null value of shape {shown(shape)} of no field")
    if 4 * math.prod(shape) > _MAX_RECORD_BYTES:
        raise FileRefusedError(f"{entry.where}: a null value of {shown(shape)} is beyond any use")
    return Null(parse_file(entry.object("file")), shape)


def parse_file(fields: Fields, name="name", size="bytes", sha256="sha256") -> StoredFile:
    """A file as a header names it, in three of an object's entries."""
    stored = StoredFile(
        check_file_name(fields.text(name), fields.where), fields.count(size), fields.text(sha256)
    )
    if not re.fullmatch("[0-9a-f]{64}", stored.sha256):
        raise FileRefusedError(f"{fields.where}: {sha256} is no SHA-256")
    return stored
