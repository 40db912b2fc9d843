import json
import pickle

import numpy as np
import pytest

from dit_jax.data import RecordWriter, latents_header, make_loader, open_source


def header_of(**changes):
    given = {
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        "num_classes": 5,
        "shard_size": 4,
        "provenance": {"vae_name": "tiny-vae"},
        **changes,
    }
    return latents_header((4, 6, 3), **given)


def records(header, count=10, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, *header.fields["latents"].stored_shape())
    return {
        "latents": rng.normal(size=shape).astype(np.float32),
        "label": rng.integers(0, 5, count),
    }


def write(folder, header, count=10):
    rows = records(header, count)
    writer = RecordWriter(folder, header)
    for start in range(0, count, 3):  # pieces that do not divide into shards
        writer.add(**{name: array[start : start + 3] for name, array in rows.items()})
    writer.finish()
    dtype = header.fields["latents"].dtype
    return rows["latents"].astype(dtype).astype(np.float32), rows["label"]


def scaled(latents):
    return (latents - 0.25) * 0.5


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_samples_round_trip(tmp_path, dtype):
    header = header_of(kind="samples", flip="none", dtype=dtype)
    latents, labels = write(tmp_path, header)
    source = open_source("latents", "train", path=str(tmp_path), verify_checksums=True)
    assert source.info.image_shape == (4, 6, 3) and len(source) == 10
    assert [shard.count for shard in source.info.latents.shards] == [4, 4, 2]
    order = np.array([9, 0, 4, 4, 3])
    batch = source.batch(order)
    np.testing.assert_allclose(batch["image"], scaled(latents[order, 0]), rtol=1e-6, atol=1e-7)
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], labels[order])
    np.testing.assert_array_equal(source[4]["image"], batch["image"][2])
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.batch(order)["image"], batch["image"])
    assert json.loads((tmp_path / "header.json").read_text())["count"] == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["header.json"]
        + [f"shard-0000{i}.{kind}.npy" for i in range(3) for kind in ("label", "latents")]
    )


def test_pairs_are_picked_at_random(tmp_path):
    header = header_of(kind="samples", flip="pairs", dtype="float32")
    latents, _ = write(tmp_path, header)
    source = open_source("latents", "train", path=str(tmp_path))
    np.testing.assert_allclose(source[3]["image"], scaled(latents[3, 0]), rtol=1e-6, atol=1e-7)
    options = {"batch_size": 10, "seed": 0, "shuffle": False}
    plain = next(iter(make_loader(source, **options)))
    np.testing.assert_allclose(plain["image"], scaled(latents[:, 0]), rtol=1e-6, atol=1e-7)
    iterator = iter(make_loader(source, **options, horizontal_flip=True))
    flips = 0
    for _ in range(20):
        image = next(iterator)["image"]
        distance = [np.abs(image - scaled(latents[:, i])).max(axis=(1, 2, 3)) for i in (0, 1)]
        assert np.minimum(*distance).max() < 1e-6
        flips += (distance[1] < distance[0]).sum()
    assert 70 < flips < 130


def test_moments_are_sampled_anew_each_epoch(tmp_path):
    header = header_of(dtype="float32")
    latents, _ = write(tmp_path, header)
    mean, logvar = np.split(latents[:, 0], 2, axis=-1)
    source = open_source("latents", "train", path=str(tmp_path))
    np.testing.assert_allclose(source[3]["image"], scaled(mean[3]), rtol=1e-5, atol=1e-6)
    iterator = iter(make_loader(source, batch_size=10, seed=0, shuffle=False))
    drawn = np.stack([next(iterator)["image"] for _ in range(200)])
    eps = (drawn / 0.5 + 0.25 - mean) / np.exp(0.5 * logvar)
    assert np.abs(eps.mean()) < 0.01 and np.abs(eps.std() - 1) < 0.01
    assert np.abs(eps.mean(axis=0)).max() < 0.4  # fresh noise for each example and epoch
    assert np.abs(np.mean(eps[:, 0] * eps[:, 1])) < 0.02
    fixed = open_source("latents", "train", path=str(tmp_path), moments="mean")
    batch = next(iter(make_loader(fixed, batch_size=10, seed=0, shuffle=False)))
    np.testing.assert_allclose(batch["image"], scaled(mean), rtol=1e-5, atol=1e-6)
    assert fixed.info.fingerprint != source.info.fingerprint
    with pytest.raises(ValueError, match="moments must be"):
        open_source("latents", "train", path=str(tmp_path), moments="median")


def test_mirroring_needs_pairs(tmp_path):
    write(tmp_path, header_of(flip="none"))
    source = open_source("latents", "train", path=str(tmp_path))
    with pytest.raises(ValueError, match="--flip=pairs, or set horizontal_flip=False"):
        make_loader(source, batch_size=2, seed=0, horizontal_flip=True)


def test_splits_lie_side_by_side(tmp_path):
    write(tmp_path / "train", header_of())
    write(tmp_path / "test", header_of(split="test"), count=4)
    assert len(open_source("latents", "test", path=str(tmp_path))) == 4
    with pytest.raises(ValueError, match="of split 'train', not 'test'"):
        open_source("latents", "test", path=str(tmp_path / "train"))
    with pytest.raises(FileNotFoundError, match=r"no latents .*header.json is missing"):
        open_source("latents", "train", path=str(tmp_path / "nowhere"))


def test_truncated_damaged_and_missing_shards(tmp_path):
    write(tmp_path, header_of())
    shard = tmp_path / "shard-00001.latents.npy"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    with pytest.raises(
        ValueError, match=f"shard-00001.*truncated.*: {len(data) - 10} bytes instead of {len(data)}"
    ):
        open_source("latents", "train", path=str(tmp_path))
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        open_source("latents", "train", path=str(tmp_path), verify_checksums=True)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.latents.npy is missing"):
        open_source("latents", "train", path=str(tmp_path))


def test_what_the_format_lacks_is_refused():
    for change, message in (
        ({"kind": "logits"}, "kind of latents must be one of"),
        ({"flip": "both"}, "flip of latents must be one of"),
        ({"dtype": "int32"}, "have no posterior, shift or scale"),
        ({"scaling_factor": 0.0}, "make nothing of a number"),
    ):
        with pytest.raises(ValueError, match=message):
            header_of(**change)
