"""Images and a reference to one stamped record of FID, sFID, IS, precision, recall and KID."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dit_jax.evaluation.feature_scores import kernel_distance, precision_recall
from dit_jax.evaluation.feature_summary import (
    FeatureSummary,
    InceptionLike,
    ProgressCallback,
    summarise,
)
from dit_jax.evaluation.frechet import TooFewSamplesError, frechet_distance
from dit_jax.evaluation.image_streams import ImageSet
from dit_jax.evaluation.record import build_record
from dit_jax.evaluation.reference import ReferenceStatistics

SCORES = ("fid", "sfid", "inception_score", "precision_recall", "kid")
"""Names that `ScoreSettings.scores` may hold."""


@dataclass(frozen=True)
class ScoreSettings:
    """Which scores, and how; by default as ADM's evaluator, and KID as in its paper.

    Attributes:
        scores: Of `SCORES`; None for all that the reference permits.
        split_size: Images a split of the Inception Score.
        neighbours: k of precision and recall.
        kid_subsets: Random subsets that KID averages over.
        kid_subset_size: Images of each.
        kid_seed: Of their draw.
        allow_singular: See `frechet_distance`: FID of fewer images than features + 1.
    """

    scores: tuple[str, ...] | None = None
    split_size: int = 5000
    neighbours: int = 3
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    kid_seed: int = 0
    allow_singular: bool = False

    def __post_init__(self) -> None:
        """Refuses unknown scores and sizes below 1."""
        unknown = sorted(set(self.scores or ()) - set(SCORES))
        if unknown or self.scores == ():
            raise ValueError(f"scores {self.scores}: expected some of {', '.join(SCORES)}")
        sizes = (self.split_size, self.neighbours, self.kid_subsets, self.kid_subset_size)
        if min(sizes) < 1:
            raise ValueError(f"sizes and numbers must be at least 1: {self}")


def evaluate_images(
    images: ImageSet,
    reference: ReferenceStatistics,
    extractor: InceptionLike,
    *,
    settings: ScoreSettings | None = None,
    rounding: str | None = None,
    seeds: int | Sequence[int] | None = None,
    sampling: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Scores images against a reference, reading each image once; the result is for JSON.

    Scores (`record["scores"]`), None where the reference does not permit one (`record["provenance"]
    ["not_computed"]` says why):
        fid: Fréchet distance of pooled features.
        sfid: Fréchet distance of spatial features.
        inception_score: {"mean", "std", "splits"}.
        precision, recall: Improved ones, of pooled features.
        kid: {"mean", "std"}.

    Args:
        images: `NpzImages`, `BatchImages`, `FolderImages`, `SourceImages`.
        reference: From `open_reference`, of the same extractor.
        extractor: Makes the features.
        settings: Which scores, and how.
        rounding: How the images became bytes; None takes the rule that `images` applies, or says
            that they came as bytes.
        seeds: Of the samples; None where not known.
        sampling: How they were sampled (solver, steps, guidance, ...); None where not known.
        provenance: More to record: vae, checkpoint, training step, ...
        batch_size: Images given to the extractor at once.
        progress: Called after each batch.

    Raises:
        FeatureMismatchError: The reference is another extractor's.
        TooFewSamplesError: Too few images for a score; before any of them is read.
        ValueError: A score was asked for that the reference does not permit, or comes out not
            finite.
    """
    settings = settings or ScoreSettings()
    reference.require_extractor(extractor)
    chosen, missing = _choose_scores(settings, reference)
    _require_enough(chosen, settings, images.count, reference)
    digest = hashlib.sha256()

    def hash_pixels(batch: np.ndarray) -> None:
        if not digest_started:
            # The same as `content_hash` of all images in one array.
            digest.update(f"{batch.dtype.str}{(images.count, *batch.shape[1:])}".encode())
            digest_started.append(True)
        digest.update(np.ascontiguousarray(batch).data)

    digest_started: list[bool] = []
    keeps_features = {"precision_recall", "kid"} & set(chosen)
    summary = summarise(
        extractor,
        images,
        batch_size=batch_size,
        keep=None if keeps_features else 0,
        split_size=settings.split_size,
        what="samples",
        progress=progress,
        on_batch=hash_pixels,
    )
    scores = compute_scores(summary, reference, settings, chosen)
    _require_finite(scores)
    return build_record(
        scores,
        extractor=extractor,
        reference_hash=reference.content_hash,
        sample_hash=digest.hexdigest(),
        counts={
            "samples": summary.count,
            "reference_features": 0 if reference.features is None else len(reference.features),
        }
        | ({} if reference.count is None else {"reference_images": reference.count}),
        seeds=seeds,
        rounding=rounding or getattr(images, "rounding", "unknown: given as bytes"),
        provenance={
            "standard_features": bool(getattr(extractor, "standard", False)),
            "images": images.description,
            "reference": reference.as_dict(),
            "settings": asdict(settings) | {"scores": list(chosen)},
            "not_computed": missing,
            "sampling": None if sampling is None else dict(sampling),
        }
        | dict(provenance or {}),
    )


