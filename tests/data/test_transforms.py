import numpy as np
import pytest

from dit_jax.data.digits import open_digits
from dit_jax.data.labels import validate_labels
from dit_jax.data.transforms import epoch_order, flip_where, random_bit, random_words, to_float


def test_to_float_is_exact_at_the_ends():
    values = to_float(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1))
    assert values.dtype == np.float32
    assert (values.min(), values.max()) == (-1, 1)
    # Back to the pixels by rounding, for every level.
    np.testing.assert_array_equal(np.rint((values + 1) * 127.5).ravel(), np.arange(256))


def test_flip_where_mirrors_only_the_chosen_images():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 2), np.uint8)
    flipped = flip_where(np.array([True, False, True]), images)
    np.testing.assert_array_equal(flipped[0], np.fliplr(images[0]))
    np.testing.assert_array_equal(flipped[1], images[1])
    np.testing.assert_array_equal(flipped[2], np.fliplr(images[2]))


def test_random_words_do_not_depend_on_how_the_stream_is_cut():
    whole = random_words(7, 1000, 60)
    pieces = [random_words(7, 1000 + start, 20) for start in (0, 20, 40)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))
    assert not np.isin(random_words(8, 1000, 60), whole).any()
    assert len(np.unique(random_words(7, 0, 10_000))) == 10_000
    assert abs(random_bit(random_words(7, 0, 10_000)).mean() - 0.5) < 0.02


def test_epoch_order_is_a_new_permutation_each_epoch():
    orders = [epoch_order(3, epoch, 100) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    # Seed s in epoch e + 1 is not seed s + 1 in epoch e.
    assert not np.array_equal(epoch_order(3, 1, 100), epoch_order(4, 0, 100))
    # The stream is part of what a checkpoint promises: it must not change between versions.
    assert epoch_order(0, 0, 8).tolist() == PINNED_ORDER


PINNED_ORDER = [6, 7, 2, 1, 3, 5, 0, 4]


def test_digits_split_is_stratified_and_disjoint():
    train, test = open_digits("train"), open_digits("test")
    assert (len(train), len(test)) == (1442, 355)
    assert train.info.image_shape == (8, 8, 1) and train.info.num_classes == 10
    counts = [
        np.bincount(source.batch(np.arange(len(source)))["label"]) for source in (train, test)
    ]
    assert np.all(np.abs(counts[1] / (counts[0] + counts[1]) - 0.2) < 0.01)
    pixels = train.batch(np.arange(len(train)))["image"]
    assert (pixels.min(), pixels.max(), pixels.dtype) == (0, 255, np.uint8)
    # The digits have no duplicates, so equal images would mean overlapping splits.
    seen = {image.tobytes() for image in pixels}
    assert not any(test[i]["image"].tobytes() in seen for i in range(len(test)))
    assert train.info.fingerprint != test.info.fingerprint
    with pytest.raises(ValueError, match="'train' and 'test', not 'val'"):
        open_digits("val")


def test_a_label_out_of_range_is_named():
    labels = np.array([0, 2, 3, -1])
    with pytest.raises(ValueError, match=r"file 12 has label 3 \(1 more like it\).*in 0\.\.2"):
        validate_labels(labels, 3, lambda i: f"file {i}", indices=np.array([10, 11, 12, 13]))
    with pytest.raises(ValueError, match=r"file 1 has label 2 .*must be in 0 \(the data are unl"):
        validate_labels(labels, 0, lambda i: f"file {i}")
    validate_labels(labels[:2], 3, str)
