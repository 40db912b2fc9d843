import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from dit_jax.atomic import atomic_file, atomic_folder
from dit_jax.evaluation import (
    check_destination,
    load_adm_npz,
    save_adm_npz,
    save_json,
    save_png_folder,
)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)


def test_adm_npz_round_trip_in_adms_format(tmp_path, images):
    labels = np.arange(12, dtype=np.int32)
    path = save_adm_npz(tmp_path / "new" / "samples.npz", images, labels)
    with np.load(path) as archive:
        assert sorted(archive.files) == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].dtype == np.int64
    read_images, read_labels = load_adm_npz(path)
    np.testing.assert_array_equal(read_images, images)
    np.testing.assert_array_equal(read_labels, labels)
    save_adm_npz(path, images[:3], overwrite=True)
    assert load_adm_npz(path)[1] is None
    assert len(load_adm_npz(path)[0]) == 3
    assert os.listdir(path.parent) == ["samples.npz"]


def test_equal_content_gives_equal_files(tmp_path, images):
    first, second = (save_adm_npz(tmp_path / f"{name}.npz", images) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_unreadable_npz_files_are_named(tmp_path, images):
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.npz"):
        load_adm_npz(tmp_path / "missing.npz")
    path = save_adm_npz(tmp_path / "a.npz", images)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.npz is not a readable \.npz"):
        load_adm_npz(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a readable"):
        load_adm_npz(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"expected the array 'arr_0', found \['mu'\]"):
        load_adm_npz(path)
    np.savez(path, np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="got float64"):
        load_adm_npz(path)
    np.savez(path, images, np.zeros(5, np.int64))
    with pytest.raises(ValueError, match="12 images but 5 labels"):
        load_adm_npz(path)


class Payload:
    """Pickles into a call that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_objects_in_an_npz_are_not_executed(tmp_path):
    np.savez(tmp_path / "evil.npz", np.array([Payload(tmp_path / "made")], dtype=object))
    with pytest.raises(ValueError, match="not a readable"):
        load_adm_npz(tmp_path / "evil.npz")
    assert not (tmp_path / "made").exists()


def test_png_folder_flat_and_by_class(tmp_path, images):
    flat = save_png_folder(tmp_path / "flat", images)
    assert sorted(os.listdir(flat)) == [f"{i:06d}.png" for i in range(12)]
    np.testing.assert_array_equal(np.asarray(Image.open(flat / "000007.png")), images[7])
    by_class = save_png_folder(tmp_path / "classes", images[..., :1], np.arange(12))
    assert sorted(os.listdir(by_class)) == [f"{i:02d}" for i in range(12)]
    image = Image.open(by_class / "11" / "000011.png")
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), images[11, ..., 0])
    save_png_folder(flat, images[:2], overwrite=True)
    assert len(os.listdir(flat)) == 2
    assert sorted(os.listdir(tmp_path)) == ["classes", "flat"]


def test_a_failure_half_way_leaves_the_old_and_no_debris(tmp_path, images):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file", overwrite=True) as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old"
    folder = save_png_folder(tmp_path / "folder", images)
    with pytest.raises(RuntimeError), atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert len(os.listdir(folder)) == 12
    with pytest.raises(ValueError, match="3 or 4 channels, got 5"):
        save_png_folder(tmp_path / "latents", np.zeros((2, 4, 4, 5), np.uint8))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_existing_destinations_are_refused_and_kept(tmp_path, images):
    path = save_adm_npz(tmp_path / "a.npz", images)
    before = path.read_bytes()
    for save in (save_adm_npz, save_png_folder):
        with pytest.raises(FileExistsError, match=r"a\.npz exists already; give another name"):
            save(path, images[:1])
    with pytest.raises(FileExistsError):
        save_json(path, {})
    assert path.read_bytes() == before
    (tmp_path / "dir").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_json(tmp_path / "dir", {}, overwrite=True)
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_png_folder(path, images, overwrite=True)


def test_unwritable_destinations_are_named_before_any_work(tmp_path, monkeypatch, images):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/x\.npz.*choose another place"):
        save_adm_npz(tmp_path / "file" / "x.npz", images)

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(PermissionError, match=r"cannot write .*y\.npz: Permission denied"):
        check_destination(tmp_path / "y.npz")


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path, monkeypatch, images):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*x\.npz: No space left.*space left"):
        save_adm_npz(tmp_path / "x.npz", images)
    assert os.listdir(tmp_path) == []


def test_json_is_readable_and_strict(tmp_path):
    path = save_json(tmp_path / "metrics.json", {"a": 1.5})
    assert json.loads(path.read_text()) == {"a": 1.5}
    with pytest.raises(ValueError):
        save_json(tmp_path / "nan.json", {"a": float("nan")})
    assert not (tmp_path / "nan.json").exists()


@pytest.mark.parametrize("labels", [np.zeros(3, np.int32), np.zeros(12), -np.ones(12, np.int32)])
def test_labels_that_do_not_fit_are_refused(tmp_path, images, labels):
    with pytest.raises(ValueError, match="labels"):
        save_adm_npz(tmp_path / "x.npz", images, labels)
    assert os.listdir(tmp_path) == []
