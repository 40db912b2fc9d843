"""The record of a score: the numbers, and all that is needed to know what they mean."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax.evaluation.features import FeatureExtractor
from dit_jax.evaluation.images import AnyArray

RECORD_FORMAT = "dit-jax-evaluation/1"


def content_hash(*arrays: AnyArray) -> str:
    """SHA-256, in hexadecimal, of the types, shapes and values of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()


@cache
def code_version() -> str:
    """This code's version: `git describe` in a checkout of it, else the installed package's."""
    package = Path(__file__).resolve().parents[1]
    # Asking for our own file keeps a repository that merely surrounds an installation quiet.
    tracked = _git(package, "ls-files", "--error-unmatch", "evaluation/record.py")
    described = tracked and _git(package, "describe", "--always", "--dirty", "--tags")
    if described:
        return described
    try:
        return importlib.metadata.version("dit-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def build_record(
    scores: Mapping[str, Any],
    *,
    extractor: FeatureExtractor,
    reference_hash: str,
    sample_hash: str,
    counts: Mapping[str, int],
    seeds: int | Sequence[int] | None,
    rounding: str,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Puts scores and their provenance into one dictionary that JSON can hold.

    Args:
        scores: Names to numbers (or nested dictionaries of them). A score to come adds a name here.
        extractor: What made the features.
        reference_hash: `content_hash` of the reference images or statistics.
        sample_hash: `content_hash` of the samples as bytes.
        counts: How many images of each kind.
        seeds: Of the samples; None where they are not known.
        rounding: The rule by which samples became bytes.
        provenance: More of it from the caller: sampler, steps, guidance, checkpoint.

    Raises:
        ValueError: `provenance` uses a name that belongs to this record.
    """
    stamp: dict[str, Any] = {
        "feature_extractor": {
            "name": extractor.name,
            "fingerprint": extractor.fingerprint,
            "dim": int(extractor.dim),
        },
        "reference_hash": reference_hash,
        "sample_hash": sample_hash,
        "seeds": seeds if seeds is None else [int(seed) for seed in np.atleast_1d(seeds)],
        "rounding": rounding,
        "code_version": code_version(),
        "jax_version": jax.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    taken = sorted(set(stamp) & set(provenance or {}))
    if taken:
        raise ValueError(f"provenance may not set {taken}: the record does")
    return {
        "format": RECORD_FORMAT,
        "scores": dict(scores),
        "counts": {name: int(count) for name, count in counts.items()},
        "provenance": stamp | dict(provenance or {}),
    }


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
