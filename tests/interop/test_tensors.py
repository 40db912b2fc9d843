"""Reading and writing of both formats, against torch's and safetensors' own."""

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from collections import OrderedDict

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from dit_jax.interop import pt_files
from dit_jax.interop.tensor_file import DTYPE_OF_TORCH, TORCH_OF_DTYPE
from dit_jax.interop.tensors import (
    InteropError,
    TensorSpec,
    open_tensors,
    write_pt,
    write_safetensors,
)

WRITERS = {"pt": write_pt, "safetensors": write_safetensors}
QUICK = hypothesis.settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def random_array(shape, dtype, seed=0):
    """Any bits at all (NaNs of every kind too), but for truth values."""
    spec = TensorSpec(shape, dtype)
    data = np.random.default_rng(seed).integers(0, 256, spec.nbytes, np.uint8)
    return (data % 2 if spec.dtype == bool else data).view(spec.dtype).reshape(shape)


def specs_of(arrays):
    return {name: TensorSpec(a.shape, a.dtype) for name, a in arrays.items()}


def write(kind, path, arrays, **options):
    return WRITERS[kind](path, specs_of(arrays), iter(arrays.values()), **options)


def read_all(file):
    return dict(zip(file.specs, file.read(list(file.specs)), strict=True))


def assert_same(array, expected):
    assert array.shape == expected.shape and array.dtype == expected.dtype
    assert array.tobytes() == expected.tobytes()


def torch_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_torch_same(tensors, arrays):
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert str(tensors[name].dtype) == f"torch.{TORCH_OF_DTYPE[array.dtype]}"
        assert tuple(tensors[name].shape) == array.shape
        assert torch_bytes(tensors[name]) == array.tobytes()


DTYPES = list(TORCH_OF_DTYPE)
ARRAYS = st.dictionaries(
    # Not before all names, or the .pt reader would take it off.
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
        lambda name: not name.startswith("module.") and "_orig_mod" not in name
    ),
    st.builds(
        random_array,
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.sampled_from(DTYPES),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=6,
)


