"""Samples on disk while they are made: nothing made twice, nothing of the user's lost."""

import json

import numpy as np
import pytest

from dit_jax.evaluation import SampleStore, load_adm_npz
from dit_jax.evaluation.sample_store import record_path

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
LABELS = np.arange(10) % 3


def store(path, **options):
    return SampleStore(path, 10, (4, 4, 3), {"seed": 0, "steps": [1, 2]}, **options)


def test_images_go_to_disk_batch_by_batch_and_then_into_the_file(tmp_path):
    path = tmp_path / "x.npz"
    first = store(path)
    first.append(IMAGES[:4])
    assert not path.exists() and store(path).done == 4
    second = store(path)
    second.append(IMAGES[4:8])
    with pytest.raises(ValueError, match="8 of 10 images"):
        second.finish(LABELS)
    third = store(path)
    third.append(IMAGES[8:])
    third.finish(LABELS)
    images, labels = load_adm_npz(path)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert json.loads(record_path(path).read_text()) == {"seed": 0, "steps": [1, 2]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.npz"]


def test_other_settings_do_not_continue_unless_they_restart(tmp_path):
    path = tmp_path / "x.npz"
    store(path).append(IMAGES[:4])
    with pytest.raises(FileExistsError, match=r"left 4 images .* \(seed\)"):
        SampleStore(path, 10, (4, 4, 3), {"seed": 1, "steps": [1, 2]})
    with pytest.raises(FileExistsError, match="shape"):
        SampleStore(path, 11, (4, 4, 3), {"seed": 0, "steps": [1, 2]})
    assert store(path).done == 4
    assert store(path, restart=True).done == 0


def test_a_file_where_the_record_goes_is_kept(tmp_path):
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"x\.json"):
        store(tmp_path / "x.npz")
    assert (tmp_path / "x.json").read_text() == "mine"
    store(tmp_path / "x.npz", restart=True)


def test_a_folder_of_pictures(tmp_path):
    folder = store(tmp_path / "folder")
    folder.append(IMAGES)
    folder.finish(None)
    assert len(list((tmp_path / "folder").glob("*.png"))) == 10
    assert (tmp_path / "folder.json").is_file()


def test_a_run_that_was_cut_off_while_it_began_starts_afresh(tmp_path):
    store(tmp_path / "x.npz")
    (tmp_path / ".x.npz.partial" / "progress.json").write_text("{")
    assert store(tmp_path / "x.npz").done == 0
