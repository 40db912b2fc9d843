"""Reference statistics: what samples are compared with, computed once and kept by content.

A reference comes from images (a folder, an .npz, a data source) or from published moments. It
carries the fingerprint of the extractor that made it, and is refused under another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dit_jax.atomic import atomic_file
from dit_jax.data.registry import open_source
from dit_jax.evaluation.feature_summary import (
    InceptionLike,
    ProgressCallback,
    spatial_fingerprint,
    summarise,
)
from dit_jax.evaluation.frechet import FeatureMismatchError, GaussianStatistics
from dit_jax.evaluation.image_streams import (
    FolderImages,
    ImageSet,
    NpzImages,
    SourceImages,
    hash_files,
)
from dit_jax.untrusted import Fields, FileRefusedError, npz_names, parse_json, read_npz, shown

FORMAT = "dit-jax-reference/1"
FEATURE_LIMIT = 10_000
"""Images whose features precision, recall and KID use, as many as ADM's reference files hold."""

MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
"""ADM's names: mean and covariance of pooled, then of spatial features."""


@dataclass(frozen=True)
class ReferenceStatistics:
    """What is known of the reference images.

    Attributes:
        pool: Moments of pooled features.
        spatial: Moments of spatial features; None where they were not published.
        features: Pooled features of up to `FEATURE_LIMIT` images; None without images.
        fingerprint: Of the extractor.
        content_hash: SHA-256 of what it was made of: the file, a folder's names and bytes, or a
            data source's fingerprint.
        description: Where it came from.
        origin: "images", or "published moments" (the features, if any, are of images).
        count: Images behind the moments; None where the publisher does not say.
        preprocessing: What was done to the images on reading.
    """

    pool: GaussianStatistics
    spatial: GaussianStatistics | None
    features: Float32[np.ndarray, "m dim"] | None
    fingerprint: str
    content_hash: str
    description: str
    origin: str
    count: int | None
    preprocessing: str

    def require_extractor(self, extractor: InceptionLike) -> None:
        """Raises a FeatureMismatchError if another extractor made these features."""
        _require_fingerprint(self.fingerprint, self.description, extractor)

    def as_dict(self) -> dict[str, Any]:
        """For records."""
        return {
            "description": self.description,
            "origin": self.origin,
            "images": self.count,
            "images_with_features": 0 if self.features is None else len(self.features),
            "preprocessing": self.preprocessing,
            "content_hash": self.content_hash,
        }


def open_reference(
    reference: str | os.PathLike,
    extractor: InceptionLike,
    *,
    split: str = "train",
    image_size: int | None = None,
    resize: str = "none",
    data_dir: str | None = None,
    ignore_moments: bool = False,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 64,
    progress: ProgressCallback | None = None,
) -> ReferenceStatistics:
    """The reference that a command line names.

    Args:
        reference: A folder of images; an .npz of ADM's (images in `arr_0`, moments, or both) or of
            `save_reference`; or "tfds:NAME".
        extractor: Makes the features.
        split: Of a TFDS set, its own names included ("train[:50%]").
        image_size: Side in pixels, of a folder or a TFDS set.
        resize: "adm" or "none", of a folder or a TFDS set.
        data_dir: Where TFDS keeps its sets; None for its default.
        ignore_moments: Compute an .npz's moments from its images although it publishes some.
        cache_dir: Where computed statistics are kept; None for nowhere.
        batch_size: Images given to the extractor at once.
        progress: Called after each batch.

    Raises:
        FileNotFoundError: There is no such file, folder or data set.
        FeatureMismatchError: The statistics are another extractor's.
        ValueError: Damaged or unsuitable files, options that would do nothing.
    """
    name = os.fspath(reference)
    is_tfds = name.startswith("tfds:")
    path = Path(name).expanduser()
    options = {"cache_dir": cache_dir, "batch_size": batch_size, "progress": progress}
    if not is_tfds and (split != "train" or data_dir is not None):
        raise ValueError(f"{name}: split and data_dir are for tfds:NAME and would do nothing")
    if ignore_moments and (is_tfds or path.is_dir()):
        raise ValueError(f"{name}: ignore_moments is for .npz files and would do nothing")
    if is_tfds:
        source = open_source(
            "tfds",
            split,
            dataset=name.removeprefix("tfds:"),
            data_dir=data_dir,
            image_size=image_size,
            resize=resize,
        )
        return reference_from_images(SourceImages(source), extractor, **options)
    if path.is_dir():
        images = FolderImages(path, image_size=image_size, resize=resize)
        return reference_from_images(images, extractor, **options)
    if not path.is_file():
        raise FileNotFoundError(
            f"no reference {name}: expected a folder of images, an .npz file, or tfds:NAME"
        )
    if image_size is not None or resize != "none":
        raise ValueError(
            f"{name}: the images of an .npz are taken as they are; leave out image_size and resize"
        )
    return reference_from_npz(path, extractor, ignore_moments=ignore_moments, **options)


