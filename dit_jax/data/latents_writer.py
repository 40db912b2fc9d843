"""Writing a set of latents (format: `dit_jax.data.latents`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float, Integer

from dit_jax.data.latents import LatentsHeader, Shard
from dit_jax.data.shards import HEADER, UNFINISHED, save_array, save_text
from dit_jax.data.source import validate_labels


class LatentsWriter:
    """Writes a folder of latents, shard by shard; survives being killed.

    Every file appears complete or not at all. After a kill, a writer opened with resume=True
    says in `count` how many images are safely on disk: continue with the next one. As a context
    manager it finishes the set on leaving, unless an exception is under way.

    Attributes:
        count: Number of images in the shards on disk.

    Raises:
        FileExistsError: The folder holds a finished set, or an unfinished one and `resume` is
            false.
        ValueError: An unfinished set was begun with another header.
    """

    def __init__(
        self,
        folder: str | Path,
        header: LatentsHeader,
        *,
        shard_size: int = 4096,
        resume: bool = False,
    ):
        if shard_size < 1:
            raise ValueError(f"shard_size must be a positive number of images, not {shard_size}")
        self._folder, self._shard_size = Path(folder), shard_size
        self._header = dataclasses.replace(header, count=0, shards=())
        self._latents: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        if (self._folder / HEADER).exists():
            raise FileExistsError(
                f"{self._folder} holds a finished set of latents: delete it or choose another "
                f"folder"
            )
        unfinished = self._folder / UNFINISHED
        if unfinished.exists():
            if not resume:
                raise FileExistsError(
                    f"{self._folder} holds an unfinished set of latents: continue it with "
                    f"resume=True, delete it, or choose another folder"
                )
            self._header = _continued(unfinished, self._header)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write_header(UNFINISHED)

    @property
    def count(self) -> int:
        """Number of images in the shards on disk."""
        return self._header.count

    def add(
        self, latents: Float[np.ndarray, "b flips h w k"], labels: Integer[np.ndarray, " b"]
    ) -> None:
        """Append images; they reach the disk when a shard is full, or at `finish`.

        Args:
            latents: The VAE's unscaled output, laid out as `LatentsHeader.record_shape` says.
            labels: Class indices.

        Raises:
            ValueError: Wrong shape, a value that is not finite in the header's dtype, or a label
                out of range.
        """
        expected = (len(labels), *self._header.record_shape)
        if latents.shape != expected:
            raise ValueError(
                f"latents have shape {list(latents.shape)}, expected {list(expected)} for "
                f"{len(labels)} labels, kind {self._header.kind!r} and flip {self._header.flip!r}"
            )
        first = self.count + sum(map(len, self._labels))
        validate_labels(labels, self._header.num_classes, lambda row: f"image {first + row}")
        with np.errstate(over="ignore"):
            stored = latents.astype(self._header.dtype)
        finite = np.isfinite(stored).reshape(len(labels), -1).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"the latents of image {first + int(np.argmin(finite))} are not finite in "
                f"{self._header.dtype}: check the VAE, or store float32"
            )
        self._latents.append(stored)
        self._labels.append(labels.astype(np.int32))
        while sum(map(len, self._labels)) >= self._shard_size:
            self._flush(self._shard_size)

    def finish(self) -> LatentsHeader:
        """Write what remains, then the header.

        Returns:
            The header of the finished set.

        Raises:
            ValueError: Nothing was added.
        """
        self._flush(self._shard_size)
        if not self._header.count:
            raise ValueError(f"no latents were added to {self._folder}")
        self._write_header(HEADER)
        (self._folder / UNFINISHED).unlink()
        return self._header

    def __enter__(self) -> LatentsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()

    def _flush(self, limit: int) -> None:
        """Write up to `limit` images as one shard."""
        if not self._labels:
            return
        latents, labels = np.concatenate(self._latents), np.concatenate(self._labels)
        self._latents, self._labels = [latents[limit:]], [labels[limit:]]
        latents, labels = latents[:limit], labels[:limit]
        if not len(labels):
            return
        stem = f"shard-{len(self._header.shards):05d}"
        names = f"{stem}.latents.npy", f"{stem}.labels.npy"
        values, classes = (
            save_array(self._folder, name, array)
            for name, array in zip(names, (latents, labels), strict=True)
        )
        shard = Shard(
            len(labels),
            values.name,
            values.bytes,
            values.sha256,
            classes.name,
            classes.bytes,
            classes.sha256,
        )
        self._header = dataclasses.replace(
            self._header,
            count=self._header.count + shard.count,
            shards=(*self._header.shards, shard),
        )
        self._write_header(UNFINISHED)

    def _write_header(self, name: str) -> None:
        save_text(self._folder / name, self._header.to_json())


def _continued(unfinished: Path, header: LatentsHeader) -> LatentsHeader:
    """Return the header of an unfinished set after comparing it with the one asked for."""
    found = LatentsHeader.from_file(unfinished)
    begun = dataclasses.asdict(dataclasses.replace(found, count=0, shards=()))
    asked = dataclasses.asdict(header)
    differing = [
        f"{name}: {begun[name]!r} -> {asked[name]!r}"
        for name in asked
        if begun[name] != asked[name]
    ]
    if differing:
        raise ValueError(
            f"{unfinished.parent} was begun with other settings ({'; '.join(differing)}): use "
            f"those, or another folder"
        )
    return found
