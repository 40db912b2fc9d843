"""The name of an output says its format, in any case; what it cannot mean is refused."""

import numpy as np
import pytest
from PIL import Image

from dit_jax import output_formats
from dit_jax.evaluation import save_grid
from dit_jax.evaluation.sample_store import SampleStore


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.PNG", "picture"),
        ("x.JPG", "picture"),
        ("x.jpeg", "picture"),
        ("x.WebP", "picture"),
        ("x.NPZ", "npz"),
        ("x", "folder"),
        ("runs/v1.5", "folder"),
        ("sd.final", "folder"),
    ],
)
def test_samples_format(name, kind):
    assert output_formats.samples_format(name) == kind


@pytest.mark.parametrize("name", ["x.gif", "x.TIFF", "x.npy", "x.json", "x.avif", "x.mp4"])
def test_a_file_of_another_kind_never_becomes_a_folder(name):
    with pytest.raises(ValueError, match=rf"{name}: samples are written as .png, .jpg, .*or .npz"):
        output_formats.samples_format(name)
    with pytest.raises(ValueError, match=rf"{name}: the output is a folder"):
        output_formats.require_folder(name)


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [("x.PNG", "PNG", 0), ("x.webp", "WEBP", 0), ("x.JPG", "JPEG", 24), ("x.jpeg", "JPEG", 24)],
)
def test_a_grid_is_written_as_its_name_says(tmp_path, name, kind, tolerance):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    save_grid(tmp_path / name, images)
    save_grid(tmp_path / "exact.png", images)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "exact.png"])
    with Image.open(tmp_path / name) as picture, Image.open(tmp_path / "exact.png") as exact:
        assert picture.format == kind
        difference = np.asarray(picture).astype(int) - np.asarray(exact)
    assert np.abs(difference).max() <= tolerance


def test_a_grid_of_no_pictures_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x.gif: a picture's name ends in .png, .jpg, .jpeg or"):
        save_grid(tmp_path / "x.gif", np.zeros((1, 8, 8, 1), np.uint8))
    assert not list(tmp_path.iterdir())


def test_an_npz_in_capitals_is_an_npz(tmp_path):
    store = SampleStore(tmp_path / "x.NPZ", 2, (8, 8, 1), {})
    store.append(np.zeros((2, 8, 8, 1), np.uint8))
    store.finish(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.NPZ", "x.json"]
    assert (tmp_path / "x.NPZ").is_file()
