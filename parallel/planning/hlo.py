"""One line of a compiled program: an instruction, the arrays it makes, what it is made of."""

import dataclasses
import functools
import json
import math
import re
from typing import Any

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """Element type and shape of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> float:
        """Bytes without padding."""
        digits = re.search(r"\d+", self.dtype)
        width = _BYTES.get(self.dtype, int(digits.group()) / 8 if digits else 0)
        return float(self.size * width)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: unique in the program.
        opcode: as 'dot'; 'all-gather-start' for the half that starts an asynchronous collective.
        types: arrays of the result, in order; several where it is a tuple.
        operands: names of instructions of the same computation.
        text: the line, with all attributes.
        is_root: whether it is what its computation returns.
    """

    name: str
    opcode: str
    types: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool = False

    @property
    def collective(self) -> str | None:
        """Which collective it is or starts, None for anything else (and for the '-done' half)."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def target(self) -> str:
        """The library function of a custom call, "" for anything else."""
        if self.opcode != "custom-call":
            return ""
        return re.search(r'custom_call_target="([^"]*)"', self.text).group(1)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What the backend has decided of it; {} if nothing is said."""
        _, found, rest = self.text.partition("backend_config={")
        return json.JSONDecoder().raw_decode("{" + rest)[0] if found else {}

    @property
    def source(self) -> str:
        """Where it comes from, by names of functions: 'jit(f)/while/body/dot_general'."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str:
        """The value of `name=value` or `name={value}` of the line, "" if it has none."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([\w.\-]+))", self.text)
        return (found.group(1) or found.group(2) or "") if found else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations it runs: a fusion's, a loop's body, the branches of a conditional."""
        if self.opcode in ("async-done", "async-update", "get-tuple-element"):
            return ()
        found = _CALLED.findall(self.text)
        return tuple(name.strip(" %") for group in found for name in group.strip("{}").split(","))


def parse_instruction(line: str) -> Instruction | None:
    """The instruction of a line, None for anything else."""
    head = _HEAD.match(line)
    if not head:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind = rest[:end]
    rest = rest[end:].lstrip()
    opcode, parenthesis, _ = rest.partition("(")
    if not parenthesis:
        return None
    close = _closing(rest, len(opcode))
    operands = ()
    if opcode not in ("constant", "parameter", "iota"):
        # Operands are written with or without their types, %name either way.
        operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : close]))
    types = tuple(
        ArrayType(dtype, tuple(int(n.lstrip("<=")) for n in shape.split(",") if n))
        for dtype, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", kind))
    )
    text = line.strip()
    return Instruction(head.group(2), opcode, types, operands, text, bool(head.group(1)))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis opened at `start` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
