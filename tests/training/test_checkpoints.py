import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dit_jax.training import checkpoints as checkpoints_lib
from dit_jax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    MismatchError,
    fingerprint,
    reason_of,
)
from dit_jax.training.method import TrainState


def make_state(seed):
    """Arrays of several types and shapes, NaN and negative zero among them."""
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(64, 32)).astype(np.float32)
    kernel[0, :2] = np.nan, -0.0
    params = {
        "kernel": jnp.asarray(kernel),
        "bias": jnp.asarray(random.normal(size=3), jnp.bfloat16),
    }
    return TrainState(
        step=jnp.int32(seed),
        params=params,
        ema={"ema_0.9": {"kernel": jnp.asarray(kernel * 2)}},
        optimizer=(jnp.arange(5, dtype=jnp.uint32), {"mask": jnp.array([True, False])}),
    )


def assert_same_bits(first, second):
    def same(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()

    jax.tree.map(same, first, second)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2 and 3 in a directory."""
    with_steps = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    for step in (1, 2, 3):
        with_steps.save(step, make_state(step), {"next_batch": step})
    with_steps.close()
    return tmp_path / "checkpoints"


def damage(directory, step, keep=0.5):
    """Cuts off the files that hold a checkpoint's arrays."""
    for file in (directory / str(step)).rglob("d/*"):
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def test_what_is_restored_is_what_was_saved(saved):
    found = Checkpoints(saved).restore(make_state(0))
    assert found.step == 3 and found.data == {"next_batch": 3}
    assert isinstance(found.state, TrainState)
    assert_same_bits(found.state, make_state(3))
    found = Checkpoints(saved).restore(make_state(0), 1)
    assert found.step == 1
    assert_same_bits(found.state, make_state(1))


def test_saving_does_not_wait_and_the_next_update_does_not_disturb_it(tmp_path):
    update = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state = {"a": jnp.zeros((512, 512)), "b": jnp.zeros(7)}
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 21):
        state = update(state)
        if step % 5 == 0:
            checkpoints.save(step, state, {})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [15, 20]
    for step in (15, 20):
        found = Checkpoints(tmp_path).restore(state, step)
        np.testing.assert_array_equal(found.state["a"], step)


def test_keep_last_and_keep_every(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 12):
        checkpoints.save(step, {"a": jnp.ones(2)}, {})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [4, 8, 10, 11]


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path / "new").restore({"a": jnp.ones(2)}) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 .* there are \[\]"):
        Checkpoints(tmp_path / "new").restore({"a": jnp.ones(2)}, 5)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved, caplog):
    damage(saved, 3)
    found = Checkpoints(saved, read_only=True).restore(make_state(0))
    assert found.step == 2
    assert_same_bits(found.state, make_state(2))
    assert str(saved / "3") in caplog.text and "damaged" in caplog.text
    assert (saved / "3").is_dir()  # reading moves nothing

    found = Checkpoints(saved, keep_last=3).restore(make_state(0), set_aside=True)
    assert found.step == 2 and (saved / "3.damaged").is_dir() and not (saved / "3").exists()
    again = Checkpoints(saved, keep_last=3)
    assert again.steps() == [1, 2]
    again.save(3, make_state(3), {})
    again.close()
    assert_same_bits(Checkpoints(saved).restore(make_state(0)).state, make_state(3))


@pytest.mark.parametrize("victim", ["meta/metadata", "data/metadata", "state/_METADATA"])
def test_other_files_damaged_are_noticed_too(saved, victim):
    (saved / "3" / victim).write_text("{")
    assert Checkpoints(saved).restore(make_state(0)).step == 2


def test_all_damaged_is_an_error(saved):
    for step in (1, 2, 3):
        damage(saved, step)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[3, 2, 1\]"):
        Checkpoints(saved).restore(make_state(0), set_aside=True)
    assert Checkpoints(saved).steps() == [1, 2, 3]  # the run does not go on: nothing is touched
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoints(saved).restore(make_state(0), 2)


def test_arrays_replaced_by_others_are_noticed(saved):
    shutil.rmtree(saved / "3" / "state")
    shutil.copytree(saved / "2" / "state", saved / "3" / "state")
    assert Checkpoints(saved).restore(make_state(0)).step == 2
    with pytest.raises(CheckpointError, match="not the ones that were written"):
        Checkpoints(saved).restore(make_state(0), 3)


def test_a_flipped_bit_changes_the_fingerprint():
    state = make_state(1)
    before = fingerprint(state)
    assert before == fingerprint(jax.tree.map(np.asarray, state))
    for number, leaf in enumerate(jax.tree.leaves(state)):
        leaves = [np.array(a) for a in jax.tree.leaves(state)]
        flat = leaves[number].reshape(-1)
        if leaf.dtype == bool:
            flat[-1] = not flat[-1]
        else:
            flat.view(np.uint8)[0] ^= 1
        after = fingerprint(leaves)
        assert [a != b for a, b in zip(before, after, strict=True)] == [
            i == number for i in range(len(before))
        ]


def test_a_fingerprint_does_not_depend_on_the_sharding(placement):
    state = {"a": np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)}
    split = jax.device_put(state, placement.split)
    assert fingerprint(split) == fingerprint(state)


