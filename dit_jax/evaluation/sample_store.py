"""Samples on their way to a file: kept on disk as they are made, so that nothing is made twice.

Tens of thousands of images take hours and do not fit into memory. They go, as bytes, into a
memory-mapped array in a hidden folder beside the destination; a note of how many are complete is
renewed after every batch. An interrupted run finds both and goes on, if it would make the same
images.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from dit_jax.atomic import atomic_file, check_destination, save_text
from dit_jax.evaluation.files import save_json, save_png_folder
from dit_jax.output_formats import is_npz
from dit_jax.quantities import counted, format_bytes


class SampleStore:
    """Images number 0 to n - 1 of one way of sampling.

    Args:
        path: the destination: .npz for the ADM evaluator's format, else a folder of PNGs. A record
            goes beside it as `path` with the suffix .json.
        count: n.
        image_shape: (height, width, channels).
        record: everything that decides the images; JSON values.
        restart: discard what an earlier run left.

    Attributes:
        done: images that are complete.

    Raises:
        FileExistsError: an interrupted run of other settings is there, which are named; or
            something else stands where the record goes.
        OSError: there is no space, or no permission.
    """

    def __init__(
        self,
        path: Path,
        count: int,
        image_shape: tuple[int, int, int],
        record: Mapping[str, Any],
        *,
        restart: bool = False,
    ):
        self.path, self.count = Path(path), count
        self.record = json.loads(json.dumps(record))  # as it will be read back
        self._folder = _unfinished(self.path)
        self._progress = self._folder / "progress.json"
        self._file = self._folder / "images.npy"
        if restart:
            shutil.rmtree(self._folder, ignore_errors=True)
        shape = (count, *image_shape)
        self.done = self._resume(shape)
        if not self.done:
            check_destination(record_path(self.path), overwrite=restart)
            require_space(self.path, count, image_shape)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._images = np.lib.format.open_memmap(self._file, "w+", np.uint8, shape)
            self._note()
        else:
            self._images = np.lib.format.open_memmap(self._file, "r+")

    def _resume(self, shape: tuple[int, ...]) -> int:
        if not self._progress.is_file() or not self._file.is_file():
            return 0
        try:
            noted = json.loads(self._progress.read_text())
            record, done = noted["record"], int(noted["done"])
            found = np.load(self._file, mmap_mode="r", allow_pickle=False).shape
        except (ValueError, KeyError, TypeError):
            return 0  # cut off while it was begun: nothing to keep
        changed = sorted(
            key
            for key in record.keys() | self.record.keys()
            if record.get(key) != self.record.get(key)
        )
        if changed or found != shape:
            listed = ", ".join(changed) or f"shape {found} instead of {shape}"
            raise FileExistsError(
                f"an interrupted run left {counted(done, 'image')} for {self.path}, made in "
                f"another way ({listed}): go on with its settings, give another --out, or "
                "--overwrite to discard them"
            )
        return done

    def _note(self) -> None:
        save_text(self._progress, json.dumps({"done": self.done, "record": self.record}))

    def append(self, images: UInt8[np.ndarray, "b h w c"]) -> None:
        """Adds the next images; they are safe on disk when it returns."""
        self._images[self.done : self.done + len(images)] = images
        self._images.flush()
        self.done += len(images)
        self._note()

    def finish(self, labels: Int[np.ndarray, " n"] | None, *, overwrite: bool = False) -> None:
        """Writes the destination and its record, and removes what was temporary.

        Raises:
            ValueError: images are missing.
        """
        if self.done != self.count:
            raise ValueError(f"{self.done} of {self.count} images are there")
        if is_npz(self.path):
            arrays = {"arr_0": self._images}
            if labels is not None:
                arrays["arr_1"] = np.asarray(labels, np.int64)
            with atomic_file(self.path, overwrite=overwrite) as file:
                np.savez(file, **arrays)  # in pieces; never the whole array in memory
        else:
            save_png_folder(self.path, self._images, overwrite=overwrite)
        save_json(record_path(self.path), self.record, overwrite=True)
        del self._images
        shutil.rmtree(self._folder)


def require_space(path: Path, count: int, image_shape: tuple[int, int, int]) -> None:
    """Refuses more images than the disk of `path` has room for.

    Args:
        path: the destination, as of `SampleStore`.
        count: images.
        image_shape: (height, width, channels).

    Raises:
        OSError: how much space there is and how much is needed; or no permission.
    """
    path = Path(path)
    check_destination(path, overwrite=True)
    free = shutil.disk_usage(path.parent).free
    wanted = 2 * count * math.prod(image_shape)  # the array and the finished file
    if wanted > free:
        raise OSError(
            f"{path.parent} has {format_bytes(free)} free; {counted(count, 'image')} need "
            f"{format_bytes(wanted)} while they are made: make fewer (--num_images), or give an "
            "--out on another disk"
        )


def is_begun(path: Path) -> bool:
    """Whether an interrupted run left images for `path`, which take their space already."""
    return _unfinished(Path(path)).exists()


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def record_path(path: Path) -> Path:
    """Where the record of samples at `path` is: 'x.npz' and the folder 'x' have 'x.json'."""
    path = Path(path)
    return path.with_suffix(".json") if is_npz(path) else path.with_name(f"{path.name}.json")
