import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.evaluation import feature_scores
from dit_jax.evaluation.feature_scores import (
    InceptionScoreAccumulator,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dit_jax.evaluation.frechet import TooFewSamplesError


def features_like_inceptions(seed: int, count: int, dim: int) -> np.ndarray:
    """Non-negative, correlated, with a mean far from zero."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(6, dim))
    return np.maximum(rng.normal(size=(count, 6)) @ mixing + 3.0, 0.0).astype(np.float32)


def inception_score_by_definition(logits: np.ndarray, split_size: int) -> tuple[float, float]:
    scores = []
    for start in range(0, len(logits), split_size):
        part = np.exp(logits[start : start + split_size].astype(np.float64))
        part /= part.sum(1, keepdims=True)
        marginal = part.mean(0)
        divergences = [sum(p * np.log(p / q)) for p, q in ((row, marginal) for row in part)]
        scores.append(np.exp(np.mean([np.sum(d) for d in divergences])))
    return float(np.mean(scores)), float(np.std(scores))


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(2, 60),
    split_size=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_inception_score_is_its_definition_whatever_the_batches(seed, count, split_size, cuts):
    logits = (np.random.default_rng(seed).normal(size=(count, 7)) * 3).astype(np.float32)
    accumulator = InceptionScoreAccumulator(split_size)
    for part in np.split(logits, sorted(cuts)):
        accumulator.update(part)
    result = accumulator.result()
    mean, std = inception_score_by_definition(logits, split_size)
    assert result.mean == pytest.approx(mean, rel=1e-10)
    assert result.std == pytest.approx(std, rel=1e-8, abs=1e-10)
    assert result.splits == -(-count // split_size)
    assert inception_score(logits, split_size=split_size).mean == pytest.approx(mean, rel=1e-10)


def test_inception_score_of_certain_classes_is_their_number():
    logits = 1e4 * np.eye(10)[np.arange(50) % 10]
    assert inception_score(logits).mean == pytest.approx(10.0)
    assert inception_score(logits[:, ::-1] * 0).mean == pytest.approx(1.0)


def test_inception_score_input_refused():
    with pytest.raises(TooFewSamplesError, match="at least 2"):
        inception_score(np.zeros((1, 3)))
    with pytest.raises(TooFewSamplesError):
        InceptionScoreAccumulator().result()
    with pytest.raises(ValueError, match="not finite"):
        inception_score(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="split_size"):
        inception_score(np.zeros((3, 2)), split_size=0)


def kernel_distance_by_double_loop(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a, b):
        return (float(a.astype(np.float64) @ b.astype(np.float64)) / len(a) + 1) ** 3

    n = len(x)
    within = sum(
        kernel(x[i], x[j]) + kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j
    )
    across = sum(kernel(a, b) for a in x for b in y)
    return within / (n * (n - 1)) - 2 * across / n**2


def test_kernel_distance_is_its_double_loop():
    x, y = features_like_inceptions(0, 17, 9), features_like_inceptions(1, 17, 9) + 0.3
    expected = kernel_distance_by_double_loop(x, y)
    result = kernel_distance(x, y, subsets=3, subset_size=17)
    assert result.mean == pytest.approx(expected, rel=1e-9)
    assert result.std == pytest.approx(0.0, abs=1e-9 * abs(expected))


def test_kernel_distance_is_unbiased_seeded_and_sees_a_shift():
    x, y = features_like_inceptions(0, 600, 16), features_like_inceptions(1, 500, 16)
    options = {"subsets": 40, "subset_size": 60}
    same = kernel_distance(x, y, **options)
    assert same == kernel_distance(x, y, **options)
    assert same != kernel_distance(x, y, **options, seed=1)
    assert abs(same.mean) < 3 * same.std / np.sqrt(8)
    assert kernel_distance(x, y + 1, **options).mean > 3 * same.std


def test_kernel_distance_of_too_few_or_odd_features_refused():
    x, y = features_like_inceptions(0, 20, 5), features_like_inceptions(1, 10, 5)
    with pytest.raises(TooFewSamplesError, match="at least 15 sample images, got 10"):
        kernel_distance(x, y, subset_size=15)
    with pytest.raises(TooFewSamplesError, match="1000 reference"):
        kernel_distance(x, y)
    with pytest.raises(ValueError, match="subset_size"):
        kernel_distance(x, y, subset_size=1)
    with pytest.raises(ValueError, match="one extractor"):
        kernel_distance(x, y[:, :3], subset_size=5)


def precision_recall_by_definition(real: np.ndarray, fake: np.ndarray, k: int):
    def distances(a, b):
        return np.stack([np.square(x.astype(np.float64) - b).sum(-1) for x in a])

    radius = {name: np.sort(distances(x, x), 1)[:, k] for name, x in (("r", real), ("f", fake))}
    across = distances(real, fake)
    precision = (across <= radius["r"][:, None]).any(0).mean()
    return precision, (across <= radius["f"][None]).any(1).mean()


@given(
    seed=st.integers(0, 2**31),
    real_count=st.integers(4, 60),
    fake_count=st.integers(4, 60),
    neighbours=st.integers(1, 3),
    kind=st.sampled_from(["smooth", "far from zero", "whole numbers", "copies"]),
    blocks=st.sampled_from([(16, 32), (64, 8)]),
)
@settings(max_examples=60, deadline=None)
def test_precision_and_recall_are_their_definition(
    seed, real_count, fake_count, neighbours, kind, blocks
):
    real = features_like_inceptions(seed, real_count, 5)
    fake = features_like_inceptions(seed + 1, fake_count, 5) * 1.1
    if kind == "far from zero":  # float32 products alone would lose every digit here
        real, fake = real + 3e3, fake + 3e3
    if kind == "whole numbers":  # many equal distances
        real, fake = np.round(real), np.round(fake)
    if kind == "copies":
        fake[: min(real_count, fake_count) // 2] = real[: min(real_count, fake_count) // 2]
    expected = precision_recall_by_definition(real, fake, neighbours)
    result = precision_recall(
        real, fake, neighbours=neighbours, block_rows=blocks[0], block_columns=blocks[1]
    )
    assert (result.precision, result.recall) == expected


def test_precision_and_recall_with_many_dimensions_and_the_exact_fallbacks(monkeypatch):
    real, fake = features_like_inceptions(0, 90, 2048), features_like_inceptions(1, 80, 2048)
    expected = precision_recall_by_definition(real, fake, 3)
    blocks = {"block_rows": 64, "block_columns": 32}
    result = precision_recall(real, fake, **blocks)
    assert (result.precision, result.recall) == expected
    assert 0 < result.precision < 1
    # With nothing trusted, every point goes through float64.
    monkeypatch.setattr(feature_scores._Points, "tolerance", lambda self, _: self.norms + 1e9)
    result = precision_recall(real[:30], fake[:20], **blocks)
    assert (result.precision, result.recall) == precision_recall_by_definition(
        real[:30], fake[:20], 3
    )


def test_precision_and_recall_know_narrow_and_wide_samples():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 2)).astype(np.float32)
    narrow = precision_recall(real, real[:100] * 0.2)
    assert narrow.precision == 1.0
    assert narrow.recall < 0.6
    far = precision_recall(real, real + 100)
    assert (far.precision, far.recall) == (0.0, 0.0)
    same = precision_recall(real, real)
    assert (same.precision, same.recall) == (1.0, 1.0)


def test_precision_and_recall_of_bad_features_refused():
    x = features_like_inceptions(0, 3, 5)
    with pytest.raises(TooFewSamplesError, match=r"at least 4 reference images, got 3"):
        precision_recall(x, x)
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(np.full((5, 2), np.inf, np.float32), np.zeros((5, 2), np.float32))
    with pytest.raises(ValueError, match="at least 1"):
        precision_recall(x, x, neighbours=0)