def reference_from_images(
    images: ImageSet,
    extractor: InceptionLike,
    *,
    feature_limit: int = FEATURE_LIMIT,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 64,
    progress: ProgressCallback | None = None,
) -> ReferenceStatistics:
    """Computes statistics of images, or reads what an earlier call kept of the same ones.

    Args:
        images: Read once, in batches.
        extractor: Makes the features.
        feature_limit: Images whose features are kept, chosen at random with a fixed seed.
        cache_dir: Keeps the result under a hash of contents, extractor and preprocessing.
        batch_size: Images given to the extractor at once.
        progress: Called after each batch.
    """
    cache = None if cache_dir is None else Path(cache_dir)
    content_hash = images.content_hash(cache)
    kept = None
    if cache is not None:
        parts = [FORMAT, content_hash, extractor.fingerprint, images.preprocessing, feature_limit]
        kept = cache / f"reference-{_sha256(parts)[:32]}.npz"
        if kept.is_file():
            # The same content may have another name by now.
            found = load_reference(kept, extractor)
            return replace(found, description=images.description)
    summary = summarise(
        extractor,
        images,
        batch_size=batch_size,
        keep=feature_limit,
        what=f"reference {images.description}",
        progress=progress,
    )
    reference = ReferenceStatistics(
        pool=summary.pool,
        spatial=summary.spatial,
        features=summary.features,
        fingerprint=extractor.fingerprint,
        content_hash=content_hash,
        description=images.description,
        origin="images",
        count=summary.count,
        preprocessing=images.preprocessing,
    )
    if kept is not None and reference.count > 1:
        save_reference(kept, reference, overwrite=True)
    return reference


def reference_from_npz(
    path: str | os.PathLike,
    extractor: InceptionLike,
    *,
    ignore_moments: bool = False,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 64,
    progress: ProgressCallback | None = None,
) -> ReferenceStatistics:
    """The reference in an .npz: images in `arr_0`, ADM's moments, both, or `save_reference`'s.

    As in ADM's evaluator moments go before images, for FID and sFID; images are still what
    precision, recall and KID are computed from. Published moments name no extractor. They are
    accepted for the standard Inception alone, whose features they are by convention.

    Raises:
        FeatureMismatchError: The file is of another extractor, or holds moments and `extractor` is
            not the standard Inception.
        ValueError: Damaged, or neither images nor moments.
    """
    path = Path(path)
    names = _names_in(path)
    if "metadata" in names:
        return load_reference(path, extractor)
    has_moments = {"mu", "sigma"} <= set(names) and not ignore_moments
    options = {"cache_dir": cache_dir, "batch_size": batch_size, "progress": progress}
    if not has_moments:
        return reference_from_images(NpzImages(path), extractor, **options)
    if not getattr(extractor, "standard", False):
        remedy = (
            "compute them from its images instead (ignore_moments)"
            if "arr_0" in names
            else "give the reference's images instead"
        )
        raise FeatureMismatchError(
            f"{path} holds published moments, which do not say what made them; by convention it is "
            f"the Inception of 2015-12-05. {extractor.name!r} ({extractor.fingerprint[:12]}) does "
            f"not have its weights: load them, or {remedy}."
        )
    images = (
        reference_from_images(NpzImages(path), extractor, **options) if "arr_0" in names else None
    )
    arrays = _read_arrays(path, [name for name in MOMENTS if name in names])
    fingerprint = extractor.fingerprint
    pool = _published(path, arrays, "mu", "sigma", fingerprint)
    if pool.dim != extractor.dim:
        raise FeatureMismatchError(
            f"{path}: moments of {pool.dim} features; {extractor.name!r} has {extractor.dim}"
        )
    spatial = None
    if "mu_s" in arrays and "sigma_s" in arrays:
        spatial = _published(path, arrays, "mu_s", "sigma_s", spatial_fingerprint(fingerprint))
    cache = None if cache_dir is None else Path(cache_dir)
    return ReferenceStatistics(
        pool=pool,
        spatial=spatial,
        features=images.features if images else None,
        fingerprint=fingerprint,
        content_hash=hash_files(path.parent, [path.name], cache),
        description=str(path),
        origin="published moments",
        count=None,
        preprocessing="as published",
    )


