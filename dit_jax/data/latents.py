"""Latents extracted from images beforehand: the format on disk, its reader and its writer.

A set of latents is a folder:

    header.json                  `LatentsHeader`: what the latents are, and the list of shards
    shard-00000.latents.npy      [count, flips, h, w, k], float16 or float32
    shard-00000.labels.npy       [count], int32
    shard-00001.latents.npy      ...

flips is 1, or 2 for flip = "pairs": the latents of the image and those of its mirror image (which
are not the mirrored latents). k is the VAE's number of channels c, or 2c for kind = "moments":
the posterior's mean, then its log variance. Values are the VAE's own; a reader subtracts
shift_factor and multiplies by scaling_factor. Plain .npy files are memory-mapped, so reading a
latent at random costs one page fault and no parsing.

header.json is written last: a folder without it is unfinished.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, UInt64

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
from dit_jax.data.source import (
    Batch,
    DatasetInfo,
    Example,
    Source,
    fingerprint,
    validate_labels,
)
from dit_jax.data.transforms import random_bit
from dit_jax.untrusted import Fields, map_array

FORMAT, VERSION = "dit_jax.latents", 1
_TEXTS = ("vae_name", "vae_sha256", "dtype", "kind", "flip", "split", "source_name")
_TEXTS += ("source_fingerprint",)


@dataclass(frozen=True)
class Shard:
    """Two files of a set of latents, by name, size in bytes and SHA-256."""

    count: int
    latents_file: str
    latents_bytes: int
    latents_sha256: str
    labels_file: str
    labels_bytes: int
    labels_sha256: str


@dataclass(frozen=True)
class LatentsHeader:
    """What header.json says.

    Attributes:
        vae_name: The VAE's name, for people.
        vae_sha256: Hash of its weights.
        scaling_factor: Latents enter a network as (z - shift_factor) * scaling_factor.
        shift_factor: See `scaling_factor`; 0 for VAEs without one.
        latent_shape: (height, width, channels) of a latent.
        dtype: "float16" or "float32".
        kind: "samples" of the VAE's posterior, or its "moments", sampled anew at each reading.
        flip: "pairs" if each image's mirror image was encoded too, else "none".
        num_classes: Labels lie in 0..num_classes-1; 0 for unlabelled data.
        class_names: One name a class, or none.
        split: "train" or "test".
        source_name: The images' source, as its `DatasetInfo` names it.
        source_fingerprint: The images' fingerprint.
        count: Number of images.
        shards: The files.
    """

    vae_name: str
    vae_sha256: str
    scaling_factor: float
    latent_shape: tuple[int, int, int]
    num_classes: int
    shift_factor: float = 0.0
    dtype: str = "float16"
    kind: str = "moments"
    flip: str = "pairs"
    class_names: tuple[str, ...] = ()
    split: str = "train"
    source_name: str = ""
    source_fingerprint: str = ""
    count: int = 0
    shards: tuple[Shard, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values the format does not have."""
        choices = {
            "dtype": ("float16", "float32"),
            "kind": ("samples", "moments"),
            "flip": ("none", "pairs"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"latents header: {name} must be one of {list(valid)}, not "
                    f"{getattr(self, name)!r}"
                )
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ValueError(
                f"latents header: latent_shape must be (height, width, channels), not "
                f"{self.latent_shape}"
            )

    @property
    def record_shape(self) -> tuple[int, int, int, int]:
        """Shape of what is stored for one image: (flips, h, w, k)."""
        height, width, channels = self.latent_shape
        flips = 2 if self.flip == "pairs" else 1
        return flips, height, width, channels * (2 if self.kind == "moments" else 1)

    def to_json(self) -> str:
        """Write the header as the text of header.json."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> LatentsHeader:
        """Read header.json.

        Raises:
            ValueError: Not such a file, of another version, or with missing or unknown fields.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        fields = read_header(path, names, FORMAT, VERSION)
        header = cls(
            latent_shape=fields.counts("latent_shape", 3, 1, MAX_SIDE),
            scaling_factor=fields.number("scaling_factor"),
            shift_factor=fields.number("shift_factor"),
            num_classes=fields.count("num_classes", 0, MAX_CLASSES),
            class_names=fields.texts("class_names"),
            count=fields.count("count", 0, MAX_EXAMPLES),
            shards=tuple(_read_shard(shard) for shard in fields.objects("shards")),
            **{name: fields.text(name) for name in _TEXTS},
        )
        if header.scaling_factor == 0:
            raise ValueError(f"{path}: scaling_factor is 0, which no VAE has")
        if header.class_names and len(header.class_names) != header.num_classes:
            raise ValueError(
                f"{path}: {len(header.class_names)} class_names for {header.num_classes} classes"
            )
        counts = [shard.count for shard in header.shards]
        check_sizes(path, "images", header.record_shape, counts, header.count)
        return header


def _read_shard(fields: Fields) -> Shard:
    fields.check_names([field.name for field in dataclasses.fields(Shard)])
    latents, labels = (
        read_stored_file(fields, f"{part}_file", f"{part}_bytes", f"{part}_sha256")
        for part in ("latents", "labels")
    )
    count = fields.count("count", 1, MAX_EXAMPLES)
    return Shard(count, *dataclasses.astuple(latents), *dataclasses.astuple(labels))


def open_latents(
    split: str, *, path: str, moments: str = "sample", verify_checksums: bool = False
) -> Latents:
    """Open a set of pre-extracted latents.

    Args:
        split: "train" or "test".
        path: A folder of latents, or one with a folder of latents for each split.
        moments: For latents stored as moments: "sample" draws from the posterior at each
            training read, "mean" takes its mean. (Plain reads, as for evaluation, give the mean.)
        verify_checksums: Read all files once and compare their SHA-256 with the header's.

    Raises:
        FileNotFoundError: No latents there, or an unfinished extraction.
        ValueError: A file is truncated or damaged, or belongs to another split.
    """
    if moments not in ("sample", "mean"):
        raise ValueError(f"moments must be 'sample' or 'mean', not {moments!r}")
    folder = Path(path).expanduser()
    if not (folder / HEADER).is_file() and (folder / split).is_dir():
        folder = folder / split
    if not (folder / HEADER).is_file():
        if (folder / UNFINISHED).is_file():
            partial = LatentsHeader.from_file(folder / UNFINISHED)
            raise FileNotFoundError(
                f"the extraction of latents into {folder} is unfinished ({partial.count} images "
                f"so far): run it again, it continues where it stopped"
            )
        raise FileNotFoundError(
            f"no latents for split {split!r} in {path}: {HEADER} is missing. They are made by\n"
            f"  {extraction_command(256, str(path), split)}\n"
            "(IMAGES: a folder with a subfolder of images for every class)"
        )
    header = LatentsHeader.from_file(folder / HEADER)
    if header.split != split:
        raise ValueError(f"the latents in {folder} are of split {header.split!r}, not {split!r}")
    _validate_files(folder, header, verify_checksums)
    return Latents(folder, header, moments)


def extraction_command(image_size: int, out: str, split: str = "train") -> str:
    """The command that makes a set of latents of a folder of images."""
    command = ["python", "launch/extract_features.py", "--data=image_folder", "--path=IMAGES"]
    command += [f"--image_size={image_size}", "--vae=hub:stabilityai/sd-vae-ft-mse"]
    command += [f"--split={split}"] if split != "train" else []
    return shlex.join([*command, f"--out={out}"])


class Latents(Source):
    """See `open_latents`. Shards are memory-mapped when first read."""

    slow_to_read = True

    def __init__(self, folder: Path, header: LatentsHeader, moments: str = "sample"):
        self._folder, self._header, self._moments = folder, header, moments
        self._maps: dict[int, np.ndarray] = {}
        counts = [shard.count for shard in header.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._labels = np.concatenate(
            [map_array(folder / shard.labels_file) for shard in header.shards]
        )
        validate_labels(self._labels, header.num_classes, self.describe)
        self.info = DatasetInfo(
            name=f"latents/{folder.name}",
            split=header.split,
            image_shape=header.latent_shape,
            num_classes=header.num_classes,
            num_examples=header.count,
            class_names=header.class_names,
            # The header holds the hash of every file.
            fingerprint=fingerprint("latents", header.to_json(), moments),
            latents=header,
        )

    def __getstate__(self) -> dict:
        """Leave the memory maps behind: a pickled map is a copy of the data."""
        return {**self.__dict__, "_maps": {}}

    def __getitem__(self, index: int) -> Example:
        """Return latent `index`: unmirrored, and the mean if moments are stored."""
        batch = self.batch(np.array([index]))
        return {"image": batch["image"][0], "label": int(batch["label"][0])}

    def describe(self, index: int) -> str:
        """Name an example by its folder and position."""
        return f"latent {index} of {self._folder}"

    def require_horizontal_flip(self) -> None:
        """Raise a ValueError unless the mirror images were encoded too."""
        if self._header.flip != "pairs":
            raise ValueError(
                f"horizontal_flip=True needs latents of the mirrored images, which {self._folder} "
                f"lacks (mirroring latents is not the same). Extract them again with "
                f"--flip=pairs, or set horizontal_flip=False."
            )

    def batch(
        self,
        indices: Int[np.ndarray, " b"],
        *,
        draws: UInt64[np.ndarray, " b"] | None = None,
        horizontal_flip: bool = False,
    ) -> Batch:
        """Read several latents, scaled for the network; see `Source.batch`."""
        flips = np.zeros(len(indices), np.int64)
        if horizontal_flip and draws is not None:
            self.require_horizontal_flip()
            flips = random_bit(draws).astype(np.int64)
        stored = np.empty((len(indices), *self._header.record_shape[1:]), self._header.dtype)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        offsets = indices - self._starts[shards]
        for row, (shard, offset, flip) in enumerate(zip(shards, offsets, flips, strict=True)):
            stored[row] = self._map(int(shard))[offset, flip]
        latents = stored.astype(np.float32)
        if self._header.kind == "moments":
            latents = _posterior(latents, draws if self._moments == "sample" else None)
        latents -= np.float32(self._header.shift_factor)
        latents *= np.float32(self._header.scaling_factor)
        return {"image": latents, "label": self._labels[indices]}

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            file = self._header.shards[shard].latents_file
            self._maps[shard] = map_array(self._folder / file)
        return self._maps[shard]


def _posterior(
    moments: Float32[np.ndarray, "b h w k"], draws: UInt64[np.ndarray, " b"] | None
) -> Float32[np.ndarray, "b h w c"]:
    """Sample N(mean, exp(logvar)), each example by its own random word; without words, the mean."""
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


def _validate_files(folder: Path, header: LatentsHeader, checksums: bool) -> None:
    for shard in header.shards:
        latents = StoredFile(shard.latents_file, shard.latents_bytes, shard.latents_sha256)
        labels = StoredFile(shard.labels_file, shard.labels_bytes, shard.labels_sha256)
        for stored, shape, dtype in (
            (latents, (shard.count, *header.record_shape), np.dtype(header.dtype)),
            (labels, (shard.count,), np.dtype(np.int32)),
        ):
            validate_file(
                folder,
                stored,
                shape,
                dtype,
                remedy="extract the latents again",
                checksum=checksums,
            )
