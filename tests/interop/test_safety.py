"""Files that are not what they should be: nothing in them runs, and the error says what it is."""

import argparse
import builtins
import collections
import io
import json
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from dit_jax.interop.pickle_scan import scan_pickle, unsafe_names
from dit_jax.interop.tensors import (
    InteropError,
    TensorSpec,
    open_tensors,
    write_pt,
    write_safetensors,
)

FLAG = "executed"


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Settings(argparse.Namespace):
    """Not a Namespace, though it looks like one."""


@pytest.fixture
def flag(tmp_path, monkeypatch):
    """The file that the payloads would create."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / FLAG
    assert not (tmp_path / FLAG).exists()


PAYLOADS = {
    "system": (lambda: Call(os.system, f"touch {FLAG}"), "posix.system"),
    "exec": (lambda: Call(exec, f"open({FLAG!r}, 'w').close()"), "builtins.exec"),
    "eval": (lambda: Call(builtins.eval, f"open({FLAG!r}, 'w')"), "builtins.eval"),
    "open": (lambda: Call(open, FLAG, "w"), "io.open"),
    "getattr": (lambda: Call(getattr, pathlib.Path(FLAG), "touch"), "builtins.getattr"),
}


def write_zip(path, content, protocol=2):
    torch.save(content, path, pickle_protocol=protocol)


def write_legacy(path, content, protocol=2):
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def write_pickle(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol))


PROTOCOLS = [(write, protocol) for write in (write_zip, write_legacy) for protocol in (2, 4)]
PROTOCOLS += [(write_pickle, protocol) for protocol in range(6)]


@pytest.mark.parametrize("write, protocol", PROTOCOLS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_is_refused_by_name_and_not_run(flag, write, protocol, payload):
    make, name = PAYLOADS[payload]
    # Protocols 0 to 2 write the names of Python 2.
    name = name.replace("builtins.", r"(builtins|__builtin__)\.")
    tensors = {"w": torch.ones(3), "b": torch.zeros(2)}
    contents = [
        make(),
        {"model": tensors, "ema": tensors, "args": make()},
        {**tensors, "x": [make()]},
    ]
    if write is write_pickle:
        contents = [make(), {"model": {"w": 1.0}, "args": make()}]
    for content in contents:
        path = flag.parent / "checkpoint.pt"
        write(path, content, protocol)
        with pytest.raises(InteropError, match=f"{name}.*refused; nothing was executed"):
            open_tensors(path)


def test_the_payloads_would_have_run(tmp_path, monkeypatch):
    """Or the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("system", "exec", "eval", "open"):
        pickle.loads(pickle.dumps(PAYLOADS[name][0]()))
        assert (tmp_path / FLAG).exists()
        (tmp_path / FLAG).unlink()


def test_the_suffix_does_not_matter(flag):
    for name in ("a.safetensors", "a.bin", "a.json", "a"):
        write_zip(flag.parent / name, PAYLOADS["system"][0]())
        with pytest.raises(InteropError, match=r"posix.system"):
            open_tensors(flag.parent / name)


def test_a_pickle_before_a_harmless_archive_is_refused(flag):
    """torch.load decides by the beginning of the file, zipfile by its end."""
    torch.save({"w": torch.ones(2)}, flag.parent / "good.pt")
    payload = pickle.dumps(PAYLOADS["system"][0](), 2)
    (flag.parent / "bad.pt").write_bytes(payload + (flag.parent / "good.pt").read_bytes())
    with pytest.raises(InteropError, match=r"posix.system"):
        open_tensors(flag.parent / "bad.pt")


