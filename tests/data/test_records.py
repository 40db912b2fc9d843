"""Sets of records: round trips, interruptions, several shapes, conditions, and what is refused."""

import dataclasses
import json
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dit_jax import data
from dit_jax.data.records import (
    Field,
    Header,
    RecordWriter,
    check_destination,
    open_records,
    unfinished_nulls,
)
from dit_jax.data.records.header import LABEL

HEADER = Header(
    "embeddings",
    {
        "text": Field((None, 4), "bfloat16", condition=True),
        "text_mask": Field((None,), "bool", condition=True),
        "pooled": Field((3,), "float16", condition=True),
        "label": LABEL,
    },
    {"encoder": "tiny", "seed": 0},
    num_classes=5,
    shard_size=4,
)
EMPTY = np.full((1, 4), 0.5, np.float32)


def rows_of(count=10, length=6, seed=0):
    random = np.random.default_rng(seed)
    return {
        "text": random.normal(size=(count, length, 4)).astype(np.float32),
        "text_mask": random.integers(0, 2, (count, length)).astype(bool),
        "pooled": random.normal(size=(count, 3)).astype(np.float32),
        "label": random.integers(0, 5, count),
    }


def part(rows, start, stop):
    return {name: array[start:stop] for name, array in rows.items()}


def writer_of(folder, **changes):
    return RecordWriter(folder, dataclasses.replace(HEADER, **changes), nulls={"text": EMPTY})


def write(folder, rows, first=0, finish=True, step=3):
    writer = writer_of(folder)
    for start in range(first, len(rows["label"]), step):
        writer.add(**part(rows, start, start + step))
    if finish:
        writer.finish()


