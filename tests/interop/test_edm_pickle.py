"""Network pickles: what is read of them, and that nothing in them runs."""

import builtins
import io
import os
import pathlib
import pickle
import struct

import numpy as np
import pytest
import torch

from dit_jax.interop.edm_pickle import open_network_pickle
from dit_jax.interop.models import open_model
from dit_jax.interop.tensors import InteropError
from tests.interop.edm_pickles import (
    TRACE,
    EasyDict,
    Persistent,
    dump,
    module_state,
    network,
    snapshot,
)
from tests.interop.test_safety import Call

ARGUMENTS = {"model_type": "SongUNet", "img_resolution": 8, "img_channels": 3}
NAMES = ("model.enc.8x8_conv.weight", "model.enc.8x8_conv.bias", "model.map_noise.freqs")
TENSORS = {
    name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, (name, shape) in enumerate(zip(NAMES, [(4, 3, 3, 3), (4,), (5,)], strict=True))
}


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path, monkeypatch):
    """Payloads and source code would create this file."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / TRACE).exists()


def assert_tensors(file, expected=TENSORS):
    assert list(file.specs) == list(expected)
    for name, array in zip(expected, file.read(list(expected)), strict=True):
        np.testing.assert_array_equal(array, expected[name])
        assert array.flags.writeable and array.dtype == expected[name].dtype


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_snapshot_is_read_and_its_source_code_is_not_run(tmp_path, protocol):
    file = open_network_pickle(dump(tmp_path / "a.pkl", snapshot(TENSORS, ARGUMENTS), protocol))
    assert_tensors(file)
    assert file.metadata["weights"] == "ema" and file.metadata["available_weights"] == ("ema",)
    assert file.metadata["arguments"] == ((), ARGUMENTS)
    assert file.metadata["classes"][""] == "EDMPrecond"
    assert file.metadata["classes"]["model"] == "SongUNet"
    assert file.metadata["classes"]["model.enc"] == "ModuleDict"
    assert file.metadata["dataset"] == {"path": "data.zip", "resolution": 8, "use_labels": True}


def test_the_source_code_would_have_run(tmp_path):
    """Or the test above would prove nothing."""
    dump(tmp_path / "a.pkl", snapshot(TENSORS, ARGUMENTS))
    from tests.interop.edm_pickles import named_modules

    with named_modules(), pytest.raises(AssertionError, match="was executed"):
        pickle.loads((tmp_path / "a.pkl").read_bytes())
    (tmp_path / TRACE).unlink()


def test_a_network_by_itself_and_one_of_several(tmp_path):
    assert_tensors(open_network_pickle(dump(tmp_path / "a.pkl", network(TENSORS, ARGUMENTS))))
    other = {NAMES[0]: TENSORS[NAMES[0]] + 1}
    both = {"net": network(other, ARGUMENTS), "ema": network(TENSORS, ARGUMENTS)}
    path = dump(tmp_path / "b.pkl", both)
    assert_tensors(open_network_pickle(path))
    assert_tensors(open_network_pickle(path, weights="net"), other)
    with pytest.raises(InteropError, match=r"networks 'net', 'ema'; choose one"):
        open_network_pickle(path, weights="raw")
    path = dump(tmp_path / "c.pkl", {"g": both["net"], "d": both["ema"]})
    with pytest.raises(InteropError, match=r"networks 'g', 'd'; choose one"):
        open_network_pickle(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_types_and_views_come_back_as_they_are(tmp_path, dtype):
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    state = module_state(_init_args=(1, [2, None]), _init_kwargs={})
    state["_parameters"] = {
        "turned": torch.nn.Parameter(base.permute(2, 0, 1), requires_grad=False),
        "part": base[1:, ::2],
        "scalar": base[0, 0, 3],
        "empty": base[:0],
        "bias": None,
    }
    state["_buffers"] = {"kept": base[0], "hidden": base[1], "none": None}
    state["_non_persistent_buffers_set"] = {"hidden"}
    file = open_network_pickle(dump(tmp_path / "a.pkl", Persistent("Any", **state)))
    assert list(file.specs) == ["turned", "part", "scalar", "empty", "kept"]
    expected = {**state["_parameters"], **state["_buffers"]}
    for name, array in zip(file.specs, file.read(list(file.specs)), strict=True):
        assert file.specs[name].dtype.name == str(dtype).removeprefix("torch.")
        values = expected[name].detach().to(torch.float64).numpy()
        np.testing.assert_array_equal(array.astype(np.float64), values)
    assert file.metadata["arguments"] == ((1, [2, None]), {})


PAYLOADS = {
    "system": (lambda: Call(os.system, f"touch {TRACE}"), "posix.system"),
    "eval": (lambda: Call(builtins.eval, f"open({TRACE!r}, 'w')"), r"builtin\w+\.eval"),
    "getattr": (lambda: Call(getattr, pathlib.Path(TRACE), "touch"), r"builtin\w+\.getattr"),
    "array": (lambda: np.array([Call(os.system, f"touch {TRACE}")]), "posix.system"),
    "objects": (lambda: np.array([{}, ()], dtype=object), "type 'O8'"),
    "partial": (lambda: __import__("functools").partial(print, 1), "functools.partial"),
    "module": (lambda: torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    "load": (lambda: Call(torch.load, "x.pt"), r"torch\.serialization\.load"),
}
PLACES = {
    "entry": lambda value: snapshot(TENSORS, ARGUMENTS, loss_fn=value),
    "weights": lambda value: {"ema": Persistent("Any", **module_state(_modules={"model": value}))},
    "settings": lambda value: {"ema": network(TENSORS, {"resample_filter": [value]})},
    "source": lambda value: {"ema": Persistent("Any", **module_state(_buffers={"b": value}))},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_are_refused_by_name(tmp_path, payload, place):
    make, name = PAYLOADS[payload]
    for protocol in (2, 4):
        dump(tmp_path / "a.pkl", PLACES[place](make()), protocol)
        for source in (tmp_path / "a.pkl", f"edm_pkl:{tmp_path / 'a.pkl'}"):
            with pytest.raises(InteropError, match=f"{name}.*nothing was executed"):
                open_model(source)


def test_all_names_are_in_one_refusal(tmp_path):
    content = [PAYLOADS["system"][0](), PAYLOADS["eval"][0](), snapshot(TENSORS, ARGUMENTS)]
    path = dump(tmp_path / "a.pkl", content)
    with pytest.raises(InteropError, match=r": builtins.eval, posix.system\. .*'ema'.*state_dict"):
        open_network_pickle(path)


def inner_stream(payload, protocol=2):
    """A storage's stream whose description is a payload."""
    stream = io.BytesIO()
    torch.save(torch.ones(2).untyped_storage(), stream, _use_new_zipfile_serialization=False)
    stream.seek(0)
    parts = []
    for _ in range(3):
        start = stream.tell()
        pickle.load(stream)
        parts.append(stream.getvalue()[start : stream.tell()])
    return b"".join(parts) + pickle.dumps(payload, protocol) * 2 + struct.pack("<q", 2) + bytes(8)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_payload_within_a_tensor_is_refused(tmp_path, protocol):
    data = inner_stream(PAYLOADS["system"][0](), protocol)
    dump(tmp_path / "a.pkl", {"ema": Call(torch.storage._load_from_bytes, data)})
    with pytest.raises(InteropError, match=r"posix.system within a tensor's data.*nothing was"):
        open_network_pickle(tmp_path / "a.pkl")
    data = pickle.dumps(PAYLOADS["system"][0]())
    dump(tmp_path / "a.pkl", {"ema": Call(torch.storage._load_from_bytes, data)})
    with pytest.raises(InteropError, match=r"truncated, damaged"):
        open_network_pickle(tmp_path / "a.pkl")
    zipped = io.BytesIO()
    torch.save({"a": PAYLOADS["system"][0]()}, zipped)
    dump(tmp_path / "a.pkl", {"ema": Call(torch.storage._load_from_bytes, zipped.getvalue())})
    with pytest.raises(InteropError, match=r"truncated, damaged"):
        open_network_pickle(tmp_path / "a.pkl")


