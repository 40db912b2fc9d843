"""Sets of pairs: round trips, interruptions, and what is refused."""

import dataclasses
import pickle

import numpy as np
import pytest

from dit_jax.config import ConfigError, default_config
from dit_jax.data import PairsHeader, PairsWriter, make_loader, open_source
from dit_jax.data.pairs import positions_of
from dit_jax.experiment import open_data, resolve_config

HEADER = PairsHeader(
    teacher_source="runs/teacher (ema, step 10)",
    teacher_hash="0123456789abcdef",
    process={"name": "edm", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
    sampling={"solver": "heun", "steps": 4},
    times=(80.0, 9.7, 2.5, 0.47, 0.002, 0.0),
    path_times=(80.0, 2.5, 0.47),
    start_scale=80.0,
    seed=0,
    batch_size=2,
    sample_shape=(4, 4, 3),
    num_classes=5,
)


def records(header, count=10):
    random = np.random.default_rng(0)
    shapes = header.arrays(count)
    rows = {
        name: random.normal(size=shape).astype(np.float32) for name, (shape, _) in shapes.items()
    }
    return rows | {"labels": random.integers(0, 5, count)}


def write(folder, header=HEADER, count=10, first=0, finish=True):
    rows = records(header, count)
    writer = PairsWriter(folder, header, shard_size=4)
    for start in range(first, count, 2):
        writer.add(**{name: array[start : start + 2] for name, array in rows.items()})
    if finish:
        writer.finish()
    return rows


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_round_trip(tmp_path, dtype):
    rows = write(tmp_path / "a", dataclasses.replace(HEADER, dtype=dtype))
    kept = {name: array.astype(dtype).astype(np.float32) for name, array in rows.items()}
    source = open_source("pairs", "train", path=str(tmp_path / "a"), verify_checksums=True)
    assert len(source) == 10 and source.info.image_shape == (4, 4, 3)
    assert [shard.count for shard in source.header.shards] == [4, 4, 2]
    order = np.array([9, 0, 4, 4, 3])
    batch = source.batch(order)
    assert batch.keys() == {"image", "label", "noise"}
    np.testing.assert_array_equal(batch["image"], kept["x0"][order])
    np.testing.assert_array_equal(batch["noise"], kept["noise"][order])
    np.testing.assert_array_equal(batch["label"], rows["labels"][order])
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(source[4]["image"], batch["image"][2])
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.batch(order)["noise"], batch["noise"])


def test_states_at_the_students_times(tmp_path):
    rows = write(tmp_path)
    source = open_source("pairs", "train", path=str(tmp_path), times=(80.0, 0.47))
    batch = source.batch(np.array([7, 1]))
    assert batch.keys() == {"image", "label", "path"}
    assert batch["path"].shape == (2, 2, 4, 4, 3)
    np.testing.assert_array_equal(batch["path"][:, 0], np.float32(80) * rows["noise"][[7, 1]])
    np.testing.assert_array_equal(batch["path"][:, 1], rows["path"][[7, 1], 1])
    one = open_source("pairs", "train", path=str(tmp_path), times=(80.0,))
    assert "noise" in one.batch(np.array([0]))
    assert one.info.fingerprint != source.info.fingerprint


def test_noise_alone(tmp_path):
    header = dataclasses.replace(HEADER, path_times=(80.0,))
    write(tmp_path, header)
    assert not list(tmp_path.glob("*.path.npy"))
    source = open_source("pairs", "train", path=str(tmp_path), times=(80.0,))
    assert source.batch(np.array([3]))["noise"].shape == (1, 4, 4, 3)


def test_through_the_loader(tmp_path):
    write(tmp_path)
    source = open_source("pairs", "train", path=str(tmp_path), times=(80.0, 2.5))
    batch = next(iter(make_loader(source, batch_size=4, seed=0)))
    assert batch["path"].shape == (4, 2, 4, 4, 3) and batch["image"].shape == (4, 4, 4, 3)


