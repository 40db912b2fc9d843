"""Tar shards of images with captions: what is read, and what is refused with its shard and key."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from dit_jax.data import make_loader
from dit_jax.data.captioned_folder import open_captioned_folder
from dit_jax.data.captioned_shards import open_captioned_shards
from tests.data.test_captioned_folder import write

CAPTIONS = [f"picture {i}, 猫" for i in range(6)]


def picture(grey, size=(6, 4), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (grey, 0, 0)).save(file, kind)
    return file.getvalue()


def pack(path, files, **options):
    """A shard of (name, content), or of finished headers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if content is not None:
                header.size = len(content)
            archive.addfile(header, None if content is None else io.BytesIO(content))
    return path


def sample(i, caption=None, name=None):
    name = f"{i:04}" if name is None else name
    caption = CAPTIONS[i] if caption is None else caption
    return [(f"{name}.png", picture(40 * i)), (f"{name}.txt", f"{caption}\n".encode())]


@pytest.fixture
def shards(tmp_path):
    """Three shards of two samples each, with all that tar writes besides."""
    folder = tarfile.TarInfo("d.x")
    folder.type, folder.size = tarfile.DIRTYPE, 0
    long = "d.x/" + "n" * 150
    both = json.dumps({"caption": CAPTIONS[3], "text": "other", "width": 6}).encode()
    pack(tmp_path / "s-00.tar", [*sample(0), *sample(1), (".hidden.png", b"")])
    pack(
        tmp_path / "s-01.tar",
        [(folder, None), *sample(2, name=long), ("a.json", both), ("a.PNG", picture(120))],
        format=tarfile.GNU_FORMAT,
    )
    five = json.dumps({"text": "not this one"}).encode()
    pack(
        tmp_path / "s-02.tar",
        [*sample(4, name="ü" * 80), *sample(5), ("0005.json", five), ("0005.cls", b"3")],
        format=tarfile.PAX_FORMAT,
        pax_headers={"comment": "of all files"},
    )
    return tmp_path


def test_shards_read_as_the_folder_of_the_same_images_does(shards, tmp_path):
    options = {"test_fraction": 0.34, "resize": "adm", "image_size": 4}
    folder = write(tmp_path / "f", {f"{i}.png": text for i, text in enumerate(CAPTIONS)})
    for path in ("s-{00..02}.tar", "s-{00,01,02}.tar", "s-*.tar", "s-{0,}{00..02}.tar", ""):
        if path.startswith("s-{0,}"):
            with pytest.raises(FileNotFoundError, match=r"3 shards of .* missing: .*s-000\.tar"):
                open_captioned_shards("train", path=str(shards / path))
            continue
        for split in ("train", "test"):
            source = open_captioned_shards(split, path=str(shards / path), **options)
            other = open_captioned_folder(split, path=str(folder), **options)
            assert source.captions == other.captions == tuple(CAPTIONS)
            everything = np.arange(len(other))
            ours, theirs = source.batch(everything), other.batch(everything)
            np.testing.assert_array_equal(ours["image"], theirs["image"])
            np.testing.assert_array_equal(ours["caption"], theirs["caption"])
            assert source.info.conditions == ("caption",) and source.info.num_classes == 0
    assert source.describe(0) == f"{shards}/s-01.tar: d.x/{'n' * 150}.png"


def test_a_txt_counts_and_jsons_that_say_something_else_are_told(shards, caplog):
    open_captioned_shards("train", path=str(shards))
    told = "1 caption of a .txt beside a .json that says something else: the .txt counts, as "
    assert [r.getMessage() for r in caplog.records if "beside" in r.getMessage()] == [
        f"{told}{shards}/s-02.tar: 0005.txt"
    ]


def test_order_is_that_of_seed_and_batch_and_workers_read_the_same(shards):
    path = str(shards / "s-{00..02}.tar")
    copy = pickle.loads(pickle.dumps(open_captioned_shards("train", path=path)))
    loaders = [
        make_loader(source, batch_size=2, seed=3)
        for source in (open_captioned_shards("train", path=path), copy)
    ]
    first, second = map(iter, loaders)
    seen = [next(first)["conditions"]["caption"] for _ in range(5)]
    second.set_state({**second.get_state(), "next_batch": 3})
    np.testing.assert_array_equal(next(second)["conditions"]["caption"], seen[3])
    assert sorted(np.concatenate(seen[:3])) == list(range(6))
    for batches in (first, second):
        batches.close()


def test_splits_are_in_folders_or_in_the_pattern(shards, tmp_path):
    for split in ("train", "test"):
        pack(tmp_path / "two" / split / "x.tar", sample(0, split))
        pack(tmp_path / f"{split}-0.tar", sample(0, split))
    for path in ("two", "{split}-{0..0}.tar"):
        for split in ("train", "test"):
            source = open_captioned_shards(split, path=str(tmp_path / path))
            assert source.captions == (split,)
    one = str(tmp_path / "train-0.tar")
    with pytest.raises(FileNotFoundError, match="no test split"):
        open_captioned_shards("test", path=one)
    with pytest.raises(ValueError, match=r"captioned_shards has .* not 'validation'"):
        open_captioned_shards("validation", path=one)


def test_a_damaged_image_is_replaced_and_a_changed_shard_noticed(shards, monkeypatch):
    path = shards / "s-02.tar"
    source = open_captioned_shards("train", path=str(shards / "s-*.tar"), verify="full")
    damaged = bytearray(path.read_bytes())
    at = damaged.rindex(b"\x89PNG")
    damaged[at : at + 8] = b"damaged!"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"s-02\.tar: 0005\.png \(not an image"):
        open_captioned_shards("train", path=str(shards / "s-*.tar"))
    with pytest.raises(ValueError, match=r"cannot be decoded.*s-02\.tar: ü") as error:
        source[5], source[4]
    assert "was changed after it was opened" in str(error.value.__cause__)


