import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.evaluation import (
    CIFAR10,
    DIGITS,
    GREY_28,
    ClassifierSettings,
    feature_statistics,
    frechet_distance,
    to_uint8,
    train_classifier,
)
from dit_jax.evaluation.digits.classifier import augment
from dit_jax.evaluation.digits.network import NetworkDefinition, neighbourhoods

QUICK = replace(DIGITS, stages=((4,),), feature_dim=8, steps=12, batch_size=16)


def quick(digits, seed=0, settings=QUICK, count=100, start=0, **options):
    rows = slice(start, start + count)
    return train_classifier(
        digits.train_images[rows],
        digits.train_labels[rows],
        10,
        seed=seed,
        settings=settings,
        **options,
    )


def test_digits_are_learnt(digits, classifier):
    assert classifier.test_accuracy >= 0.975
    assert classifier.train_accuracy >= 0.99
    predicted = classifier.predict(digits.test_images)
    assert (predicted == digits.test_labels).mean() == classifier.test_accuracy
    assert predicted.dtype == np.int32


def test_features_have_full_rank_and_tell_digits_from_noise(digits, classifier):
    def statistics(images):
        return feature_statistics(classifier, [images])

    test = statistics(digits.test_images)
    floor = frechet_distance(statistics(digits.train_images), test)
    half = digits.train_images + 0.5 * np.random.default_rng(0).normal(
        size=digits.train_images.shape
    )
    noise = np.random.default_rng(0).uniform(-1, 1, (500, 8, 8, 1))
    disturbed = frechet_distance(statistics(half), test)
    assert 0 < floor < 0.5 * disturbed
    assert disturbed < frechet_distance(statistics(noise), test)
    assert np.linalg.matrix_rank(test.covariance) == classifier.dim == 64


def test_a_second_training_is_read_from_the_cache(
    digits, classifier, classifier_cache, monkeypatch
):
    def fail(*_):
        raise AssertionError("trained although cached")

    monkeypatch.setattr("dit_jax.evaluation.digits.classifier._train", fail)
    again = train_classifier(
        digits.train_images, digits.train_labels, 10, seed=0, cache_dir=classifier_cache
    )
    assert again.fingerprint == classifier.fingerprint
    assert again.train_accuracy == classifier.train_accuracy
    assert again.test_accuracy is None
    images = digits.test_images[:50]
    np.testing.assert_array_equal(again(images), classifier(images))


def test_training_is_deterministic_and_depends_on_seed_data_and_settings(digits):
    first = quick(digits)
    assert quick(digits).fingerprint == first.fingerprint
    other = replace(QUICK, learning_rate=1e-3)
    others = [quick(digits, seed=1), quick(digits, start=1), quick(digits, settings=other)]
    assert len({classifier.fingerprint for classifier in [first, *others]}) == 4


