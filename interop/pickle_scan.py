"""Which classes and functions a pickle names, found without loading it.

Loading a pickle can call anything it names. Files of PyTorch are therefore looked at before they
are loaded: only what rebuilds tensors and plain data may be named. (PyTorch's own
`weights_only=True` stands behind this check; it stops at the first name, and not for every format
with the name.)
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections import OrderedDict
from typing import BinaryIO

# What a file of tensors and plain data needs. Quantised, sparse and wrapped tensors, which are
# not weights this library reads, are left out.
_ALLOWED = re.compile(
    r"""
      collections\.(OrderedDict|Counter)
    | argparse\.Namespace
    | builtins\.(set|complex|bytearray) | __builtin__\.(set|complex|bytearray)
    | _codecs\.encode
    | torch\.(Size|device|Tensor)
    | torch\.(bool|u?int\d+|float\d+(_\w+)?|bfloat16|half|float|double|long|complex\d+)
    | torch\.[A-Z][A-Za-z0-9]*Storage
    | torch\.storage\.(UntypedStorage|TypedStorage)
    | torch\.nn\.parameter\.Parameter
    | torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)
    | torch\.serialization\._get_layout
    """,
    re.VERBOSE,
)

NAMESPACE = "argparse.Namespace"


def scan_pickle(stream: BinaryIO) -> set[str]:
    """Read one pickle up to its end and return the full names it would import.

    Names that are put together while loading (protocol 4 and later) are followed as far as they
    are constants; one that is not is returned as "a name computed while loading".

    Raises:
        ValueError: If the stream is no pickle or ends within one.
    """
    names: set[str] = set()
    strings: list[str | None] = []  # The constants pushed so far; None for anything else.
    memo: dict[int, str | None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(argument.replace(" ", "."))
                strings.append(None)
            elif opcode.name == "STACK_GLOBAL":
                module, name = strings[-2:] if len(strings) > 1 else (None, None)
                known = module is not None and name is not None
                names.add(f"{module}.{name}" if known else "a name computed while loading")
                strings.append(None)
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                names.add(f"copyreg extension {argument}")
                strings.append(None)
            elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = strings[-1] if strings else None
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else None
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                strings.append(memo.get(argument))
            elif opcode.name not in ("PROTO", "FRAME", "MARK", "STOP"):
                strings.append(argument if isinstance(argument, str) else None)
    except (UnicodeDecodeError, OverflowError) as error:
        raise ValueError(str(error)) from error
    return names


def unsafe_names(names: set[str]) -> list[str]:
    """Those of the names that a file of tensors does not need, sorted."""
    return sorted(name for name in names if not _ALLOWED.fullmatch(name))


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


class _StorageReader(pickle.Unpickler):
    """Notes the storages that a pickle refers to; imports and calls nothing but `_Inert`."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.storages: dict[str, tuple[str, int]] = {}

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name, (_Inert,), {})

    def persistent_load(self, pid):
        _, storage, key, _, count = pid
        self.storages[key] = (storage.__name__, count)
        return _Inert()


def read_storages(stream: BinaryIO) -> dict[str, tuple[str, int]]:
    """The storages of a pickle of torch.save: record -> (storage class, number of elements).

    Raises:
        ValueError: If the pickle is damaged.
    """
    reader = _StorageReader(stream)
    try:
        reader.load()
    # A damaged pickle makes the unpickler raise nearly anything.
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return reader.storages
