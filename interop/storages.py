"""What a pickle of torch.save says of its tensors: read by inert records before torch reads it.

A shape that its storage does not have would be given memory by torch, so tensors and storages are
compared here.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, BinaryIO

from dit_jax.interop.pt_writer import STORAGES
from dit_jax.interop.tensor_file import DTYPE_OF_TORCH
from dit_jax.untrusted import shown

# Bytes of an element by storage class; an UntypedStorage counts bytes.
_ITEM_SIZES = {storage: DTYPE_OF_TORCH[dtype].itemsize for dtype, storage in STORAGES.items()}
_ITEM_SIZES |= {"ComplexDoubleStorage": 16, "QInt32Storage": 4}
_REBUILT = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_MAX_DIMENSIONS = 64
# One value may stand for a tensor (an expanded one); not for one of any size.
_MAX_REPEATED = 2**22
MAX_COUNT = 2**48


class _Inert:
    """Stands for whatever a pickle names, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


class _Storage(_Inert):
    """A record of so many elements."""

    nbytes, itemsize = 0, 1


class _StorageReader(pickle.Unpickler):
    """Notes the storages that a pickle refers to; imports and calls nothing but `_Inert`."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _REBUILT:
            return _check_tensor
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> _Storage:
        # After the number of elements, the format before PyTorch 1.6 says what it is a part of.
        _, kind, key, _, count, *_ = pid
        if not isinstance(key, str) or type(count) is not int or not 0 <= count <= MAX_COUNT:
            raise ValueError("a storage without a sound name and size")
        storage = _Storage()
        storage.nbytes = count * _ITEM_SIZES.get(kind.__name__, 1)
        storage.itemsize = _ITEM_SIZES.get(kind.__name__, 1)
        # One storage may be seen as several types.
        self.storages[key] = max(storage.nbytes, self.storages.get(key, 0))
        return storage


def _check_tensor(
    storage: Any, offset: Any, size: Sequence[int], stride: Sequence[int], *others: Any
) -> _Inert:
    """What _rebuild_tensor makes, if its elements lie within the storage."""
    numbers = (offset, *size, *stride)
    if (
        not isinstance(storage, _Storage)
        or len(size) != len(stride)
        or len(size) > _MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n <= MAX_COUNT for n in numbers)
    ):
        raise ValueError("a tensor of an impossible shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # (The third variant names the type of the elements of an untyped storage: at least a byte.)
    available = storage.nbytes // storage.itemsize
    if count and (last >= available or count > max(available, _MAX_REPEATED)):
        raise ValueError(
            f"a tensor of {shown(count)} elements lies in a storage of {available}; if it repeats "
            "them, save it after .contiguous()"
        )
    return _Inert()


def read_storages(stream: BinaryIO) -> dict[str, int]:
    """The storages of a pickle of torch.save: record -> bytes. Only after `scan` found it safe.

    Raises:
        ValueError: If the pickle is damaged, or a tensor does not lie within its storage.
    """
    reader = _StorageReader(stream)
    try:
        reader.load()
    except ValueError:
        raise
    # A damaged pickle makes the unpickler raise nearly anything.
    except Exception as error:
        raise ValueError(f"its structure is damaged ({type(error).__name__})") from error
    return reader.storages
