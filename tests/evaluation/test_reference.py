import json

import numpy as np
import pytest
from PIL import Image

from dit_jax.evaluation import (
    FeatureMismatchError,
    GaussianStatistics,
    NpzImages,
    load_reference,
    open_reference,
    reference_from_images,
    save_reference,
)
from tests.evaluation.inception_fakes import FakeInception, StreamingFake, random_images

IMAGES = random_images(1, 40)


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, IMAGES)
    return path


def moments_of(features) -> dict[str, np.ndarray]:
    return {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}


def adm_moments(extractor, images) -> dict[str, np.ndarray]:
    found = extractor.features(images)
    spatial = {f"{name}_s": value for name, value in moments_of(found.spatial).items()}
    return moments_of(found.pool) | spatial


def assert_moments(statistics: GaussianStatistics, features: np.ndarray):
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(features, rowvar=False), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", [FakeInception, StreamingFake])
def test_images_in_an_npz_become_statistics_in_batches(npz, kind):
    extractor = kind()
    seen = []
    reference = open_reference(npz, extractor, batch_size=7, progress=seen.append)
    expected = FakeInception().features(IMAGES)
    assert_moments(reference.pool, expected.pool)
    assert_moments(reference.spatial, expected.spatial)
    np.testing.assert_allclose(reference.features, expected.pool, rtol=1e-5, atol=1e-5)
    assert (reference.count, reference.origin) == (40, "images")
    assert reference.content_hash == NpzImages(npz).content_hash()
    assert extractor.largest_batch <= 7
    assert (seen[-1].done, seen[-1].total) == (40, 40)
    assert seen[0].eta_seconds > 0 and seen[-1].eta_seconds == 0


def test_a_folder_and_an_npz_of_the_same_images_agree(tmp_path, npz):
    for index, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{index:03d}.png")
    folder = open_reference(tmp_path, FakeInception())
    archive = open_reference(npz, FakeInception())
    np.testing.assert_allclose(folder.pool.covariance, archive.pool.covariance, rtol=1e-12)
    assert folder.content_hash != archive.content_hash
    smaller = open_reference(tmp_path, FakeInception(), image_size=2, resize="adm")
    assert smaller.preprocessing != folder.preprocessing


def test_statistics_are_kept_by_content_extractor_and_preprocessing(tmp_path, npz):
    cache, extractor = tmp_path / "cache", FakeInception()
    first = open_reference(npz, extractor, cache_dir=cache)
    assert extractor.seen == 40
    renamed = npz.rename(tmp_path / "renamed.npz")
    second = open_reference(renamed, extractor, cache_dir=cache)
    assert extractor.seen == 40
    assert second.description == str(renamed)
    np.testing.assert_allclose(second.pool.mean, first.pool.mean, rtol=1e-12)
    np.testing.assert_allclose(second.pool.covariance, first.pool.covariance, rtol=1e-12)
    np.testing.assert_array_equal(second.features, first.features)
    assert second.pool.count == first.pool.count == second.count == 40
    other = FakeInception(1)
    open_reference(renamed, other, cache_dir=cache)
    assert other.seen == 40
    reference_from_images(NpzImages(renamed), extractor, feature_limit=10, cache_dir=cache)
    assert extractor.seen == 80
    np.savez(renamed, IMAGES[::-1])
    open_reference(renamed, extractor, cache_dir=cache)
    assert extractor.seen == 120
    assert not [p for p in cache.iterdir() if p.suffix not in (".npz", ".sha256")]


def test_features_of_a_limited_random_part_are_kept_in_order(npz):
    limited = reference_from_images(NpzImages(npz), FakeInception(), feature_limit=9, batch_size=4)
    every = FakeInception().features(IMAGES).pool
    assert limited.features.shape == (9, 6)
    chosen = np.sort(np.random.default_rng(0).permutation(40)[:9])
    np.testing.assert_allclose(limited.features, every[chosen], rtol=1e-5, atol=1e-5)
    assert limited.count == 40


def test_saved_references_carry_their_extractor_and_are_refused_under_another(tmp_path, npz):
    reference = open_reference(npz, FakeInception())
    path = save_reference(tmp_path / "reference.npz", reference)
    with np.load(path, allow_pickle=False) as archive:  # as ADM's evaluator reads it
        np.testing.assert_allclose(archive["mu"], reference.pool.mean)
        assert {"sigma", "mu_s", "sigma_s"} <= set(archive.files)
    loaded = open_reference(path, FakeInception())
    assert loaded.as_dict() == reference.as_dict()
    np.testing.assert_allclose(loaded.spatial.covariance, reference.spatial.covariance)
    for reader in (open_reference, load_reference):
        with pytest.raises(FeatureMismatchError, match=r"'fake0'.*'fake1'.*Compute the reference"):
            reader(path, FakeInception(1))
    with pytest.raises(FileExistsError):
        save_reference(path, reference)


