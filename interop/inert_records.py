"""What a network pickle of NVlabs may make when it is read: inert records, and nothing else.

A pickle is a program that calls what it names. Here every name it may mention has a stand-in, which
keeps data or makes an array's view, and whose own state the pickle cannot change.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from dit_jax.interop.pickle_scan import listed, scan_pickle
from dit_jax.interop.pt_files import LEGACY_MAGIC
from dit_jax.interop.pt_writer import STORAGES
from dit_jax.interop.tensor_file import DTYPE_OF_TORCH, InteropError
from dit_jax.untrusted import shown

PERSISTENCE = "torch_utils.persistence._reconstruct_persistent_obj"
_VERSION = 6  # of torch_utils.persistence
_STORAGE_TYPES = {f"torch.{storage}": DTYPE_OF_TORCH[t] for t, storage in STORAGES.items()}
_NUMPY_NUMBERS = re.compile(r"[biuf]\d{1,2}")
_MAX_DIMENSIONS, _MAX_LENGTH = 64, 2**48
_INNER_PICKLES = 5  # of torch.save before 1.6: magic, version, machine, description, keys


class _Inert:
    """Base of everything a pickle can get hold of: its state cannot be set from there."""

    __slots__ = ()

    def __setstate__(self, state):
        raise InteropError(f"a pickle sets the state of {type(self).__name__.strip('_')}")


class PersistentObject(_Inert):
    """In place of an instance of a class whose source code is in the file.

    Attributes:
        class_name: the class's name in that source code.
        state: the instance's attributes: plain data, tensors and other records.
    """

    __slots__ = ("class_name", "state")

    def __init__(self, meta: Any):
        known = isinstance(meta, dict) and meta.get("type") == "class"
        if not known or not isinstance(meta.get("state"), dict):
            raise InteropError("a persistent object of an unknown kind")
        if meta.get("version") != _VERSION:
            version = shown(meta.get("version"))
            raise InteropError(f"version {version} of torch_utils.persistence; EDM's is {_VERSION}")
        self.class_name, self.state = str(meta.get("class_name")), meta["state"]


class Container(_Inert):
    """In place of torch's ModuleDict."""

    __slots__ = ("state",)
    class_name = "ModuleDict"

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise InteropError("a ModuleDict without attributes")
        self.state = state


class _EasyDict(dict):
    """In place of dnnlib's dictionary with attributes."""

    __slots__ = ()
    __setstate__ = _Inert.__setstate__


class _Storage(_Inert):
    __slots__ = ("elements",)

    def __init__(self, elements: np.ndarray):
        self.elements = elements


class Tensor(_Inert):
    """A dense tensor, as a read-only view of the bytes in the pickle."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray):
        self.array = array


class _NumpyType(_Inert):
    __slots__ = ("dtype",)

    def __init__(self, code: Any, align: Any = False, copy: Any = True):
        if not isinstance(code, str) or not _NUMPY_NUMBERS.fullmatch(code):
            raise InteropError(f"NumPy data of type {shown(code)}, which is not numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if not isinstance(state, tuple) or state[1] not in ("<", "|", "="):
            raise InteropError("NumPy data in another layout")


class _NumpyArray(_Inert):
    """Skipped: no array is part of the weights or of what is read of the configuration."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _Function(_Inert):
    """A stand-in that a pickle can call and do nothing else with."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)


def _dictionary(*items: Any) -> dict:
    return dict(*items)


def _scalar(kind: _NumpyType, data: bytes) -> Any:
    (value,) = np.frombuffer(data, kind.dtype)
    return value.item()


def _parameter(tensor: Tensor, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise InteropError("a parameter that is no dense tensor")
    return tensor


def _tensor(
    storage: _Storage, offset: int, size: tuple, stride: tuple, requires_grad: Any, hooks: Any
) -> Tensor:
    """A view into a storage; nothing outside of it can be reached."""
    numbers = (offset, *size, *stride)
    whole = all(type(n) is int and 0 <= n < _MAX_LENGTH for n in numbers)
    if not isinstance(storage, _Storage) or not whole or len(size) != len(stride):
        raise InteropError(f"a tensor of size {shown(size)} and strides {shown(stride)}")
    if len(size) > _MAX_DIMENSIONS:
        raise InteropError(f"a tensor of {len(size)} dimensions")
    elements = storage.elements[offset:]
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count and (last >= elements.size or count > elements.size):
        raise InteropError(
            f"a tensor of size {shown(size)} reaches beyond its storage of {storage.elements.size}"
        )
    strides = tuple(step * elements.itemsize for step in stride)
    return Tensor(np.lib.stride_tricks.as_strided(elements, size, strides, writeable=False))


class _StorageName(_Inert):
    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _StorageReader(pickle.Unpickler):
    """Reads the pickles of an inner stream: numbers, strings, and the description of a storage."""

    def find_class(self, module: str, name: str) -> _StorageName:
        if f"{module}.{name}" not in _STORAGE_TYPES:
            raise InteropError(f"{module}.{name} within a tensor's data")
        return _StorageName(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _storage(data: bytes) -> _Storage:
    """The elements in what torch.save (before PyTorch 1.6) writes of a storage, not copied."""
    if not isinstance(data, bytes):
        raise InteropError("tensor data that is not bytes")
    stream = io.BytesIO(data)
    found = set().union(*(scan_pickle(stream) for _ in range(_INNER_PICKLES)))
    refused = sorted(found - set(_STORAGE_TYPES))
    if refused:
        raise InteropError(f"{listed(refused)} within a tensor's data")
    stream.seek(0)
    contents = [_StorageReader(stream).load() for _ in range(_INNER_PICKLES)]
    magic, _, machine, description, keys = contents
    if magic != LEGACY_MAGIC or not machine.get("little_endian"):
        raise InteropError("tensor data in another layout")
    _, kind, key, _, count, view = description
    if view is not None or keys != [key]:
        raise InteropError("tensor data that shares its storage")
    dtype = _STORAGE_TYPES[kind.name]
    (stored,) = struct.unpack("<q", stream.read(8))
    if stored != count or len(data) - stream.tell() != count * dtype.itemsize:
        raise InteropError(f"{shown(count)} elements in {len(data) - stream.tell()} bytes")
    return _Storage(np.frombuffer(data, dtype, count, stream.tell()))


def _encode(text: str, encoding: str) -> bytes:
    """How protocols before 3 write bytes."""
    if type(text) is not str or encoding != "latin1":
        raise InteropError(f"text to encode as {shown(encoding)}")
    return text.encode("latin1")


# The full names that a pickle may mention, and what stands in for each.
STAND_INS: dict[str, Any] = {
    PERSISTENCE: _Function(PersistentObject),
    "collections.OrderedDict": _Function(_dictionary),
    "dnnlib.util.EasyDict": _EasyDict,
    "torch.nn.modules.container.ModuleDict": Container,
    "torch.storage._load_from_bytes": _Function(_storage),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_parameter": _Function(_parameter),
    "numpy.dtype": _Function(_NumpyType),
    "builtins.set": _Function(lambda items=(): set(items)),
    "_codecs.encode": _Function(_encode),
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    STAND_INS[f"{_module}.scalar"] = _Function(_scalar)
    STAND_INS[f"{_module}._reconstruct"] = _Function(lambda *_: _NumpyArray())
STAND_INS["numpy.ndarray"] = _Function(_NumpyArray)
STAND_INS["__builtin__.set"] = STAND_INS["builtins.set"]
