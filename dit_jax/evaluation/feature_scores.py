"""Scores from Inception's features and logits: Inception Score, precision and recall, KID.

FID and sFID are `frechet.frechet_distance` of pooled and of spatial features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int

from dit_jax.evaluation.frechet import TooFewSamplesError
from dit_jax.evaluation.images import AnyArray

# Candidates beyond the k + 1 nearest whose distances are computed exactly.
_SPARE_NEIGHBOURS = 8
_EXACT_ELEMENTS = 1 << 22  # float64 values held while doing so


@dataclass(frozen=True)
class InceptionScore:
    """Mean and population standard deviation over `splits` consecutive parts of the images."""

    mean: float
    std: float
    splits: int


@dataclass(frozen=True)
class PrecisionRecall:
    """Fractions in [0, 1]: of samples in the reference's manifold, and the other way round."""

    precision: float
    recall: float


@dataclass(frozen=True)
class KernelDistance:
    """Mean and population standard deviation over random subsets; may be slightly negative."""

    mean: float
    std: float


class InceptionScoreAccumulator:
    """The Inception Score of logits that arrive in batches; keeps two numbers a class."""

    def __init__(self, split_size: int = 5000):
        """A split is `split_size` consecutive images; the last one may be smaller."""
        if split_size < 1:
            raise ValueError(f"split_size must be at least 1, got {split_size}")
        self._split_size = split_size
        self._count = 0
        self._scores: list[float] = []
        self._probability: np.ndarray | float = 0.0
        self._negative_entropy = 0.0

    def update(self, logits: Float[AnyArray, "n classes"]) -> None:
        """Adds the next images, by their logits.

        Raises:
            ValueError: Not [n, classes], or values that are not finite.
        """
        logits = np.asarray(logits).astype(np.float64)
        if logits.ndim != 2:
            raise ValueError(f"expected logits [n, classes], got shape {logits.shape}")
        if not np.isfinite(logits).all():
            raise ValueError("the logits hold values that are not finite")
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        start = 0
        while start < len(logits):
            part = log_probability[start : start + self._split_size - self._count]
            probability = np.exp(part)
            self._probability = self._probability + probability.sum(axis=0)
            self._negative_entropy += float((probability * part).sum())
            self._count += len(part)
            start += len(part)
            if self._count == self._split_size:
                self._scores.append(self._score_of_split())
                self._count, self._probability, self._negative_entropy = 0, 0.0, 0.0

    def result(self) -> InceptionScore:
        """The score of what was seen so far.

        Raises:
            TooFewSamplesError: No image, or only one.
        """
        scores = [*self._scores, self._score_of_split()] if self._count else self._scores
        if not scores or (len(scores) == 1 and self._count == 1):
            raise TooFewSamplesError("the Inception Score needs at least 2 images")
        return InceptionScore(float(np.mean(scores)), float(np.std(scores)), len(scores))

    def _score_of_split(self) -> float:
        marginal = self._probability / self._count
        positive = marginal[marginal > 0]
        # mean KL(p(y|x) || p(y)) = mean sum p log p - sum p(y) log p(y)
        divergence = self._negative_entropy / self._count - (positive * np.log(positive)).sum()
        return float(np.exp(divergence))


def inception_score(
    logits: Float[AnyArray, "n classes"], *, split_size: int = 5000
) -> InceptionScore:
    """exp(E KL(p(y|x) || p(y))), Salimans et al. 2016, arXiv 1606.03498, split as ADM's evaluator.

    Computed in float64 from log-probabilities, so that a probability of zero costs nothing.

    Args:
        logits: Of each image; ADM's evaluator takes Inception's without their bias.
        split_size: Images a split, in the order given: sorted by class, images score differently.

    Raises:
        TooFewSamplesError: Fewer than 2 images. (Fewer than tens of thousands are scored, but
            score too low.)
    """
    accumulator = InceptionScoreAccumulator(split_size)
    accumulator.update(logits)
    return accumulator.result()


