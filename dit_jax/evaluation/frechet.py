"""Fréchet distance between two sets of features, each summarised by its mean and covariance.

Everything here is float64 on the host: in float32 the covariance of a few thousand features already
costs digits of the score that people quote.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from dit_jax.evaluation.images import AnyArray


class TooFewSamplesError(ValueError):
    """The covariance of n samples in d dimensions is singular because n < d + 1."""


class FeatureMismatchError(ValueError):
    """Two sets of statistics were computed by different feature extractors."""


class GaussianStatistics:
    """Mean and covariance of features, accumulated batch by batch in float64.

    Batches are joined by the pairwise update of Chan, Golub and LeVeque (1983): each batch is
    centred on its own mean before its outer products are summed, so features with a large common
    offset lose no digits, and the size of the batches changes the result by rounding only.

    Attributes:
        dim: Number of features.
        fingerprint: Identity of the feature extractor; statistics with different ones never meet.
        count: Number of samples seen.
    """

    def __init__(self, dim: int, fingerprint: str) -> None:
        """Starts empty, for `dim` features of the extractor identified by `fingerprint`."""
        if dim < 1:
            raise ValueError(f"the number of features must be at least 1, got {dim}")
        self.dim = dim
        self.fingerprint = fingerprint
        self.count = 0
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    @classmethod
    def from_features(cls, features: AnyArray, fingerprint: str) -> GaussianStatistics:
        """Statistics of one array of features [n, dim]."""
        features = np.asarray(features)
        if features.ndim != 2:
            raise ValueError(f"expected features of shape [n, dim], got {features.shape}")
        statistics = cls(features.shape[1], fingerprint)
        statistics.update(features)
        return statistics

    @classmethod
    def from_moments(
        cls,
        mean: AnyArray,
        covariance: AnyArray,
        count: int,
        fingerprint: str,
    ) -> GaussianStatistics:
        """Statistics published as a mean [d] and an unbiased (n - 1) covariance [d, d]."""
        mean = np.asarray(mean, np.float64)
        covariance = np.asarray(covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"expected a mean [d] and a covariance [d, d], got {mean.shape} and "
                f"{covariance.shape}"
            )
        _require_finite(mean, "the mean")
        _require_finite(covariance, "the covariance")
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got count={count}")
        if not np.allclose(
            covariance, covariance.T, rtol=1e-5, atol=1e-8 * np.abs(covariance).max()
        ):
            raise ValueError("the covariance is not symmetric")
        statistics = cls(len(mean), fingerprint)
        statistics._join(count, mean, (covariance + covariance.T) / 2 * (count - 1))
        return statistics

    def update(self, features: AnyArray) -> None:
        """Adds a batch of features [n, dim] of any float type; n may be 0.

        Raises:
            ValueError: The batch has another shape or holds a value that is not finite.
        """
        features = np.asarray(features).astype(np.float64)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"expected features of shape [n, {self.dim}], got {features.shape}")
        if len(features) == 0:
            return
        _require_finite(features, "a batch of features")
        mean = features.mean(axis=0)
        centred = features - mean
        self._join(len(features), mean, centred.T @ centred)

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        """Statistics of both sets together, as a new object.

        Raises:
            FeatureMismatchError: The two come from different feature extractors.
        """
        _require_same_extractor(self, other)
        merged = GaussianStatistics(self.dim, self.fingerprint)
        for part in (self, other):
            if part.count:
                merged._join(part.count, part._mean, part._scatter)
        return merged

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    @property
    def mean(self) -> Float[np.ndarray, " dim"]:
        """Mean of the samples seen so far."""
        if self.count < 1:
            raise ValueError("no samples yet: call update() before asking for the mean")
        return self._mean.copy()

    @property
    def covariance(self) -> Float[np.ndarray, "dim dim"]:
        """Unbiased covariance (divided by n - 1) of the samples seen so far."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(
    a: GaussianStatistics, b: GaussianStatistics, *, allow_singular: bool = False
) -> float:
    """Squared Fréchet (2-Wasserstein) distance between the Gaussians with the given moments.

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a^{1/2} S_b S_a^{1/2})^{1/2}), Dowson and Landau
    (1982); with Inception features this is the FID of Heusel et al. (2017), arXiv 1706.08500.
    The last trace is the sum of the square roots of the eigenvalues of that symmetric product,
    computed as the singular values of S_b^{1/2} S_a^{1/2}: the same numbers, but no square root is
    taken of rounding errors, and none comes out complex as from a general matrix square root.

    The estimate is biased upwards, more so for fewer samples: compare scores of equal counts only.

    Args:
        a: Statistics of one set.
        b: Statistics of the other, from the same feature extractor.
        allow_singular: Compute the distance although a set has fewer than dim + 1 samples. It is
            then the distance between degenerate Gaussians and says little about directions the
            samples do not span; fit for a quick look, not for a table.

    Returns:
        The distance, in squared feature units, never negative.

    Raises:
        FeatureMismatchError: The sets come from different extractors.
        TooFewSamplesError: A set has fewer than dim + 1 samples and `allow_singular` is False.
    """
    _require_same_extractor(a, b)
    for which, statistics in (("first", a), ("second", b)):
        if statistics.count < 2:
            raise TooFewSamplesError(
                f"the {which} set has {statistics.count} samples; a covariance needs at least 2"
            )
        if statistics.count < statistics.dim + 1 and not allow_singular:
            raise TooFewSamplesError(
                f"the {which} set has n={statistics.count} samples of d={statistics.dim} features: "
                f"its covariance is singular below n={statistics.dim + 1} and the distance "
                "misleading. Use more samples (many times d for a stable score) or a feature "
                "extractor with fewer features; with Inception's, --allow_singular "
                "computes it all the same."
            )
    difference = a.mean - b.mean
    covariance_a, covariance_b = a.covariance, b.covariance
    root_trace = np.linalg.svd(
        _square_root(covariance_b) @ _square_root(covariance_a), compute_uv=False
    ).sum()
    distance = (
        difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root_trace
    )
    # The exact value is >= 0; rounding may leave equal sets at about -1e-15 of the traces.
    return max(float(distance), 0.0)


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    # Below this an eigenvalue is a rounded zero, and its square root would be noise made larger.
    noise = len(values) * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
    if values[0] < -max(1e-6 * values[-1], noise):
        raise ValueError(
            f"a covariance has the negative eigenvalue {values[0]:.3g} (largest {values[-1]:.3g}); "
            "the statistics are damaged or were computed in too low a precision"
        )
    roots = np.sqrt(np.where(values > noise, values, 0.0))
    return (vectors * roots) @ vectors.T


def _require_same_extractor(a: GaussianStatistics, b: GaussianStatistics) -> None:
    if a.fingerprint != b.fingerprint or a.dim != b.dim:
        raise FeatureMismatchError(
            "the statistics come from different feature extractors: "
            f"{a.fingerprint!r} ({a.dim} features) and {b.fingerprint!r} ({b.dim} features). "
            "Distances between them mean nothing; compute both with one extractor."
        )


def _require_finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{what} holds {bad} values that are not finite (of {values.size})")