@pytest.mark.parametrize("added", [2, 4, 6, 8, 10])
def test_continues_after_an_interruption(tmp_path, added):
    write(tmp_path / "whole")
    rows = records(HEADER)
    writer = PairsWriter(tmp_path / "cut", HEADER, shard_size=4)
    for start in range(0, added, 2):
        writer.add(**{name: array[start : start + 2] for name, array in rows.items()})
    # Killed while it wrote the next file.
    (tmp_path / "cut" / "shard-00002.x0.npy.tmp").write_bytes(b"half")
    del writer
    with pytest.raises(FileNotFoundError, match=r"unfinished .*so far.*continues"):
        open_source("pairs", "train", path=str(tmp_path / "cut"))
    again = PairsWriter(tmp_path / "cut", HEADER, shard_size=4)
    assert again.count == added // 4 * 4
    write(tmp_path / "cut", first=again.count)
    (tmp_path / "cut" / "shard-00002.x0.npy.tmp").unlink(missing_ok=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_killed_before_its_first_header(tmp_path):
    (tmp_path / "unfinished.json.tmp").write_text("{")
    write(tmp_path)
    assert len(open_source("pairs", "train", path=str(tmp_path))) == 10


def test_other_settings_and_destinations_are_refused(tmp_path):
    write(tmp_path / "a", finish=False)
    for change in ({"seed": 1}, {"teacher_hash": "f"}, {"batch_size": 4}, {"dtype": "float16"}):
        (name,) = change
        with pytest.raises(ValueError, match=f"begun with other settings.*{name}"):
            PairsWriter(tmp_path / "a", dataclasses.replace(HEADER, **change))
    write(tmp_path / "b")
    with pytest.raises(FileExistsError, match="finished set of pairs"):
        PairsWriter(tmp_path / "b", HEADER)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other things"):
        PairsWriter(tmp_path / "c", HEADER)


def test_bad_rows_are_refused(tmp_path):
    writer = PairsWriter(tmp_path, dataclasses.replace(HEADER, dtype="float16"), shard_size=4)
    rows = records(HEADER, 2)
    with pytest.raises(ValueError, match="expected"):
        writer.add(rows["noise"], rows["x0"], rows["labels"])
    with pytest.raises(ValueError, match="label out of range: pair 1 has label 5"):
        writer.add(rows["noise"], rows["x0"], np.array([0, 5]), rows["path"])
    rows["x0"][1, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"x0 of pair 1 is not finite in float16.*float32"):
        writer.add(rows["noise"], rows["x0"], rows["labels"], rows["path"])
    with pytest.raises(ValueError, match="no pairs were added"):
        writer.finish()
    with pytest.raises(ValueError, match=r"time 3 is not among the stored times 80, 9.7, 2.5"):
        dataclasses.replace(HEADER, path_times=(80.0, 3.0))
    with pytest.raises(ValueError, match="begin with the solver's first time"):
        dataclasses.replace(HEADER, path_times=(2.5,))


def test_damage_is_refused(tmp_path):
    write(tmp_path)
    path = str(tmp_path)
    file = tmp_path / "shard-00001.noise.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"shard-00001.noise.*truncated.*write the pairs again"):
        open_source("pairs", "train", path=path)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    open_source("pairs", "train", path=path)
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        open_source("pairs", "train", path=path, verify_checksums=True)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.noise.npy is missing"):
        open_source("pairs", "train", path=path)


def test_what_the_student_cannot_use_is_refused(tmp_path):
    write(tmp_path)
    path = str(tmp_path)
    with pytest.raises(ValueError, match=r"time 5 is not among the stored times 80, 2.5, 0.47"):
        open_source("pairs", "train", path=path, times=(80.0, 5.0))
    with pytest.raises(ValueError, match=r"another process.*sigma_max: 80.0 -> 50.0"):
        open_source("pairs", "train", path=path, process={**HEADER.process, "sigma_max": 50.0})
    with pytest.raises(ValueError, match="split 'train' only"):
        open_source("pairs", "test", path=path)
    source = open_source("pairs", "train", path=path)
    with pytest.raises(ValueError, match="cannot be mirrored"):
        make_loader(source, batch_size=2, seed=0, horizontal_flip=True)
    source.require_teacher("0123456789abcdef", "runs/teacher")
    with pytest.raises(ValueError, match=r"0123456789abcdef.*runs/other.*feedfeedfeedfeed"):
        source.require_teacher("feedfeedfeedfeed", "runs/other")
    with pytest.raises(FileNotFoundError, match="no pairs in"):
        open_source("pairs", "train", path=str(tmp_path / "elsewhere"))


def config_for(folder, **model):
    config = default_config()
    config.data.name = "pairs"
    config.data.pairs.path = str(folder)
    config.process.name = "edm"
    config.model.update(image_size=4, in_channels=3)
    config.model.dit.update(hidden_size=32, depth=1, num_heads=2)
    config.model.update(num_classes=5, **model)
    config.model.dit.update(learn_sigma=False)
    config.sampling.solver = "heun"
    return resolve_config(config)


def test_opened_from_a_configuration(tmp_path):
    write(tmp_path)
    assert len(open_data(config_for(tmp_path), "train")) == 10


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_size", 8, r"pairs delivers images of \(4, 4, 3\)"),
        ("num_classes", 7, "pairs has 5 classes, the model 7"),
    ],
)
def test_other_shapes_are_refused(tmp_path, key, value, message):
    write(tmp_path)
    config = config_for(tmp_path)
    config.model[key] = value
    with pytest.raises(ConfigError, match=message):
        open_data(config, "train")


def test_times_match_up_to_rounding():
    assert positions_of((80.0, float(np.float32(0.821)), 0.0), (0.821, 80.0)) == (1, 0)
    assert positions_of((999.0, 998.0, -1.0), (998.0,)) == (1,)
