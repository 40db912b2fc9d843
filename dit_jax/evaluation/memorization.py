"""Memorisation: how close do samples come to training images, compared with unseen real images?

A model that copies its training set has a splendid Fréchet distance. Its samples, though, lie
closer to the training images than real held-out images do; that is what is measured, in pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from dit_jax.evaluation.images import AnyArray, to_float

SUSPICIOUS_RATIO = 0.5
"""Typical samples twice as close to the training set as unseen real images are."""

SUSPICIOUS_FRACTION = 0.25
"""A quarter of the samples closer than all but 1 % of unseen real images (expected: 0.01)."""

COPY_DISTANCE = 1.0 / 255.0
"""Half a byte step in [-1, 1]: below it two images are the same after rounding."""


@dataclass(frozen=True)
class NearestNeighbours:
    """For each query its nearest reference image.

    Attributes:
        distance: Root mean square difference over all pixel values, images in [-1, 1]: 0 for a
            copy, 2 for black against white. [n], float32.
        index: Position of that image in the references. [n], int32.
    """

    distance: Float32[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class MemorizationSummary:
    """Nearest-training-image distances of samples against those of held-out real images.

    Attributes:
        sample_median: Median over the samples, unit as in `NearestNeighbours`.
        heldout_median: Median over the held-out real images.
        ratio: sample_median / heldout_median. About 1 for samples as new as real images.
        heldout_first_percentile: 1 % of the held-out images are closer to the training set.
        fraction_below_first_percentile: Fraction of samples closer than that; 0.01 is expected.
        fraction_copies: Fraction of samples equal to a training image after rounding to bytes.
        suspected: ratio < SUSPICIOUS_RATIO, or fraction_below_first_percentile >
            SUSPICIOUS_FRACTION. A hint, not a proof: blurred samples are close to everything.
        num_samples: Samples measured.
        num_heldout: Held-out images measured.
        num_train: Training images searched.
        per_class: Whether neighbours were sought among images of the same label only.
    """

    sample_median: float
    heldout_median: float
    ratio: float
    heldout_first_percentile: float
    fraction_below_first_percentile: float
    fraction_copies: float
    suspected: bool
    num_samples: int
    num_heldout: int
    num_train: int
    per_class: bool

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def nearest_neighbours(
    queries: AnyArray,
    references: AnyArray,
    *,
    query_labels: AnyArray | None = None,
    reference_labels: AnyArray | None = None,
    chunk_size: int = 4096,
) -> NearestNeighbours:
    """Finds the nearest reference image of each query by pixel distance, a chunk at a time.

    Args:
        queries: uint8 or [-1, 1] images [n, h, w, c].
        references: Images [m, h, w, c] to search.
        query_labels: Integer labels [n]; with them only references of the same are searched.
        reference_labels: Integer labels [m], given if and only if `query_labels` are.
        chunk_size: At most so many queries times so many references are held at once.

    Raises:
        ValueError: Shapes differ, there is nothing to search, or a label has no reference image.
    """
    queries, references = to_float(queries), to_float(references)
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"images of different shapes: {queries.shape[1:]} against {references.shape[1:]}"
        )
    if len(references) == 0:
        raise ValueError("no reference images to search")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    query_labels, reference_labels = _paired_labels(
        query_labels, reference_labels, len(queries), len(references)
    )
    flat_queries = queries.reshape(len(queries), -1)
    flat_references = references.reshape(len(references), -1)
    # Smaller numbers, smaller cancellation in |q|^2 - 2 q.r + |r|^2.
    centre = flat_references.mean(axis=0, dtype=np.float64).astype(np.float32)
    index = np.empty(len(queries), np.int32)
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, start + chunk_size)
        index[rows] = _search(
            flat_queries[rows] - centre[None],
            flat_references,
            centre,
            query_labels[rows],
            reference_labels,
            chunk_size,
        )
    # The expanded square found the neighbour; its distance is computed anew, exact for copies.
    distance = np.empty(len(queries), np.float32)
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, start + chunk_size)
        difference = flat_queries[rows].astype(np.float64) - flat_references[index[rows]]
        distance[rows] = np.sqrt(np.square(difference).mean(axis=1))
    return NearestNeighbours(distance, index)


def memorization_summary(
    samples: AnyArray,
    train_images: AnyArray,
    heldout_images: AnyArray,
    *,
    sample_labels: AnyArray | None = None,
    train_labels: AnyArray | None = None,
    heldout_labels: AnyArray | None = None,
    chunk_size: int = 4096,
) -> MemorizationSummary:
    """Compares how near samples and held-out real images come to the training images.

    Args:
        samples: Generated images, uint8 or [-1, 1], [n, h, w, c].
        train_images: What the model was trained on.
        heldout_images: Real images of the same distribution it never saw.
        sample_labels: With all three labels, neighbours are sought within the class.
        train_labels: See `sample_labels`.
        heldout_labels: See `sample_labels`.
        chunk_size: As in `nearest_neighbours`.

    Raises:
        ValueError: No images, images of different shapes, or labels for some sets only.
    """
    given = [labels is not None for labels in (sample_labels, train_labels, heldout_labels)]
    if any(given) and not all(given):
        raise ValueError("give the labels of samples, training and held-out images, or none")
    if len(samples) == 0 or len(heldout_images) == 0:
        raise ValueError(
            f"nothing to compare: {len(samples)} samples and {len(heldout_images)} held-out images"
        )
    search = partial(
        nearest_neighbours,
        references=train_images,
        reference_labels=train_labels,
        chunk_size=chunk_size,
    )
    sample = search(samples, query_labels=sample_labels).distance
    heldout = search(heldout_images, query_labels=heldout_labels).distance
    sample_median, heldout_median = float(np.median(sample)), float(np.median(heldout))
    first_percentile = float(np.percentile(heldout, 1))
    below = float((sample < first_percentile).mean())
    # Held-out images that are themselves copies (duplicates in the data) leave nothing to compare.
    ratio = sample_median / heldout_median if heldout_median > 0 else 1.0
    return MemorizationSummary(
        sample_median=sample_median,
        heldout_median=heldout_median,
        ratio=ratio,
        heldout_first_percentile=first_percentile,
        fraction_below_first_percentile=below,
        fraction_copies=float((sample < COPY_DISTANCE).mean()),
        suspected=ratio < SUSPICIOUS_RATIO or below > SUSPICIOUS_FRACTION,
        num_samples=len(sample),
        num_heldout=len(heldout),
        num_train=len(train_images),
        per_class=all(given),
    )


def _search(
    queries: np.ndarray,
    references: np.ndarray,
    centre: np.ndarray,
    query_labels: np.ndarray,
    reference_labels: np.ndarray,
    chunk_size: int,
) -> np.ndarray:
    """Index of the nearest reference of each query, keeping the best over chunks of references."""
    best = np.full(len(queries), np.inf, np.float32)
    index = np.zeros(len(queries), np.int32)
    for start in range(0, len(references), chunk_size):
        rows = slice(start, start + chunk_size)
        value, place = _nearest_in_chunk(
            queries, references[rows] - centre[None], query_labels, reference_labels[rows]
        )
        value, place = np.asarray(value), np.asarray(place)
        # Strictly less: of equally near images the first one is kept.
        closer = value < best
        best, index = np.where(closer, value, best), np.where(closer, place + start, index)
    return index


@jax.jit
def _nearest_in_chunk(
    queries: Float[Array, "q d"],
    references: Float[Array, "r d"],
    query_labels: Int[Array, " q"],
    reference_labels: Int[Array, " r"],
) -> tuple[Float[Array, " q"], Int[Array, " q"]]:
    # Accelerators multiply in TF32 or bfloat16 by default: too coarse to rank near neighbours.
    product = jnp.matmul(queries, references.T, precision=jax.lax.Precision.HIGHEST)
    # |q|^2 is the same for all references of a query and left out.
    distance = jnp.square(references).sum(axis=1)[None, :] - 2.0 * product
    same = query_labels[:, None] == reference_labels[None, :]
    distance = jnp.where(same, distance, jnp.inf)
    return distance.min(axis=1), distance.argmin(axis=1)


def _paired_labels(
    query_labels: AnyArray | None, reference_labels: AnyArray | None, queries: int, references: int
) -> tuple[np.ndarray, np.ndarray]:
    if (query_labels is None) != (reference_labels is None):
        raise ValueError("give the labels of queries and references, or neither")
    if query_labels is None or reference_labels is None:
        return np.zeros(queries, np.int32), np.zeros(references, np.int32)
    pair = np.asarray(query_labels), np.asarray(reference_labels)
    if pair[0].shape != (queries,) or pair[1].shape != (references,):
        raise ValueError(
            f"{queries} queries and {references} references with labels of shapes "
            f"{pair[0].shape} and {pair[1].shape}"
        )
    missing = sorted(set(pair[0].tolist()) - set(pair[1].tolist()))
    if missing:
        raise ValueError(f"no reference images of the labels {missing}")
    return pair[0].astype(np.int32), pair[1].astype(np.int32)
