"""Which classes and functions a pickle names and calls, found without loading it.

Loading a pickle can call anything it names. Files of PyTorch are therefore looked at before they
are loaded: only what rebuilds tensors and plain data may be named. (PyTorch's own
`weights_only=True` stands behind this check; it stops at the first name, and not for every format
with the name.)

Harmless names can do harm, too: a few bytes may ask for all memory, or build what takes for ever to
hash. So the scan follows the pickle's stack, and refuses what no file of tensors needs.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

_NUMBERS = r"(bool|u?int\d+|float\d+(_\w+)?|bfloat16|half|float|double|long|complex\d+)"
# What a file of tensors and plain data needs. Quantised, sparse and wrapped tensors, which are
# not weights this library reads, are left out.
_CALLED = re.compile(
    r"""
      collections\.(OrderedDict|Counter)
    | argparse\.Namespace
    | (builtins|__builtin__)\.(set|complex|bytearray)
    | _codecs\.encode
    | torch\.(Size|device)
    | torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)
    | torch\.serialization\._get_layout
    """,
    re.VERBOSE,
)
_MENTIONED = re.compile(
    rf"""
      torch\.{_NUMBERS}
    | torch\.Tensor
    | torch\.[A-Z][A-Za-z0-9]*Storage
    | torch\.storage\.(UntypedStorage|TypedStorage)
    | torch\.nn\.parameter\.Parameter
    """,
    re.VERBOSE,
)
# Whose attributes a pickle may set. (torch.load would give a tensor another storage.)
_BUILT = re.compile(r"collections\.(OrderedDict|Counter)|argparse\.Namespace")

NAMESPACE = "argparse.Namespace"
COMPUTED = "a name computed while loading"

# The largest checkpoints with their optimizer's state have a tenth of these.
MAX_OPCODES = 2_000_000
_MAX_WORK = 20_000_000
_MAX_DEPTH = 200
# Numbers as keys can be chosen such that finding one takes as long as there are keys.
_MAX_NUMBER_KEYS = 20_000
_MAX_LINE = 2**16

_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_FILLS = frozenset(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"))
_CALLS = frozenset(("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"))
_HASHED = re.compile(r"collections\..*|.*\.(set|frozenset)")


@dataclass
class PickleScan:
    """What `scan` found.

    Attributes:
        names: Full names that would be imported; `COMPUTED` for one put together while loading.
        calls: What is called, "collections.OrderedDict", and of what attributes are set,
            "attributes of collections.OrderedDict".
    """

    names: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)


class _Value:
    """What is known of an object on a pickle's stack.

    Attributes:
        weight: Objects in it, counted as often as they occur: what hashing it costs.
        depth: Of its nesting.
        constant: A string of the pickle itself, b"" for bytes, None for anything else.
        name: The full name of an import.
        maker: The name of what was called for it.
        items: Of a tuple.
    """

    __slots__ = ("constant", "depth", "items", "maker", "name", "weight")

    def __init__(self, items: Sequence[_Value] = ()):
        self.items = items
        self.weight = 1 + sum(item.weight for item in items)
        self.depth = 1 + max((item.depth for item in items), default=0)
        self.constant: str | bytes | None = None
        self.name: str | None = None
        self.maker: str | None = None


class _Bounded:
    """A stream whose reads are refused beforehand where they go beyond its end."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        position = stream.tell()
        self.remaining = stream.seek(0, os.SEEK_END) - position
        stream.seek(position)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.remaining:
            raise ValueError("it ends within a value")
        self.remaining -= size
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(_MAX_LINE)
        self.remaining -= len(line)
        return line


