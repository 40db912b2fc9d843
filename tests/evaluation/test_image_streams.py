import hashlib

import numpy as np
import pytest
from PIL import Image

from dit_jax.data import ArraySource
from dit_jax.evaluation import BatchImages, FolderImages, NpzImages, SourceImages
from tests.evaluation.inception_fakes import random_images

IMAGES = random_images(0, 11)


def read(images, batch_size=4):
    return np.concatenate(list(images.batches(batch_size)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_npz_is_read_in_batches_with_and_without_compression(tmp_path, save, batch_size):
    save(tmp_path / "x.npz", np.arange(3), arr_1=np.arange(11))
    save(tmp_path / "x.npz", IMAGES, arr_1=np.arange(11))
    images = NpzImages(tmp_path / "x.npz")
    assert images.count == 11
    assert max(len(batch) for batch in images.batches(batch_size)) == min(batch_size, 11)
    np.testing.assert_array_equal(read(images, batch_size), IMAGES)
    expected = hashlib.sha256((tmp_path / "x.npz").read_bytes()).hexdigest()
    assert images.content_hash() == expected


def test_npz_array_behind_others_and_in_fortran_order(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(1000), arr_0=np.asfortranarray(IMAGES))
    np.testing.assert_array_equal(read(NpzImages(tmp_path / "x.npz")), IMAGES)
    np.savez_compressed(tmp_path / "y.npz", arr_0=np.asfortranarray(IMAGES))
    with pytest.raises(ValueError, match="ascontiguousarray"):
        NpzImages(tmp_path / "y.npz")


def test_damaged_or_unsuitable_npz_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        NpzImages(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(ValueError, match=r"text.npz is not a readable .npz"):
        NpzImages(tmp_path / "text.npz")
    np.savez(tmp_path / "a.npz", IMAGES.astype(np.float32))
    with pytest.raises(ValueError, match="uint8"):
        NpzImages(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", other=IMAGES)
    with pytest.raises(ValueError, match=r"expected 'arr_0', found \['other'\]"):
        NpzImages(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", np.array([object()]))
    with pytest.raises(ValueError, match="Python objects"):
        NpzImages(tmp_path / "c.npz")
    np.savez_compressed(tmp_path / "d.npz", random_images(0, 2000))
    data = bytearray((tmp_path / "d.npz").read_bytes())
    data[50_000:50_020] = bytes(20)
    (tmp_path / "d.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"d.npz is damaged"):
        read(NpzImages(tmp_path / "d.npz"))


def make_folder(root):
    for index, image in enumerate(IMAGES):
        folder = root / ("a" if index % 2 else "b/deep")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    (root / "notes.txt").write_text("no image")
    return sorted(p for p in root.rglob("*.png"))


def test_folder_is_read_recursively_in_sorted_order(tmp_path):
    files = make_folder(tmp_path)
    images = FolderImages(tmp_path)
    expected = np.stack([np.asarray(Image.open(file)) for file in files])
    for batch_size in (1, 4, 30):
        np.testing.assert_array_equal(read(images, batch_size), expected)
    assert images.count == 11
    resized = FolderImages(tmp_path, image_size=2, resize="adm")
    assert read(resized).shape == (11, 2, 2, 3)
    assert resized.preprocessing != images.preprocessing


def test_folder_hash_follows_names_and_bytes_and_is_remembered(tmp_path, monkeypatch):
    root, cache = tmp_path / "images", tmp_path / "cache"
    files = make_folder(root)
    before = FolderImages(root).content_hash()
    assert FolderImages(root).content_hash(cache) == before
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", None)  # unchanged files are not read again
        assert FolderImages(root).content_hash(cache) == before
    data = bytearray(files[3].read_bytes())
    data[-1] ^= 1
    files[3].write_bytes(data)
    assert FolderImages(root).content_hash(cache) != before
    data[-1] ^= 1
    files[3].write_bytes(data)
    assert FolderImages(root).content_hash(cache) == before
    files[3].rename(files[3].with_name("renamed.png"))
    assert FolderImages(root).content_hash(cache) != before


def test_unusable_folders_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        FolderImages(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no images"):
        FolderImages(tmp_path)
    files = make_folder(tmp_path)
    with pytest.raises(ValueError, match="adm"):
        FolderImages(tmp_path, resize="adm")
    with pytest.raises(ValueError, match="4x4, expected 8x8"):
        read(FolderImages(tmp_path, image_size=8))
    Image.new("RGB", (6, 4)).save(files[5])
    with pytest.raises(
        ValueError, match=r"mixed sizes.*--reference_resize=adm --reference_size=SIDE"
    ):
        read(FolderImages(tmp_path))
    files[5].write_bytes(files[4].read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{files[5].name} cannot be decoded"):
        read(FolderImages(tmp_path))


def test_a_data_source_is_read_in_its_order():
    source = ArraySource(IMAGES, np.zeros(11, np.int32), name="x", split="train")
    images = SourceImages(source)
    np.testing.assert_array_equal(read(images), IMAGES)
    other = ArraySource(IMAGES[::-1], np.zeros(11, np.int32), name="x", split="train")
    assert images.content_hash() != SourceImages(other).content_hash()


def test_batches_are_rounded_and_cut_anew():
    floats = [IMAGES[:3] / 127.5 - 1, IMAGES[3:4] / 127.5 - 1, IMAGES[4:] / 127.5 - 1]
    images = BatchImages([x.astype(np.float32) for x in floats], 11)
    batches = list(images.batches(4))
    assert [len(b) for b in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    with pytest.raises(ValueError, match="expected 12 images, the batches held 11"):
        list(BatchImages([IMAGES], 12).batches(4))
