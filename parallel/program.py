"""What a compiled program does, by its text: loops, collectives, products, dependencies.

XLA's own cost analysis counts the body of a loop once and says nothing of communication. Here every
instruction is counted as often as it runs, so that a scan over layers counts all layers. The text
is that of `jax.stages.Compiled.as_text()`: the program of one device after partitioning.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)(]*(?:\([^)]*\))?)\))? *(\{[^}]*\})"
)
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
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
    def called(self) -> tuple[str, ...]:
        """Computations it runs: a fusion's, a loop's body, the branches of a conditional."""
        if self.opcode in ("async-done", "async-update", "get-tuple-element"):
            return ()
        found = _CALLED.findall(self.text)
        return tuple(name.strip(" %") for group in found for name in group.strip("{}").split(","))


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one instruction.

    Attributes:
        kind: one of `COLLECTIVES`.
        name: of the instruction.
        nbytes: of the whole array on one device: the gathered, the summed, the one before a
            reduce-scatter, the exchanged.
        dtype: of its (first) array.
        groups: ids of the devices that communicate, a row a group; of a permutation, a row a pair.
        group_size: devices of a group; 2 for a permutation.
        count: how often it runs in a run of the program.
        keeps_part: an all-reduce of which every device uses only its part: XLA makes a
            reduce-scatter of it on GPUs and TPUs, not on CPUs, and it is counted as one.
    """

    kind: str
    name: str
    nbytes: float
    dtype: str
    groups: np.ndarray
    group_size: int
    count: int = 1
    keeps_part: bool = False

    @property
    def bytes_sent(self) -> float:
        """What each device sends every time it runs, by the ring algorithm on N devices.

        (N - 1) / N of the array, twice that for an all-reduce whose whole result is used; a
        permutation sends all of it.
        """
        if self.kind == "collective-permute":
            return self.nbytes
        share = (self.group_size - 1) / self.group_size
        twice = self.kind == "all-reduce" and not self.keeps_part
        return self.nbytes * share * (2 if twice else 1)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop: its instruction, its body, and how often that runs (None: not known)."""

    name: str
    body: str
    trip_count: int | None


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run of the program does on one device.

    Attributes:
        flops: of matrix products and convolutions, a multiply-add being two.
        collectives: with how often each runs.
        unknown_loops: names of loops of unknown length, whose bodies are counted once.
    """

    flops: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: tuple[str, ...] = ()

    @property
    def bytes_sent(self) -> float:
        """By all collectives together, in bytes a device."""
        return math.fsum(c.bytes_sent * c.count for c in self.collectives)

    def times(self, count: int) -> "Work":
        """The same, `count` times."""
        repeated = tuple(
            dataclasses.replace(c, count=c.count * count) for c in self.collectives if count
        )
        return Work(self.flops * count, repeated, self.unknown_loops)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.collectives + other.collectives,
            self.unknown_loops + other.unknown_loops,
        )