class _Machine:
    """The stack and the memo of a pickle, with what is known of each object."""

    def __init__(self, stream: _Bounded):
        self.found = PickleScan()
        self._stream = stream
        self._stack: list[_Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Value] = {}
        self._work = self._number_keys = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Follow one operation."""
        name = opcode.name
        if name in _PUTS or name == "MEMOIZE":
            index = len(self._memo) if name == "MEMOIZE" else argument
            # Unpicklers keep the memo as a table as long as its highest number.
            if not 0 <= index <= MAX_OPCODES:
                raise ValueError("it numbers its objects beyond any count")
            self._memo[index] = self._top()
        elif name in _GETS:
            if argument not in self._memo:
                raise ValueError("it refers to an object that is not there")
            self._stack.append(self._memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._import(argument)
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name == "DUP":
            self._stack.append(self._top())
        elif name == "POP" and self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        elif name in _FILLS or name == "BUILD":
            self._fill(name, self._popped(opcode, keep=1))
        elif name in _CALLS:
            self._call(name, argument, self._popped(opcode))
        elif name == "FRAME":
            if argument > self._stream.remaining:
                raise ValueError("it ends within a frame")
        elif name not in ("PROTO", "STOP"):
            if name.startswith("EXT"):
                self.found.names.add(f"copyreg extension {argument}")
            value = self._joined(self._popped(opcode))
            if any(kind in name for kind in ("UNICODE", "STRING", "BYTES", "BYTEARRAY8")):
                # (Of bytes only that they are some: they may be most of the file.)
                value.constant = argument if isinstance(argument, str) else b""
            if name == "FROZENSET":
                self._hash(value)
            if opcode.stack_after:
                self._stack.append(value)

    def _top(self) -> _Value:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("it takes what it has not made")
        return self._stack[-1]

    def _popped(self, opcode: pickletools.OpcodeInfo, keep: int = 0) -> list[_Value]:
        """What the operation takes off the stack, but for its first `keep` objects."""
        before = opcode.stack_before[keep:]
        start = len(self._stack) - len(before)
        if pickletools.markobject in before:
            if not self._marks:
                raise ValueError("it takes what it has not made")
            start = self._marks.pop()
        elif start < (self._marks[-1] if self._marks else 0):
            raise ValueError("it takes what it has not made")
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _joined(self, items: list[_Value]) -> _Value:
        value = _Value(items)
        self._charge(value.weight, value.depth)
        return value

    def _charge(self, weight: int, depth: int) -> None:
        self._work += weight
        if self._work > _MAX_WORK or depth > _MAX_DEPTH:
            raise ValueError("it builds more than any file of tensors holds")

    def _hash(self, value: _Value) -> None:
        self._charge(value.weight, 0)
        self._number_keys += value.weight
        if self._number_keys > _MAX_NUMBER_KEYS:
            raise ValueError("it has more keys that are no names than any file of tensors")

    def _fill(self, name: str, items: list[_Value]) -> None:
        target = self._top()
        if name == "BUILD":
            self.found.calls.add(f"attributes of {target.maker or 'what it computed'}")
        keys = items[::2] if name.startswith("SETITEM") else items if name == "ADDITEMS" else []
        for key in keys:
            if not isinstance(key.constant, str):
                self._hash(key)
        weight = sum(item.weight for item in items)
        target.weight += weight
        target.depth = max(target.depth, 1 + max((item.depth for item in items), default=0))
        self._charge(weight, target.depth)

    def _import(self, argument: str | None) -> None:
        if argument is None:
            if len(self._stack) < 2:
                raise ValueError("it takes what it has not made")
            parts = [value.constant for value in self._stack[-2:]]
            del self._stack[-2:]
        else:
            parts = argument.split(" ", 1)
        value = _Value()
        if all(isinstance(part, str) for part in parts):
            value.name = ".".join(parts)
        self.found.names.add(value.name or COMPUTED)
        self._stack.append(value)

    def _call(self, name: str, argument: str | None, taken: list[_Value]) -> None:
        if name == "INST":
            self.found.names.add(argument.replace(" ", ".", 1))
            called, arguments = argument.replace(" ", ".", 1), taken
        elif not taken:
            raise ValueError("it takes what it has not made")
        else:
            called, arguments = taken[0].name, taken[1:]
        value = self._joined(arguments)
        value.items, value.maker = (), called
        if called and _HASHED.fullmatch(called):
            for item in arguments:
                self._hash(item)
        if called in ("_codecs.encode", "builtins.bytearray", "__builtin__.bytearray"):
            given = [item.constant for tuple_ in arguments for item in tuple_.items]
            # A number is a length; an encoding can make much of little, again and again.
            if (
                not given
                or not isinstance(given[0], str | bytes)
                or given[1:]
                not in (
                    [],
                    ["latin1"],
                    ["latin-1"],
                )
            ):
                called = f"{called} of computed values"
        self.found.calls.add(called or COMPUTED)
        self._stack.append(value)


def scan(stream: BinaryIO) -> PickleScan:
    """Read one pickle up to its end and tell what it would import and call.

    Raises:
        ValueError: If the stream is no pickle, ends within one, or builds what no file of tensors
            needs. The message repeats nothing of the stream.
    """
    bounded = _Bounded(stream)
    machine = _Machine(bounded)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(bounded)):
            if count > MAX_OPCODES:
                raise ScanError("it has more parts than any file of tensors")
            try:
                machine.step(opcode, argument)
            except ValueError as error:
                raise ScanError(str(error)) from None
    except ScanError:
        raise
    # (What pickletools says repeats the line that it could not read.)
    except (ValueError, OverflowError, MemoryError, struct.error):
        raise ScanError("it is no pickle, or one that was cut off") from None
    return machine.found


class ScanError(ValueError):
    """A pickle that cannot be read to its end, or should not be."""


def scan_pickle(stream: BinaryIO) -> set[str]:
    """Read one pickle up to its end and return the full names it would import; see `scan`."""
    return scan(stream).names


def unsafe_names(names: set[str]) -> list[str]:
    """Those of the names that a file of tensors does not need, sorted."""
    return sorted(n for n in names if not (_CALLED.fullmatch(n) or _MENTIONED.fullmatch(n)))


def unsafe_parts(found: PickleScan) -> list[str]:
    """Names and calls that a file of tensors does not need, sorted."""
    refused = []
    for call in found.calls:
        built = call.removeprefix("attributes of ")
        if not (_CALLED if built == call else _BUILT).fullmatch(built):
            refused.append(call if built != call else f"a call of {call}")
    # A name that is refused is named once.
    names = unsafe_names(found.names)
    return names or sorted(refused)


def listed(names: Iterable[str]) -> str:
    """Names for a message: those that are identifiers, and not too many."""
    fit = [n if n.isprintable() and len(n) <= 100 and n.isascii() else "..." for n in names]
    more = f" and {len(fit) - 8} more" if len(fit) > 8 else ""
    return ", ".join(fit[:8]) + more