def opened(folder, kind="embeddings", *fields, **options):
    return open_records(folder, kind, *fields, how="HOW", command="write them again", **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_kind_of_field_round_trips(tmp_path):
    rows = rows_of()
    write(tmp_path, rows)
    records = opened(tmp_path, verify_checksums=True)
    assert len(records) == 10 and [s.count for s in records.header.shards] == [4, 4, 2]
    assert records.header.conditions == ("text", "text_mask", "pooled", "label")
    order = np.array([9, 0, 4, 4, 3])
    expected = {
        "text": rows["text"].astype(ml_dtypes.bfloat16).astype(np.float32),
        "pooled": rows["pooled"].astype(np.float16).astype(np.float32),
    }
    for reader in (records, pickle.loads(pickle.dumps(records))):
        for name in rows:
            found = reader.read(name, order)
            np.testing.assert_array_equal(found, expected.get(name, rows[name])[order])
            assert found.dtype == records.header.fields[name].read_dtype
    np.testing.assert_array_equal(records.null("text"), EMPTY)
    assert sorted(contents(tmp_path)) == sorted(
        ["header.json", "null.text.npy"]
        + [f"shard-0000{i}.{name}.npy" for i in range(3) for name in rows]
    )


def test_shift_scale_and_versions(tmp_path):
    field = Field((2,), "float32", versions=("a", "b"), shift=0.25, scale=2.0)
    header = Header("things", {"x": field}, {})
    writer = RecordWriter(tmp_path, header)
    x = np.random.default_rng(0).normal(size=(5, 2, 2)).astype(np.float32)
    writer.add(x=x)
    writer.finish()
    records = opened(tmp_path, "things")
    np.testing.assert_array_equal(records.read("x", np.arange(5)), (x[:, 0] - np.float32(0.25)) * 2)
    versions = np.array([1, 0, 1])
    found = records.read("x", np.array([4, 2, 0]), versions=versions)
    np.testing.assert_array_equal(found, (x[[4, 2, 0], versions] - np.float32(0.25)) * 2)


def test_records_of_several_shapes(tmp_path):
    writer, rows = writer_of(tmp_path), []
    for seed, length in enumerate((6, 6, 8, 6)):  # of 5, 3, 5 and 5 records
        rows.append(rows_of(3 if seed == 1 else 5, length, seed))
        writer.add(**rows[-1])
    writer.finish()
    records = opened(tmp_path)
    assert [s.count for s in records.header.shards] == [4, 4, 4, 1, 4, 1]
    found = records.shapes("text")
    assert {shape: list(numbers) for shape, numbers in found.items()} == {
        (6, 4): [*range(8), *range(13, 18)],
        (8, 4): [*range(8, 13)],
    }
    np.testing.assert_array_equal(
        records.read("text_mask", np.array([9, 8])), rows[2]["text_mask"][[1, 0]]
    )
    with pytest.raises(ValueError, match="text has several shapes"):
        records.read("text", np.array([0, 9]))


@pytest.mark.parametrize("added", [0, 3, 6, 9])
@pytest.mark.parametrize("saved", [False, True])
def test_goes_on_after_it_was_ended_with_the_same_bits(tmp_path, added, saved):
    rows, cut = rows_of(), tmp_path / "cut"
    write(tmp_path / "whole", rows)
    writer = writer_of(cut)
    for start in range(0, added, 3):
        writer.add(**part(rows, start, start + 3))
    if saved:
        writer.save()
    del writer
    # Killed while it wrote the next files.
    (cut / ".shard-00002.text.npy.0123456789ab.tmp").write_bytes(b"half")
    (cut / "shard-00002.pooled.npy").write_bytes(b"not in the header")
    with pytest.raises(FileNotFoundError, match=r"embeddings in .* is unfinished .*so far"):
        opened(cut)
    again = writer_of(cut)
    assert again.count == (added if saved else added // 4 * 4)
    assert not (cut / "shard-00002.pooled.npy").exists()
    if saved:
        again.save()
        again.add(**part(rows, added, added + 1))
        again.save()
        again = writer_of(cut)
    again.add(**part(rows, again.count, 10))
    again.finish()
    assert contents(cut) == contents(tmp_path / "whole")


def test_killed_before_its_first_header(tmp_path):
    (tmp_path / ".unfinished.json.0123456789ab.tmp").write_text("{")
    (tmp_path / "null.text.npy").write_bytes(b"half")
    write(tmp_path, rows_of())
    assert len(opened(tmp_path, verify_checksums=True)) == 10


def test_other_settings_and_destinations_are_refused(tmp_path):
    write(tmp_path / "a", rows_of(), finish=False)
    for changes, message in (
        ({"provenance": {"encoder": "tiny", "seed": 1}}, "seed: 0 -> 1"),
        ({"shard_size": 8}, "shard_size: 4 -> 8"),
        ({"fields": {**HEADER.fields, "pooled": Field((4,), "float16")}}, "shape: .*condition"),
    ):
        with pytest.raises(ValueError, match=rf"begun with other settings \({message}"):
            writer_of(tmp_path / "a", **changes)
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match=r"begun with other settings.*sha256"):
        RecordWriter(tmp_path / "a", HEADER, nulls={"text": EMPTY + 1})
    np.testing.assert_array_equal(unfinished_nulls(tmp_path / "a")["text"], EMPTY)
    assert unfinished_nulls(tmp_path / "none") == {}
    assert contents(tmp_path / "a") == before
    write(tmp_path / "b", rows_of())
    with pytest.raises(FileExistsError, match="finished set of embeddings"):
        writer_of(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other things: choose another --out"):
        check_destination(tmp_path / "c", "embeddings", "another --out")


def test_bad_rows_are_refused(tmp_path):
    writer, rows = writer_of(tmp_path), rows_of(2)
    for changes, message in (
        ({"pooled": rows["pooled"][:, :2]}, r"have shapes .*expected .*'pooled': \['n', 3\]"),
        ({"label": rows["label"][:1]}, "have shapes"),
        ({"label": np.array([0, 5])}, "label out of range: embedding 1 has label 5"),
        ({"pooled": rows["pooled"] * 1e9}, "pooled of embedding 0 is not finite in float16"),
        ({"text": rows["text"] * np.nan}, "text of embedding 0 is not finite in bfloat16"),
        ({"text_mask": rows["text_mask"].astype(int)}, "int64 is not stored as bool"),
        ({"style": rows["label"]}, "have shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.add(**{**rows, **changes})
    with pytest.raises(ValueError, match="no embeddings were added"):
        writer.finish()
    with pytest.raises(ValueError, match=r"null value of pooled is \[1, 3\], expected \[3\]"):
        RecordWriter(tmp_path / "x", HEADER, nulls={"pooled": np.zeros((1, 3))})


def test_damaged_and_other_sets_are_refused(tmp_path):
    write(tmp_path, rows_of())
    with pytest.raises(ValueError, match="holds embeddings, not latents"):
        opened(tmp_path, "latents")
    with pytest.raises(ValueError, match=r"have no field noise. HOW"):
        opened(tmp_path, "embeddings", "text", "noise")
    with pytest.raises(ValueError, match="of split 'train', not 'test'"):
        opened(tmp_path, split="test")
    with pytest.raises(FileNotFoundError, match=r"no embeddings .*header.json is missing. HOW"):
        opened(tmp_path / "nowhere")
    path = tmp_path / "header.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"version": 9}, "version 9; this code reads"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
        ({"num_classes": 1}, r"embedding \d+ of .* has label"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            opened(tmp_path)
    path.write_text(json.dumps(good))
    null = tmp_path / "null.text.npy"
    content = null.read_bytes()
    null.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    opened(tmp_path)
    with pytest.raises(ValueError, match=r"null.text.npy is damaged: its SHA-256"):
        opened(tmp_path, verify_checksums=True)
    null.unlink()
    with pytest.raises(FileNotFoundError, match="Write them again"):
        opened(tmp_path)


def captioned_latents(folder, shape=(2, 2, 1), sizes=((2, 2),)):
    text = {"text": Field((3, 4), "float32", condition=True)}
    header = data.latents_header(shape, scaling_factor=1.0, kind="samples", conditions=text)
    writer = RecordWriter(folder, header, nulls={"text": EMPTY})
    random, texts = np.random.default_rng(0), []
    for size in sizes:
        texts.append(random.normal(size=(5, 3, 4)).astype(np.float32))
        writer.add(latents=random.normal(size=(5, 2, *size, 1)), text=texts[-1])
    writer.finish()
    return np.concatenate(texts)


def test_conditions_of_any_kind_reach_the_batch(tmp_path):
    texts = captioned_latents(tmp_path)
    source = data.open_source("latents", "train", path=str(tmp_path))
    assert source.info.declared["text"].describe() == "float32 [b, 3, 4]"
    np.testing.assert_array_equal(source.info.null_conditions["text"], EMPTY)
    batch = next(iter(data.make_loader(source, batch_size=5, seed=0, shuffle=False)))
    assert batch["conditions"].keys() == {"text"}
    np.testing.assert_array_equal(batch["conditions"]["text"], texts)
    np.testing.assert_array_equal(source[3]["text"], texts[3])


def test_what_is_no_image_is_refused(tmp_path):
    writer = RecordWriter(tmp_path, Header("latents", {"latents": Field((2, 2), "float32")}, {}))
    writer.add(latents=np.zeros((1, 2, 2)))
    writer.finish()
    with pytest.raises(ValueError, match=r"latents of .* is float32 \[2, 2\]; expected an image"):
        data.open_source("latents", "train", path=str(tmp_path))


def test_latents_of_several_sizes_come_in_batches_of_one(tmp_path):
    texts = captioned_latents(tmp_path, (None, None, 1), ((2, 2), (2, 4), (4, 2)))
    records = opened(tmp_path, "latents")
    assert list(records.shapes("latents")) == [(2, 2, 1), (2, 4, 1), (4, 2, 1)]
    assert records.read("latents", np.array([7, 5])).shape == (2, 2, 4, 1)
    source = data.open_source("latents", "train", path=str(tmp_path))
    assert [(str(b), b.count) for b in source.info.buckets] == [("2x2", 5), ("2x4", 5), ("4x2", 5)]
    assert source.info.image_shape == (2, 4, 1)
    with pytest.raises(ValueError, match=r"several shapes"):
        source.batch(np.array([0, 5]))
    batches = iter(data.make_loader(source, batch_size=4, seed=0, shuffle=False))
    found = [next(batches) for _ in range(6)]
    batches.close()
    assert [b["image"].shape[1:3] for b in found] == [(2, 2), (2, 4), (4, 2)] * 2
    np.testing.assert_array_equal(found[1]["conditions"]["text"], texts[5:9])
    np.testing.assert_array_equal(found[4]["conditions"]["text"], texts[[9, 5, 6, 7]])


def test_other_records_of_several_sizes_are_refused(tmp_path):
    image = Field((None, None, 1), "float32")
    writer = RecordWriter(tmp_path, Header("pictures", {"x0": image}, {}))
    for size in ((2, 2), (2, 4)):
        writer.add(x0=np.zeros((1, *size, 1), np.float32))
    writer.finish()
    with pytest.raises(ValueError, match=r"several sizes \(2x2, 2x4\), and a batch"):
        data.RecordSource(opened(tmp_path, "pictures"), "x0")


@pytest.mark.parametrize(
    ("name", "kind", "options", "flip"),
    [
        ("sample", "latents", {}, True),
        ("mean", "latents", {"moments": "mean"}, False),
        ("noise", "pairs", {}, False),
        ("path", "pairs", {"times": (80.0, 0.47)}, False),
    ],
)
def test_folders_of_the_formats_before_give_the_batches_they_gave(name, kind, options, flip):
    """The folders, and the batches, were written by the code of before."""
    root = Path(__file__).parent / "version0"
    source = data.open_source(
        kind, "train", path=str(root / kind), verify_checksums=True, **options
    )
    with np.load(root / "batches.npz") as expected:
        assert source.info.fingerprint == str(expected[f"{name}.fingerprint"])
        batches = iter(data.make_loader(source, batch_size=4, seed=7, horizontal_flip=flip))
        for step in range(3):
            batch = next(batches)
            conditions = batch.pop("conditions")
            for key, found in {**batch, **conditions}.items():
                np.testing.assert_array_equal(found, expected[f"{name}.{step}.{key}"])


def test_an_unfinished_folder_of_the_formats_before_is_not_taken_up(tmp_path):
    old = Path(__file__).parent / "version0" / "pairs" / "header.json"
    (tmp_path / "unfinished.json").write_bytes(old.read_bytes())
    with pytest.raises(ValueError, match="an earlier version of this code began"):
        writer_of(tmp_path)