def save_reference(
    path: str | os.PathLike, reference: ReferenceStatistics, *, overwrite: bool = False
) -> Path:
    """Writes an .npz without pickles, atomically; ADM's evaluator reads its moments."""
    arrays: dict[str, Any] = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    metadata = reference.as_dict() | {
        "format": FORMAT,
        "fingerprint": reference.fingerprint,
        "nominal_count": reference.pool.count,
    }
    with atomic_file(path, overwrite=overwrite) as file:
        np.savez(file, metadata=np.array(json.dumps(metadata)), **arrays)
    return Path(path)


def load_reference(path: str | os.PathLike, extractor: InceptionLike) -> ReferenceStatistics:
    """Reads a file of `save_reference`.

    Raises:
        FeatureMismatchError: Another extractor made it.
        ValueError: Damaged, or another kind of file.
    """
    path = Path(path)
    names = _names_in(path)
    arrays = _read_arrays(path, [n for n in ("metadata", "features", *MOMENTS) if n in names])
    if "metadata" not in arrays:
        raise ValueError(f"{path} is no file of reference statistics: it has no 'metadata'")
    try:
        metadata = parse_json(str(arrays["metadata"]), f"'metadata' of {path}")
    except FileRefusedError as error:
        raise ValueError(f"{path} is no file of reference statistics: {error}") from error
    fields, kind = Fields(metadata, path), metadata.get("format")
    if kind != FORMAT:
        raise ValueError(f"{path} has the format {shown(kind)}; this version reads {FORMAT!r}")
    fingerprint, nominal = fields.text("fingerprint"), fields.count("nominal_count", 1)
    _require_fingerprint(fingerprint, str(path), extractor)
    spatial = None
    if "mu_s" in arrays:
        identity = spatial_fingerprint(fingerprint)
        spatial = _published(path, arrays, "mu_s", "sigma_s", identity, nominal)
    return ReferenceStatistics(
        pool=_published(path, arrays, "mu", "sigma", fingerprint, nominal),
        spatial=spatial,
        features=arrays.get("features"),
        fingerprint=fingerprint,
        content_hash=fields.text("content_hash"),
        description=fields.text("description"),
        origin=fields.text("origin"),
        count=None if metadata.get("images") is None else fields.count("images"),
        preprocessing=fields.text("preprocessing"),
    )


def _published(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    mean: str,
    covariance: str,
    fingerprint: str,
    count: int | None = None,
) -> GaussianStatistics:
    try:
        mu, sigma = arrays[mean], arrays[covariance]
        # A covariance that was published is taken at its word: the smallest count that spans it.
        nominal = len(np.atleast_1d(mu)) + 1 if count is None else count
        return GaussianStatistics.from_moments(mu, sigma, nominal, fingerprint)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {mean!r} and {covariance!r} are unusable: {error}") from error


def _require_fingerprint(fingerprint: str, description: str, extractor: InceptionLike) -> None:
    if fingerprint != extractor.fingerprint:
        raise FeatureMismatchError(
            f"the reference {description} was made by a feature extractor with fingerprint "
            f"{fingerprint!r}, the samples are measured by {extractor.name!r} with "
            f"{extractor.fingerprint!r}. Compute the reference again, from its images, with the "
            "extractor in use."
        )


def _names_in(path: Path) -> list[str]:
    try:
        return npz_names(path)
    except (OSError, FileRefusedError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is not a readable .npz: {error}") from error


def _read_arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        return read_npz(path, names)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npz of plain arrays: {error}") from error


def _sha256(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
