import os
import shutil
import signal

import jax
import numpy as np
import pytest

from dit_jax.parallel.mesh import DataParallel
from dit_jax.training import loop, memory
from dit_jax.training.checkpoints import CheckpointError, Checkpoints
from dit_jax.training.method import TrainState
from dit_jax.training.progress import NonFiniteError
from tests.training.conftest import MeanSeeker


class Recorder:
    """A metric writer that keeps everything."""

    def __init__(self):
        self.scalars, self.flushed = {}, False

    def write_scalars(self, step, scalars):
        self.scalars[step] = dict(scalars)

    def write_images(self, step, images):
        raise AssertionError("the loop itself draws no pictures")

    def flush(self):
        self.flushed = True


class Intercepted:
    """An iterator that calls `act(number, batch)` before handing over a batch."""

    def __init__(self, data, act):
        self.data, self.act, self.count = data, act, 0
        self.get_state, self.set_state = data.get_state, data.set_state

    def __next__(self):
        self.count += 1
        return self.act(self.count, next(self.data))


@pytest.fixture
def train(tmp_path, placement):
    """Runs the loop; returns (result, metrics by step, announced lines)."""

    def run(
        data,
        *,
        seed=0,
        directory="run",
        keep_last=2,
        preview=None,
        strict=True,
        placement=placement,
        on_start=lambda: None,
        before_writing=lambda step: None,
        **options,
    ):
        recorder, lines = Recorder(), []
        checkpoints = Checkpoints(tmp_path / directory, keep_last=keep_last)
        try:
            result = loop.train(
                MeanSeeker(),
                data,
                jax.random.key(seed),
                loop.LoopOptions(**{"num_steps": 10, "batch_size": 16, "log_every": 2, **options}),
                placement=placement,
                checkpoints=checkpoints,
                writers=lambda step: [recorder],
                preview=preview,
                announce=lines.append,
                strict=strict,
                on_start=on_start,
                before_writing=before_writing,
            )
            assert recorder.flushed or not recorder.scalars
        finally:
            checkpoints.close()
        return result, recorder.scalars, lines

    return run


def assert_states_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_metrics_are_means_over_windows(train, batches):
    result, every, _ = train(batches(), log_every=1, directory="a")
    _, windows, lines = train(batches(), log_every=3, directory="b")
    assert result.step == int(result.state.step) == 10 and not result.interrupted
    assert sorted(every) == list(range(1, 11))
    assert sorted(windows) == [3, 6, 9, 10]  # the last step always
    for step, window in ((3, (1, 2, 3)), (6, (4, 5, 6)), (10, (10,))):
        mean = np.mean([every[i]["loss"] for i in window])
        np.testing.assert_allclose(windows[step]["loss"], mean, rtol=1e-6)
    rates = {"steps_per_second", "images_per_second", "model_tflops_per_second"}
    assert rates <= windows[10].keys()
    line = next(line for line in lines if line.startswith("step  9/10"))
    assert "loss" in line and "steps/s" in line and "images/s" in line and "ETA" in line
    assert result.seconds > 0 and result.steps_per_second > 0


def test_previews_and_checkpoints_come_at_their_steps(train, batches, tmp_path):
    seen = []
    train(
        batches(),
        preview_every=4,
        checkpoint_every=3,
        keep_last=9,
        preview=lambda step, weights: seen.append((step, sorted(weights))),
    )
    assert seen == [(step, ["ema_0.5", "raw"]) for step in (4, 8, 10)]
    assert Checkpoints(tmp_path / "run").steps() == [3, 6, 9, 10]


def test_resuming_gives_the_same_bits(train, batches):
    whole, expected, _ = train(batches(), directory="whole", log_every=1)
    train(batches(), num_steps=3, log_every=1)
    train(batches(), num_steps=7, log_every=1)
    resumed, found, lines = train(batches(), log_every=1)
    assert lines[0].startswith("continuing from step 7")
    assert_states_equal(resumed.state, whole.state)
    assert sorted(found) == [8, 9, 10]
    for step, metrics in found.items():
        assert metrics["loss"] == expected[step]["loss"]
    again, nothing, lines = train(batches())
    assert again.step == 10 and not nothing and "nothing to train" in lines[-1]
    assert_states_equal(again.state, whole.state)


def test_one_device_resumes_what_eight_began(train, batches):
    whole, *_ = train(batches(), directory="whole")
    train(batches(), num_steps=4)
    one = DataParallel(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))
    resumed, _, lines = train(batches(), placement=one)
    assert lines[0].startswith("continuing from step 4")
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(close, resumed.state, whole.state)