STORAGE = torch.arange(6.0)


def rebuilt(offset, size, stride, storage=None):
    storage = STORAGE._typed_storage() if storage is None else storage
    call = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    return Persistent("Any", **module_state(_parameters={"w": call}))


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (7,), (1,)),
        (1, (2, 3), (3, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (10**12,), (0,)),
        (0, (2.0,), (1,)),
        (7, (1,), (1,)),
        (0, (True,), (1,)),
    ],
)
def test_tensors_cannot_reach_beyond_their_storage_error(tmp_path, offset, size, stride):
    path = dump(tmp_path / "a.pkl", rebuilt(offset, size, stride))
    with pytest.raises(InteropError, match=r"a tensor of size .*nothing was executed"):
        open_network_pickle(path)
    assert open_network_pickle(dump(path, rebuilt(1, (2, 2), (2, 1)))).specs["w"].shape == (2, 2)


# Programs that torch or NVlabs never write. Each ends with the stop opcode.
TENSOR = b"ctorch.storage\n_load_from_bytes\n"
PROGRAMS = {
    "state of a function": (TENSOR + b"}b.", "sets the state of Function"),
    "attribute of a function": (TENSOR + b"(N}U\x01aK\x01stb.", "sets the state of Function"),
    "state of a class": (b"ctorch.nn.modules.container\nModuleDict\n}b.", "damaged"),
    "data that is no bytes": (TENSOR + b"(K\x01tR.", "not bytes"),
    "instance of a function": (TENSOR + b")\x81.", "damaged"),
    "persistent object": (b"U\x01aQ.", "damaged"),
    "extension": (b"\x82\x01.", "copyreg extension 1"),
    "name of a name": (b"\x80\x04\x8c\x05torch\x8c\x04load\x93.", r"torch\.load"),
    "computed name": (b"\x80\x04]\x8c\x04load\x93.", "computed while loading"),
    "state of a record": (
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(}(U\x04typeU\x05classU\x07version"
        b"K\x06U\x05state}utR}b.",
        "sets the state of PersistentObject",
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_written_by_hand_are_refused(tmp_path, program):
    code, says = PROGRAMS[program]
    (tmp_path / "a.pkl").write_bytes(code if code[:1] == b"\x80" else b"\x80\x02" + code)
    with pytest.raises(InteropError, match=says):
        open_network_pickle(tmp_path / "a.pkl")


def test_reading_leaves_no_trace_in_the_reader(tmp_path):
    """A pickle that was refused does not change how the next one is read."""
    for program, _ in PROGRAMS.values():
        (tmp_path / "a.pkl").write_bytes(program)
        with pytest.raises(InteropError):
            open_network_pickle(tmp_path / "a.pkl")
    assert_tensors(open_network_pickle(dump(tmp_path / "b.pkl", snapshot(TENSORS, ARGUMENTS))))


def test_unknown_persistent_objects_are_refused(tmp_path):
    for change, says in (
        ({"version": 7}, "version 7"),
        ({"type": "function"}, "unknown kind"),
        ({"state": None}, "unknown kind"),
    ):
        loss = Persistent("EDMLoss")
        loss.meta |= change
        path = dump(tmp_path / "a.pkl", snapshot(TENSORS, ARGUMENTS, loss_fn=loss))
        with pytest.raises(InteropError, match=says):
            open_network_pickle(path)


def test_modules_that_are_no_tree_error(tmp_path):
    shared = Persistent("Layer", **module_state())
    twice = Persistent("Any", **module_state(_modules={"a": shared, "b": shared}))
    with pytest.raises(InteropError, match="'b' is a module that occurs twice"):
        open_network_pickle(dump(tmp_path / "a.pkl", twice))
    settings: list = []
    settings.append(settings)
    for state, says in (
        ({"_init_kwargs": {"a": settings}}, "recursion"),
        ({"_modules": {"a": 3}}, "'a' is no module"),
        ({"_modules": {"a": Persistent("Layer")}}, "module 'a' has no _parameters"),
        ({"_parameters": {"w": 3}}, "w is no dense tensor"),
        ({"_init_kwargs": {"a": torch.ones(2)}}, "a Tensor among the settings"),
    ):
        path = dump(tmp_path / "a.pkl", Persistent("Any", **module_state(**state)))
        with pytest.raises(InteropError, match=says):
            open_network_pickle(path)


def test_truncated_files_error(tmp_path):
    whole = dump(tmp_path / "a.pkl", snapshot(TENSORS, ARGUMENTS)).read_bytes()
    for length in (0, 1, 2, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.pkl").write_bytes(whole[:length])
        with pytest.raises(InteropError, match="truncated, damaged or no pickle"):
            open_network_pickle(tmp_path / "a.pkl")
    # Data of a tensor that is shorter than it says.
    data = inner_stream(0)
    call = Call(torch.storage._load_from_bytes, data[:-1])
    with pytest.raises(InteropError):
        open_network_pickle(dump(tmp_path / "a.pkl", {"ema": call}))


@pytest.mark.parametrize(
    "content, says",
    [
        ({"weights": [1.0], "b": None}, "holds 'weights' (list), 'b' (NoneType)"),
        ([1], "holds 'all of it' (list)"),
        ({}, "holds nothing"),
        (EasyDict(ema=3), "holds 'ema' (int)"),
        ({"loss_fn": Persistent("EDMLoss", P_mean=1)}, "holds 'loss_fn' (PersistentObject)"),
    ],
)
def test_pickles_without_a_network_error(tmp_path, content, says):
    path = dump(tmp_path / "a.pkl", content)
    with pytest.raises(InteropError) as refusal:
        open_network_pickle(path)
    assert says in str(refusal.value) and "no network of torch_utils" in str(refusal.value)


def test_other_files_error(tmp_path):
    for legacy in (False, True):
        options = {"_use_new_zipfile_serialization": not legacy}
        torch.save({"w": torch.ones(2)}, tmp_path / "a.pkl", **options)
        with pytest.raises(InteropError, match=r"torch.save.*edm_pt"):
            open_network_pickle(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_text("version https://git-lfs")
    with pytest.raises(InteropError, match="no pickle"):
        open_network_pickle(tmp_path / "a.pkl")
    with pytest.raises(InteropError, match="is not a file"):
        open_network_pickle(tmp_path)
