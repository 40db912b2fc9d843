"""What is kept of a set of images once Inception has seen them: moments, scores, some features."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Shaped

from dit_jax.evaluation.feature_scores import InceptionScore, InceptionScoreAccumulator
from dit_jax.evaluation.features import FeatureExtractor
from dit_jax.evaluation.frechet import GaussianStatistics, TooFewSamplesError
from dit_jax.evaluation.image_streams import ImageSet
from dit_jax.evaluation.images import AnyArray

# Rows gathered before a covariance is updated: each update also touches every entry of it.
_MOMENT_ROWS = 2048
SUBSET_SEED = 0


@runtime_checkable
class Features(Protocol):
    """What Inception makes of a batch.

    Attributes:
        pool: Pooled features [n, dim], for FID, precision, recall and KID.
        spatial: The features of sFID [n, any].
        logits: Of the classes [n, classes], without bias, for the Inception Score.
    """

    pool: Float[AnyArray, "n dim"]
    spatial: Float[AnyArray, "n spatial"]
    logits: Float[AnyArray, "n classes"]


@runtime_checkable
class InceptionLike(FeatureExtractor, Protocol):
    """The part of `InceptionExtractor` that scores need; called, it gives pooled features.

    Two more members are used where they exist. `standard`, true where the weights are the published
    ones of 2015-12-05, allows published moments as reference. `stream(batches)`, an iterator of
    `Features` of all images in order, lets the extractor read a batch while it computes another.
    """

    def features(self, images: Shaped[AnyArray, "n h w c"]) -> Features:
        """All three kinds of features of a batch."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far the reading of features is.

    Attributes:
        what: What is read, e.g. "samples".
        done: Images so far.
        total: Images in all.
        seconds: Since the start, compilation included.
    """

    what: str
    done: int
    total: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Average speed so far."""
        return self.done / max(self.seconds, 1e-9)

    @property
    def eta_seconds(self) -> float:
        """Time left at that speed."""
        return (self.total - self.done) / max(self.images_per_second, 1e-9)


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class FeatureSummary:
    """Features of a set of images, summarised in one pass.

    Attributes:
        count: Images.
        pool: Moments of the pooled features.
        spatial: Moments of the spatial features.
        inception_score: Of the logits.
        features: Pooled features of a part of the images, in order.
    """

    count: int
    pool: GaussianStatistics
    spatial: GaussianStatistics
    inception_score: InceptionScore | None
    features: Float32[np.ndarray, "m dim"]


def spatial_fingerprint(fingerprint: str) -> str:
    """Identity of an extractor's spatial features, so that they never meet pooled ones."""
    return f"{fingerprint}/spatial"


def summarise(
    extractor: InceptionLike,
    images: ImageSet,
    *,
    batch_size: int = 64,
    keep: int | None = None,
    split_size: int = 5000,
    what: str = "images",
    progress: ProgressCallback | None = None,
    on_batch: Callable[[np.ndarray], None] | None = None,
) -> FeatureSummary:
    """Runs all images through the extractor once, one batch in memory at a time.

    Args:
        extractor: Makes the features.
        images: Any set of images.
        batch_size: Images given to the extractor at once.
        keep: How many images' pooled features to keep (8 KB each), chosen at random with a fixed
            seed; None for all.
        split_size: Of the Inception Score.
        what: Name for progress.
        progress: Called after each batch.
        on_batch: Called with each batch of pixels, e.g. to hash them.

    Raises:
        ValueError: An extractor's output that does not fit, or another number of images than
            announced.
        TooFewSamplesError: No images.
    """
    if images.count < 1:
        raise TooFewSamplesError(f"{images.description} holds no images")
    kept = _kept(images.count, keep)
    features = np.empty((int(kept.sum()), extractor.dim), np.float32)
    pool = _Moments(extractor.dim, extractor.fingerprint)
    spatial = None
    score = InceptionScoreAccumulator(split_size)
    start, done, filled = time.monotonic(), 0, 0
    for found in _features_of(extractor, _watched(images.batches(batch_size), on_batch)):
        size = len(found.pool)
        pooled = _rows(found.pool, size, extractor, extractor.dim)
        spatials = _rows(found.spatial, size, extractor)
        if spatial is None:
            spatial = _Moments(spatials.shape[1], spatial_fingerprint(extractor.fingerprint))
        pool.add(pooled)
        spatial.add(spatials)
        score.update(_rows(found.logits, size, extractor))
        chosen = pooled[kept[done : done + size]]
        features[filled : filled + len(chosen)] = chosen
        filled, done = filled + len(chosen), done + size
        if progress:
            progress(Progress(what, done, images.count, time.monotonic() - start))
    if done != images.count:
        raise ValueError(f"{images.description}: {images.count} images announced, {done} came")
    return FeatureSummary(
        done, pool.result(), spatial.result(), score.result() if done > 1 else None, features
    )


class _Moments:
    """`GaussianStatistics` updated by large batches."""

    def __init__(self, dim: int, fingerprint: str):
        self._statistics = GaussianStatistics(dim, fingerprint)
        self._held: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        self._held.append(rows)
        if sum(map(len, self._held)) >= _MOMENT_ROWS:
            self.result()

    def result(self) -> GaussianStatistics:
        if self._held:
            self._statistics.update(np.concatenate(self._held))
            self._held = []
        return self._statistics


def _kept(count: int, keep: int | None) -> np.ndarray:
    kept = np.ones(count, bool)
    if keep is not None and keep < count:
        kept[:] = False
        kept[np.random.default_rng(SUBSET_SEED).permutation(count)[:keep]] = True
    return kept


def _watched(
    batches: Iterator[np.ndarray], watch: Callable[[np.ndarray], None] | None
) -> Iterator[np.ndarray]:
    for batch in batches:
        if watch:
            watch(batch)
        yield batch


def _features_of(extractor: InceptionLike, batches: Iterator[np.ndarray]) -> Iterator[Features]:
    stream = getattr(extractor, "stream", None)
    if stream is not None:
        yield from stream(batches)
        return
    for batch in batches:
        features = extractor.features(batch)
        if len(features.pool) != len(batch):
            raise ValueError(
                f"feature extractor {extractor.name!r} returned features of {len(features.pool)} "
                f"images for {len(batch)}"
            )
        yield features


def _rows(
    values: AnyArray, count: int, extractor: InceptionLike, dim: int | None = None
) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or len(values) != count or dim not in (None, values.shape[1]):
        raise ValueError(
            f"feature extractor {extractor.name!r} returned shape {list(values.shape)} for {count} "
            f"images; expected [{count}, {dim or 'features'}]"
        )
    return values
