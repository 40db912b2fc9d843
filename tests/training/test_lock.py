import json
import subprocess
import sys
import threading
import time

import pytest

from dit_jax.training import lock as lock_lib
from dit_jax.training.lock import LOCK_FILE, held
from dit_jax.training.workdir import WorkdirError

# A holder that is killed, as a training is: it prints what it wrote and waits.
HOLDER = """
import sys, time
from dit_jax.training import lock
with lock.held(__import__("pathlib").Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def rewrite(directory, **changes):
    """Changes the holder in a lock, as if it were another."""
    file = directory / LOCK_FILE
    record = json.loads(file.read_text())
    record["holder"].update(changes)
    file.write_text(json.dumps(record))
    return record


@pytest.fixture
def left_by_a_killed_process(tmp_path):
    """A workdir whose lock was held by a process that was killed; it was refused while it lived."""
    directory = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, directory], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    started = time.monotonic()
    with pytest.raises(WorkdirError, match=rf"is in use by process {process.pid} on .* since 20"):
        held(directory).__enter__()
    assert time.monotonic() - started < 1
    process.kill()
    process.wait()
    assert (directory / LOCK_FILE).exists()
    return directory


@pytest.fixture
def without_flock(monkeypatch):
    monkeypatch.setattr(lock_lib, "_flock", lambda file: False)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock_lib, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_lib, "_SILENCE_SECONDS", 0.5)


def test_a_lock_leaves_nothing_behind(tmp_path):
    with held(tmp_path / "a" / "b") as lock:
        assert lock.is_held() and (tmp_path / "a" / "b" / LOCK_FILE).exists()
    assert not (tmp_path / "a").exists()
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_a_second_one_is_refused_at_once_and_the_first_goes_on(tmp_path):
    with held(tmp_path) as lock:
        with pytest.raises(WorkdirError, match=r"is in use by process \d+ on .* since 20"):
            held(tmp_path).__enter__()
        assert lock.is_held()
    with held(tmp_path):
        pass


def test_a_killed_process_locks_nobody_out(left_by_a_killed_process, capsys):
    with held(left_by_a_killed_process):
        assert not capsys.readouterr().out


def test_without_flock_processes_of_one_machine_are_looked_up(
    left_by_a_killed_process, without_flock, tmp_path
):
    with held(left_by_a_killed_process), pytest.raises(WorkdirError, match="is in use by process"):
        held(left_by_a_killed_process).__enter__()
    # Its number was given to another process since.
    with held(tmp_path):
        rewrite(tmp_path, started=1)
        with held(tmp_path):
            pass


def test_another_machine_is_known_by_its_beats(
    left_by_a_killed_process, without_flock, quick, capsys
):
    record = rewrite(left_by_a_killed_process, machine="another", host="node7")
    end = threading.Event()

    def beat():
        while not end.wait(0.1):
            record["beat"] += 1
            (left_by_a_killed_process / LOCK_FILE).write_text(json.dumps(record))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(WorkdirError, match=r"in use by process .* on node7"):
            held(left_by_a_killed_process).__enter__()
    finally:
        end.set()
        thread.join()
    assert "looking whether it still is" in capsys.readouterr().out
    with held(left_by_a_killed_process) as lock:  # it was killed
        assert lock.is_held()


def test_a_holder_keeps_beating_and_notices_who_took_it_away(tmp_path, quick):
    with held(tmp_path) as lock:
        before = (tmp_path / LOCK_FILE).read_text()
        time.sleep(0.3)
        assert (tmp_path / LOCK_FILE).read_text() != before and lock.is_held()
        (tmp_path / LOCK_FILE).unlink()
        assert not lock.is_held()
        lock.retake()
        assert lock.is_held()
        rewrite(tmp_path, token="another", host="node7")
        with pytest.raises(WorkdirError, match=r"in use by process .* on node7"):
            lock.retake()
    assert (tmp_path / LOCK_FILE).exists()  # the other's
