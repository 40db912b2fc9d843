"""Images scaled and cropped to sizes that are not square."""

import numpy as np
import pytest
from PIL import Image

from dit_jax.data import open_source
from dit_jax.data.images import adm_center_crop, crop_pixels


@pytest.mark.parametrize("size", [(64, 48), (40, 100), (30, 30), (31, 57)])
@pytest.mark.parametrize("wanted", [(16, 24), (24, 16), (16, 16), (7, 31)])
def test_a_rectangle_is_just_covered(size, wanted):
    rows = np.linspace(0, 255, size[0])[:, None]
    image = Image.fromarray(np.broadcast_to(rows, size).astype(np.uint8))
    found = np.asarray(adm_center_crop(image, wanted)).astype(float)
    assert found.shape == wanted
    # Rows go from dark to bright as far as they are kept, and columns not at all.
    kept = min(1.0, wanted[0] * size[1] / (wanted[1] * size[0]))
    assert abs((found[-1, 0] - found[0, 0]) - 255 * kept) < 255 * (2 / wanted[0] + 0.03)
    assert np.ptp(found, axis=1).max() <= 1


def test_a_square_is_what_it_was():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    np.testing.assert_array_equal(adm_center_crop(image, 16), adm_center_crop(image, (16, 16)))


def test_every_source_of_pixels_crops(tmp_path, write_image):
    write_image("images/a/0.png", size=(30, 20))
    write_image("images/b/0.png", size=(20, 40))
    options = {"image_size": (8, 12), "resize": "adm", "channels": 1}
    folder = open_source("image_folder", "train", path=str(tmp_path / "images"), **options)
    assert folder.info.image_shape == folder[1]["image"].shape == (8, 12, 1)
    digits = open_source("digits", "train", image_size=(8, 12), resize="adm")
    assert digits.info.image_shape == (8, 12, 1)
    plain = open_source("digits", "train")
    pixels = plain.batch(np.arange(3))["image"]
    cropped = crop_pixels(pixels, (8, 12))
    np.testing.assert_array_equal(digits.batch(np.arange(3))["image"], cropped)
    assert plain.info.fingerprint != digits.info.fingerprint

    files = [(tmp_path / "images" / name / "0.png").read_bytes() for name in "ab"]
    offsets = np.cumsum([0, *map(len, files)])
    arrays = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets}
    np.savez(tmp_path / "x_train.npz", **arrays, labels=np.array([0, 1]))
    source = open_source("jpeg_npz", "train", path=str(tmp_path / "x_{split}.npz"), **options)
    assert source.batch(np.arange(2))["image"].shape == (2, 8, 12, 1)
    np.testing.assert_array_equal(source[1]["image"], folder[1]["image"])


def test_sizes_that_do_not_fit_are_refused(tmp_path, write_image):
    write_image("a/0.png", size=(30, 20))
    options = {"path": str(tmp_path), "channels": 1}
    shape = open_source("image_folder", "train", image_size=(20, 30), **options).info.image_shape
    assert shape == (20, 30, 1) or shape == (30, 20, 1)
    with pytest.raises(ValueError, match=r"not image_size=20 x 31 \(height x width\)"):
        open_source("image_folder", "train", image_size=(20, 31), **options)
    with pytest.raises(ValueError, match="image_size must be a positive number of pixels, or two"):
        open_source("image_folder", "train", image_size=(20, 0), resize="adm", **options)