def compute_scores(
    summary: FeatureSummary,
    reference: ReferenceStatistics,
    settings: ScoreSettings,
    chosen: Sequence[str] = SCORES,
) -> dict[str, Any]:
    """The scores of `evaluate_images` from features that were read already."""
    scores: dict[str, Any] = dict.fromkeys(
        ("fid", "sfid", "inception_score", "precision", "recall", "kid")
    )
    if "fid" in chosen:
        scores["fid"] = frechet_distance(
            summary.pool, reference.pool, allow_singular=settings.allow_singular
        )
    if "sfid" in chosen:
        scores["sfid"] = frechet_distance(
            summary.spatial, reference.spatial, allow_singular=settings.allow_singular
        )
    if "inception_score" in chosen:
        scores["inception_score"] = asdict(summary.inception_score)
    if "precision_recall" in chosen:
        scores |= asdict(
            precision_recall(reference.features, summary.features, neighbours=settings.neighbours)
        )
    if "kid" in chosen:
        distance = kernel_distance(
            reference.features,
            summary.features,
            subsets=settings.kid_subsets,
            subset_size=settings.kid_subset_size,
            seed=settings.kid_seed,
        )
        scores["kid"] = asdict(distance)
    return scores


def format_scores(record: Mapping[str, Any]) -> str:
    """The scores of a record, one a line, for a terminal."""
    scores = record["scores"]
    lines = []
    for name, label in (("fid", "FID"), ("sfid", "sFID")):
        if scores.get(name) is not None:
            lines.append(f"{label:<16} {scores[name]:.4f}")
    if scores.get("inception_score"):
        found = scores["inception_score"]
        lines.append(f"{'Inception Score':<16} {found['mean']:.3f} ± {found['std']:.3f}")
    for name in ("precision", "recall"):
        if scores.get(name) is not None:
            lines.append(f"{name.capitalize():<16} {scores[name]:.4f}")
    if scores.get("kid"):
        lines.append(f"{'KID':<16} {scores['kid']['mean']:.6f} ± {scores['kid']['std']:.6f}")
    lines += [
        f"{name}: not computed, {reason}"
        for name, reason in record["provenance"].get("not_computed", {}).items()
    ]
    return "\n".join(lines)


def _choose_scores(
    settings: ScoreSettings, reference: ReferenceStatistics
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The scores to compute, and those among all that the reference does not permit, with why."""
    impossible = {}
    if reference.spatial is None:
        impossible["sfid"] = "the reference publishes no spatial moments (mu_s, sigma_s)"
    if reference.features is None:
        for name in ("precision_recall", "kid"):
            impossible[name] = "the reference holds moments only, and this needs images"
    if settings.scores is None:
        return tuple(name for name in SCORES if name not in impossible), impossible
    for name in settings.scores:
        if name in impossible:
            raise ValueError(f"{name} of {reference.description}: {impossible[name]}")
    return tuple(name for name in SCORES if name in settings.scores), {}


def _require_enough(
    chosen: Sequence[str], settings: ScoreSettings, count: int, reference: ReferenceStatistics
) -> None:
    """Refuses at once what would be refused after hours of reading features."""
    needed = {}
    if not settings.allow_singular:
        needed["fid"] = (reference.pool.dim + 1, "--allow_singular")
        if reference.spatial is not None:
            needed["sfid"] = (reference.spatial.dim + 1, "--allow_singular")
    else:
        needed["fid"] = needed["sfid"] = (2, "")
    needed["inception_score"] = (2, "")
    needed["precision_recall"] = (settings.neighbours + 1, "fewer neighbours")
    needed["kid"] = (settings.kid_subset_size, "a smaller kid_subset_size")
    features = 0 if reference.features is None else len(reference.features)
    available = {"precision_recall": features, "kid": features}
    # Published moments count as enough: their number is not known.
    available |= dict.fromkeys(("fid", "sfid"), reference.pool.count)
    for name in chosen:
        least, remedy = needed[name]
        for what, have in (("sample", count), ("reference", available.get(name, least))):
            if have < least:
                raise TooFewSamplesError(
                    f"{name} needs at least {least} {what} images, there are {have}. Use more"
                    + (f", or {remedy} for a quick look" if remedy else "")
                    + ", or leave it out of the scores."
                )


def _require_finite(scores: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            _require_finite(value, f"{prefix}{name}.")
        elif value is not None and not math.isfinite(value):
            raise ValueError(
                f"the score {prefix}{name} is {value}: the features are unusable, check the "
                "extractor's weights"
            )
