"""Latents of images, encoded by a VAE beforehand: records of the kind "latents".

Field `latents`, [count, versions, h, w, k] on disk: the latents of the image and, if both were
encoded, of its mirror image (which are not the mirrored latents). k is the VAE's number of channels
c, or 2c for posteriors: means, then log variances. Values on disk are the VAE's own; reading
subtracts its shift factor and multiplies by its scaling factor. Every other field is a condition,
`label` for a start.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from dit_jax.data.images import Size, as_size
from dit_jax.data.record_source import RecordSource
from dit_jax.data.records import Field, Header, Records, open_records
from dit_jax.data.records.header import LABEL
from dit_jax.data.source import Batch
from dit_jax.data.transforms import random_bit
from dit_jax.options import option

KIND = "latents"
VERSIONS = {"none": ("plain",), "pairs": ("plain", "mirrored")}


def latents_header(
    latent_shape: tuple[int | None, int | None, int],
    *,
    scaling_factor: float,
    shift_factor: float = 0.0,
    dtype: str = "float16",
    kind: str = "moments",
    flip: str = "pairs",
    conditions: Mapping[str, Field] | None = None,
    provenance: Mapping[str, Any] | None = None,
    **others: Any,
) -> Header:
    """The header of a set of latents.

    Args:
        latent_shape: (height, width, channels) of a latent; None where each shard tells.
        scaling_factor: Latents enter a network as (z - shift_factor) * scaling_factor.
        shift_factor: See `scaling_factor`; 0 for VAEs without one.
        dtype: "float16" or "float32".
        kind: "samples" of the VAE's posterior, or its "moments", sampled anew at each reading.
        flip: "pairs" if each image's mirror image is encoded too, else "none".
        conditions: Fields that tell a network of an image; default: its class, "label".
        provenance: JSON: the VAE's vae_name and vae_sha256, the images' source_name and
            source_fingerprint, and what else decides the bits.
        **others: Of `Header`: split, num_classes, class_names, shard_size.

    Raises:
        ValueError: A value that the format does not have.
    """
    for name, value, valid in (("kind", kind, ("samples", "moments")), ("flip", flip, VERSIONS)):
        if value not in valid:
            raise ValueError(f"{name} of latents must be one of {list(valid)}, not {value!r}")
    latents = Field(
        tuple(latent_shape),
        dtype,
        versions=VERSIONS[flip],
        posterior=kind == "moments",
        shift=shift_factor,
        scale=scaling_factor,
    )
    conditions = {"label": LABEL} if conditions is None else conditions
    return Header(KIND, {KIND: latents, **conditions}, provenance or {}, **others)


@dataclasses.dataclass(frozen=True)
class LatentsOptions:
    """Keys of config.data.latents."""

    path: str = option("", "folder that launch/extract_features.py wrote", expected="that folder")
    moments: str = option("sample", "of the VAE's posterior: sample (at every read) | mean")


def open_latents(
    split: str, *, path: str, moments: str = LatentsOptions.moments, verify_checksums: bool = False
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
    how = (
        f"They are made by\n  {extraction_command(256, str(path), split)}\n"
        "(IMAGES: a folder with a subfolder of images for every class)"
    )
    records = open_records(
        path,
        KIND,
        KIND,
        how=how,
        command="extract the latents again",
        split=split,
        verify_checksums=verify_checksums,
    )
    return Latents(records, moments)


def extraction_command(image_size: Size, out: str, split: str = "train") -> str:
    """The command that makes a set of latents of a folder of images."""
    height, width = as_size(image_size)
    command = ["python", "launch/extract_features.py", "--data=image_folder", "--path=IMAGES"]
    command.append(
        f"--image_size={height}" if height == width else f"--image_size={height}x{width}"
    )
    command.append("--vae=hub:stabilityai/sd-vae-ft-mse")
    command += [f"--split={split}"] if split != "train" else []
    return shlex.join([*command, f"--out={out}"])


def caption_command(image_size: Size, out: str) -> str:
    """The command that makes a set of latents and embeddings of a folder of captioned images."""
    height, width = as_size(image_size)
    size = f"{height}" if height == width else f"{height}x{width}"
    command = ["python", "launch/extract_features.py", "--data=captioned_folder", "--path=PICTURES"]
    command += [f"--image_size={size}", "--vae=FLUX.1-dev", "--text_encoders=FLUX.1-dev"]
    return shlex.join([*command, "--compute_dtype=bfloat16", f"--out={out}"])


class Latents(RecordSource):
    """See `open_latents`. Latents of several sizes are in buckets, one a size."""

    has_buckets = True

    def __init__(self, records: Records, moments: str = "sample"):
        super().__init__(records, KIND, moments)
        self.info = dataclasses.replace(self.info, latents=self.header)
        self._moments = moments

    def require_horizontal_flip(self) -> None:
        """Raise a ValueError unless the mirror images were encoded too."""
        if "mirrored" not in self.header.fields[KIND].versions:
            raise ValueError(
                f"horizontal_flip=True needs latents of the mirrored images, which "
                f"{self.records.folder} lacks (mirroring latents is not the same). Extract them "
                f"again with --flip=pairs, or set horizontal_flip=False."
            )

    def batch(
        self,
        indices: Int[np.ndarray, " b"],
        *,
        draws: UInt64[np.ndarray, " b"] | None = None,
        horizontal_flip: bool = False,
    ) -> Batch:
        """Read several latents, scaled for the network; see `Source.batch`."""
        versions = None
        if horizontal_flip and draws is not None:
            self.require_horizontal_flip()
            mirrored = self.header.fields[KIND].versions.index("mirrored")
            versions = np.where(random_bit(draws), mirrored, 0)
        sampled = draws if self._moments == "sample" else None
        latents = self.records.read(KIND, indices, versions=versions, draws=sampled)
        return {"image": latents, **self.conditions(indices)}
