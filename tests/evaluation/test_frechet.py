import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.evaluation import (
    FeatureMismatchError,
    GaussianStatistics,
    TooFewSamplesError,
    frechet_distance,
)


def random_features(seed: int, count: int, dim: int) -> np.ndarray:
    """Correlated features with an offset and a wide spectrum."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dim, dim)) * np.geomspace(1.0, 1e-2, dim)
    return rng.normal(size=(count, dim)) @ mixing + 3.0 * rng.normal(size=dim)


def statistics_of(features, fingerprint="x") -> GaussianStatistics:
    return GaussianStatistics.from_features(features, fingerprint)


def scipy_distance(a: np.ndarray, b: np.ndarray) -> float:
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + np.trace(covariance_a + covariance_b - 2 * root)


@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
)
@settings(max_examples=50, deadline=None)
def test_any_batching_gives_numpys_moments(seed, cuts, offset):
    features = random_features(seed, 60, 5) + offset
    statistics = GaussianStatistics(5, "x")
    for part in np.split(features, sorted(cuts)):
        statistics.update(part)
    assert statistics.count == 60
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(
        statistics.covariance, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max()
    )


@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_merge_equals_one_pass_and_leaves_its_parts_alone(seed, cut):
    features = random_features(seed, 40, 4)
    left, right = GaussianStatistics(4, "x"), GaussianStatistics(4, "x")
    left.update(features[:cut])
    right.update(features[cut:])
    merged, swapped = left.merge(right), right.merge(left)
    whole = statistics_of(features)
    for both in (merged, swapped):
        assert both.count == 40
        np.testing.assert_allclose(both.mean, whole.mean, rtol=1e-10)
        np.testing.assert_allclose(both.covariance, whole.covariance, rtol=1e-8, atol=1e-10)
    assert (left.count, right.count) == (cut, 40 - cut)


def test_float32_features_with_a_large_offset_keep_their_covariance():
    features = (np.random.default_rng(0).normal(size=(5000, 3)) + 1000.0).astype(np.float32)
    covariance = statistics_of(features).covariance
    np.testing.assert_allclose(
        covariance, np.cov(features.astype(np.float64), rowvar=False), atol=1e-10
    )


@given(seed=st.integers(0, 2**31), dim=st.integers(1, 24))
@settings(max_examples=40, deadline=None)
def test_distance_equals_scipys_matrix_square_root(seed, dim):
    a, b = random_features(seed, 200, dim), random_features(seed + 1, 150, dim)
    expected = scipy_distance(a, b) if dim > 1 else None
    got = frechet_distance(statistics_of(a), statistics_of(b))
    if expected is None:
        expected = ((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2).item()
    assert got == pytest.approx(expected, rel=1e-7, abs=1e-8)


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    a = GaussianStatistics.from_moments(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 100, "x")
    b = GaussianStatistics.from_moments(np.array([3.0, 1.0]), np.diag([1.0, 16.0]), 100, "x")
    assert frechet_distance(a, b) == pytest.approx(9.0 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_distance_is_symmetric_nonnegative_zero_to_itself_and_rotation_invariant(seed):
    a, b = random_features(seed, 90, 8), random_features(seed + 1, 90, 8)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 8)))[0]
    forth = frechet_distance(statistics_of(a), statistics_of(b))
    back = frechet_distance(statistics_of(b), statistics_of(a))
    turned = frechet_distance(statistics_of(a @ rotation), statistics_of(b @ rotation))
    assert forth >= 0
    assert back == pytest.approx(forth, rel=1e-9)
    assert turned == pytest.approx(forth, rel=1e-8)
    trace = np.trace(statistics_of(a).covariance)
    assert frechet_distance(statistics_of(a), statistics_of(a)) <= 1e-12 * trace


def test_singular_covariances_are_exact_when_allowed():
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0][:, :6]
    low_a, low_b = random_features(1, 20, 6), random_features(2, 25, 6)
    a, b = statistics_of(low_a @ basis.T), statistics_of(low_b @ basis.T)
    # Within the six directions the samples span, the covariances are regular.
    expected = frechet_distance(statistics_of(low_a), statistics_of(low_b))
    assert frechet_distance(a, b, allow_singular=True) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a, allow_singular=True) < 1e-10


def test_too_few_samples_are_refused_with_the_numbers():
    few, enough = random_features(0, 8, 8), random_features(1, 9, 8)
    with pytest.raises(TooFewSamplesError, match=r"first set has n=8 samples of d=8.*n=9.*allow_s"):
        frechet_distance(statistics_of(few), statistics_of(enough))
    with pytest.raises(TooFewSamplesError, match="second set"):
        frechet_distance(statistics_of(enough), statistics_of(few))
    assert frechet_distance(statistics_of(enough), statistics_of(enough + 1)) > 0
    assert frechet_distance(statistics_of(few), statistics_of(enough), allow_singular=True) > 0
    with pytest.raises(TooFewSamplesError, match="at least 2"):
        frechet_distance(statistics_of(few[:1]), statistics_of(enough), allow_singular=True)


def test_statistics_of_different_extractors_never_meet():
    features = random_features(0, 20, 3)
    a, b = statistics_of(features, "inception:1234"), statistics_of(features, "classifier:5678")
    with pytest.raises(FeatureMismatchError, match=r"inception:1234.*classifier:5678"):
        frechet_distance(a, b)
    with pytest.raises(FeatureMismatchError):
        a.merge(b)
    with pytest.raises(FeatureMismatchError, match="2 features"):
        frechet_distance(a, statistics_of(features[:, :2], "inception:1234"))


def test_published_moments_behave_like_the_features_they_came_from():
    a, b = random_features(0, 50, 6), random_features(1, 60, 6)
    published = GaussianStatistics.from_moments(a.mean(0), np.cov(a, rowvar=False), 50, "x")
    expected = frechet_distance(statistics_of(a), statistics_of(b))
    assert frechet_distance(published, statistics_of(b)) == pytest.approx(expected, rel=1e-10)
    whole = published.merge(statistics_of(b))
    np.testing.assert_allclose(whole.covariance, np.cov(np.vstack([a, b]), rowvar=False))


@pytest.mark.parametrize(
    ("mean", "covariance", "count", "message"),
    [
        (np.zeros(2), np.eye(3), 10, "expected a mean"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), 10, "not symmetric"),
        (np.zeros(2), np.diag([1.0, np.nan]), 10, "not finite"),
        (np.zeros(2), np.eye(2), 1, "count=1"),
    ],
)
def test_damaged_moments_are_refused(mean, covariance, count, message):
    with pytest.raises(ValueError, match=message):
        GaussianStatistics.from_moments(mean, covariance, count, "x")


def test_an_indefinite_covariance_is_refused():
    bad = GaussianStatistics.from_moments(np.zeros(2), np.diag([1.0, -0.5]), 10, "x")
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(bad, bad)


def test_bad_batches_are_refused():
    statistics = GaussianStatistics(3, "x")
    with pytest.raises(ValueError, match=r"\[n, 3\], got \(4, 2\)"):
        statistics.update(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="1 values that are not finite"):
        statistics.update(np.array([[0.0, np.inf, 0.0]]))
    assert statistics.count == 0
    with pytest.raises(ValueError, match="no samples yet"):
        _ = statistics.mean
    with pytest.raises(ValueError, match=r"\[n, dim\]"):
        GaussianStatistics.from_features(np.zeros(3), "x")