@QUICK
@hypothesis.given(arrays=ARRAYS)
def test_safetensors_round_trip(tmp_path, arrays):
    path = tmp_path / "a.safetensors"
    digest = write("safetensors", path, arrays, metadata={"format": "pt", "é": "ü"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    file = open_tensors(path)
    assert file.kind == "safetensors" and file.metadata == {"format": "pt", "é": "ü"}
    assert file.specs == specs_of(arrays)
    for name, array in zip(arrays, file.read(list(arrays)), strict=True):
        assert_same(array, arrays[name])
        assert array.flags.writeable
    assert_torch_same(safetensors.torch.load_file(path), arrays)
    with safe_open(path, framework="pt") as theirs:
        assert set(theirs.keys()) == set(arrays) and theirs.metadata() == file.metadata
        assert_torch_same({name: theirs.get_tensor(name) for name in arrays}, arrays)


@QUICK
@hypothesis.given(arrays=ARRAYS)
def test_pt_round_trip(tmp_path, arrays):
    path = tmp_path / "a.pt"
    digest = write("pt", path, arrays)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    file = open_tensors(path)
    assert file.kind == "pt" and dict(file.metadata)["weights"] == ""
    assert list(file.specs.items()) == list(specs_of(arrays).items())
    for name, array in read_all(file).items():
        assert_same(array, arrays[name])
        assert array.flags.writeable
    for mmap in (False, True):
        theirs = torch.load(path, weights_only=True, mmap=mmap)
        assert type(theirs) is OrderedDict and list(theirs) == list(arrays)
        assert_torch_same(theirs, arrays)
        assert all(t.data_ptr() % 64 == 0 for t in theirs.values() if mmap and t.numel())
    assert zipfile.ZipFile(path).testzip() is None


@QUICK
@hypothesis.given(arrays=ARRAYS)
def test_files_of_the_libraries_are_read(tmp_path, arrays):
    tensors = {}
    for name, array in arrays.items():
        dtype = getattr(torch, TORCH_OF_DTYPE[array.dtype])
        tensors[name] = torch.empty(array.shape, dtype=dtype)
        if array.size:
            flat = torch.frombuffer(bytearray(array.tobytes()), dtype=dtype)
            tensors[name].copy_(flat.view(array.shape))
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    for file in ("a.safetensors", "a.pt"):
        read = read_all(open_tensors(tmp_path / file))
        assert set(read) == set(arrays)
        for name, array in read.items():
            assert_same(array, arrays[name])


@pytest.mark.parametrize("kind", WRITERS)
def test_mixed_types_stay_aligned_for_torch(tmp_path, kind):
    names = ["bool", "float8_e4m3fn", "float64", "bfloat16", "float32", "int8", "int64"]
    arrays = {name: random_array((3,), DTYPE_OF_TORCH[name]) for name in names}
    digest = write(kind, tmp_path / "file", arrays)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    load = safetensors.torch.load_file if kind == "safetensors" else torch.load
    assert_torch_same(load(tmp_path / "file"), arrays)


@pytest.mark.parametrize("kind", WRITERS)
def test_names_may_repeat_and_come_in_any_order(tmp_path, kind):
    arrays = {name: random_array((4, 2), np.float32, seed) for seed, name in enumerate("abc")}
    write(kind, tmp_path / "file", arrays)
    file = open_tensors(tmp_path / "file")
    first, second, third = file.read(["c", "a", "c"])
    assert_same(first, arrays["c"]), assert_same(second, arrays["a"])
    third[:] = 0
    assert_same(first, arrays["c"])  # Each its own.
    assert list(file.read([])) == []
    next(file.read(["a", "b"]))  # An iterator may be left half-way.
    with pytest.raises(InteropError, match=r"no tensor named 'aa'.*3 tensors; close names: a"):
        file.read(["a", "aa"])


@pytest.mark.parametrize("kind", WRITERS)
def test_arrays_in_other_memory_layouts_are_written(tmp_path, kind):
    base = random_array((4, 6), np.float32)
    arrays = {"t": base.T, "slice": base[::2, 1:5], "broadcast": np.broadcast_to(base[0], (3, 6))}
    write(kind, tmp_path / "file", arrays)
    for name, array in read_all(open_tensors(tmp_path / "file")).items():
        assert_same(array, arrays[name])


@pytest.mark.parametrize("kind", WRITERS)
def test_writers_hold_one_array_at_a_time(tmp_path, kind):
    import weakref

    class Traced(np.ndarray):
        pass

    specs = {f"t{i}": TensorSpec((5,), np.float32) for i in range(6)}
    alive = []

    def arrays():
        for _ in specs:
            assert all(reference() is None for reference in alive)
            array = np.ones(5, np.float32).view(Traced)
            alive.append(weakref.ref(array))
            yield array
            del array

    WRITERS[kind](tmp_path / "file", specs, arrays())
    assert len(alive) == 6


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "given, says",
    [
        ([np.ones((2, 3), np.float32)], "2 tensors were announced, only 1 came.*'b'"),
        ([np.ones((2, 3), np.float32), np.ones(3, np.float64)], "'b'.*float32.3.*float64.3"),
        ([np.ones((3, 2), np.float32), np.ones(3, np.float32)], "'a'.*2, 3.*3, 2"),
        ([np.ones((2, 3), np.float32), np.ones(3, np.float32), np.ones(3)], "more arrays"),
    ],
)
def test_arrays_unlike_their_specs_are_an_error(tmp_path, kind, given, says):
    specs = {"a": TensorSpec((2, 3), np.float32), "b": TensorSpec((3,), np.float32)}
    with pytest.raises(InteropError, match=says):
        WRITERS[kind](tmp_path / "file", specs, iter(given))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("dtype", ["O", "U3", ">f4", "datetime64[s]", "complex128"])
def test_types_without_a_name_in_the_formats_are_an_error(tmp_path, kind, dtype):
    with pytest.raises(InteropError, match=r"'a'.*cast it"):
        WRITERS[kind](tmp_path / "file", {"a": TensorSpec((1,), dtype)}, iter([]))
    assert not (tmp_path / "file").exists()


def test_safetensors_metadata_error(tmp_path):
    with pytest.raises(InteropError, match=r"strings"):
        write("safetensors", tmp_path / "x", {"a": np.ones(1)}, metadata={"steps": 3})
    with pytest.raises(InteropError, match=r"__metadata__"):
        write("safetensors", tmp_path / "x", {"__metadata__": np.ones(1)})


def test_pt_records_beyond_4_gib_are_zip64(tmp_path, monkeypatch):
    """The limit is lowered instead of writing so much."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    arrays = {name: random_array((50,), np.float32, i) for i, name in enumerate("abc")}
    arrays["small"] = random_array((3,), np.float32)
    write("pt", tmp_path / "a.pt", arrays)
    monkeypatch.undo()
    for mmap in (False, True):
        tensors = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert_torch_same(tensors, arrays)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
    assert_same(next(open_tensors(tmp_path / "a.pt").read(["b"])), arrays["b"])


# Sharded safetensors.


def write_shards(folder, shards, stem="diffusion_pytorch_model", **changes):
    weight_map = {}
    for i, arrays in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write("safetensors", folder / name, arrays)
        weight_map |= dict.fromkeys(arrays, name)
    index = {"metadata": {"total_size": 3}, "weight_map": weight_map | changes}
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_shards(tmp_path, stem):
    arrays = {name: random_array((3, 2), np.float32, i) for i, name in enumerate("abcd")}
    shards = [{n: arrays[n] for n in part} for part in ("ac", "bd")]
    index = write_shards(tmp_path, shards, stem)
    for path in (index, tmp_path):
        file = open_tensors(path)
        assert file.path == index and file.metadata == {"total_size": 3}
        assert file.specs == specs_of(arrays)
        order = ["d", "a", "c", "b"]
        for name, array in zip(order, file.read(order), strict=True):
            assert_same(array, arrays[name])


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "C:x", 3, ""]
)
def test_shards_elsewhere_are_refused(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    write("safetensors", tmp_path / "secret.safetensors", {"x": np.ones(1)})
    index = write_shards(folder, [{"a": np.ones(2)}], x=shard)
    with pytest.raises(InteropError, match=r"own folder"):
        open_tensors(index)


def test_index_and_shards_must_agree_error(tmp_path):
    arrays = {"a": np.ones(2), "b": np.zeros(2)}
    index = write_shards(tmp_path, [arrays], c="diffusion_pytorch_model-00001-of-00001.safetensors")
    with pytest.raises(InteropError, match=r"'c' is in .*, where it is not"):
        open_tensors(index)
    index = write_shards(tmp_path, [arrays], b="gone.safetensors")
    with pytest.raises(InteropError, match=r"gone\.safetensors.*not beside it"):
        open_tensors(index)
    index = write_shards(tmp_path, [arrays], b="pytorch_model-1.h5")
    with pytest.raises(InteropError, match=r"expected \.safetensors, or a file of torch\.save"):
        open_tensors(index)
    index.write_text(json.dumps({"weight_map": {"a": next(tmp_path.glob("*00001.s*")).name}}))
    with pytest.raises(InteropError, match=r"does not list 1 tensor of.*'b'"):
        open_tensors(index)
    for text in ("{", "{}", '{"weight_map": {}}', '{"_class_name": "DiT"}', '{"weight_map": [1]}'):
        index.write_text(text)
        with pytest.raises(InteropError, match=r"not JSON|no index"):
            open_tensors(index)


# Files of torch.save.


def test_fast_dit_checkpoints(tmp_path):
    model = torch.nn.Linear(3, 2)
    ema = {name: torch.randn_like(p) for name, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(
        model="DiT-XL/2",
        image_size=256,
        lr=1e-4,
        flags=[True, None],
        nested=argparse.Namespace(a=1),
    )
    content = {"model": model.state_dict(), "ema": ema, "opt": optimizer.state_dict(), "args": args}
    torch.save(content, tmp_path / "0050000.pt")
    file = open_tensors(tmp_path / "0050000.pt")
    assert file.metadata == {
        "weights": "ema",
        "available_weights": ("model", "ema"),
        "args": dict(
            model="DiT-XL/2", image_size=256, lr=1e-4, flags=[True, None], nested={"a": 1}
        ),
        "other_entries": ("opt",),
    }
    for name, array in read_all(file).items():
        assert_same(array, ema[name].numpy())
    chosen = open_tensors(tmp_path / "0050000.pt", weights="model")
    assert chosen.metadata["weights"] == "model"
    for name, array in read_all(chosen).items():
        assert_same(array, model.state_dict()[name].numpy())
    with pytest.raises(InteropError, match=r"weights model, ema; choose one.*'opt'"):
        open_tensors(tmp_path / "0050000.pt", weights="opt")
    # The allowance was for this file only.
    with pytest.raises(Exception, match=r"Namespace"):
        torch.load(tmp_path / "0050000.pt", weights_only=True)


def test_choice_of_weights(tmp_path):
    state = {"w": torch.ones(2)}
    path = tmp_path / "a.pt"
    torch.save({"model": state, "step": torch.tensor(3)}, path)
    file = open_tensors(path)
    assert file.metadata["weights"] == "model" and file.metadata["other_entries"] == ("step",)
    torch.save({"state_dict": state, "epoch": 3}, path)
    assert open_tensors(path).metadata["weights"] == "state_dict"
    torch.save({"net": state, "net2": state}, path)
    with pytest.raises(InteropError, match=r"net, net2; choose one"):
        open_tensors(path)
    assert open_tensors(path, weights="net2").metadata["weights"] == "net2"
    torch.save(state, path)
    with pytest.raises(InteropError, match=r"single state dict.*'ema'"):
        open_tensors(path, weights="ema")
    torch.save({**state, "epoch": 3}, path)
    assert open_tensors(path).metadata["other_entries"] == ("epoch",)
    write("safetensors", tmp_path / "a.safetensors", {"w": np.ones(2)})
    with pytest.raises(InteropError, match=r"one set of weights"):
        open_tensors(tmp_path / "a.safetensors", weights="ema")
    for content, says in (({"epoch": 3}, "no weights.*epoch"), ([1], "holds list"), (3, "int")):
        torch.save(content, path)
        with pytest.raises(InteropError, match=says):
            open_tensors(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_parameters_and_shared_storages(tmp_path, legacy):
    base = torch.randn(6, 8)
    tensors = {
        "whole": base,
        "transposed": base.T,
        "slice": base[1:5:2, 3:],
        "expanded": base[:, :1].expand(6, 4),
        "scalar": base[2, 3],
        "parameter": torch.nn.Parameter(base.bfloat16()[:, ::2]),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    }
    path = tmp_path / "a.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    read = read_all(open_tensors(path))
    assert read["parameter"].dtype == ml_dtypes.bfloat16
    for name, tensor in tensors.items():
        assert read[name].tobytes() == torch_bytes(tensor.resolve_conj()), name
        assert read[name].shape == tuple(tensor.shape)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."]
)
def test_wrappers_leave_no_prefix(tmp_path, prefix):
    state = {"blocks.0.module.weight": torch.randn(2), "x": torch.randn(3)}
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "a.pt")
    read = read_all(open_tensors(tmp_path / "a.pt"))
    assert list(read) == list(state)
    for name, array in read.items():
        assert_same(array, state[name].numpy())


def test_prefixes_within_and_of_some(tmp_path):
    names = {"blocks._orig_mod.0.w": "blocks.0.w", "module.w": "module.w", "my_orig_mod.w": None}
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "a.pt")
    assert list(open_tensors(tmp_path / "a.pt").specs) == [b or a for a, b in names.items()]
    torch.save({"w": torch.ones(1), "_orig_mod.w": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(InteropError, match=r"both 'w' and '_orig_mod.w'"):
        open_tensors(tmp_path / "a.pt")


def test_compressed_archives_are_read_without_mapping(tmp_path):
    state = {"w": torch.randn(40, 40), "b": torch.zeros(1000)}
    torch.save(state, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as stored,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for entry in stored.namelist():
            compressed.writestr(entry, stored.read(entry))
    for name, array in read_all(open_tensors(tmp_path / "b.pt")).items():
        assert_same(array, state[name].numpy())


def test_mappings_are_renewed_while_reading(tmp_path, monkeypatch):
    arrays = {f"t{i}": random_array((10,), np.float32, i) for i in range(9)}
    write("pt", tmp_path / "a.pt", arrays)
    monkeypatch.setattr(pt_files, "REMAP_BYTES", 100)  # After three tensors of 40 bytes.
    file = open_tensors(tmp_path / "a.pt")
    loads = []
    load = file._load
    monkeypatch.setattr(file, "_load", lambda: loads.append(1) or load())
    for name, array in read_all(file).items():
        assert_same(array, arrays[name])
    assert len(loads) == 3


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_changed_since_is_an_error(tmp_path, kind):
    path = tmp_path / "file"
    write(kind, path, {"a": np.ones(3)})
    file = open_tensors(path)
    write(kind, path, {"a": np.ones(4)})
    with pytest.raises(InteropError, match=r"changed after it was opened"):
        list(file.read(["a"]))
    path.unlink()
    with pytest.raises(InteropError, match=r"removed after it was opened"):
        list(file.read(["a"]))


# Memory.

READ_IN_GROUPS = """
import resource, sys
import numpy as np
from dit_jax.interop.tensors import open_tensors
if sys.argv[1].endswith(".pt"):
    import torch
file = open_tensors(sys.argv[1])
names = list(file.specs)
next(file.read(names[:1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = 0.0
for start in range(0, len(names), 4):
    group = {name: array for name, array in zip(names[start:start + 4], file.read(names[start:]))}
    total += sum(float(array[0, 0]) for array in group.values())
for array in file.read(names):
    total -= float(array[0, 0])
assert total == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory as Linux counts")
@pytest.mark.parametrize("kind", WRITERS)
def test_reading_takes_the_memory_of_a_group(tmp_path, kind):
    """320 MiB in tensors of 4 MiB, in groups of 4, then all through one iterator."""
    path = tmp_path / f"file.{kind}"
    specs = {f"t{i}": TensorSpec((1024, 1024), np.float32) for i in range(80)}
    array = np.ones((1024, 1024), np.float32)
    WRITERS[kind](path, specs, (array for _ in specs))
    # A mapped .pt keeps its pages until the next mapping, of which there is one every 32 MiB here.
    script = READ_IN_GROUPS.replace(
        "file = open",
        "from dit_jax.interop import pt_files; pt_files.REMAP_BYTES = 2**25; file = open",
        1,
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < (40 if kind == "safetensors" else 72) * 2**20
