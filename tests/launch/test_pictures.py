"""Pictures that runs and commands leave: where they are, and what is on them."""

import io

import numpy as np
import pytest
from PIL import Image

from dit_jax.evaluation import labelled_panel, load_adm_npz, render_panels
from dit_jax.launch import sample, train
from tests.launch.conftest import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run's workdir, with TensorBoard."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    settings = {"num_steps": 2, "preview_every": 2, "preview_images": 20, "tensorboard": True}
    train.run(tiny_config(**{f"training.{key}": value for key, value in settings.items()}), workdir)
    return workdir


def test_tensorboard_shows_the_preview(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert events.SummaryMetadata("samples").plugin_data.plugin_name == "images"
    (event,) = events.Tensors("samples")
    width, height, png = make_ndarray(event.tensor_proto)
    shown = np.asarray(Image.open(io.BytesIO(png)))
    kept = Image.open(trained / "previews" / "step_00000002.png")
    assert event.step == 2 and kept.size == (int(width), int(height))
    np.testing.assert_array_equal(shown, np.asarray(kept))  # the grid, with its captions
    assert min(kept.size) > 100


def test_labels_make_an_image_each_with_captions(trained, tmp_path):
    common = [f"--workdir={trained}", "--labels", "3", "7"]
    sample.main([*common, f"--out={tmp_path / 'two.NPZ'}"])
    images, labels = load_adm_npz(tmp_path / "two.NPZ")
    assert labels.tolist() == [3, 7]
    sample.main([*common, f"--out={tmp_path / 'two.PNG'}"])
    expected = render_panels([labelled_panel(images, [3, 7])])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "two.PNG")), np.asarray(expected))
    sample.main([*common, "--num_images=5", f"--out={tmp_path / 'five.npz'}"])
    assert load_adm_npz(tmp_path / "five.npz")[1].tolist() == [3, 7, 3, 7, 3]
    # Numbers of a seed and i only: the first two are the same images.
    np.testing.assert_array_equal(load_adm_npz(tmp_path / "five.npz")[0][:2], images)