class Program:
    """A parsed program.

    Attributes:
        computations: instructions by name, by computation.
        entry: name of the computation that is run.
        num_devices: over which the program is partitioned.
    """

    def __init__(self, text: str):
        """Parses `Compiled.as_text()`.

        Raises:
            ValueError: it is not the text of a compiled program.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        counts = [re.search(rf"\bnum_{name}=(\d+)", text[:100_000]) for name in _COUNTS]
        self.num_devices = math.prod(int(found.group(1)) for found in counts if found)
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if line.startswith("}"):
                current = None
            elif current is None:
                found = None if line.startswith("HloModule") else _COMPUTATION.match(line)
                if found:
                    current = self.computations.setdefault(found.group(2), {})
                    self.entry = found.group(2) if found.group(1) else self.entry
            elif instruction := _parse(line):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError(
                "no ENTRY computation found: expected the HLO text of a compiled program, "
                "jax.jit(f).lower(...).compile().as_text()"
            )
        self._parents = {
            instruction.name: computation
            for computation, body in self.computations.items()
            for instruction in body.values()
        }
        self._users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in self.instructions():
            for operand in instruction.operands:
                self._users[operand].append(instruction)

    def instructions(self, computation: str | None = None) -> Iterator[Instruction]:
        """Those of one computation, by default of all."""
        names = self.computations if computation is None else (computation,)
        for name in names:
            yield from self.computations[name].values()

    def parent(self, instruction: Instruction | str) -> str:
        """Name of the computation an instruction is in."""
        return self._parents[instruction if isinstance(instruction, str) else instruction.name]

    def loops(self) -> list[Loop]:
        """All while loops."""
        whiles = [i for i in self.instructions() if i.opcode == "while"]
        return [Loop(i.name, i.called[0], self._trip_count(i)) for i in whiles]

    def work(self) -> Work:
        """What one run does, loops multiplied out; of a conditional, its costliest branch."""
        return self._work(self.entry)

    def depends_on(
        self, instruction: Instruction | str, predicate: Callable[[Instruction], bool]
    ) -> bool:
        """Whether the instruction needs the result of one for which `predicate` holds.

        Walks the operands within the instruction's computation; what comes from outside (its
        parameters: in a loop's body, what the last iteration left) is not followed. An operand that
        runs other computations counts for everything inside them.
        """
        name = instruction if isinstance(instruction, str) else instruction.name
        body = self.computations[self.parent(name)]
        pending, seen = list(self._operands(body[name], body)), set()
        while pending:
            name = pending.pop()
            if name in seen or name not in body:
                continue
            seen.add(name)
            found = body[name]
            if predicate(found) or any(self._contains(c, predicate) for c in found.called):
                return True
            pending += self._operands(found, body)
        return False

    def _operands(self, instruction: Instruction, body: dict[str, Instruction]) -> tuple[str, ...]:
        """Operands, and of an element of a tuple made on the spot that element alone."""
        if instruction.opcode == "get-tuple-element" and instruction.operands[0] in body:
            source = body[instruction.operands[0]]
            if source.opcode == "tuple":
                return (source.operands[int(re.search(r"index=(\d+)", instruction.text)[1])],)
        return instruction.operands

    def _contains(self, computation: str, predicate: Callable[[Instruction], bool]) -> bool:
        return any(
            predicate(i) or any(self._contains(c, predicate) for c in i.called)
            for i in self.instructions(computation)
        )

    def _trip_count(self, loop: Instruction) -> int | None:
        """XLA's own finding, else the only integer constant of the condition."""
        if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.text):
            return int(found.group(1))
        condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.text).group(1)
        constants = [
            int(found.group(1))
            for i in self.instructions(condition)
            if (found := re.search(r"= [su]\d+\[\](?:\{\})? constant\((\d+)\)", i.text))
        ]
        return constants[0] if len(constants) == 1 else None

    @functools.cache  # noqa: B019 (a program lives as long as its analysis)
    def _work(self, computation: str) -> Work:
        body = self.computations[computation]
        total = Work()
        for instruction in body.values():
            if kind := instruction.collective:
                total += Work(collectives=(self._collective(kind, instruction, body),))
            elif instruction.opcode in ("dot", "convolution"):
                total += Work(_product_flops(instruction, body))
            elif instruction.opcode == "while":
                count = self._trip_count(instruction)
                inside = self._work(instruction.called[0]).times(1 if count is None else count)
                total += inside
                total += Work(unknown_loops=(instruction.name,) if count is None else ())
            elif instruction.opcode == "conditional":
                total += max(map(self._work, instruction.called), key=lambda work: work.flops)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                for name in instruction.called:
                    total += self._work(name)
        return total

    def _collective(self, kind: str, instruction: Instruction, body) -> Collective:
        operands = [t for name in instruction.operands if name in body for t in body[name].types]
        results = instruction.types
        if instruction.opcode == "all-gather-start":  # (operands, results)
            results = results[len(results) // 2 :]
        whole = results if kind == "all-gather" else operands or results
        if kind == "collective-permute":
            found = re.search(r"source_target_pairs=\{([\d,{} ]*)\}", instruction.text)
            pairs = re.findall(r"\{(\d+),(\d+)\}", found.group(1)) if found else []
            groups, size = np.array(pairs, int).reshape(-1, 2), 2
        else:
            groups = replica_groups(instruction.text, self.num_devices)
            size = groups.shape[1]
        nbytes = math.fsum(array.nbytes for array in whole)
        part = kind == "all-reduce" and self._keeps_part(instruction)
        dtype = whole[0].dtype
        return Collective(kind, instruction.name, nbytes, dtype, groups, size, keeps_part=part)

    def _keeps_part(self, instruction: Instruction) -> bool:
        """Whether all users, through copies and conversions, take a slice at a computed place."""
        users = self._users[instruction.name]
        passing = ("bitcast", "convert", "copy", "get-tuple-element", "reshape", "transpose")
        return bool(users) and all(
            user.opcode == "dynamic-slice"
            or (user.opcode in passing and not user.is_root and self._keeps_part(user))
            for user in users
        )


_COUNTS = ("replicas", "partitions")


def replica_groups(text: str, num_devices: int) -> np.ndarray:
    """The groups of a collective, a row of device ids each.

    Args:
        text: of the instruction: groups listed ({{0,1},{2,3}}), as a reshaped and transposed range
            ([4,2]<=[2,4]T(1,0)), as axes of a mesh (mesh['a'=2,'b'=4] {'b'}; 'b':(2)2 for a part
            of an axis), or {} for one group of all.
        num_devices: how many there are.

    Raises:
        ValueError: groups of different sizes, or written in another way.
    """
    if found := _MESH.search(text):
        return _mesh_groups(*found.groups())
    if found := _IOTA.search(text):
        shape, source, order = found.groups()
        return _range(source, order).reshape(_integers(shape))
    found = _LISTED.search(text)
    if found is None and "replica_groups=" in text:
        raise ValueError(f"cannot read the groups of this collective: {text[:300]}")
    if not found or not found.group(1):
        return np.arange(num_devices)[None]
    rows = [list(map(int, row.split(","))) for row in re.findall(r"\{([\d, ]+)\}", found.group(1))]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"groups of different sizes: {found.group(0)}")
    return np.array(rows)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _range(shape: str, order: str | None) -> np.ndarray:
    """0, 1, ... in a shape ('2,4'), its axes then reordered ('1,0')."""
    ids = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return ids.transpose(_integers(order)) if order else ids


