"""Comparing sets of images: every score against its definition, and what cannot be compared."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from dit_jax import evaluation
from dit_jax.evaluation.comparison import (
    amplification,
    compare_images,
    difference_maps,
    open_images,
)
from dit_jax.evaluation.comparison_report import save_comparison_html, save_comparison_png


@dataclass(frozen=True)
class Means:
    """Mean, and range, of each image: two features whose distance can be worked out by hand."""

    name: str = "means"
    fingerprint: str = "means"
    dim: int = 2

    def __call__(self, images):
        flat = images.reshape(len(images), -1).astype(np.float64)
        return np.stack([flat.mean(axis=1), np.ptp(flat, axis=1)], axis=1)


def noise(count=10, height=12, width=14, channels=1, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, (count, height, width, channels), dtype=np.uint8
    )


def image_set(images, name="images"):
    return evaluation.BatchImages(evaluation.batches_of(images, 4), len(images), description=name)


def compare(a, b, **options):
    return compare_images(image_set(a, "one"), image_set(b, "other"), batch_size=3, **options)


def damaged(images):
    """Image i has its first i pixels changed by 3 i; image 0 is untouched."""
    changed = images.astype(np.int16)
    for i in range(len(images)):
        flat = changed[i].reshape(-1)
        flat[:i] += np.where(flat[:i] > 127, -3 * i, 3 * i)
    return changed.astype(np.uint8)


def test_scores_are_those_of_the_definitions():
    a = noise()
    b = damaged(a)
    result = compare(a, b, extractor=Means(), kept=4)
    error = np.square(a.astype(float) - b).mean(axis=(1, 2, 3))
    expected = 10 * np.log10(255**2 / error[1:])
    assert result.equal == 1 and np.isinf(result.psnr[0])
    np.testing.assert_allclose(result.psnr[1:], expected)
    np.testing.assert_allclose(result.mean_psnr, expected.mean())
    np.testing.assert_allclose(result.pooled_psnr, 10 * np.log10(255**2 / error.mean()))
    np.testing.assert_array_equal(result.largest, 3 * np.arange(10))
    np.testing.assert_allclose(result.ssim, evaluation.ssim(a, b))
    statistics = [
        evaluation.GaussianStatistics.from_features(Means()(images), "means") for images in (a, b)
    ]
    np.testing.assert_allclose(result.frechet, evaluation.frechet_distance(*statistics))
    np.testing.assert_array_equal(result.worst, np.argsort(result.psnr)[:4])
    np.testing.assert_array_equal(result.pairs[0], a[result.worst])
    np.testing.assert_array_equal(result.pairs[1], b[result.worst])


def test_equal_sets_are_said_to_be_equal_in_valid_json(tmp_path):
    a = noise()
    result = compare(a, a, extractor=Means())
    assert result.equal == 10 and result.frechet == pytest.approx(0, abs=1e-9)
    assert ("PSNR, lowest", "infinite (equal)") in result.summary()
    evaluation.save_json(tmp_path / "scores.json", result.record())
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["psnr_lowest"] is None and record["equal_pairs"] == 10
    assert record["per_image"]["psnr"] == [None] * 10


def test_what_is_left_out_says_why():
    a = noise(height=8, width=8)
    result = compare(a, damaged(a), extractor=Means(dim=2), left_out={"LPIPS": "no package"})
    assert result.ssim is None and "11 pixels" in result.left_out["SSIM"]
    assert result.left_out["LPIPS"] == "no package" and result.lpips is None
    few = compare(a[:2], a[:2], extractor=Means())
    assert few.frechet is None and "too few" in few.left_out["Fréchet distance"]
    assert compare(a[:2], a[:2], extractor=Means(), allow_singular=True).frechet is not None


def test_difference_maps_use_the_whole_range_and_do_not_wrap():
    a = np.zeros((1, 2, 2, 1), np.uint8)
    b = np.array([0, 1, 3, 10], np.uint8).reshape(a.shape)
    assert amplification(a, b) == 16
    np.testing.assert_array_equal(difference_maps(b, a, 16).ravel(), [0, 16, 48, 160])
    assert difference_maps(a, b, 128).max() == 255
    assert amplification(a, a) == 128 and amplification(a, a + np.uint8(255)) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_folders_and_npz_of_the_same_images_are_equal(tmp_path, channels):
    images = noise(channels=channels)
    evaluation.save_adm_npz(tmp_path / "images.npz", images)
    evaluation.save_png_folder(tmp_path / "folder", images)
    a, b = open_images(tmp_path / "images.npz"), open_images(tmp_path / "folder")
    assert compare_images(a, b).equal == len(images)


def test_reports_hold_the_pairs_themselves(tmp_path):
    a = noise(count=11)
    result = compare(a, damaged(a), names=("<one>", "other"))
    save_comparison_html(tmp_path / "compare.html", result)
    page = (tmp_path / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 33 and "http" not in page
    assert "&lt;one&gt;" in page and "<one>" not in page
    assert page.index("no. 10<br>") < page.index("no. 1<br>") < page.index("no. 0<br>")
    save_comparison_png(tmp_path / "compare.png", result)
    width, height = Image.open(tmp_path / "compare.png").size
    assert width > 8 * 48 and height > 6 * 48
    with pytest.raises(FileExistsError, match="--overwrite"):
        save_comparison_html(tmp_path / "compare.html", result)


def test_errors_for_sets_that_do_not_pair(tmp_path):
    with pytest.raises(ValueError, match="one has 10 images and other has 9"):
        compare(noise(10), noise(9))
    with pytest.raises(ValueError, match="14x12 with 1 channels, other are 14x12 with 3"):
        compare(noise(), noise(channels=3))
    with pytest.raises(FileNotFoundError, match=r"no images .*nowhere"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match=r"expected a folder of images or an \.npz"):
        open_images(tmp_path / "text.txt")