def test_another_seed_or_stream_is_refused_unless_forced(train, batches):
    train(batches(), num_steps=3)
    with pytest.raises(ValueError, match=r"trained from another seed: set config.seed"):
        train(batches(), seed=1)
    with pytest.raises(ValueError, match="another stream of data"):
        train(batches(seed=5))
    result, *_ = train(batches(seed=5), seed=1, strict=False)
    assert result.step == 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(train, batches, capsys, number):
    whole, *_ = train(batches(), directory="whole")
    before = signal.getsignal(number)

    def interrupt(count, batch):
        if count == 6:  # asked for while step 5 is done
            os.kill(os.getpid(), number)
        return batch

    result, *_ = train(Intercepted(batches(), interrupt), checkpoint_every=100)
    assert result.interrupted and result.step == 6
    assert f"{number.name}: saving after this step" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    resumed, _, lines = train(batches())
    assert lines[0].startswith("continuing from step 6") and not resumed.interrupted
    assert_states_equal(resumed.state, whole.state)


def test_not_finite_stops_with_step_batch_and_checkpoint(train, batches, tmp_path):
    def poison(count, batch):
        if count == 6:
            batch = {**batch, "image": batch["image"].copy()}
            batch["image"][3, 0, 1] = np.nan
        return batch

    with pytest.raises(NonFiniteError) as error:
        train(Intercepted(batches(), poison), checkpoint_every=2)
    message = str(error.value)
    assert "loss is nan at step 6" in message and "non-finite 1" in message
    assert "image (16, 2, 2, 1)" in message and "labels: 0 to 2" in message
    assert f"last good checkpoint: {tmp_path / 'run' / '4'}" in message
    assert Checkpoints(tmp_path / "run").steps() == [2, 4]
    assert "to continue from it: the same command with --force and a lower" in message
    with pytest.raises(NonFiniteError, match="no checkpoint was written yet") as error:
        train(Intercepted(batches(), poison), directory="early")
    assert "continue" not in str(error.value) and "to start again: " in str(error.value)


def test_the_last_checkpoint_removed_while_it_is_written_is_an_error(train, batches, tmp_path):
    def remove(step):
        if step == 10:
            shutil.rmtree(tmp_path / "run" / "10", ignore_errors=True)

    with pytest.raises(CheckpointError, match=r"run/10 was removed while it was written"):
        train(batches(), before_writing=remove)


def test_an_update_that_cannot_fit_is_refused_before_anything_changes(train, batches, monkeypatch):
    started = []
    monkeypatch.setattr(memory, "available_host_memory", lambda: 100)
    with pytest.raises(
        memory.MemoryNeededError,
        match=r"an update needs .* of memory, beside .* of state and batch, and this",
    ):
        train(batches(), on_start=lambda: started.append(1))
    assert not started


def test_what_is_too_large_is_named(monkeypatch):
    monkeypatch.setattr(memory, "available_host_memory", lambda: 1 << 30)
    shapes = {"mean": jax.ShapeDtypeStruct((1 << 28,), np.float32)}
    state = TrainState(jax.ShapeDtypeStruct((), np.int32), shapes, {"ema_0.9": shapes}, ())
    with pytest.raises(memory.MemoryNeededError) as error:
        memory.require_batches(8, (8, 8, 1), state)
    message = str(error.value)
    assert "the training state (params 1.00 GiB, ema 1.00 GiB" in message
    assert "2.00 GiB of memory, and 1.00 GiB are free: make the network" in message
    with pytest.raises(memory.MemoryNeededError, match=r"free: lower config.training.batch_size="):
        memory.require_batches(1 << 30, (8, 8, 1), {})


def test_fewer_steps_than_are_done_are_refused(train, batches):
    train(batches(), num_steps=4)
    started = []
    with pytest.raises(ValueError, match=r"num_steps=2: .* is at step 4 already.*more than 4"):
        train(batches(), num_steps=2, strict=False, on_start=lambda: started.append(1))
    assert not started  # so that config.json stays what it was
    _, _, lines = train(batches(), num_steps=14, log_every=100)
    assert any("for the" not in line and "step 14/14" in line for line in lines)
    assert not any("0 steps left" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "training.num_steps=0"),
        ({"log_every": 0}, "training.log_every=0"),
        ({"checkpoint_every": -1}, "training.checkpoint_every=-1"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        loop.LoopOptions(**{"num_steps": 1, "batch_size": 1, **options})
