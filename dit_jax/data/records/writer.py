"""Writing records: shard by shard, and on from where a writer was ended."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dit_jax.atomic import atomic_file, save_text
from dit_jax.data.labels import validate_labels
from dit_jax.data.records.header import HEADER, UNFINISHED, Field, Header, Null, Shard, StoredFile
from dit_jax.data.records.reader import encode, file_sha256, read_header
from dit_jax.untrusted import map_array

# What a writer makes in its folder, temporary files (of `atomic_file`) included.
_OWN = re.compile(
    r"\.?(header\.json|unfinished\.json|((shard|waiting)-\d+|null)\.[a-z0-9_]+\.npy)"
    r"(\.[0-9a-f]+)?(\.tmp)?"
)


class RecordWriter:
    """Writes a folder of records; whenever it is ended, another one goes on with the same bits.

    Every file appears whole or not at all. A new writer for the folder says in `count` how many
    records are safe: continue with the next one. Records that wait for their shard to be full are
    lost with the process, unless `save` was called.

    Records of another shape than those before begin another shard.

    Args:
        folder: The set's; made if it is not there.
        header: What the records will be; its count, shards and nulls are ignored.
        nulls: "No condition" of the fields that need to be told, without the batch.

    Attributes:
        count: Records that are safe, and those that wait in this process.

    Raises:
        FileExistsError: The folder holds a finished set, or other things.
        ValueError: An unfinished set was begun with another header; lists what differs.
    """

    def __init__(
        self,
        folder: str | Path,
        header: Header,
        *,
        nulls: Mapping[str, Shaped[np.ndarray, ...]] | None = None,
    ):
        self._folder = Path(folder)
        self._waiting: list[dict[str, np.ndarray]] = []
        self._kept: Shard | None = None  # the files of records that waited when one was saved
        check_destination(self._folder, header.kind)
        self._folder.mkdir(parents=True, exist_ok=True)
        files = {
            name: _null_file(name, header.fields[name], array)
            for name, array in (nulls or {}).items()
        }
        self._header = dataclasses.replace(
            header.without_files(), nulls={name: null for name, (null, _) in files.items()}
        )
        if (self._folder / UNFINISHED).exists():
            self._continue()
        for null, content in files.values():
            with atomic_file(self._folder / null.file.name, overwrite=True) as file:
                file.write(content)
        self._note()
        self._clear()

    @property
    def count(self) -> int:
        """Number of records written and waiting."""
        return self._header.count + self._waits

    @property
    def _waits(self) -> int:
        return sum(len(next(iter(rows.values()))) for rows in self._waiting)

    def add(self, **arrays: Shaped[np.ndarray, "b ..."]) -> None:
        """Appends records; they reach the disk when a shard is full, and at `save` and `finish`.

        Args:
            **arrays: The fields by name, as they are stored: versions along their own axis,
                posteriors as means and log variances, not shifted nor scaled.

        Raises:
            ValueError: Fields or shapes that the header does not have, a number that is not finite
                in the field's dtype, or a label out of range.
        """
        fields = self._header.fields
        sizes = {len(array) for array in arrays.values() if np.ndim(array)}
        wrong = arrays.keys() ^ fields.keys()
        shapes = {n: f.read_shape(arrays[n].shape[1:]) for n, f in fields.items() if n in arrays}
        if wrong or len(sizes) != 1 or None in shapes.values():
            given = {name: list(array.shape) for name, array in arrays.items()}
            wanted = {name: ["n", *field.stored_shape()] for name, field in fields.items()}
            raise ValueError(f"{self._header.kind} have shapes {given}, expected {wanted}")
        if sizes == {0}:
            return
        if "label" in arrays:
            validate_labels(arrays["label"], self._header.num_classes, lambda row: self._name(row))
        rows = {name: encode(field, arrays[name]) for name, field in fields.items()}
        for name, field in fields.items():
            if field.is_floating:
                self._check_finite(name, field, rows[name])
        if self._waiting and self._shapes(self._waiting[0]) != self._shapes(rows):
            self._flush()
        self._waiting.append(rows)
        while self._waits >= self._header.shard_size:
            self._flush()

    def save(self) -> None:
        """Makes the records that wait safe too; the next writer for this folder has them."""
        if not self._waits:
            return
        # A name of its own: what is noted stays as it is until this is noted.
        self._kept = self._write(f"waiting-{self.count:09d}", self._together())
        self._note()
        self._clear()

    def finish(self) -> Header:
        """Writes what waits, then the header.

        Returns:
            The header of the finished set.

        Raises:
            ValueError: Nothing was added.
        """
        self._flush()
        if not self._header.count:
            raise ValueError(f"no {self._header.kind} were added to {self._folder}")
        save_text(self._folder / HEADER, self._header.to_json())
        (self._folder / UNFINISHED).unlink()
        return self._header

    def _name(self, row: int) -> str:
        return f"{self._header.kind.removesuffix('s')} {self.count + row}"

    def _shapes(self, rows: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
        """The shapes that fields leave open, of one record as it is read."""
        return {
            name: field.read_shape(rows[name].shape[1:])
            for name, field in self._header.fields.items()
            if not field.is_of_one_shape
        }

    def _check_finite(self, name: str, field: Field, rows: np.ndarray) -> None:
        # In bfloat16 all ones in the exponent.
        is_finite = (rows & 0x7F80) != 0x7F80 if field.dtype == "bfloat16" else np.isfinite(rows)
        finite = is_finite.reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{name} of {self._name(int(np.argmin(finite)))} is not finite in {field.dtype}: "
                "check the model that makes it, or store float32"
            )

    def _together(self) -> dict[str, np.ndarray]:
        return {
            name: np.concatenate([rows[name] for rows in self._waiting])
            for name in self._waiting[0]
        }

    def _flush(self) -> None:
        """Writes up to a shard's size of what waits as one shard."""
        if not self._waits:
            return
        waiting, size = self._together(), self._header.shard_size
        self._waiting = [{name: rows[size:] for name, rows in waiting.items()}]
        stem = f"shard-{len(self._header.shards):05d}"
        shard = self._write(stem, {name: rows[:size] for name, rows in waiting.items()})
        if not self._waits:
            self._waiting = []
        self._header = dataclasses.replace(
            self._header,
            count=self._header.count + shard.count,
            shards=(*self._header.shards, shard),
        )
        kept, self._kept = self._kept, None
        self._note()
        if kept:
            self._clear()

    def _write(self, stem: str, rows: Mapping[str, np.ndarray]) -> Shard:
        files = {
            name: self._save_array(f"{stem}.{name}.npy", array) for name, array in rows.items()
        }
        return Shard(len(next(iter(rows.values()))), files, self._shapes(rows))

    def _save_array(self, name: str, array: np.ndarray) -> StoredFile:
        path = self._folder / name
        with atomic_file(path, overwrite=True) as file:
            np.save(file, array)
        return StoredFile(name, path.stat().st_size, file_sha256(path))

    def _note(self) -> None:
        """Notes what is there; records that wait are a last shard of their own."""
        header = self._header
        if self._kept:
            header = dataclasses.replace(
                header,
                count=header.count + self._kept.count,
                shards=(*header.shards, self._kept),
            )
        save_text(self._folder / UNFINISHED, header.to_json())

    def _continue(self) -> None:
        """Takes up an unfinished set after comparing it with the one asked for."""
        found, text = read_header(self._folder / UNFINISHED)
        begun = _as_json(found.without_files())
        if json.loads(text).get("format") != begun["format"]:
            raise ValueError(
                f"{self._folder} holds an unfinished set that an earlier version of this code "
                "began: finish it with that version, delete it, or choose another folder"
            )
        differing = _differences(begun, _as_json(self._header))
        if differing:
            raise ValueError(
                f"{self._folder} was begun with other settings ({'; '.join(differing)}): use "
                "those, or another folder"
            )
        self._header = found
        last = found.shards[-1] if found.shards else None
        if last and next(iter(last.files.values())).name.startswith("waiting-"):
            self._kept = last
            self._header = dataclasses.replace(
                found, count=found.count - last.count, shards=found.shards[:-1]
            )
            self._waiting = [
                {n: np.array(map_array(self._folder / f.name)) for n, f in last.files.items()}
            ]

    def _clear(self) -> None:
        """Removes files that a writer left which was ended while it wrote."""
        shards = (*self._header.shards, *([self._kept] if self._kept else []))
        known = {file.name for shard in shards for file in shard.files.values()}
        known |= {null.file.name for null in self._header.nulls.values()} | {UNFINISHED, HEADER}
        for file in self._folder.iterdir():
            if file.name not in known and _OWN.fullmatch(file.name):
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()


