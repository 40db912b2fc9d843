"""What a run survives: refusals, new wishes, a second training, a lost workdir, a full disk."""

import errno
import shutil

import jax
import numpy as np
import pytest

from dit_jax.evaluation import sample_store
from dit_jax.launch import classifier_scores, evaluate, loading, sample, train, training, wiring
from dit_jax.training import lock, memory, workdir
from dit_jax.training.checkpoints import Checkpoints
from dit_jax.training.saved_weights import SavedWeights
from tests.launch.conftest import curve, tiny_config
from tests.launch.test_bad_input import refusal


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run, made in this process, on 8 virtual devices."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    assert train.run(tiny_config(**{"training.num_steps": 4}), directory).step == 4
    return directory


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "changes",
    [
        {"model.dit.hidden_size": 48, "ema.decays": (0.9, 0.99), "ema.power_stds": ()},
        {"optimizer.name": "lion"},
        {"training.batch_size": 8 * 10**8},
    ],
)
def test_a_refused_force_changes_nothing(capsys, copy, changes):
    before = contents(copy)
    config = tiny_config(**changes, **{"training.num_steps": 6})
    assert "error: " in refusal(capsys, train.run, config, copy, force=True)
    assert contents(copy) == before


def test_an_average_is_added_and_another_left_out(capsys, copy):
    changes = {"training.num_steps": 6, "ema.decays": (0.9, 0.99), "ema.power_stds": ()}
    assert "add --force" in refusal(capsys, train.run, tiny_config(**changes), copy)
    assert train.run(tiny_config(**changes), copy, force=True).step == 6
    out = capsys.readouterr().out
    assert "ema_0.99 is new: it starts from the parameters" in out
    assert "ema_std0.1 is no longer kept" in out
    added, kept, raw = (
        loading.load_model(copy, weights=name).params for name in ("ema_0.99", "ema_0.9", "raw")
    )
    distance = lambda a, b: sum(  # noqa: E731
        float(np.abs(x - y).sum()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    assert distance(added, raw) > 0 and distance(added, kept) > 0
    # Older checkpoints are the run's, too, but for the average they have not.
    assert loading.load_model(copy, weights="ema_0.9", step=4).step == 4
    error = refusal(capsys, loading.load_model, copy, weights="ema_0.99", step=4)
    assert "has no ema_0.99: that average was added to the run later" in error
    # It is this configuration's run now: no need of --force.
    assert train.run(tiny_config(**{**changes, "training.num_steps": 7}), copy).step == 7


def test_a_short_run_warms_up_shortly_and_is_lengthened_when_asked(capsys, tmp_path):
    schedule = {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 100}
    short = tiny_config(**schedule, **{"training.num_steps": 2})
    assert train.run(short, tmp_path).step == 2
    out = capsys.readouterr().out
    assert "2 steps is too short for config.optimizer.warmup_steps=100: it warms up for 0" in out
    longer = tiny_config(**schedule, **{"training.num_steps": 3})
    error = refusal(capsys, train.run, longer, tmp_path)
    assert "holds a run of 2 steps; with 3 its cosine schedule" in error
    assert "Add --force to go on with the new schedule" in error
    assert workdir.load_config(tmp_path).training.num_steps == 2
    assert train.run(longer, tmp_path, force=True).step == 3
    assert "continuing from step 2" in capsys.readouterr().out


def test_checkpoints_that_rotate_away_while_they_are_read_are_passed_over(
    copy, monkeypatch, caplog
):
    saved, load = copy / "checkpoints", SavedWeights.load

    def rotate(self, *how):
        if self.step == 4:  # the run has removed it, and written a newer one
            (saved / "4").rename(saved / "9")
        return load(self, *how)

    monkeypatch.setattr(SavedWeights, "load", rotate)
    assert loading.load_model(copy).step == 9
    assert "cannot be read" not in caplog.text


def test_a_second_training_is_refused_at_once(capsys, copy):
    before = contents(copy)
    with lock.held(copy):
        error = refusal(capsys, train.run, tiny_config(), copy)
    assert f"{copy} is in use by process" in error and "choose another --workdir" in error
    assert contents(copy) == before


def test_a_workdir_removed_while_training_is_made_again(capsys, tmp_path, monkeypatch):
    directory, announce = tmp_path / "run", training.announce

    def remove(text):
        announce(text)
        if text.startswith("step  4/"):
            shutil.rmtree(directory)

    monkeypatch.setattr(training, "announce", remove)
    assert train.run(tiny_config(**{"training.num_steps": 10}), directory).step == 10
    out = capsys.readouterr().out
    assert f"warning: {directory} was removed or moved while training: config.json" in out
    assert out.count("warning") == 1
    assert loading.load_model(directory).step == 10
    assert sorted(curve(directory)) == [8, 10]
    assert not (directory / lock.LOCK_FILE).exists()


def test_a_full_disk_ends_with_path_and_remedy_and_the_run_goes_on_later(capsys, copy, monkeypatch):
    config = tiny_config(**{"training.num_steps": 8})

    def fail(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Checkpoints, "save", fail)
        error = refusal(capsys, train.run, config, copy)
    assert f"no space is left on the disk of {copy}" in error
    assert "Free some space; then the same command continues" in error
    assert train.run(config, copy).step == 8


def test_what_cannot_fit_is_refused_before_anything_is_made(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_host_memory", lambda: 1 << 30)
    config = tiny_config(**{"training.batch_size": 8 * 10**8})
    error = refusal(capsys, train.run, config, tmp_path / "run")
    assert "batches of 800000000 images need at least" in error and "1.00 GiB are free" in error
    assert "lower config.training.batch_size" in error
    assert not (tmp_path / "run").exists()
    many = [f"--workdir={trained}", "--num_images=1000000000"]
    for name in ("a.png", "a.npz", "a"):
        error = refusal(capsys, sample.main, [*many, f"--out={tmp_path / name}"])
        assert "1000000000 images need at least" in error and "lower --num_images" in error
    error = refusal(capsys, evaluate.main, [*many, f"--out={tmp_path / 'a.json'}"])
    assert "1000000000 images need at least" in error and "lower --num_images" in error
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_made_is_refused_before_it_is_begun(capsys, trained, tmp_path, monkeypatch):
    def begun(*arguments, **options):
        raise AssertionError("the work has begun")

    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(memory, "available_host_memory", lambda: 1 << 60)
    monkeypatch.setattr(sample_store.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(wiring, "balanced_labels", begun)
    many = [f"--workdir={trained}", "--num_images=1000000000", f"--out={tmp_path / 'a.npz'}"]
    error = refusal(capsys, sample.main, many)
    assert "3.0 MiB free; 1000000000 images need 119.21 GiB" in error and "--num_images" in error
    monkeypatch.setattr(classifier_scores.evaluation, "train_classifier", begun)
    few = [f"--workdir={trained}", "--num_images=20", f"--out={tmp_path / 'a.json'}"]
    error = refusal(capsys, evaluate.main, few)
    assert "--num_images=20: " in error and "give --num_images=65" in error
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_while_sampling_names_the_batch(
    capsys, trained, tmp_path, monkeypatch
):
    def exhaust(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        yield

    monkeypatch.setattr(wiring, "generate", exhaust)
    options = [f"--workdir={trained}", "--num_images=8", "--batch_size=8"]
    error = refusal(capsys, sample.main, [*options, f"--out={tmp_path / 'a.png'}"])
    assert "memory ran out while sampling 8 images at once: lower --batch_size=8" in error
    assert "Out of memory allocating 9 bytes" in error and "RESOURCE_EXHAUSTED" not in error


def test_a_period_that_is_none_is_refused_before_anything_is_made(capsys, tmp_path):
    config = tiny_config(**{"training.checkpoint_every": -1})
    error = refusal(capsys, train.run, config, tmp_path / "run")
    assert "training.checkpoint_every=-1" in error and not (tmp_path / "run").exists()
