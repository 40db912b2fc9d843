import json
import subprocess
import sys

import numpy as np
import pytest

from dit_jax.evaluation import (
    DIGITS,
    Classifier,
    TooFewSamplesError,
    content_hash,
    evaluate_samples,
    feature_statistics,
    frechet_distance,
    label_accuracy,
    psnr,
    save_json,
    to_uint8,
)
from dit_jax.evaluation.digits.network import NetworkDefinition
from dit_jax.evaluation.record import code_version


def sets_of(digits):
    return {
        "train": (digits.train_images, digits.train_labels),
        "test": (digits.test_images, digits.test_labels),
    }


@pytest.fixture(scope="module")
def record(digits, classifier):
    """Slightly disturbed training digits, two in ten under a wrong label."""
    samples = digits.train_images[:200] + 0.1 * np.random.default_rng(0).normal(size=(200, 8, 8, 1))
    labels = digits.train_labels[:200].copy()
    labels[:40] = (labels[:40] + 1) % 10
    return evaluate_samples(
        classifier,
        samples,
        labels,
        **sets_of(digits),
        rounding="truncate",
        seeds=[3, 4],
        provenance={"solver": "ddim", "guidance_scale": 1.5},
    )


def test_scores_are_those_of_their_parts(record, digits, classifier):
    scores = record["scores"]
    samples = digits.train_images[:200] + 0.1 * np.random.default_rng(0).normal(size=(200, 8, 8, 1))
    test = feature_statistics(classifier, [to_uint8(digits.test_images, "truncate")])
    expected = frechet_distance(
        feature_statistics(classifier, [to_uint8(samples, "truncate")]), test
    )
    assert scores["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert scores["frechet_distance"] > 0
    assert scores["frechet_distance_floor"] > 0
    assert 0.75 <= scores["label_accuracy"]["overall"] <= 0.82
    assert set(scores["label_accuracy"]["per_class"]) == {str(digit) for digit in range(10)}
    assert scores["classifier_test_accuracy"] == pytest.approx(classifier.test_accuracy, abs=0.01)
    assert scores["memorization"]["suspected"] is True
    assert record["counts"] == {
        "samples": 200,
        "train_images": 1437,
        "test_images": 360,
        "floor_images": 200,
    }


def test_the_record_is_stamped_and_json(record, classifier, tmp_path):
    stamp = record["provenance"]
    assert stamp["feature_extractor"] == {
        "name": classifier.name,
        "fingerprint": classifier.fingerprint,
        "dim": 64,
    }
    assert stamp["rounding"] == "truncate"
    assert stamp["seeds"] == [3, 4]
    assert (stamp["solver"], stamp["guidance_scale"]) == ("ddim", 1.5)
    assert len(stamp["reference_hash"]) == len(stamp["sample_hash"]) == 64
    assert stamp["code_version"] == code_version() != ""
    path = save_json(tmp_path / "metrics.json", record)
    assert json.loads(path.read_text()) == record


def test_what_cannot_be_scored_is_refused(digits, classifier):
    sets, labels = sets_of(digits), digits.train_labels
    few = digits.train_images[:20]
    with pytest.raises(TooFewSamplesError, match="n=20 samples of d=64"):
        evaluate_samples(classifier, few, labels[:20], **sets)
    with pytest.raises(ValueError, match="20 samples with labels of shape"):
        evaluate_samples(classifier, few, labels[:9], **sets)
    with pytest.raises(ValueError, match="images of different shapes: samples"):
        evaluate_samples(classifier, np.zeros((99, 9, 9, 1)), labels[:99], **sets)
    with pytest.raises(ValueError, match=r"may not set \['seeds'\]"):
        evaluate_samples(
            classifier, digits.train_images[:99], labels[:99], provenance={"seeds": 1}, **sets
        )


def test_psnr_is_the_formula_for_bytes_and_floats():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    error = ((a.astype(float) - b) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(psnr(a, b), 10 * np.log10(255**2 / error))
    np.testing.assert_allclose(psnr(a / 127.5 - 1, b / 127.5 - 1), psnr(a, b))
    assert np.isinf(psnr(a, a)).all()
    constant = np.zeros((1, 4, 4, 1), np.float32)
    np.testing.assert_allclose(psnr(constant, constant + 0.02), 40.0, rtol=1e-6)
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(a, b[:2])
    with pytest.raises(ValueError, match="one kind"):
        psnr(a, b / 127.5 - 1)


def test_label_accuracy_counts_by_class():
    class Constant(Classifier):
        def predict(self, images):
            return np.ones(len(images), np.int32)

    constant = Constant(NetworkDefinition((2, 2, 1), 3, DIGITS), {})
    result = label_accuracy(constant, np.zeros((4, 2, 2, 1)), np.array([1, 1, 1, 2]))
    assert result == {"overall": 0.75, "per_class": {"1": 1.0, "2": 0.0}}
    with pytest.raises(ValueError, match="as many labels as images"):
        label_accuracy(constant, np.zeros((4, 2, 2, 1)), np.array([1]))


def test_content_hash_sees_values_shapes_and_types():
    array = np.arange(6, dtype=np.uint8)
    variants = [array, array[::-1], array.reshape(2, 3), array.astype(np.int32), array[:0]]
    assert len({content_hash(variant) for variant in variants}) == 5
    assert content_hash(array[::2]) == content_hash(array[::2].copy())
    assert content_hash(array, array) != content_hash(array)


def test_importing_evaluation_loads_no_other_framework():
    code = (
        "import sys, dit_jax.evaluation; "
        "print({'torch', 'tensorflow', 'sklearn', 'scipy.linalg'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(eval(done.stdout)) <= {"scipy.linalg"}