def kernel_distance(
    reference: Float[AnyArray, "n dim"],
    samples: Float[AnyArray, "m dim"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Kernel Inception distance: unbiased squared MMD with the kernel (x.y / dim + 1)^3.

    Bińkowski et al. 2018, arXiv 1801.01401; averaged over random subsets, in float64.

    Args:
        reference: Features of real images.
        samples: Features of generated ones.
        subsets: How many pairs of subsets are drawn.
        subset_size: Images of a subset, drawn without replacement.
        seed: Of the draws.

    Raises:
        TooFewSamplesError: A set is smaller than a subset.
        ValueError: Shapes that do not fit, or options out of range.
    """
    reference, samples = _checked_features(reference, samples)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"expected subsets >= 1 and subset_size >= 2: {subsets}, {subset_size}")
    _require_samples(reference, samples, subset_size, "KID", "a smaller subset_size")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            features[rng.choice(len(features), subset_size, replace=False)].astype(np.float64)
            for features in (reference, samples)
        )
        values.append(_squared_mmd(x, y))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _squared_mmd(x: Float64[np.ndarray, "n dim"], y: Float64[np.ndarray, "n dim"]) -> float:
    size, dim = x.shape

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        base = a @ b.T / dim + 1.0
        return base * base * base

    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return within / (size * (size - 1)) - 2.0 * kernel(x, y).mean()


def precision_recall(
    reference: Float[AnyArray, "n dim"],
    samples: Float[AnyArray, "m dim"],
    *,
    neighbours: int = 3,
    block_rows: int = 1024,
    block_columns: int = 8192,
) -> PrecisionRecall:
    """Improved precision and recall, Kynkäänniemi et al. 2019, arXiv 1904.06991.

    A set's manifold is the union of balls around its features, each as wide as the distance to the
    k-th nearest other feature of that set. Precision is the fraction of samples in the reference's
    manifold, recall that of the reference in the samples'.

    Distances are float32 matrix products, in blocks, on the default device; every comparison
    that their rounding error could turn is made again in float64 from differences. The result is
    hence that of the definition, whatever the device and the blocks.

    Args:
        reference: Features of real images; ADM's evaluator takes pooled features of 10,000.
        samples: Features of generated images (ADM: of all, 50,000).
        neighbours: k.
        block_rows: Memory is about block_rows * block_columns float32.
        block_columns: See there.

    Raises:
        TooFewSamplesError: A set has no k-th neighbour.
        ValueError: Shapes that do not fit, or features that are not finite.
    """
    reference, samples = _checked_features(reference, samples)
    if neighbours < 1 or block_rows < 1 or block_columns < 1:
        raise ValueError("neighbours, block_rows and block_columns must be at least 1")
    _require_samples(reference, samples, neighbours + 1, "precision and recall", "fewer neighbours")
    # Distances do not change, but smaller vectors lose fewer digits to cancellation.
    centre = reference.mean(axis=0, dtype=np.float64)
    real, fake = _Points(reference, centre), _Points(samples, centre)
    blocks = (block_rows, block_columns)
    real_radii, fake_radii = (_squared_radii(p, neighbours, blocks) for p in (real, fake))
    real_margin = np.full(len(reference), np.inf, np.float32)
    fake_margin = np.full(len(samples), np.inf, np.float32)
    for rows, u in real.blocks(block_rows):
        u_radii = _padded(real_radii[rows], len(u[0]))
        for columns, v in fake.blocks(block_columns):
            v_radii = _padded(fake_radii[columns], len(v[0]))
            margins = _smallest_margins(u, u_radii, v, v_radii)
            for margin, which, new in zip(
                (real_margin, fake_margin), (rows, columns), margins, strict=True
            ):
                part = margin[which]
                np.minimum(part, np.asarray(new)[: len(part)], out=part)
    return PrecisionRecall(
        precision=float(_inside(fake, fake_margin, real, real_radii).mean()),
        recall=float(_inside(real, real_margin, fake, fake_radii).mean()),
    )


class _Points:
    """Features, their centred copy for float32 products, and the rounding error of these."""

    def __init__(self, features: np.ndarray, centre: Float64[np.ndarray, " dim"]):
        self.features = features
        # In parts: a float64 copy of 50,000 features would take 800 MB.
        self.centred = np.empty(features.shape, np.float32)
        for start in range(0, len(features), 4096):
            self.centred[start : start + 4096] = features[start : start + 4096] - centre
        self.norms = np.einsum("nd,nd->n", self.centred, self.centred)
        # Rounding errors of a float32 sum of d products grow like sqrt(d); 4 is for safety.
        self.unit_error = max(16.0, 4.0 * features.shape[1] ** 0.5) * np.finfo(np.float32).eps

    def blocks(self, limit: int) -> Iterator[tuple[slice, tuple[np.ndarray, np.ndarray]]]:
        """Slices of up to `limit` points with (centred features, squared norms).

        All of one size, the last filled up by points at infinity: equal shapes keep the compiled
        programs to one.
        """
        count = len(self.centred)
        size = -(-count // -(-count // limit))
        for start in range(0, count, size):
            rows = slice(start, start + size)
            yield rows, (_padded(self.centred[rows], size), _padded(self.norms[rows], size, np.inf))

    def tolerance(self, others: _Points) -> Float32[np.ndarray, " n"]:
        """Bound on the error of this set's float32 squared distances to another's."""
        return self.unit_error * (self.norms + others.norms.max())


def _padded(values: np.ndarray, size: int, fill: float = 0.0) -> np.ndarray:
    padded = np.full((size, *values.shape[1:]), fill, np.float32)
    padded[: len(values)] = values
    return padded


def _squared_distances(u, v) -> Float[Array, "n m"]:
    (a, a_norms), (b, b_norms) = u, v
    products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(a_norms[:, None] + b_norms[None, :] - 2.0 * products, 0.0)


@jax.jit
def _smallest_margins(u, u_radii, v, v_radii):
    distances = _squared_distances(u, v)
    return (distances - v_radii[None, :]).min(axis=1), (distances - u_radii[:, None]).min(axis=0)


@partial(jax.jit, donate_argnums=(0, 1))
def _merge_nearest(distances, indices, u, v, offset):
    """Keeps the nearest of those known so far and those of one more block."""
    fresh = _squared_distances(u, v)
    numbers = jnp.broadcast_to(offset + jnp.arange(fresh.shape[1]), fresh.shape)
    values, places = jax.lax.top_k(-jnp.concatenate([distances, fresh], axis=1), distances.shape[1])
    numbers = jnp.concatenate([indices, numbers], axis=1)
    return -values, jnp.take_along_axis(numbers, places, axis=1)


def _squared_radii(
    points: _Points, neighbours: int, blocks: tuple[int, int]
) -> Float64[np.ndarray, " n"]:
    """Squared distance of each point to its k-th nearest other one, exact."""
    count = len(points.features)
    wanted = min(count, neighbours + 1 + _SPARE_NEIGHBOURS)
    tolerance = points.tolerance(points)
    radii = np.empty(count)
    for rows, u in points.blocks(blocks[0]):
        shape = (len(u[0]), wanted)
        nearest = jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32)
        for columns, v in points.blocks(blocks[1]):
            nearest = _merge_nearest(*nearest, u, v, jnp.int32(columns.start))
        rounded, indices = (np.asarray(x)[: len(radii[rows])] for x in nearest)
        exact = _exact_distances(points.features, rows.start, indices)
        # The point itself is among them, at distance 0.
        radii[rows] = np.sort(exact, axis=1)[:, neighbours]
        unseen = rounded[:, -1] - tolerance[rows]
        for row in np.flatnonzero((unseen < radii[rows]) & (wanted < count)):
            index = rows.start + row
            every = _exact_to_all(points.features[index], points.features)
            radii[index] = np.partition(every, neighbours)[neighbours]
    return radii


def _inside(
    points: _Points,
    margin: Float32[np.ndarray, " n"],
    centres: _Points,
    squared_radii: Float64[np.ndarray, " m"],
) -> Bool[np.ndarray, " n"]:
    """Whether each point lies in a ball; `margin` is the float32 estimate of distance - radius."""
    # Twice: the radii were rounded to float32 for that estimate.
    tolerance = 2.0 * points.tolerance(centres)
    inside = margin <= 0
    for index in np.flatnonzero(np.abs(margin) <= tolerance):
        rounded = (
            points.norms[index] + centres.norms - 2.0 * centres.centred @ points.centred[index]
        )
        doubtful = np.flatnonzero(rounded - squared_radii <= 2.0 * tolerance[index])
        exact = _exact_to_all(points.features[index], centres.features[doubtful])
        inside[index] = (exact <= squared_radii[doubtful]).any()
    return inside


def _exact_distances(
    features: np.ndarray, start: int, indices: Int[np.ndarray, "n k"]
) -> Float64[np.ndarray, "n k"]:
    exact = np.empty(indices.shape)
    step = max(1, _EXACT_ELEMENTS // (indices.shape[1] * features.shape[1]))
    for first in range(0, len(indices), step):
        chosen = indices[first : first + step]
        points = features[start + first : start + first + len(chosen)].astype(np.float64)
        exact[first : first + step] = np.square(features[chosen] - points[:, None]).sum(axis=-1)
    return exact


def _exact_to_all(point: np.ndarray, features: np.ndarray) -> Float64[np.ndarray, " n"]:
    step = max(1, _EXACT_ELEMENTS // features.shape[1])
    parts = [
        np.square(features[first : first + step] - point.astype(np.float64)).sum(axis=-1)
        for first in range(0, len(features), step)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _checked_features(
    reference: AnyArray, samples: AnyArray
) -> tuple[Float[np.ndarray, "n dim"], Float[np.ndarray, "m dim"]]:
    reference, samples = np.asarray(reference), np.asarray(samples)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            "expected reference features [n, dim] and sample features [m, dim] of one extractor, "
            f"got {list(reference.shape)} and {list(samples.shape)}"
        )
    for what, features in (("reference", reference), ("sample", samples)):
        if not np.isfinite(features).all():
            raise ValueError(f"the {what} features hold values that are not finite")
    return reference, samples


def _require_samples(
    reference: np.ndarray, samples: np.ndarray, needed: int, score: str, remedy: str
) -> None:
    for what, features in (("reference", reference), ("sample", samples)):
        if len(features) < needed:
            raise TooFewSamplesError(
                f"{score} needs at least {needed} {what} images, got {len(features)}. Use more, or "
                f"{remedy}."
            )
