"""Sets of pairs: round trips, interruptions, and what is refused."""

import dataclasses
import pickle

import numpy as np
import pytest

from dit_jax.config import ConfigError, default_config
from dit_jax.data import RecordWriter, Teaching, make_loader, open_source, pairs_header
from dit_jax.data.pairs import positions_of
from dit_jax.experiment import open_data, resolve_config

TEACHING = Teaching(
    teacher_source="runs/teacher (ema, step 10)",
    teacher_hash="0123456789abcdef",
    process={"name": "edm", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
    sampling={"solver": "heun", "steps": 4},
    times=(80.0, 9.7, 2.5, 0.47, 0.002, 0.0),
    path_times=(80.0, 2.5, 0.47),
    start_scale=80.0,
    seed=0,
    batch_size=2,
)


def header_of(dtype="float32", **changes):
    teaching = dataclasses.replace(TEACHING, **changes)
    return pairs_header((4, 4, 3), teaching, dtype=dtype, num_classes=5, shard_size=4)


def records(header, count=10):
    random = np.random.default_rng(0)
    rows = {
        name: random.normal(size=(count, *field.shape)).astype(np.float32)
        for name, field in header.fields.items()
    }
    return rows | {"label": random.integers(0, 5, count)}


def write(folder, header=None, count=10, first=0, finish=True):
    header = header or header_of()
    rows = records(header, count)
    writer = RecordWriter(folder, header)
    for start in range(first, count, 2):
        writer.add(**{name: array[start : start + 2] for name, array in rows.items()})
    if finish:
        writer.finish()
    return rows


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_round_trip(tmp_path, dtype):
    rows = write(tmp_path / "a", header_of(dtype))
    kept = {name: array.astype(dtype).astype(np.float32) for name, array in rows.items()}
    source = open_source("pairs", "train", path=str(tmp_path / "a"), verify_checksums=True)
    assert len(source) == 10 and source.info.image_shape == (4, 4, 3)
    assert [shard.count for shard in source.header.shards] == [4, 4, 2]
    order = np.array([9, 0, 4, 4, 3])
    batch = source.batch(order)
    assert batch.keys() == {"image", "label", "noise"}
    np.testing.assert_array_equal(batch["image"], kept["x0"][order])
    np.testing.assert_array_equal(batch["noise"], kept["noise"][order])
    np.testing.assert_array_equal(batch["label"], rows["label"][order])
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
    header = header_of(path_times=(80.0,))
    write(tmp_path, header)
    assert not list(tmp_path.glob("*.path.npy"))
    source = open_source("pairs", "train", path=str(tmp_path), times=(80.0,))
    assert source.batch(np.array([3]))["noise"].shape == (1, 4, 4, 3)


def test_through_the_loader(tmp_path):
    write(tmp_path)
    source = open_source("pairs", "train", path=str(tmp_path), times=(80.0, 2.5))
    batch = next(iter(make_loader(source, batch_size=4, seed=0)))
    assert batch["path"].shape == (4, 2, 4, 4, 3) and batch["image"].shape == (4, 4, 4, 3)


def test_times_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"time 3 is not among the stored times 80, 9.7, 2.5"):
        header_of(path_times=(80.0, 3.0))
    with pytest.raises(ValueError, match="begin with the solver's first time"):
        header_of(path_times=(2.5,))


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
        open_source("pairs", "train", path=path, process={**TEACHING.process, "sigma_max": 50.0})
    with pytest.raises(ValueError, match="split 'train' only"):
        open_source("pairs", "test", path=path)
    source = open_source("pairs", "train", path=path)
    with pytest.raises(ValueError, match="cannot be mirrored"):
        make_loader(source, batch_size=2, seed=0, horizontal_flip=True)
    source.require_teacher("0123456789abcdef", "runs/teacher")
    with pytest.raises(ValueError, match=r"0123456789abcdef.*runs/other.*feedfeedfeedfeed"):
        source.require_teacher("feedfeedfeedfeed", "runs/other")
    with pytest.raises(FileNotFoundError, match=r"no pairs for split 'train' in .*write_pairs.py"):
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