def rewrite_archive(path, changes):
    """The zip archive again with some records changed, added, or (None) left out."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(records)).partition("/")[0]
    records |= {f"{folder}/{name}": data for name, data in changes.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if data is not None:
                archive.writestr(name, data)


def test_names_computed_while_loading_are_refused(flag):
    """STACK_GLOBAL with a name that comes out of a dictionary instead of a constant."""
    path = flag.parent / "a.pt"
    torch.save({"w": torch.ones(2)}, path)
    computed = (
        b"\x80\x04(\x8c\x05posixt0\x8c\x05posix\x94(\x8c\x06systemlh\x000"
        + b"N\x93"
        + b"\x8c\x01x\x85R."
    )
    rewrite_archive(path, {"data.pkl": computed})
    with pytest.raises(InteropError, match=r"computed while loading"):
        open_tensors(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_newer_protocols_without_payload_say_what_to_do_error(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(InteropError, match=r"default pickle_protocol") as caught:
        open_tensors(tmp_path / "a.pt")
    # torch's own advice in this case is to load the file without protection.
    assert "set to `False`" not in str(caught.value)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(
    "args, says",
    [
        (Settings(a=1), "test_safety.Settings"),
        (argparse.Namespace(path=pathlib.PurePosixPath("x")), "pathlib.PurePosixPath"),
        (argparse.Namespace(a=argparse.ArgumentError(None, "x")), "argparse.ArgumentError"),
        (argparse.Namespace(a={"b": [torch.ones(1)]}), r"args.a.b\[0\] is torch.Tensor"),
        (argparse.Namespace(lr=np.float64(1e-4)), "numpy"),
        (argparse.Namespace(t=torch.float32), "args.t is torch.dtype"),
        (collections.defaultdict(int), "collections.defaultdict"),
    ],
)
def test_args_beyond_plain_data_are_refused(tmp_path, write, args, says):
    write(tmp_path / "a.pt", {"ema": {"w": torch.ones(2)}, "args": args})
    with pytest.raises(InteropError, match=says):
        open_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_whole_modules_are_refused(tmp_path, write):
    write(tmp_path / "a.pt", torch.nn.Linear(2, 2))
    with pytest.raises(InteropError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        open_tensors(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_tensors_that_are_not_dense_are_refused(tmp_path, write):
    for tensor in (
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.empty(2, device="meta"),
    ):
        write(tmp_path / "a.pt", {"w": tensor})
        with pytest.raises(InteropError, match=r"torch\._utils\._rebuild|'w'"):
            open_tensors(tmp_path / "a.pt")
    write(tmp_path / "a.pt", {"w": torch.ones(2, dtype=torch.complex128)})
    with pytest.raises(InteropError, match=r"'w'.*complex128"):
        open_tensors(tmp_path / "a.pt")


def test_torchscript_and_other_archives_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(InteropError, match=r"TorchScript"):
        open_tensors(tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    with pytest.raises(InteropError, match=r"NumPy .npz"):
        open_tensors(tmp_path / "a.npz")
    with tarfile.open(tmp_path / "tensors.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    with pytest.raises(InteropError, match=r"tar archive"):
        open_tensors(tmp_path / "tensors.pt")


def test_a_harmless_pickle_is_no_checkpoint_error(tmp_path):
    for protocol in range(6):
        (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": [1.0, 2.0]}, protocol))
        with pytest.raises(InteropError, match=r"pickle|neither"):
            open_tensors(tmp_path / "a.pt")


def test_scan_follows_memo_and_extensions():
    names = scan_pickle(io.BytesIO(pickle.dumps([os.system, os.system, exec, {"os": "system"}], 4)))
    assert names == {"posix.system", "builtins.exec"}
    names = scan_pickle(io.BytesIO(b"\x80\x02\x82\x01."))
    assert unsafe_names(names) == ["copyreg extension 1"]
    assert unsafe_names({"torch.FloatStorage", "collections.OrderedDict", "torch.bfloat16"}) == []
    for name in ("torch.load", "torch.hub.load", "torch.FloatStorage.from_file", "os.system"):
        assert unsafe_names({name}) == [name]


# Damage.


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_truncated_pt_error(tmp_path, write):
    path = tmp_path / "a.pt"
    write(path, {"w": torch.randn(400), "b": torch.randn(30)})
    data = path.read_bytes()
    for length in (1, 3, 60, len(data) // 2, len(data) - 300, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InteropError, match=r"truncated|neither safetensors nor"):
            file = open_tensors(path)
            list(file.read(list(file.specs)))


def test_short_or_missing_storages_error(tmp_path):
    path = tmp_path / "a.pt"
    for change in ({"data/0": b"1234"}, {"data/0": None}):
        torch.save({"w": torch.randn(40)}, path)
        rewrite_archive(path, change)
        with pytest.raises(InteropError, match=r"truncated"):
            file = open_tensors(path)
            list(file.read(list(file.specs)))


def test_truncated_safetensors_error(tmp_path):
    path = tmp_path / "a.safetensors"
    specs = {name: TensorSpec((50,), np.float32) for name in "ab"}
    write_safetensors(path, specs, iter([np.ones(50, np.float32)] * 2))
    data = path.read_bytes()
    for length in (5, 8, 9, 40, len(data) - 200, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InteropError, match=r"truncated|neither safetensors nor"):
            open_tensors(path)
    path.write_bytes(data + b"1")
    with pytest.raises(InteropError, match=r"1 bytes after its last tensor"):
        open_tensors(path)


def entry(begin, end, shape=None, dtype="F32"):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, says",
    [
        ({"a": entry(0, 800)}, "truncated.*800 bytes after the header, 80"),
        ({"a": entry(0, 8), "b": entry(4, 80)}, "'b' overlaps 'a'"),
        ({"a": entry(0, 40), "b": entry(0, 80)}, "'b' overlaps 'a'"),
        ({"a": entry(0, 8), "b": entry(12, 80)}, "'b' leaves a gap to 'a'"),
        ({"a": entry(4, 80)}, "leaves a gap to the header"),
        ({"a": entry(0, 40)}, "40 bytes after its last"),
        ({"a": entry(80, 0, [0])}, "-80 bytes"),
        ({"a": entry(0, 80, [30])}, "gives 'a' 80 bytes, but .* has 120"),
        ({"a": entry(0, 80, [-2, -10])}, "malformed"),
        ({"a": entry(0, 80, [True, 20])}, "malformed"),
        ({"a": entry(0, 80, [20.0])}, "malformed"),
        ({"a": entry(0, 80, "20")}, "malformed"),
        ({"a": entry(0, 80, [2**62, 2**62, 4])}, "but"),
        ({"a": entry(0, 80, dtype="F4")}, "type 'F4'"),
        ({"a": entry(0, 80, dtype=["F32"])}, "malformed|type"),
        ({"a": {"dtype": "F32", "shape": [20]}}, "malformed"),
        ({"a": 3}, "malformed"),
        ({"a": entry(0, 80), "__metadata__": {"x": 1}}, "__metadata__"),
        ({"a": entry(0, 80), "__metadata__": "x"}, "__metadata__"),
        (b'{"a": }', "cannot be read"),
        (b'{"a"\xff\xfe: }', "cannot be read"),
        (b'{"a": 1, "a": 1}', "'a' is there twice"),
        (b"{" + b'"a":{' * 5000, "cannot be read"),
    ],
)
def test_lying_safetensors_headers_error(tmp_path, header, says):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(80))
    with pytest.raises(InteropError, match=says):
        open_tensors(path)


def test_a_header_beyond_any_limit_error(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (2**63, 200_000_000):
        path.write_bytes(struct.pack("<Q", length) + b"{}      ")
        with pytest.raises(InteropError, match=f"header of {length} bytes"):
            open_tensors(path)


def test_the_library_has_the_last_word_error(tmp_path, monkeypatch):
    import safetensors

    def refuse(*args, **kwargs):
        raise safetensors.SafetensorError("InvalidHeader")

    write_safetensors(tmp_path / "a", {"a": TensorSpec((), bool)}, iter([np.array(True)]))
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    with pytest.raises(InteropError, match=r"InvalidHeader"):
        open_tensors(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\xef\xbb\xbf<html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        (b'{"error": "Repository not found"}', "JSON but no index"),
        (b'{"a":   {"error": 1}}', "JSON but no index"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "compressed"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "GGUF"),
        (bytes(100), "no format known"),
        (b"hello", "no format known"),
    ],
)
def test_what_is_no_checkpoint_is_recognised_error(tmp_path, suffix, content, says):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(InteropError, match=says):
        open_tensors(path)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20, 200])
def test_random_bytes_error(tmp_path, length):
    for seed in range(30):
        data = np.random.default_rng(seed).bytes(length)
        for beginning in (b"", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{", b"{"):
            (tmp_path / "x").write_bytes(beginning + data)
            with pytest.raises(InteropError):
                open_tensors(tmp_path / "x")


# Paths.


def test_missing_files_and_folders_error(tmp_path):
    with pytest.raises(InteropError, match=r"does not exist"):
        open_tensors(tmp_path / "missing.pt")
    with pytest.raises(InteropError, match=r"holds no .safetensors"):
        open_tensors(tmp_path)
    (tmp_path / "vae").mkdir()
    write_pt(tmp_path / "vae" / "a.pt", {"a": TensorSpec((), bool)}, iter([np.array(True)]))
    with pytest.raises(InteropError, match=r"some in vae: name that folder"):
        open_tensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InteropError, match=r"not a regular file"):
        open_tensors(tmp_path / "pipe")


def test_a_folder_of_several_checkpoints_error(tmp_path):
    specs = {"a": TensorSpec((), bool)}
    write_pt(tmp_path / "a.pt", specs, iter([np.array(True)]))
    assert open_tensors(tmp_path).path == tmp_path / "a.pt"
    (tmp_path / "config.json").write_text("{}")
    assert open_tensors(tmp_path).path == tmp_path / "a.pt"
    write_safetensors(tmp_path / "b.safetensors", specs, iter([np.array(True)]))
    with pytest.raises(InteropError, match=r"2 checkpoints; name one of them: a.pt, b.safetensors"):
        open_tensors(tmp_path)
    # Shards are no checkpoints of their own; what lies beside them is.
    index = tmp_path / "b.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(InteropError, match=r"b.safetensors.index.json, a.pt"):
        open_tensors(tmp_path)
    (tmp_path / "a.pt").unlink()
    assert open_tensors(tmp_path).path == index
