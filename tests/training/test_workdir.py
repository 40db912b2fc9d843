import json
import logging
import os
import shutil
from pathlib import Path

import jax
import pytest

from dit_jax import config as config_lib
from dit_jax.training import workdir as workdir_lib
from dit_jax.training.workdir import (
    RunFiles,
    WorkdirError,
    config_text,
    keep_earlier,
    load_config,
    readable_disk_errors,
    require_same_run,
    require_space,
    require_writable,
)


@pytest.fixture
def config():
    return config_lib.resolve({"name": "first", "model": {"depth": 2}})


def changed(config, **values):
    other = config.to_dict()
    for path, value in values.items():
        section, _, key = path.replace("__", ".").rpartition(".")
        inner = other
        for name in section.split(".") if section else ():
            inner = inner[name]
        inner[key] = value
    return config_lib.resolve(other)


def prepare(workdir, config, *, force=False):
    """What a training run does first: checks, then says whose the workdir is."""
    require_writable(workdir)
    require_same_run(workdir, config, force=force)
    RunFiles(workdir).write("config.json", config_text(workdir, config))


def with_checkpoint(workdir):
    (workdir / "checkpoints" / "10").mkdir(parents=True)


def test_the_configuration_comes_back(config, tmp_path):
    prepare(tmp_path / "a" / "b", config)
    assert load_config(tmp_path / "a" / "b") == config
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_without_checkpoints_another_configuration_takes_over(config, tmp_path):
    prepare(tmp_path, config)
    prepare(tmp_path, changed(config, model__dit__depth=3))
    assert load_config(tmp_path).model.dit.depth == 3


def test_another_configuration_is_refused_unless_forced(config, tmp_path):
    prepare(tmp_path, config)
    with_checkpoint(tmp_path)
    other = changed(config, model__dit__depth=3, seed=5)
    with pytest.raises(WorkdirError) as error:
        prepare(tmp_path, other)
    message = str(error.value)
    assert (
        "config.model.dit.depth: 2 there, 3 now" in message and "config.seed: 0 there, 5" in message
    )
    assert "--force" in message and load_config(tmp_path) == config
    prepare(tmp_path, other, force=True)
    assert load_config(tmp_path) == other


def test_a_run_older_than_a_key_goes_on_as_it_was(config, tmp_path, caplog):
    # ema.warmup is younger than some runs, which did without.
    assert config.ema.warmup
    old = changed(config, ema__warmup=False)
    file = tmp_path / "config.json"
    file.write_text(config_lib.to_json(config, without=["ema.warmup"]))
    assert "warmup" not in json.loads(file.read_text())["ema"] and load_config(tmp_path) == old
    assert keep_earlier(tmp_path, config) == config  # nothing was trained there
    with_checkpoint(tmp_path)
    for _ in range(2):  # the first time must not make the second differ
        caplog.clear()
        continued = keep_earlier(tmp_path, config)
        assert continued == old and "config.ema.warmup=False" in caplog.text
        prepare(tmp_path, continued)
        assert load_config(tmp_path) == old
    with pytest.raises(WorkdirError, match=r"config.ema.warmup: False there, True now"):
        prepare(tmp_path, config)
    # A run that states it is like any other: another value is a difference.
    file.write_text(config_lib.to_json(old))
    assert keep_earlier(tmp_path, config) == config
    with pytest.raises(WorkdirError, match=r"config.ema.warmup: False there, True now"):
        prepare(tmp_path, config)


def test_what_changes_nothing_learned_may_change(config, tmp_path):
    prepare(tmp_path, config)
    with_checkpoint(tmp_path)
    other = changed(config, name="x", training__num_steps=10, sampling__steps=9, mesh__data=1)
    prepare(tmp_path, other)
    assert load_config(tmp_path) == other


def test_the_length_of_a_decaying_schedule_is_refused(config, tmp_path):
    cosine = changed(config, optimizer__schedule="cosine")
    prepare(tmp_path, cosine)
    with_checkpoint(tmp_path)
    with pytest.raises(WorkdirError, match=r"run of 400000 steps; with 10 .*\n.*\nAdd --force to"):
        prepare(tmp_path, changed(cosine, training__num_steps=10))
    prepare(tmp_path, changed(cosine, training__num_steps=10), force=True)


def test_unwritable_directory_errors(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WorkdirError, match=r"cannot write to .*Choose another directory"):
            prepare(directory, config)

    def refuse(self, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(WorkdirError, match=r"cannot write to .*: Permission denied"):
        prepare(tmp_path, config)


def test_space_errors_say_how_much_is_missing(tmp_path, monkeypatch):
    state = {"w": jax.ShapeDtypeStruct((1 << 28,), "float32")}  # 1 GiB
    usage = shutil.disk_usage(tmp_path)
    free = lambda gib: lambda path: usage._replace(free=gib << 30)  # noqa: E731
    monkeypatch.setattr(workdir_lib.shutil, "disk_usage", free(3))
    require_space(tmp_path, state, keep=2)
    monkeypatch.setattr(workdir_lib.shutil, "disk_usage", free(2))
    with pytest.raises(WorkdirError) as error:
        require_space(tmp_path, state, keep=2)
    message = str(error.value)
    assert "2.00 GiB free" in message and "2 checkpoints and one being written need 3.00" in message
    # What the run holds already counts: it is replaced, not added to.
    with_checkpoint(tmp_path)
    with (tmp_path / "checkpoints" / "10" / "array").open("wb") as file:
        file.truncate(1 << 30)
    require_space(tmp_path, state, keep=2)


def test_files_that_vanish_are_written_again(tmp_path):
    files = RunFiles(tmp_path / "run")
    files.write("config.json", "{}")
    files.write("frozen.json", "[]")
    assert files.mend() == []
    shutil.rmtree(tmp_path / "run")
    assert files.mend() == ["config.json", "frozen.json"]
    assert (tmp_path / "run" / "frozen.json").read_text() == "[]"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "frozen.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError('DATA_LOSS: Error writing "x": ... No space left on device [source locations'),
        OSError(122, "Disk quota exceeded"),
    ],
)
def test_full_disk_errors_name_the_workdir_and_what_to_do(tmp_path, error):
    with pytest.raises(WorkdirError) as raised, readable_disk_errors(tmp_path):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("the library's own words") from cause
    message = str(raised.value)
    assert f"no space is left on the disk of {tmp_path}" in message and "iB free" in message
    assert "the same command continues from the newest" in message
    with pytest.raises(KeyError), readable_disk_errors(tmp_path):
        raise KeyError("another")


def test_a_full_disk_is_told_once(tmp_path, caplog):
    with pytest.raises(WorkdirError), readable_disk_errors(tmp_path):
        raise OSError(28, "No space left on device")
    for name in ("asyncio", "absl"):  # as orbax's threads do for every array
        logger = logging.getLogger(name)
        logger.error("once more", exc_info=OSError(28, "No space left on device"))
        logger.error("of %s", name, exc_info=ValueError("another kind"))
    assert [record.getMessage() for record in caplog.records] == ["of asyncio", "of absl"]


def test_no_run_errors(tmp_path):
    with pytest.raises(WorkdirError, match="is not the workdir of a run"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {"dept": 3}}')
    with pytest.raises(WorkdirError, match=r"did you mean config.model.dit.depth"):
        load_config(tmp_path)


def test_a_config_that_is_a_pipe_is_named_once(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(WorkdirError, match=r"^[^ ]*config\.json is not a regular file: [^/]*$"):
        load_config(tmp_path)