def _mesh_groups(mesh: str, devices: str | None, axes: str) -> np.ndarray:
    """Groups of devices along some axes of a mesh, whose devices are in order or `devices`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    grouped = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    ]
    # Every axis as the parts before, inside and after what of it is grouped.
    cuts = {name: {1, size} for name, size in sizes.items()}
    for name, before, size in grouped:
        cuts[name] |= {before, before * size}
    parts = [
        (name, low, high // low)
        for name in sizes
        for low, high in itertools.pairwise(sorted(cuts[name]))
    ]
    ids = np.arange(math.prod(sizes.values()))
    if devices and (found := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", devices)):
        ids = _range(*found.groups())
    elif devices:
        ids = np.array(_integers(devices))
    ids = ids.reshape([size for *_, size in parts])
    inside = [
        i
        for name, before, size in grouped
        for i, (other, low, _) in enumerate(parts)
        if other == name and before <= low < before * size
    ]
    outside = [i for i in range(len(parts)) if i not in inside]
    size = math.prod(parts[i][2] for i in inside)
    return ids.transpose(*outside, *inside).reshape(-1, size)


def _product_flops(instruction: Instruction, body: dict[str, Instruction]) -> float:
    """Operations of a dot (2 x results x contracted) or a convolution (2 x results x window)."""
    results = instruction.types[0].size
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        shape = body[instruction.operands[0]].types[0].shape
        axes = [int(axis) for axis in contracted.group(1).split(",") if axis] if contracted else []
        return 2.0 * results * math.prod(shape[axis] for axis in axes)
    kernel = body[instruction.operands[1]].types[0].shape
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.text).group(1)
    return 2.0 * results * math.prod(kernel) / kernel[labels.index("o")]


def _parse(line: str) -> Instruction | None:
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
