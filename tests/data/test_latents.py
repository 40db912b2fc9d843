import dataclasses
import json
import pickle

import numpy as np
import pytest

from dit_jax.data import LatentsHeader, LatentsWriter, make_loader, open_source

HEADER = LatentsHeader(
    vae_name="tiny-vae",
    vae_sha256="ab" * 32,
    scaling_factor=0.5,
    shift_factor=0.25,
    latent_shape=(4, 6, 3),
    num_classes=5,
    source_name="digits",
    source_fingerprint="0123",
)


def records(header, count=10, seed=0):
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(count, *header.record_shape)).astype(np.float32)
    return latents, rng.integers(0, 5, count)


def write(folder, header, count=10, shard_size=4):
    latents, labels = records(header, count)
    with LatentsWriter(folder, header, shard_size=shard_size) as writer:
        for start in range(0, count, 3):  # pieces that do not divide into shards
            writer.add(latents[start : start + 3], labels[start : start + 3])
    return latents.astype(header.dtype).astype(np.float32), labels


def scaled(latents):
    return (latents - 0.25) * 0.5


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_samples_round_trip(tmp_path, dtype):
    header = dataclasses.replace(HEADER, kind="samples", flip="none", dtype=dtype)
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
        + [f"shard-0000{i}.{kind}.npy" for i in range(3) for kind in ("labels", "latents")]
    )


def test_pairs_are_picked_at_random(tmp_path):
    header = dataclasses.replace(HEADER, kind="samples", flip="pairs", dtype="float32")
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
    header = dataclasses.replace(HEADER, dtype="float32")
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
    write(tmp_path, dataclasses.replace(HEADER, flip="none"))
    source = open_source("latents", "train", path=str(tmp_path))
    with pytest.raises(ValueError, match="--flip=pairs, or set horizontal_flip=False"):
        make_loader(source, batch_size=2, seed=0, horizontal_flip=True)


def test_splits_lie_side_by_side(tmp_path):
    write(tmp_path / "train", HEADER)
    write(tmp_path / "test", dataclasses.replace(HEADER, split="test"), count=4)
    assert len(open_source("latents", "test", path=str(tmp_path))) == 4
    with pytest.raises(ValueError, match="of split 'train', not 'test'"):
        open_source("latents", "test", path=str(tmp_path / "train"))
    with pytest.raises(FileNotFoundError, match=r"no latents .*header.json is missing"):
        open_source("latents", "train", path=str(tmp_path / "nowhere"))


def test_truncated_damaged_and_missing_shards(tmp_path):
    write(tmp_path, HEADER)
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


def test_bad_headers(tmp_path):
    write(tmp_path, HEADER)
    path = tmp_path / "header.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"version": 9}, "version 9; this code reads"),
        ({"kind": "logits"}, "kind must be one of"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
        ({"count": 11}, "the header counts 11 images, its shards 10"),
        ({"num_classes": 1}, r"latent \d+ of .* has label"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            open_source("latents", "train", path=str(tmp_path))
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not the header of a set of latents"):
        open_source("latents", "train", path=str(tmp_path))


def test_a_killed_writer_continues(tmp_path):
    latents, labels = records(HEADER)
    write(tmp_path / "whole", HEADER)
    folder = tmp_path / "resumed"
    writer = LatentsWriter(folder, HEADER, shard_size=4)
    writer.add(latents[:6], labels[:6])  # one shard on disk, two images lost with the process
    assert writer.count == 4
    with pytest.raises(FileNotFoundError, match=r"unfinished \(4 images so far\)"):
        open_source("latents", "train", path=str(folder))
    with pytest.raises(FileExistsError, match="resume=True"):
        LatentsWriter(folder, HEADER)
    other = dataclasses.replace(HEADER, scaling_factor=0.7)
    with pytest.raises(ValueError, match=r"scaling_factor: 0.5 -> 0.7"):
        LatentsWriter(folder, other, resume=True)
    with LatentsWriter(folder, HEADER, shard_size=4, resume=True) as writer:
        assert writer.count == 4
        writer.add(latents[4:], labels[4:])
    whole, resumed = (
        open_source("latents", "train", path=str(tmp_path / name)) for name in ("whole", "resumed")
    )
    assert whole.info.fingerprint == resumed.info.fingerprint
    with pytest.raises(FileExistsError, match="finished set"):
        LatentsWriter(folder, HEADER, resume=True)


def test_the_writer_refuses_bad_latents(tmp_path):
    latents, labels = records(HEADER, 3)
    writer = LatentsWriter(tmp_path, HEADER)
    with pytest.raises(ValueError, match=r"have shape \[3, 1, 4, 6, 6\], expected \[3, 2, 4, 6, 6"):
        writer.add(latents[:, :1], labels)
    with pytest.raises(ValueError, match="image 1 has label 5"):
        writer.add(latents, np.array([0, 5, 0]))
    latents[2, 0, 0, 0, 0] = 1e6  # beyond float16
    with pytest.raises(ValueError, match="image 2 are not finite in float16"):
        writer.add(latents, labels)
    with pytest.raises(ValueError, match="no latents were added"):
        writer.finish()
    with pytest.raises(RuntimeError), LatentsWriter(tmp_path / "x", HEADER) as writer:
        raise RuntimeError
    assert not (tmp_path / "x" / "header.json").exists()
