"""Compiled programs in files: when they are used, when they are refused, and by whom."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.programs import Program, ProgramError, Programs, identify, load, read_header, save


def scaled(params, x):
    return jnp.tanh(x @ params["kernel"])


def make(columns=3, factor=1.0, name="scaled"):
    params = {"kernel": np.full((4, columns), factor, np.float32)}
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    return Program(name, scaled, {"activation": "tanh"}, {"params": params, "x": x})


@pytest.fixture
def kept(tmp_path):
    """A folder with one program, and the lines that were printed."""
    lines = []
    programs = Programs(tmp_path / "new" / "programs", lines.append)
    out = programs.call(make())
    return programs.directory, lines, out


def test_one_process_keeps_what_the_next_one_finds(kept):
    directory, lines, out = kept
    expected = scaled(*make().inputs.values())
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert lines[0] == f"compiling 'scaled': {directory} holds no program 'scaled'"
    assert lines[1].startswith(f"kept {directory}/scaled-") and lines[1].endswith("MiB")

    again = []
    programs = Programs(directory, again.append)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: events.append(name))
    try:
        found = np.asarray(programs.call(make(factor=2.0)))  # other weights
        programs.call(make(factor=3.0))
    finally:
        jax.monitoring.clear_event_listeners()
    assert [line.split(":")[0] for line in again] == ["'scaled' is ready"]
    assert not [name for name in events if "compile" in name or "trace" in name]
    np.testing.assert_allclose(found, scaled(*make(factor=2.0).inputs.values()), rtol=1e-6)


def test_what_differs_is_said_and_compiled(kept):
    directory, _, _ = kept
    lines = []
    Programs(directory, lines.append).call(make(columns=5))
    assert lines[0] == (
        f"compiling 'scaled': the nearest program 'scaled' in {directory} is for params/kernel "
        "float32[4,3] instead of float32[4,5]"
    )
    assert len(list(directory.iterdir())) == 2
    other = dataclasses.replace(make(), compiled_in={"activation": "tanh", "precision": "high"})
    with pytest.raises(FileNotFoundError, match="is for precision none instead of 'high'"):
        load(directory, identify(other), make().inputs.values())
    with pytest.raises(FileNotFoundError, match="holds no program 'other'"):
        load(directory, identify(make(name="other")), make().inputs.values())


def test_another_machine_or_version_is_another_program(kept):
    directory, _, _ = kept
    identity = identify(make())
    for part, changes in (
        ("accelerator", {"device": "NVIDIA H100 80GB HBM3"}),
        ("versions", {"jax": "0.1.2"}),
    ):
        values = {**getattr(identity, part), **changes}
        other = dataclasses.replace(identity, **{part: values})
        (name, value), *_ = changes.items()
        own = getattr(identity, part)[name]
        with pytest.raises(FileNotFoundError, match=f"is for {name} {own} instead of {value}"):
            load(directory, other, make().inputs.values())


def test_damage_is_refused(kept):
    directory, _, _ = kept
    (path,) = directory.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ProgramError, match="is damaged"):
            Programs(directory).call(make())
    header = json.loads(whole.partition(b"\n")[0])
    header["identity"]["versions"]["jax"] = "0.1.2"
    path.write_bytes(json.dumps(header).encode() + b"\n" + whole.partition(b"\n")[2])
    with pytest.raises(ProgramError, match="another program than its name says"):
        Programs(directory).call(make())


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04}", b"{}\n", b"[1]\n", b'{"format": 1, "identity": "x"}\n', b"{" * 9999],
)
def test_files_that_are_no_programs(kept, content):
    directory, _, _ = kept
    (path,) = directory.iterdir()
    path.write_bytes(content)
    with pytest.raises(ProgramError, match=r"is no compiled program|is damaged"):
        Programs(directory).call(make())


def test_a_failed_write_leaves_the_old_program(kept, monkeypatch):
    directory, _, _ = kept
    (path,) = directory.iterdir()
    before, identity = path.read_bytes(), identify(make())
    compiled = jax.jit(scaled).lower(*make().inputs.values()).compile()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save(directory, identity, compiled)
    assert path.read_bytes() == before and list(directory.iterdir()) == [path]
    assert read_header(path)[0] == identity