def _null_file(name: str, field: Field, array: np.ndarray) -> tuple[Null, bytes]:
    """A null value's entry in the header, and its file's content."""
    if len(array.shape) != len(field.shape) or field.versions or field.posterior:
        raise ValueError(
            f"the null value of {name} is {list(array.shape)}, expected {list(field.shape)}"
        )
    content = io.BytesIO()
    np.save(content, encode(field, np.asarray(array)))
    written = content.getvalue()
    digest = hashlib.sha256(written).hexdigest()
    return Null(StoredFile(f"null.{name}.npy", len(written), digest), tuple(array.shape)), written


def check_destination(folder: Path, kind: str = "records", remedy: str = "another folder") -> None:
    """Refuses a folder that a set cannot be written to.

    Args:
        folder: The set's.
        kind: What it is to hold.
        remedy: What to choose instead.

    Raises:
        FileExistsError: A finished set or other things are there.
    """
    if (folder / HEADER).exists():
        raise FileExistsError(
            f"{folder} holds a finished set of {kind}: delete it or choose {remedy}"
        )
    if not folder.exists() or (folder / UNFINISHED).exists():
        return
    # A program killed right at its start leaves nothing else than temporary files and null values.
    if not folder.is_dir() or not all(_OWN.fullmatch(file.name) for file in folder.iterdir()):
        raise FileExistsError(f"{folder} exists and holds other things: choose {remedy}")


def _as_json(header: Header) -> dict[str, Any]:
    return json.loads(header.to_json())


def _differences(begun: Any, asked: Any, name: str = "") -> list[str]:
    """What differs, by the innermost name: "seed: 0 -> 1"."""
    if isinstance(begun, dict) and isinstance(asked, dict):
        return [
            line
            for key in {**begun, **asked}
            for line in _differences(begun.get(key), asked.get(key), key)
        ]
    return [] if begun == asked else [f"{name}: {begun!r} -> {asked!r}"]
