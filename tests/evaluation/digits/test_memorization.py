import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.evaluation import memorization_summary, nearest_neighbours


def random_images(seed, count, shape=(4, 4, 3)):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(np.float32)


def brute_force(queries, references):
    difference = queries[:, None].astype(np.float64) - references[None]
    return np.sqrt(np.square(difference).mean(axis=(2, 3, 4)))


@given(seed=st.integers(0, 1000), chunk=st.sampled_from([1, 3, 8, 100]))
@settings(max_examples=20, deadline=None)
def test_neighbours_equal_brute_force_for_any_chunk(seed, chunk):
    queries, references = random_images(seed, 8), random_images(seed + 1, 8)
    distance, index = nearest_neighbours(queries, references, chunk_size=chunk)
    expected = brute_force(queries, references)
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_allclose(distance, expected.min(1), rtol=1e-6)


def test_copies_have_distance_zero_exactly_and_the_scale_is_pixels():
    train = random_images(0, 20) * 0.01 + 0.9
    distance, index = nearest_neighbours(train[::-1], train)
    assert (distance == 0).all()
    np.testing.assert_array_equal(index, np.arange(20)[::-1])
    black, white = -np.ones((1, 4, 4, 1)), np.ones((1, 4, 4, 1))
    assert nearest_neighbours(black, white)[0].item() == 2.0
    as_bytes = np.full((1, 4, 4, 1), 255, np.uint8)
    assert nearest_neighbours(white, as_bytes)[0].item() == 0.0


def test_new_real_images_are_not_suspected(digits):
    half = len(digits.test_images) // 2
    summary = memorization_summary(
        digits.test_images[:half], digits.train_images, digits.test_images[half:]
    )
    assert 0.9 < summary["ratio"] < 1.1
    assert summary["fraction_below_first_percentile"] < 0.1
    assert summary["fraction_copies"] == 0
    assert not summary["suspected"]
    assert (summary["num_samples"], summary["num_heldout"], summary["num_train"]) == (
        180,
        180,
        1437,
    )


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_copies_are_caught_even_with_noise(digits, noise):
    rng = np.random.default_rng(0)
    copies = digits.train_images[:200]
    copies = copies + noise * rng.normal(size=copies.shape)
    summary = memorization_summary(copies, digits.train_images, digits.test_images)
    assert summary["suspected"]
    assert summary["ratio"] < 0.2
    assert summary["fraction_below_first_percentile"] == 1.0
    assert summary["fraction_copies"] == (1.0 if noise == 0 else 0.0)


def test_some_copies_among_good_samples_are_caught(digits):
    mixed = np.concatenate([digits.train_images[:60], digits.test_images[:120]])
    summary = memorization_summary(mixed, digits.train_images, digits.test_images[120:])
    assert summary["ratio"] > 0.5
    assert summary["fraction_copies"] == pytest.approx(1 / 3)
    assert summary["suspected"]


def test_what_cannot_be_compared_is_refused():
    images = random_images(0, 5)
    with pytest.raises(ValueError, match=r"\(4, 4, 3\) against \(4, 4, 1\)"):
        nearest_neighbours(images, images[..., :1])
    with pytest.raises(ValueError, match="no reference images to search"):
        nearest_neighbours(images, images[:0])
    with pytest.raises(ValueError, match="0 samples and 5 held-out"):
        memorization_summary(images[:0], images, images)
