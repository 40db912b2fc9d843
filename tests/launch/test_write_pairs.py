"""Pairs written by the command: what they hold, resuming after a kill, distilling from them."""

import json
import signal
import time

import jax
import numpy as np
import pytest

from dit_jax import experiment
from dit_jax.data import open_source
from dit_jax.launch import loading, train, write_pairs
from dit_jax.launch import pairs as pairs_lib
from tests.launch.conftest import curve, run, start, tiny_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The workdir of a briefly trained teacher."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train.run(tiny_config(**{"training.num_steps": 4}), folder)
    return folder


def arguments(teacher, out, **changes):
    options = {
        "workdir": teacher,
        "out": out,
        "num_pairs": 22,
        "batch_size": 8,
        "shard_size": 8,
        "solver": "heun",
        "steps": 3,
        "guidance_scale": 1.5,
        **changes,
    }
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def write(*given, path_times=(), **changes):
    times = ["--path_times", *map(str, path_times)] if path_times else []
    return pairs_lib.run(write_pairs.parse_arguments([*arguments(*given, **changes), *times]))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_pairs_are_what_the_sampler_makes(teacher, tmp_path):
    header = write(teacher, tmp_path / "p", path_times=(0.5,))
    assert header.count == 22 and [shard.count for shard in header.shards] == [8, 8, 6]
    source = open_source("pairs", "train", path=str(tmp_path / "p"), times=(1.0, 0.5))
    made = source.teaching
    np.testing.assert_allclose(made.times, [1, 2 / 3, 0.5, 1 / 3, 0], rtol=1e-6)
    assert made.path_times == (1.0, 0.5)
    batch = source.batch(np.arange(22))
    np.testing.assert_array_equal(batch["label"], np.arange(22) % 10)

    # The same by the parts: from the stored noise with the stored teacher's own solver.
    model = loading.load_model(teacher, overrides={"sampling.solver": "heun", "sampling.steps": 3})
    assert model.weights_hash() == made.teacher_hash
    sampler = experiment.build_sampling(model.config).sampler
    keys = pairs_lib.pair_keys(0, np.arange(22))
    times = np.asarray(made.times, np.float32)
    noise, x0, path = sampler.path(model.params, keys, batch["label"], times, (2,), 1.5)
    np.testing.assert_array_equal(batch["path"][:, 0], noise)
    np.testing.assert_allclose(batch["path"][:, 1], path[:, 0], atol=1e-5)
    np.testing.assert_allclose(batch["image"], x0, atol=1e-5)
    plain = sampler(model.params, keys, batch["label"], times, 1.5)
    np.testing.assert_allclose(plain, x0, atol=1e-5)


def test_noise_is_none_that_images_start_from():
    from dit_jax.sampling import image_keys

    pairs = jax.random.key_data(pairs_lib.pair_keys(0, np.arange(50)))
    images = jax.random.key_data(image_keys(0, np.arange(50)))
    assert not {tuple(key) for key in np.asarray(pairs)} & {tuple(k) for k in np.asarray(images)}


def test_killed_and_continued(teacher, tmp_path):
    write(teacher, tmp_path / "whole", path_times=(0.5,), num_pairs=60)
    process = start(
        "write_pairs",
        *arguments(teacher, tmp_path / "cut", num_pairs=60),
        "--path_times",
        0.5,
        devices=jax.device_count(),
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "cut").glob("shard-00001.*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "cut" / "header.json").exists():
        write(teacher, tmp_path / "cut", path_times=(0.5,), num_pairs=60)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_distilling_from_pairs(teacher, tmp_path):
    write(teacher, tmp_path / "p", path_times=(0.5,), num_pairs=32)
    changes = {
        "method.name": "kd",
        "method.label_dropout": 0.0,
        "data.name": "pairs",
        "data.pairs.path": str(tmp_path / "p"),
        "teacher.path": str(teacher),
        "sampling.solver": "consistency",
        "sampling.steps": 2,
        "training.num_steps": 4,
    }
    result = train.run(tiny_config(**changes), tmp_path / "student")
    assert result.step == 4
    losses = [metrics["loss"] for metrics in curve(tmp_path / "student").values()]
    assert np.isfinite(losses).all()
    frozen = json.loads((tmp_path / "student" / "frozen.json").read_text())
    assert frozen["teacher"]["source"] == str(teacher)
    out, _ = run(
        "sample", f"--workdir={tmp_path / 'student'}", "--num_images=4", f"--out={tmp_path}/x.png"
    )
    assert "4 images" in out

    other = tiny_config(**{**changes, "teacher.weights": "raw"})
    with pytest.raises(ValueError, match=r"were made by .* with the weights .*; the teacher"):
        train.run(other, tmp_path / "other")
    three = tiny_config(**{**changes, "sampling.steps": 3})
    with pytest.raises(ValueError, match=r"0.666667 is not among the stored times 1, 0.5"):
        train.run(three, tmp_path / "three")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "consistency"}, "adds no noise on its way"),
        ({"path_times": (1.5,)}, "does not lie between 1"),
        ({"shard_size": 6}, "multiple of the batch size, 8"),
        ({"vae": "x"}, "--vae does nothing"),
    ],
)
def test_refused(teacher, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(teacher, tmp_path / "p", **changes)
    assert not (tmp_path / "p" / "header.json").exists()


def test_finished_and_other_sets_are_refused(teacher, tmp_path):
    write(teacher, tmp_path / "p", num_pairs=4)
    with pytest.raises(FileExistsError, match="finished set"):
        write(teacher, tmp_path / "p")
    (tmp_path / "p" / "header.json").rename(tmp_path / "p" / "unfinished.json")
    with pytest.raises(ValueError, match=r"begun with other settings.*seed"):
        write(teacher, tmp_path / "p", seed=3)
    with pytest.raises(ValueError, match="has 4 pairs already, written for another number"):
        write(teacher, tmp_path / "p", num_pairs=2)
