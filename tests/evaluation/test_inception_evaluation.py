import json

import numpy as np
import pytest

from dit_jax.evaluation import (
    BatchImages,
    FeatureMismatchError,
    GaussianStatistics,
    NpzImages,
    ScoreSettings,
    TooFewSamplesError,
    content_hash,
    evaluate_images,
    format_scores,
    frechet_distance,
    inception_score,
    kernel_distance,
    open_reference,
    precision_recall,
    save_json,
)
from tests.evaluation.inception_fakes import FakeInception, StreamingFake, random_images

REAL, SAMPLES = random_images(0, 80), random_images(1, 70, shift=15.0)
SETTINGS = ScoreSettings(split_size=30, kid_subsets=4, kid_subset_size=50)


@pytest.fixture
def reference(tmp_path):
    np.savez(tmp_path / "real.npz", REAL)
    return open_reference(tmp_path / "real.npz", FakeInception())


@pytest.fixture
def samples(tmp_path):
    np.savez(tmp_path / "samples.npz", SAMPLES)
    return NpzImages(tmp_path / "samples.npz")


def evaluate(images, reference, extractor=None, **options):
    extractor = extractor or FakeInception()
    return evaluate_images(images, reference, extractor, **{"settings": SETTINGS} | options)


@pytest.mark.parametrize("kind", [FakeInception, StreamingFake])
def test_scores_are_those_of_their_parts(samples, reference, kind):
    record = evaluate(samples, reference, kind(), batch_size=9)
    real, fake = (FakeInception().features(images) for images in (REAL, SAMPLES))

    def distance(which):
        a, b = (
            GaussianStatistics.from_features(getattr(features, which), "x")
            for features in (real, fake)
        )
        return frechet_distance(a, b)

    scores = record["scores"]
    assert scores["fid"] == pytest.approx(distance("pool"), rel=1e-5)
    assert scores["sfid"] == pytest.approx(distance("spatial"), rel=1e-5)
    expected = inception_score(fake.logits, split_size=30)
    assert scores["inception_score"]["mean"] == pytest.approx(expected.mean, rel=1e-5)
    assert scores["inception_score"]["splits"] == 3
    both = precision_recall(real.pool, fake.pool)
    assert (scores["precision"], scores["recall"]) == (both.precision, both.recall)
    kid = kernel_distance(real.pool, fake.pool, subsets=4, subset_size=50)
    assert scores["kid"]["mean"] == pytest.approx(kid.mean, rel=1e-4)
    for word in ("FID", "sFID", "Inception Score", "Precision", "Recall", "KID"):
        assert word in format_scores(record)


def test_the_record_says_all_that_a_score_depends_on(samples, reference, tmp_path):
    record = evaluate(
        samples,
        reference,
        seeds=3,
        rounding="truncate",
        sampling={"solver": "ddpm", "steps": 250, "guidance_scale": 1.5},
        provenance={"vae": "sd-vae-ft-mse", "step": 400_000},
    )
    provenance = record["provenance"]
    assert provenance["feature_extractor"]["fingerprint"] == "fake0"
    assert provenance["reference_hash"] == reference.content_hash
    assert provenance["sample_hash"] == content_hash(SAMPLES)
    assert provenance["seeds"] == [3]
    assert provenance["rounding"] == "truncate"
    assert provenance["sampling"]["guidance_scale"] == 1.5
    assert provenance["vae"] == "sd-vae-ft-mse"
    assert provenance["code_version"]
    assert provenance["settings"]["kid_subset_size"] == 50
    assert provenance["standard_features"] is False
    assert provenance["reference"]["origin"] == "images"
    assert record["counts"] == {"samples": 70, "reference_features": 80, "reference_images": 80}
    save_json(tmp_path / "record.json", record)
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(json.dumps(record))


