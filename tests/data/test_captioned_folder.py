"""Folders of images with metadata.jsonl: what is read, and what is refused with its line."""

import json

import numpy as np
import pytest
from PIL import Image

from dit_jax.data import captioned_digits
from dit_jax.data.captioned_folder import open_captioned_folder

CAPTIONS = {"a.png": "a red house", "below/b.PNG": "Straße, 猫", "c.jpg": ""}


def write(folder, captions=CAPTIONS, size=(6, 4)):
    lines = []
    for number, (name, text) in enumerate(captions.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (40 * number, 0, 0)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": text, "more": number}))
    (folder / "metadata.jsonl").write_text("\n".join([*lines, ""]) + "\n", encoding="utf-8")
    return folder


def test_captions_go_with_their_images(tmp_path):
    source = open_captioned_folder("train", path=str(write(tmp_path)), channels=3)
    assert (len(source), source.info.image_shape, source.info.num_classes) == (3, (4, 6, 3), 0)
    assert source.captions == ("a red house", "Straße, 猫", "") and list(source.used) == [0, 1, 2]
    batch = source.batch(np.array([2, 1]))
    assert sorted(batch) == ["caption", "image"] and list(batch["caption"]) == [2, 1]
    assert batch["image"][1, 0, 0, 0] == 40 and batch["caption"].dtype == np.int32
    changed = CAPTIONS | {"a.png": "a green house"}
    other = open_captioned_folder("train", path=str(write(tmp_path, changed)))
    assert other.info.fingerprint != source.info.fingerprint


def test_splits_are_those_on_disk_or_a_share(tmp_path):
    many = {f"{i}.png": f"number {i}" for i in range(10)}
    whole = write(tmp_path / "whole", many)
    options = {"path": str(whole), "test_fraction": 0.2}
    train, test = (open_captioned_folder(split, **options) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2)
    of_test = [test.captions[test[i]["caption"]] for i in range(2)]
    assert of_test == [f"number {test.describe(i)[-5]}" for i in range(2)]
    for split in ("train", "validation"):
        write(tmp_path / "two" / split, {f"{split}.png": split})
    options = {"path": str(tmp_path / "two"), "resize": "adm", "image_size": 4}
    for split, text in (("train", "train"), ("test", "validation")):
        assert open_captioned_folder(split, **options).captions == (text,)
    for path in (str(whole), options["path"]):
        with pytest.raises(ValueError, match=r"captioned_folder has .* not 'validation'"):
            open_captioned_folder("validation", path=path)


def test_a_corrupt_image_is_replaced_with_its_caption(tmp_path):
    source = open_captioned_folder("train", path=str(write(tmp_path)))
    (tmp_path / "a.png").write_bytes(b"no longer an image")
    example = source[0]
    assert source.captions[example["caption"]] == "Straße, 猫" and example["image"][0, 0, 0] == 40


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"metadata\.jsonl, line 4 is not JSON"),
        ("[1]", "line 4 holds a list; expected an object"),
        ('{"file_name": "a.png"}', "line 4: text is missing; expected a string"),
        ('{"text": "x"}', "line 4: file_name is missing"),
        ('{"file_name": "a.png", "text": 7}', "line 4: text is 7; expected a string"),
        ('{"file_name": "a.png", "text": "x"}', r"line 4: a\.png has a caption already"),
        ('{"file_name": "d.png", "text": "x"}', r"line 4: there is no image 'd\.png'"),
        ('{"file_name": "../a.png", "text": "x"}', "line 4: there is no image"),
        ('{"file_name": "a.txt", "text": "x"}', r"line 4: 'a\.txt' is no image; expected one of"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path, line, message):
    metadata = write(tmp_path) / "metadata.jsonl"
    metadata.write_text(metadata.read_text(encoding="utf-8").rstrip() + "\n" + line, "utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_captioned_folder("train", path=str(tmp_path))


def test_missing_files_and_images_without_a_caption_are_refused(tmp_path):
    folder = write(tmp_path / "images")
    Image.new("L", (6, 4)).save(folder / "z.png")
    with pytest.raises(ValueError, match=r"1 image of .* without a caption: z\.png\. Give"):
        open_captioned_folder("train", path=str(folder))
    (folder / "z.png").unlink()
    with pytest.raises(FileNotFoundError, match="no test split"):
        open_captioned_folder("test", path=str(folder))
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty: expected a line for every image"):
        open_captioned_folder("train", path=str(folder))
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.jsonl: expected one JSON"):
        open_captioned_folder("train", path=str(folder))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_captioned_folder("train", path=str(tmp_path / "none"))


def test_captioned_digits_show_what_they_say(tmp_path):
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] + np.zeros((20, 8, 8, 1), np.uint8)
    labels = np.arange(20) % 10
    pictures, shown = captioned_digits.compose(images, labels, 200)
    assert pictures.shape == (220, 8, 16, 1) and shown[7] == (7,) and shown[20 + 35] == (3, 5)
    assert captioned_digits.caption(shown[7]) == "a handwritten seven"
    assert captioned_digits.caption(shown[55]) == "three and five side by side"
    assert len(set(captioned_digits.all_captions())) == 110
    assert not pictures[7, :, :4].any() and not pictures[7, :, 12:].any()
    cut, classes, of_picture = captioned_digits.halves(pictures, shown)
    assert (cut[:, 0, 0, 0] % 10 == classes).all()
    assert list(of_picture[-2:]) == [219, 219] and len(cut) == 20 + 400
    count = captioned_digits.write_folder(tmp_path / "digits", 100)
    source = open_captioned_folder("train", path=str(tmp_path / "digits"), channels=1)
    assert len(source) == count == 1542 and len(set(source.captions)) == 110
