import numpy as np
import pytest
from PIL import Image

from dit_jax.evaluation import Panel, labelled_panel, save_grid, save_panels
from dit_jax.evaluation.grid import CELL_GAP, MARGIN, render_panels


def random_images(count, side=8, channels=1, seed=0):
    shape = (count, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_where_it_belongs_and_whole(tmp_path, channels):
    images = random_images(7, channels=channels)
    path = save_grid(tmp_path / "grid.png", images, columns=3, upscale=4)
    picture = np.asarray(Image.open(path))
    step = 8 * 4 + CELL_GAP
    assert picture.shape == (2 * MARGIN + 3 * step - CELL_GAP, 2 * MARGIN + 3 * step - CELL_GAP, 3)
    for index, image in enumerate(images):
        y, x = (MARGIN + part * step for part in divmod(index, 3))
        tile = picture[y : y + 32, x : x + 32]
        expected = np.broadcast_to(image.repeat(4, 0).repeat(4, 1), (32, 32, 3))
        np.testing.assert_array_equal(tile, expected)
    # The two cells left over are background.
    assert (picture[MARGIN + 2 * step :, MARGIN + step :] == 255).all()


def test_small_images_are_enlarged_and_large_ones_are_not():
    small = render_panels([Panel(random_images(1))])
    large = render_panels([Panel(random_images(1, side=64))])
    assert small.size == (2 * MARGIN + 48,) * 2
    assert large.size == (2 * MARGIN + 64,) * 2


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        ([i % 10 for i in range(64)], 10),  # a class a column
        ([i % 10 for i in range(400)], 20),
        ([3, 7] * 10, 4),
        ([3, 7], None),
        ([3, 3, 7, 7], None),
        (list(range(100)) * 2, None),  # too many to stand side by side
    ],
)
def test_classes_are_captions_and_in_turn_columns(labels, columns):
    panel = labelled_panel(random_images(len(labels)), labels, "title")
    assert panel.columns == columns and panel.title == "title"
    assert panel.captions == [str(label) for label in labels]
    render_panels([panel])


def test_panels_share_a_top_line_and_keep_their_labels_apart(tmp_path):
    samples, real = random_images(20), random_images(10, seed=1)
    labels = [str(digit) for digit in range(10)]
    panels = [
        Panel(samples, "samples", columns=2, row_labels=labels),
        Panel(real, "real", columns=1, captions=[f"is {i}" for i in range(10)]),
    ]
    path = save_panels(tmp_path / "panels.png", panels, upscale=3)
    picture = np.asarray(Image.open(path))

    def find(image):
        tile = np.broadcast_to(image.repeat(3, 0).repeat(3, 1), (24, 24, 3))
        windows = np.lib.stride_tricks.sliding_window_view(picture, (24, 24, 3))[:, :, 0]
        rows, columns = np.nonzero((windows[:, :, 0, 0] == tile[0, 0]).all(-1))
        for y, x in zip(rows, columns, strict=True):
            if (windows[y, x] == tile).all():
                return y, x
        raise AssertionError("image not found in the picture")

    first_sample, first_real = find(samples[0]), find(real[0])
    assert first_sample[0] == first_real[0] > MARGIN
    assert first_sample[1] < first_real[1]
    left_of_samples = picture[first_sample[0] :, : first_sample[1]]
    assert (left_of_samples < 128).any(), "row labels are drawn"
    assert (picture[: first_sample[0]] < 128).any(), "titles are drawn"
    assert (picture[:, -1] == 255).all() and (picture[-1] == 255).all()


def test_floats_and_bytes_give_the_same_picture():
    images = random_images(4)
    floats = images.astype(np.float32) / 127.5 - 1
    assert render_panels([Panel(images)]).tobytes() == render_panels([Panel(floats)]).tobytes()


def test_what_does_not_fit_is_refused(tmp_path):
    images = random_images(6)
    path = tmp_path / "grid.png"
    with pytest.raises(ValueError, match="no images"):
        save_grid(path, images[:0])
    with pytest.raises(ValueError, match="3 row labels for 2 rows"):
        save_grid(path, images, 3, row_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="1 captions for 6 images"):
        save_grid(path, images, captions=["a"])
    with pytest.raises(ValueError, match="columns must be"):
        save_grid(path, images, 0)
    with pytest.raises(ValueError, match="upscale"):
        save_grid(path, images, upscale=0)
    with pytest.raises(ValueError, match="3 or 4 channels, got 2"):
        save_grid(path, random_images(2, channels=2))
    with pytest.raises(ValueError, match="no panels"):
        save_panels(path, [])
    assert not path.exists()
    save_grid(path, images)
    with pytest.raises(FileExistsError):
        save_grid(path, images)
    save_grid(path, images[:1], overwrite=True)