def typed(name, kind, link=""):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, link
    return [(header, None)]


PNG = picture(9)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.png", PNG)], r"1 image without a caption: .*x\.tar: a\.png\. Put a \.txt"),
        ([("a.txt", b"x")], r"x\.tar: 'a\.txt' is the caption of no image: expected a\.jpg"),
        ([("a.seg.png", PNG), ("a.txt", b"x")], r"'a\.seg\.png' is none, as keys end at the first"),
        ([*sample(0), ("0000.jpg", PNG)], r"two files of one key, '0000\.png' and '0000\.jpg'"),
        ([*sample(0), *sample(0)], r"two files of one key, '0000\.png' and '0000\.png'"),
        ([("a.png", PNG), ("a.txt", b"\xff\xfe")], r"x\.tar: a\.txt is no text"),
        ([("a.png", PNG), ("a.txt", bytes(2**20 + 1))], r"a\.txt has 1048577 bytes"),
        ([("a.png", PNG), ("a.json", b"{")], r"x\.tar: a\.json is not JSON"),
        ([("a.png", PNG), ("a.json", b"{}")], r'a\.json has no "caption"'),
        ([("a.png", PNG), ("a.json", b'{"caption": null}')], "caption is None; expected a string"),
        ([("a.npy", b"1")], r"no images in 1 shard, the first being .*x\.tar"),
        (typed("a.png", tarfile.SYMTYPE, "/etc/passwd"), r"holds 'a\.png', a symbolic link"),
        (typed("a.png", tarfile.LNKTYPE, "b.png"), r"holds 'a\.png', a link"),
        (typed("a.png", tarfile.SYMTYPE, "x" * 200), "a link|a symbolic link"),
        (typed("a.png", tarfile.BLKTYPE), r"'a\.png', a device"),
        (typed("a.png", tarfile.FIFOTYPE), r"'a\.png', a named pipe"),
        (typed("a.png", b"V"), r"'a\.png' of the unknown type"),
    ],
)
def test_what_a_shard_may_not_hold_is_named(tmp_path, files, message):
    shard = pack(tmp_path / "x.tar", files, format=tarfile.GNU_FORMAT)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_captioned_shards("train", path=str(shard))
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def header(**values):
    entry = tarfile.TarInfo("a.png")
    for name, value in values.items():
        setattr(entry, name, value)
    return entry.tobuf(tarfile.GNU_FORMAT)


def extended(record):
    entry = tarfile.TarInfo("pax")
    entry.type, entry.size = tarfile.XHDTYPE, len(record)
    return entry.tobuf() + record.ljust(512, b"\0") + header()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: whole[:540], r"ends within '0000\.png', \d+ bytes of which are missing"),
        (
            lambda whole: whole[: whole.rindex(b"picture 0") + 512],
            "without the two blocks of zeros",
        ),
        (lambda whole: whole.rstrip(b"\0") + bytes(512), r"truncated"),
        (lambda whole: whole + whole, r"goes on after its end .* joined by cat"),
        (lambda whole: b"\x1f\x8b" + whole, r"is compressed \(gzip\)"),
        (lambda whole: b"x" * 600, "is no tar archive"),
        (lambda whole: header(size=2**62) + bytes(1024), "387904 bytes, .*1536. Write or fetch it"),
        (lambda whole: header(size=-512) + bytes(1024), "is to have -512 bytes"),
        (lambda whole: extended(b"9999 size=1\n") + bytes(1024), "the extended header at byte 512"),
        (lambda whole: extended(b"11 size=-9\n") + bytes(1024), "a size is '-9'"),
        (lambda whole: extended(b"24 GNU.sparse.major=1\n") + bytes(1024), "the extended header"),
        (lambda whole: extended(b"22 GNU.sparse.major=1\n") + bytes(1024), "which is not read"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, content, message):
    whole = pack(tmp_path / "whole.tar", sample(0)).read_bytes()
    shard = tmp_path / "x.tar"
    shard.write_bytes(content(whole))
    with pytest.raises(ValueError, match=message) as error:
        open_captioned_shards("train", path=str(shard))
    assert str(shard) in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none-{0..2}.tar", r"3 shards of .* missing: .*none-0\.tar, .*none-1\.tar, .*none-2"),
        ("none-*.tar", "missing: .*none"),
        ("x-{2..0}.tar", r"\{2\.\.0\}: expected a range from the lower to the higher"),
        ("x-{0..2.tar", "braces that are not closed"),
        ("x-{name}.tar", r"\{name\}: expected a range"),
        ("x-{0..9999}{0..9999}.tar", "stands for more than 100000 shards"),
        ("x-{0..999999}.tar", r"\{0\.\.999999\} stands for more than 100000 shards"),
        ("{s-00,s-00}.tar", r"names .*s-00\.tar more than once"),
        ("s-00.zip", r"s-00\.zip is no \.tar file"),
        ("empty", r"empty holds no \.tar files"),
    ],
)
def test_patterns_without_shards_are_refused(shards, path, message):
    (shards / "empty").mkdir()
    (shards / "s-00.zip").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_captioned_shards("train", path=str(shards / path))
    with pytest.raises(ValueError, match="is no file: copy the shards here first"):
        open_captioned_shards("train", path="s3://bucket/{0..2}.tar")
