"""Memorisation: how close do samples come to training images, compared with unseen real images?

A model that copies its training set has a splendid Fréchet distance. Its samples, though, lie
closer to the training images than real held-out images do; that is what is measured, in pixels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from dit_jax.evaluation.images import AnyArray, to_float

SUSPICIOUS_RATIO = 0.5
"""Typical samples twice as close to the training set as unseen real images are."""

SUSPICIOUS_FRACTION = 0.25
"""A quarter of the samples closer than all but 1 % of unseen real images (expected: 0.01)."""

COPY_DISTANCE = 1.0 / 255.0
"""Half a byte step in [-1, 1]: below it two images are the same after rounding."""


def memorization_summary(
    samples: AnyArray, train_images: AnyArray, heldout_images: AnyArray
) -> dict[str, Any]:
    """Compares how near samples and held-out real images come to the training images.

    Distances are root mean square differences of pixel values in [-1, 1].

    Args:
        samples: Generated images, uint8 or [-1, 1], [n, h, w, c].
        train_images: What the model was trained on.
        heldout_images: Real images of the same distribution it never saw.

    Returns:
        sample_median, heldout_median: Of the distances to the nearest training image.
        ratio: The first over the second; about 1 for samples as new as real images.
        heldout_first_percentile: 1 % of the held-out images are closer to the training set.
        fraction_below_first_percentile: Of the samples; 0.01 is expected.
        fraction_copies: Of samples equal to a training image after rounding to bytes.
        suspected: Whether ratio < SUSPICIOUS_RATIO, or fraction_below_first_percentile >
            SUSPICIOUS_FRACTION. A hint, not a proof: blurred samples are close to everything.
        num_samples, num_heldout, num_train: Images compared.

    Raises:
        ValueError: No images, or images of different shapes.
    """
    if len(samples) == 0 or len(heldout_images) == 0:
        raise ValueError(
            f"nothing to compare: {len(samples)} samples and {len(heldout_images)} held-out images"
        )
    sample = nearest_neighbours(samples, train_images)[0]
    heldout = nearest_neighbours(heldout_images, train_images)[0]
    sample_median, heldout_median = float(np.median(sample)), float(np.median(heldout))
    first_percentile = float(np.percentile(heldout, 1))
    below = float((sample < first_percentile).mean())
    # Held-out images that are themselves copies (duplicates in the data) leave nothing to compare.
    ratio = sample_median / heldout_median if heldout_median > 0 else 1.0
    return {
        "sample_median": sample_median,
        "heldout_median": heldout_median,
        "ratio": ratio,
        "heldout_first_percentile": first_percentile,
        "fraction_below_first_percentile": below,
        "fraction_copies": float((sample < COPY_DISTANCE).mean()),
        "suspected": ratio < SUSPICIOUS_RATIO or below > SUSPICIOUS_FRACTION,
        "num_samples": len(sample),
        "num_heldout": len(heldout),
        "num_train": len(train_images),
    }


def nearest_neighbours(
    queries: AnyArray, references: AnyArray, chunk_size: int = 4096
) -> tuple[Float32[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Finds the nearest reference image of each query by pixel distance, a chunk at a time.

    Args:
        queries: uint8 or [-1, 1] images [n, h, w, c].
        references: Images [m, h, w, c] to search.
        chunk_size: At most so many queries times so many references are held at once.

    Returns:
        Root mean square differences, 0 for a copy and 2 for black against white, and the places of
        the neighbours in `references`; of equally near ones the first.

    Raises:
        ValueError: Shapes differ, or there is nothing to search.
    """
    queries, references = to_float(queries), to_float(references)
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"images of different shapes: {queries.shape[1:]} against {references.shape[1:]}"
        )
    if len(references) == 0:
        raise ValueError("no reference images to search")
    queries = queries.reshape(len(queries), -1)
    references = references.reshape(len(references), -1)
    # Smaller numbers, smaller cancellation in |q|^2 - 2 q.r + |r|^2.
    centre = references.mean(axis=0, dtype=np.float64).astype(np.float32)[None]
    index, distance = np.empty(len(queries), np.int32), np.empty(len(queries), np.float32)
    for first in range(0, len(queries), chunk_size):
        rows = slice(first, first + chunk_size)
        best, places = np.full(len(queries[rows]), np.inf, np.float32), index[rows]
        for start in range(0, len(references), chunk_size):
            chunk = references[start : start + chunk_size]
            value, place = map(np.asarray, _nearest(queries[rows] - centre, chunk - centre))
            closer = value < best
            best[closer], places[closer] = value[closer], place[closer] + start
        # The expanded square found the neighbour; its distance is computed anew, exact for copies.
        difference = queries[rows].astype(np.float64) - references[places]
        distance[rows] = np.sqrt(np.square(difference).mean(axis=1))
    return distance, index


@jax.jit
def _nearest(queries, references):
    # Accelerators multiply in TF32 or bfloat16 by default: too coarse to rank near neighbours.
    product = jnp.matmul(queries, references.T, precision=jax.lax.Precision.HIGHEST)
    # |q|^2 is the same for all references of a query and left out.
    distance = jnp.square(references).sum(axis=1)[None, :] - 2.0 * product
    return distance.min(axis=1), distance.argmin(axis=1)