def test_batches_from_a_sampler_score_as_the_file_of_them(samples, reference):
    floats = (SAMPLES / 127.5 - 1).astype(np.float32)
    batches = BatchImages([floats[:33], floats[33:]], len(floats), rounding="truncate")
    record, from_file = evaluate(batches, reference), evaluate(samples, reference)
    assert record["scores"] == from_file["scores"]
    assert record["provenance"]["rounding"] == "truncate"
    assert "unknown" in from_file["provenance"]["rounding"]
    assert record["provenance"]["sample_hash"] == from_file["provenance"]["sample_hash"]
    assert from_file["provenance"]["sampling"] is None


def test_progress_has_speed_and_time_left(samples, reference):
    seen = []
    evaluate(samples, reference, batch_size=30, progress=seen.append)
    assert [p.done for p in seen] == [30, 60, 70]
    assert all(p.what == "samples" and p.total == 70 for p in seen)
    assert seen[0].images_per_second > 0
    expected = 40 / seen[0].images_per_second
    assert seen[0].eta_seconds == pytest.approx(expected)


def test_moments_alone_permit_fid_only_and_the_record_says_so(samples, tmp_path):
    pool = FakeInception().features(REAL).pool
    np.savez(tmp_path / "x.npz", mu=pool.mean(0), sigma=np.cov(pool, rowvar=False))
    extractor = FakeInception(standard=True)
    reference = open_reference(tmp_path / "x.npz", extractor)
    record = evaluate(samples, reference, extractor)
    scores = record["scores"]
    assert scores["fid"] > 0 and scores["inception_score"]["mean"] > 1
    assert [scores[name] for name in ("sfid", "precision", "recall", "kid")] == [None] * 4
    assert set(record["provenance"]["not_computed"]) == {"sfid", "precision_recall", "kid"}
    assert "kid: not computed" in format_scores(record)
    with pytest.raises(ValueError, match="holds moments only"):
        evaluate(samples, reference, extractor, settings=ScoreSettings(scores=("kid",)))
    with pytest.raises(ValueError, match="no spatial moments"):
        evaluate(samples, reference, extractor, settings=ScoreSettings(scores=("fid", "sfid")))


def test_only_the_scores_asked_for_are_computed(samples, reference):
    record = evaluate(samples, reference, settings=ScoreSettings(scores=("inception_score",)))
    computed = {name for name, value in record["scores"].items() if value is not None}
    assert computed == {"inception_score"}
    assert record["provenance"]["settings"]["scores"] == ["inception_score"]


def test_too_few_samples_refused_before_any_is_read(reference):
    def explode():
        raise AssertionError("read")
        yield

    few = BatchImages(explode(), 6)
    with pytest.raises(TooFewSamplesError, match=r"fid needs at least 7 sample images.*allow_sing"):
        evaluate(few, reference)
    with pytest.raises(TooFewSamplesError, match=r"kid needs at least 50 sample images, there are"):
        evaluate(BatchImages(explode(), 20), reference)
    quick = ScoreSettings(scores=("kid",), kid_subset_size=81)
    with pytest.raises(TooFewSamplesError, match="at least 81 reference images, there are 80"):
        evaluate(BatchImages(explode(), 100), reference, settings=quick)
    allowed = ScoreSettings(scores=("fid", "sfid"), allow_singular=True)
    assert evaluate(BatchImages([SAMPLES[:4]], 4), reference, settings=allowed)["scores"]["fid"] > 0


def test_mismatches_and_unusable_features_refused(samples, reference):
    with pytest.raises(FeatureMismatchError, match=r"'fake0'.*'fake1'"):
        evaluate(samples, reference, FakeInception(1))
    with pytest.raises(ValueError, match="expected some of fid, sfid"):
        ScoreSettings(scores=("fdi",))
    with pytest.raises(ValueError, match="at least 1"):
        ScoreSettings(neighbours=0)
    broken = FakeInception()
    broken.features = lambda images: FakeInception().features(images[:-1])
    with pytest.raises(ValueError, match="returned features of"):
        evaluate(samples, reference, broken)
    with pytest.raises(ValueError, match="expected 71 images"):
        evaluate(BatchImages([SAMPLES], 71), reference)