def test_every_input_has_a_cache_file_of_its_own(digits, tmp_path, monkeypatch):
    # Initial weights stand for trained ones: the names of the files are what is looked at.
    monkeypatch.setattr(
        "dit_jax.evaluation.digits.classifier._train",
        lambda definition, images, labels, seed: definition.init(jax.random.key(seed)),
    )
    options = {"cache_dir": tmp_path / "cache"}
    quick(digits, **options)
    quick(digits, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    quick(digits, seed=1, **options)
    quick(digits, start=1, **options)
    quick(digits, settings=replace(QUICK, steps=13), **options)
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("damage", ["truncate", "flip", "other"])
def test_a_damaged_cache_file_is_replaced_with_a_warning(digits, tmp_path, caplog, damage):
    original = quick(digits, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        with np.load(path) as archive:
            arrays = dict(archive)
        arrays["head.kernel"] = arrays["head.kernel"] + 1e-3
        np.savez(path, **arrays)
    else:
        np.savez(path, header=np.zeros(3, np.uint8))
    with caplog.at_level(logging.WARNING):
        again = quick(digits, cache_dir=tmp_path)
    assert "is damaged" in caplog.text
    assert again.fingerprint == original.fingerprint
    caplog.clear()
    quick(digits, cache_dir=tmp_path)
    assert "is damaged" not in caplog.text


def test_an_unwritable_cache_fails_before_training(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_jax.evaluation.digits.classifier._train", lambda *_: 1 / 0)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        quick(digits, cache_dir=tmp_path / "file")


def test_an_images_features_do_not_depend_on_its_batch(digits, classifier):
    images = np.concatenate([digits.test_images, digits.train_images[:300]])
    whole = classifier(images)
    assert whole.shape == (660, 64)
    np.testing.assert_array_equal(classifier(images[370:391]), whole[370:391])
    assert classifier(images[:0]).shape == (0, 64)
    as_bytes = classifier(to_uint8(images))
    np.testing.assert_allclose(as_bytes, whole, atol=0.1 * np.abs(whole).max())
    np.testing.assert_array_equal(classifier(jnp.asarray(images[:9])), whole[:9])


def test_convolution_equals_xlas():
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    x = jax.random.normal(jax.random.key(2), (2, 7, 6, 3))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = (neighbourhoods(x) @ kernel.reshape(27, 5)).reshape(2, 7, 6, 5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_dropout_is_on_with_a_key_alone(normalize):
    settings = replace(QUICK, normalize=normalize)
    definition = NetworkDefinition((8, 8, 1), 3, settings)
    random = np.random.default_rng(0)
    params = {
        name: random.normal(size=shape).astype(np.float32)
        for name, shape in definition.shapes().items()
    }
    x = jnp.asarray(random.normal(size=(4, 8, 8, 1)), jnp.float32)
    still, again = (definition.apply(params, x)[1] for _ in range(2))
    first, second = (definition.apply(params, x, jax.random.key(i))[1] for i in range(2))
    np.testing.assert_array_equal(still, again)
    assert np.abs(first - still).max() > 0.01 and np.abs(first - second).max() > 0.01


def test_initial_weights_are_those_published_scores_began_with():
    settings = replace(QUICK, normalize=True, steps=3)
    params = NetworkDefinition((8, 8, 1), 10, settings).init(jax.random.key(0))
    sums = {name: float(np.abs(value).sum()) for name, value in params.items()}
    expected = {"stages.0.0.linear.kernel": 16.964071, "stages.0.0.norm.scale": 4.0}
    expected |= {"penultimate.kernel": 71.944336, "head.kernel": 26.120998}
    zeros = {name: 0.0 for name in params if name.endswith("bias")}
    assert sums == pytest.approx({**expected, **zeros}, rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "settings"), [((8, 8, 1), DIGITS), ((28, 28, 1), GREY_28), ((32, 32, 3), CIFAR10)]
)
def test_the_settings_fit_their_images(shape, settings):
    assert ClassifierSettings.for_images(shape) == settings
    definition = NetworkDefinition(shape, 10, settings)
    params = jax.eval_shape(definition.init, jax.random.key(0))
    assert {name: value.shape for name, value in params.items()} == definition.shapes()
    images = jax.ShapeDtypeStruct((4, *shape), jnp.float32)
    features, logits = jax.eval_shape(definition.apply, params, images)
    assert features.shape == (4, settings.feature_dim)
    assert logits.shape == (4, 10)


def test_colour_images_of_odd_size_train_with_every_option():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 64)
    images = rng.normal(size=(64, 9, 11, 3)) * 0.2
    images[..., 0] += 0.5 * (labels - 1)[:, None, None]
    settings = ClassifierSettings(
        stages=((8,), (8,)), feature_dim=8, normalize=True, steps=60, batch_size=32, max_shift=2
    )
    settings = replace(settings, horizontal_flip=True, label_smoothing=0.1, learning_rate=1e-2)
    result = train_classifier(
        to_uint8(images), labels, 3, seed=0, settings=settings,
        test_images=images[:16], test_labels=labels[:16],
    )  # fmt: skip
    assert result.train_accuracy > 0.9
    assert result.test_accuracy > 0.9


def test_augmentation_shifts_and_mirrors_and_nothing_else():
    settings = replace(DIGITS, max_shift=1, horizontal_flip=True)
    image = jax.random.normal(jax.random.key(0), (1, 6, 6, 1))
    results = np.asarray(augment(jax.random.key(1), jnp.repeat(image, 200, 0), settings))
    padded = np.pad(np.asarray(image[0]), ((1, 1), (1, 1), (0, 0)), mode="edge")
    shifted = [padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    allowed = {array.tobytes() for s in shifted for array in (s, s[:, ::-1])}
    assert {result.tobytes() for result in results} == allowed
    still = replace(DIGITS, max_shift=0)
    np.testing.assert_array_equal(augment(jax.random.key(1), image, still), image)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 10, 2], "label 10 of image 2 is out of range: 10 classes are 0..9"),
        ([0, -1, 1, 2], "label -1 of image 1"),
        ([0, 1], r"expected 4 integer labels.*shape \(2,\)"),
        ([0.0, 1.0, 2.0, 3.0], "got float64"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(np.zeros((4, 8, 8, 1), np.uint8), np.array(labels), 10, seed=0)


def test_bad_images_and_settings_are_refused(digits, classifier):
    with pytest.raises(ValueError, match=r"\(8, 8, 1\), got \(8, 8, 3\)"):
        classifier.predict(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="training images: expected a batch"):
        train_classifier(np.zeros((8, 8)), np.zeros(8, int), 10, seed=0)
    with pytest.raises(ValueError, match="at least 2"):
        quick(digits, count=1)
    with pytest.raises(ValueError, match="together"):
        quick(digits, test_images=digits.test_images)
    with pytest.raises(ValueError, match=r"8x8 are too small for 4 stages.*at most 3"):
        quick(digits, settings=replace(QUICK, stages=((4,),) * 4))
    with pytest.raises(ValueError, match="must be positive"):
        ClassifierSettings(steps=0)
    with pytest.raises(ValueError, match="dropout"):
        ClassifierSettings(dropout=1.0)


def test_a_diverging_training_says_what_to_do(digits):
    with pytest.raises(FloatingPointError, match=r"loss is .* by step 12: the training"):
        quick(digits, settings=replace(QUICK, learning_rate=1e30))