def test_published_moments_are_for_the_standard_inception_only(tmp_path):
    path = tmp_path / "VIRTUAL.npz"
    extractor = FakeInception(standard=True)
    moments = adm_moments(extractor, IMAGES)
    np.savez(path, **moments)
    reference = open_reference(path, extractor)
    np.testing.assert_allclose(reference.pool.covariance, moments["sigma"], rtol=1e-6)
    np.testing.assert_allclose(reference.spatial.mean, moments["mu_s"], rtol=1e-6)
    assert reference.features is None and reference.count is None
    assert reference.origin == "published moments"
    with pytest.raises(FeatureMismatchError, match=r"2015-12-05.*images instead"):
        open_reference(path, FakeInception())


def test_images_beside_published_moments_serve_the_scores_that_need_them(tmp_path):
    path = tmp_path / "VIRTUAL.npz"
    extractor = FakeInception(standard=True)
    np.savez(path, arr_0=IMAGES[:12], **adm_moments(extractor, IMAGES))
    reference = open_reference(path, extractor, cache_dir=tmp_path / "cache")
    assert_moments(reference.pool, extractor.features(IMAGES).pool)
    assert len(reference.features) == 12
    with pytest.raises(FeatureMismatchError, match="ignore_moments"):
        open_reference(path, FakeInception())
    from_images = open_reference(path, FakeInception(), ignore_moments=True)
    assert_moments(from_images.pool, extractor.features(IMAGES[:12]).pool)


def test_moments_without_spatial_ones_and_of_other_sizes(tmp_path):
    path, extractor = tmp_path / "x.npz", FakeInception(standard=True)
    np.savez(path, **moments_of(extractor.features(IMAGES).pool))
    assert open_reference(path, extractor).spatial is None
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(FeatureMismatchError, match="3 features"):
        open_reference(path, extractor)
    np.savez(path, mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
    with pytest.raises(ValueError, match=r"x.npz: 'mu' and 'sigma' are unusable"):
        open_reference(path, extractor)


def test_unusable_references_refused(tmp_path, npz):
    extractor = FakeInception()
    with pytest.raises(FileNotFoundError, match="expected a folder of images"):
        open_reference(tmp_path / "none", extractor)
    with pytest.raises(ValueError, match="taken as they are"):
        open_reference(npz, extractor, image_size=64)
    with pytest.raises(ValueError, match="split and data_dir are for tfds"):
        open_reference(npz, extractor, split="test")
    with pytest.raises(ValueError, match="ignore_moments is for"):
        open_reference(tmp_path, extractor, ignore_moments=True)
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(ValueError, match="not a readable"):
        open_reference(tmp_path / "text.npz", extractor)
    np.savez(tmp_path / "pickle.npz", metadata=np.array([{"format": 1}], object))
    with pytest.raises(ValueError, match="plain arrays"):
        open_reference(tmp_path / "pickle.npz", extractor)
    np.savez(tmp_path / "later.npz", metadata=np.array(json.dumps({"format": "later/2"})))
    with pytest.raises(ValueError, match="'later/2'"):
        open_reference(tmp_path / "later.npz", extractor)
    np.savez(tmp_path / "other.npz", metadata=np.array("text"))
    with pytest.raises(ValueError, match="no file of reference statistics"):
        load_reference(tmp_path / "other.npz", extractor)


def test_a_tfds_reference_goes_through_the_data_room(monkeypatch):
    from dit_jax.data import ArraySource

    asked = {}

    def open_source(name, split, **options):
        asked.update(options, name=name, split=split)
        return ArraySource(IMAGES, np.zeros(40, np.int32), name="tfds/x", split=split)

    monkeypatch.setattr("dit_jax.evaluation.reference.open_source", open_source)
    reference = open_reference(
        "tfds:cifar10:3.*.*", FakeInception(), split="test", image_size=4, resize="adm"
    )
    assert asked == {
        "name": "tfds",
        "split": "test",
        "dataset": "cifar10:3.*.*",
        "data_dir": None,
        "image_size": 4,
        "resize": "adm",
    }
    assert_moments(reference.pool, FakeInception().features(IMAGES).pool)
    assert reference.description == "tfds/x/test"


def test_a_failed_extraction_leaves_nothing_behind(tmp_path, npz, monkeypatch):
    extractor = FakeInception()
    monkeypatch.setattr(extractor, "features", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_reference(npz, extractor, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npz"))
