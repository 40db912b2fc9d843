import logging
import os

import numpy as np
import pytest
from PIL import Image

from dit_jax.data import image_index, make_loader, open_source
from dit_jax.evaluation.image_streams import FolderImages


def open_folder(path, split="train", **options):
    return open_source("image_folder", split, path=str(path), **options)


def test_grey_pngs_in_class_folders(tmp_path, write_image):
    pixels = [write_image(f"{name}/{i}.png", seed=i) for name in ("b", "a") for i in range(3)]
    source = open_folder(tmp_path, channels=1)
    assert source.info.image_shape == (28, 28, 1)
    assert source.info.class_names == ("a", "b") and source.info.num_classes == 2
    assert [source[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(source[4]["image"][..., 0], pixels[1])
    assert source.describe(4) == str(tmp_path / "b" / "1.png")
    batch = next(iter(make_loader(source, batch_size=4, seed=0)))
    assert batch["image"].shape == (4, 28, 28, 1)
    assert batch["conditions"]["label"].dtype == np.int32
    # As colour, by an option only.
    assert open_folder(tmp_path).info.image_shape == (28, 28, 3)


def test_formats_upper_case_nesting_and_hidden_files(tmp_path, write_image):
    webp = write_image("x/0.webp", mode="RGB", lossless=True)
    write_image("x/1.JPG", mode="RGB")
    write_image("x/deep/er/2.Jpeg", mode="RGB")
    write_image("y/3.PNG", mode="RGB")
    write_image("y/.hidden.png")
    write_image(".cache/4.png")
    (tmp_path / "y" / "notes.txt").write_text("no image")
    source = open_folder(tmp_path)
    names = [os.path.relpath(source.describe(i), tmp_path) for i in range(len(source))]
    assert names == ["x/0.webp", "x/1.JPG", "x/deep/er/2.Jpeg", "y/3.PNG"]
    np.testing.assert_array_equal(source[0]["image"], webp)


def test_files_of_other_suffixes_are_named_in_one_warning(tmp_path, write_image, caplog):
    write_image("x/0.png")
    for name in ("x/1.HEIC", "x/deep/2.gif", "y/3.gif"):
        write_image(f"{name}.png")
        os.rename(tmp_path / f"{name}.png", tmp_path / name)
    write_image("y/4.bmp")
    write_image("y/5.TIFF")
    assert len(open_folder(tmp_path, channels=1)) == 3
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path}: 3 files of other suffixes (.gif, .heic) are left out" in warning
    assert "the first being x/1.HEIC" in warning and ".bmp, .tif, .tiff" in warning
    # The same in a folder to compare with; without any image it is the error's reason.
    caplog.clear()
    assert FolderImages(tmp_path, channels=1).count == 3
    assert "3 files of other suffixes" in caplog.text
    for name in ("x/0.png", "y/4.bmp", "y/5.TIFF"):
        (tmp_path / name).unlink()
    for function in (open_folder, FolderImages):
        with pytest.raises(FileNotFoundError, match=r"3 files of other suffixes \(.gif, .heic\)"):
            function(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_photographs_are_upright(tmp_path, suffix):
    # Stored on its side, as cameras do: EXIF's 6 says to turn it clockwise for looking at.
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:8] = 255
    stored = Image.fromarray(np.rot90(upright))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    stored.save(tmp_path / "a" / f"0.{suffix}", exif=exif)
    source = open_folder(tmp_path)
    assert source.info.image_shape == (24, 16, 3)
    (batch,) = FolderImages(tmp_path).batches(1)
    for image in (source[0]["image"], batch[0]):
        assert np.abs(image.astype(int) - upright).max() < 16
    assert open_folder(tmp_path, resize="adm", image_size=16)[0]["image"][0].mean() > 200


def test_a_flat_folder_is_unlabelled(tmp_path, write_image):
    for i in range(3):
        write_image(f"{i}.png", seed=i)
    source = open_folder(tmp_path, channels=1)
    assert source.info.num_classes == 0 and source.info.class_names == ()
    assert source[2]["label"] == 0


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_split_folders_share_the_training_classes(tmp_path, write_image, test_name):
    for name in ("train/a", "train/b", "train/c", f"{test_name}/a", f"{test_name}/c"):
        write_image(f"{name}/0.png")
    assert len(open_folder(tmp_path)) == 3
    test = open_folder(tmp_path, "test")
    assert [test[i]["label"] for i in range(2)] == [0, 2] and test.info.num_classes == 3
    with pytest.raises(ValueError, match="folders without a test split"):
        open_folder(tmp_path, test_fraction=0.1)
    write_image(f"{test_name}/d/0.png")
    with pytest.raises(ValueError, match=r"lacks: \['d'\]"):
        open_folder(tmp_path, "test")


def test_a_class_may_be_called_train(tmp_path, write_image):
    write_image("bus/0.png")
    write_image("train/0.png")
    assert open_folder(tmp_path).info.class_names == ("bus", "train")


def test_test_fraction_cuts_without_overlap(tmp_path, write_image):
    for name in "ab":
        for i in range(10):
            write_image(f"{name}/{i}.png", size=(4, 4))
    train, test = (open_folder(tmp_path, split, test_fraction=0.2) for split in ("train", "test"))
    files = [{source.describe(i) for i in range(len(source))} for source in (train, test)]
    assert (len(train), len(test)) == (16, 4) and not files[0] & files[1]
    assert [test[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    with pytest.raises(FileNotFoundError, match=r"has no test split.*test_fraction"):
        open_folder(tmp_path, "test")
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        open_folder(tmp_path, test_fraction=1.0)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is empty: expected class subfolders, or images"):
        open_folder(tmp_path)
    (tmp_path / "cats").mkdir()
    with pytest.raises(FileNotFoundError, match="its class subfolders hold no image"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match="'train' and 'test', not 'eval'"):
        open_folder(tmp_path, "eval")


def test_mixed_sizes_name_two_files_and_the_remedy(tmp_path, write_image):
    write_image("a/0.png", size=(28, 28))
    write_image("a/1.png", size=(30, 20))
    with pytest.raises(ValueError, match=r"a/0.png is 28x28, .*a/1.png is 30x20.*resize='adm'"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match="resize='adm' needs image_size"):
        open_folder(tmp_path, resize="adm")
    source = open_folder(tmp_path, resize="adm", image_size=16)
    assert source[1]["image"].shape == (16, 16, 3)


def test_unexpected_size_and_bad_options(tmp_path, write_image):
    write_image("a/0.png", size=(30, 20))
    with pytest.raises(ValueError, match=r"are 30x20 .*not image_size=32"):
        open_folder(tmp_path, image_size=32)
    assert open_folder(tmp_path).info.image_shape == (20, 30, 3)
    for options, message in (
        ({"channels": 4}, "channels must be 1"),
        ({"resize": "stretch"}, "resize must be one of"),
        ({"verify": "no"}, "verify must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            open_folder(tmp_path, **options)


def write_many(folder, count):
    """The same small JPEG many times: quick, and truncatable."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "000.jpg")
    data = (folder / "000.jpg").read_bytes()
    for i in range(1, count):
        (folder / f"{i:03}.jpg").write_bytes(data)
    return data


def test_corrupt_images_are_named_skipped_and_counted(tmp_path, caplog, monkeypatch):
    data = write_many(tmp_path / "a", 200)
    (tmp_path / "a" / "003.jpg").write_bytes(data[:-30])  # the header is fine
    (tmp_path / "a" / "007.jpg").write_bytes(b"<html>")
    source = open_folder(tmp_path)
    assert len(source) == 198
    assert "skipping corrupt image" in caplog.text
    assert "003.jpg (image file is truncated" in caplog.text
    assert "007.jpg (not an image in one of the formats JPEG, PNG, WEBP, BMP, TIFF)" in caplog.text
    assert "skipped 2 of 200 images (1.00%)" in caplog.text
    # Numbers are stable: the second opening recalls the check instead of repeating it.
    assert (tmp_path / ".dit_jax_index.npz").exists()
    monkeypatch.setattr(image_index, "_check", None)
    again = open_folder(tmp_path)
    assert again.info == source.info and again.describe(3).endswith("004.jpg")
    assert caplog.text.count("skipped 2 of 200") == 2


def test_too_many_corrupt_images_are_an_error(tmp_path):
    write_many(tmp_path / "a", 50)
    (tmp_path / "a" / "003.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 50 images \(2.00%\).*corrupt.*003.jpg"):
        open_folder(tmp_path)


def test_the_index_notices_a_changed_file(tmp_path, caplog):
    data = write_many(tmp_path / "a", 200)
    before = open_folder(tmp_path).info
    (tmp_path / "a" / "003.jpg").write_bytes(data[:100])
    after = open_folder(tmp_path).info
    assert after.num_examples == 199 and after.fingerprint != before.fingerprint
    (tmp_path / ".dit_jax_index.npz").write_bytes(b"garbage")
    assert open_folder(tmp_path).info == after
    assert "ignoring the unreadable index file" in caplog.text


def test_the_index_file_may_lie_elsewhere(tmp_path, write_image):
    write_image("images/a/0.png")
    index = tmp_path / "index.npz"
    open_folder(tmp_path / "images", index_cache=str(index))
    assert index.exists() and not (tmp_path / "images" / ".dit_jax_index.npz").exists()
    with pytest.raises(OSError, match="cannot write the index file index_cache="):
        open_folder(tmp_path / "images", index_cache=str(tmp_path / "no" / "index.npz"))


def test_a_read_only_folder_is_checked_at_each_opening(tmp_path, write_image, monkeypatch):
    def refuse(source, target):
        raise PermissionError(f"read-only: {target}")

    monkeypatch.setattr(image_index.os, "replace", refuse)
    write_image("a/0.png")
    assert len(open_folder(tmp_path)) == len(open_folder(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["a"]


def corrupt_inside(path):
    """Damage a PNG's pixels but not its ends: the fast check cannot see it."""
    data = bytearray(path.read_bytes())
    middle = data.index(b"IDAT") + 20
    data[middle : middle + 20] = bytes(20)
    path.write_bytes(data)


def test_damage_that_the_fast_check_misses(tmp_path, write_image, caplog):
    for i in range(150):
        write_image(f"a/{i:03}.png", size=(8, 8), seed=i)
    corrupt_inside(tmp_path / "a" / "005.png")
    assert len(open_folder(tmp_path, verify="full")) == 149
    caplog.clear()
    fast = open_folder(tmp_path, verify="fast")
    assert len(fast) == 150 and not caplog.records
    # Replaced by its neighbour, at every reading alike; named once.
    for _ in range(2):
        np.testing.assert_array_equal(fast[5]["image"], fast[6]["image"])
    assert caplog.text.count("005.png cannot be decoded, using the next image") == 1
    corrupt_inside(tmp_path / "a" / "090.png")
    with pytest.raises(ValueError, match=r"2 of 150 images .* more than 1%.*090.png.*verify="):
        fast[90]


def test_images_beside_the_class_folders_are_mentioned(tmp_path, write_image, caplog):
    write_image("a/0.png")
    write_image("preview.png")
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.WARNING):
        source = open_folder(tmp_path)
    assert len(source) == 1
    assert "ignoring 1 images beside the class subfolders" in caplog.text
    assert "1 classes without an image: ['empty']" in caplog.text