def test_a_checkpoint_of_another_network_is_refused_with_a_list(saved):
    other = make_state(0)
    other.params["kernel"] = jnp.zeros((64, 48))
    other.params["scale"] = other.params.pop("bias")
    with pytest.raises(MismatchError) as error:
        Checkpoints(saved).restore(other, set_aside=True)
    message = str(error.value)
    assert "params/kernel: (64, 32) in the checkpoint, (64, 48) expected" in message
    assert "params/bias: only in the checkpoint" in message
    assert "params/scale: not in the checkpoint" in message
    assert Checkpoints(saved).steps() == [1, 2, 3]


def test_what_is_stored_otherwise_is_converted_and_said(saved):
    def state(dtype):
        params = {"kernel": jnp.linspace(0, 1, 6).reshape(2, 3)}
        average = {"kernel": params["kernel"].astype(dtype)}
        return TrainState(jnp.int32(5), params, {"ema_0.9": average}, ())

    directory = saved.with_name("dtypes")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(5, {"state": state(jnp.bfloat16), "key": jnp.ones(2)}, {})
    found = Checkpoints(directory, read_only=True).restore(
        {"state": state(jnp.float32), "key": jnp.ones(2)}
    )
    assert found.notes == ["1 array of bfloat16 in the checkpoint, float32 from here on"]
    assert_same_bits(
        found.state["state"].ema["ema_0.9"]["kernel"],
        state(jnp.bfloat16).ema["ema_0.9"]["kernel"].astype(jnp.float32),
    )


def test_averages_may_be_added_and_left_out(saved):
    # 'kernel' alone is averaged in these states, so their parameters are made the same.
    def with_averages(step, *names):
        state = make_state(step)
        params = {"kernel": state.params["kernel"]}
        return TrainState(
            state.step, params, {n: {"kernel": params["kernel"] * 2} for n in names}, ()
        )

    directory = saved.with_name("averages")
    before = with_averages(5, "ema_0.9", "ema_0.5")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(5, {"state": before, "key": jnp.ones(2)}, {})
    wanted = {"state": with_averages(0, "ema_0.9", "ema_0.99"), "key": jnp.ones(2)}
    found = Checkpoints(directory, read_only=True).restore(wanted)
    assert found.notes == [
        "ema_0.99 is new: it starts from the parameters",
        "ema_0.5 is no longer kept",
    ]
    state = found.state["state"]
    assert sorted(state.ema) == ["ema_0.9", "ema_0.99"]
    assert_same_bits(state.ema["ema_0.9"], before.ema["ema_0.9"])
    assert_same_bits(state.ema["ema_0.99"], before.params)
    new, params = state.ema["ema_0.99"]["kernel"], state.params["kernel"]
    assert new.unsafe_buffer_pointer() != params.unsafe_buffer_pointer()
    assert Checkpoints(directory).restore({"state": before, "key": jnp.ones(2)}).notes == []


def test_an_error_leaves_no_directory_that_it_made(tmp_path):
    with pytest.raises(ValueError, match="refused"), Checkpoints(tmp_path / "new"):
        raise ValueError("refused")
    assert not list(tmp_path.iterdir())


def test_reasons_are_without_the_arrays_specification():
    text = "NOT_FOUND: Error opening: no such file [tensorstore_spec='{\"context\":{}}']\nmore"
    assert reason_of(ValueError(text)) == "NOT_FOUND: Error opening: no such file"
    assert reason_of(ValueError()) == "ValueError()"


def test_an_unfinished_write_is_ignored_then_removed(saved):
    unfinished = saved / f"7{ocp.utils.TMP_DIR_SUFFIX}123"
    shutil.copytree(saved / "3", unfinished)
    reader = Checkpoints(saved, read_only=True)
    assert reader.steps() == [1, 2, 3] and reader.restore(make_state(0)).step == 3
    assert unfinished.exists()  # it may be another process's
    writer = Checkpoints(saved, keep_last=3)
    writer.save(4, make_state(4), {})
    writer.close()
    assert not unfinished.exists() and Checkpoints(saved).steps() == [2, 3, 4]


def test_a_failed_write_is_raised_and_leaves_the_others(saved, monkeypatch):
    checkpoints = Checkpoints(saved, keep_last=3)
    state = make_state(4)

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(4, state, {})
    assert Checkpoints(saved).restore(make_state(0)).step == 3


def test_what_an_error_left_half_written_is_removed(saved):
    unfinished = saved / f"7{ocp.utils.TMP_DIR_SUFFIX}123"
    with pytest.raises(OSError, match="No space left"), Checkpoints(saved, keep_last=3):
        unfinished.mkdir()
        raise OSError("No space left on device")
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


def test_programming_errors_are_not_taken_for_damage(saved, monkeypatch):
    def fail(tree):
        raise TypeError("a bug")

    monkeypatch.setattr(checkpoints_lib, "fingerprint", fail)
    with pytest.raises(TypeError, match="a bug"):
        Checkpoints(saved, keep_last=3).restore(make_state(0), set_aside=True)
    assert Checkpoints(saved).steps() == [1, 2, 3]


def test_option_errors(tmp_path):
    with pytest.raises(ValueError, match=r"training.keep_last=0"):
        Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match=r"training.keep_every=-1"):
        Checkpoints(tmp_path, keep_every=-1)
