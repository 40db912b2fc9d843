import io
import pickle

import numpy as np
import pytest
from PIL import Image

from dit_jax.data import make_loader, open_source


def write_npz(path, images, labels, **extra):
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0] + [len(file) for file in files])
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    content = {"jpeg": jpeg, "offsets": offsets, "labels": np.asarray(labels, np.uint8), **extra}
    np.savez(path, **content)
    return files


def noise(count, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "tiny_{split}.npz")


def test_images_and_labels(tmp_path, path):
    names = np.array(["cat", "dog", "emu"])
    files = write_npz(tmp_path / "tiny_train.npz", noise(5), [0, 1, 1, 0, 1], class_names=names)
    source = open_source("jpeg_npz", "train", path=path)
    assert source.info.class_names == ("cat", "dog", "emu") and source.info.num_classes == 3
    assert source.info.image_shape == (8, 8, 3) and len(source) == 5
    decoded = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    for _ in range(2):  # the second time from memory
        batch = source.batch(np.array([3, 2, 2]))
        np.testing.assert_array_equal(batch["image"], np.stack([decoded[i] for i in (3, 2, 2)]))
        assert batch["label"].tolist() == [0, 1, 1]
    assert source[4]["label"] == 1
    lazy = open_source("jpeg_npz", "train", path=path, keep_decoded=False)
    for one in (lazy, pickle.loads(pickle.dumps(source))):
        np.testing.assert_array_equal(one.batch(np.arange(5))["image"], np.stack(decoded))
    batch = next(iter(make_loader(source, batch_size=4, seed=0, horizontal_flip=True)))
    assert batch["image"].dtype == np.float32
    grey = open_source("jpeg_npz", "train", path=path, channels=1)
    assert grey.info.image_shape == (8, 8, 1) and grey.info.fingerprint != source.info.fingerprint


def test_bad_files(tmp_path, path):
    file = tmp_path / "tiny_train.npz"
    with pytest.raises(FileNotFoundError, match=r"tiny_train.npz for split 'train'"):
        open_source("jpeg_npz", "train", path=path)
    with pytest.raises(ValueError, match=r"write {split} where"):
        open_source("jpeg_npz", "train", path=str(file))
    np.savez(file, images=noise(2))
    with pytest.raises(ValueError, match=r"lacks the arrays \['jpeg', 'offsets', 'labels'\]"):
        open_source("jpeg_npz", "train", path=path)
    write_npz(file, noise(3), [0, 1])
    with pytest.raises(ValueError, match="2 labels need 3 integer offsets"):
        open_source("jpeg_npz", "train", path=path)
    write_npz(file, noise(2), [0, 1], offsets=np.array([0, 5, 6]))
    with pytest.raises(ValueError, match="offsets must rise from 0"):
        open_source("jpeg_npz", "train", path=path)
    write_npz(file, noise(3), [0, 7, 0], class_names=np.array(["cat", "dog"]))
    with pytest.raises(ValueError, match=r"image 1 of .*tiny_train.npz has label 7"):
        open_source("jpeg_npz", "train", path=path)


def test_bad_images(tmp_path, path):
    file = tmp_path / "tiny_train.npz"
    write_npz(file, [*noise(2), *noise(1, size=9)], [0, 1, 0])
    source = open_source("jpeg_npz", "train", path=path)
    with pytest.raises(ValueError, match=r"image 2 of .* is 9x9, image 0 is 8x8"):
        source[2]
    jpeg = np.zeros(20, np.uint8)
    np.savez(file, jpeg=jpeg, offsets=np.array([0, 10, 20]), labels=np.array([0, 1]))
    with pytest.raises(ValueError, match=r"image 0 of .* cannot be decoded"):
        open_source("jpeg_npz", "train", path=path)
