"""What a compiled program does, by its text: loops, collectives, products, dependencies.

XLA's own cost analysis counts the body of a loop once and says nothing of communication. Here every
instruction is counted as often as it runs, so that a scan over layers counts all layers. The text
is that of `jax.stages.Compiled.as_text()`: the program of one device after partitioning.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dit_jax.models.step_cache import DECISION_SCOPE
from dit_jax.parallel.planning.groups import replica_groups
from dit_jax.parallel.planning.hlo import Instruction, parse_instruction
from dit_jax.parallel.planning.products import find_product

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_COUNTS = ("replicas", "partitions")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one instruction.

    Attributes:
        kind: one of `hlo.COLLECTIVES`.
        name: of the instruction.
        nbytes: of the whole array on one device: the gathered, the summed, the one before a
            reduce-scatter, the exchanged.
        dtype: of its (first) array.
        groups: ids of the devices that communicate, a row a group; of a permutation, a row a pair.
        group_size: devices of a group; 2 for a permutation.
        count: how often it runs in a run of the program; a mean where that is not whole.
        keeps_part: an all-reduce of which every device uses only its part: XLA makes a
            reduce-scatter of it on GPUs and TPUs, not on CPUs, and it is counted as one.
    """

    kind: str
    name: str
    nbytes: float
    dtype: str
    groups: np.ndarray
    group_size: int
    count: float = 1
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

    def times(self, count: float) -> "Work":
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
        is_scheduled: whether instructions stand in the order in which they are launched.
        computed_share: of the evaluations with a step cache, those that run all blocks.
    """

    def __init__(self, text: str, computed_share: float = 1.0):
        """Parses `Compiled.as_text()`.

        Args:
            text: of the program.
            computed_share: what a step cache decides when the program runs, above 0 and up to 1.

        Raises:
            ValueError: it is not the text of a compiled program.
        """
        self.computed_share = computed_share
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        counts = [re.search(rf"\bnum_{name}=(\d+)", text[:100_000]) for name in _COUNTS]
        self.num_devices = math.prod(int(found.group(1)) for found in counts if found)
        self.is_scheduled = "is_scheduled=true" in text.partition("\n")[0]
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if line.startswith("}"):
                current = None
            elif current is None:
                found = None if line.startswith("HloModule") else _COMPUTATION.match(line)
                if found:
                    current = self.computations.setdefault(found.group(2), {})
                    self.entry = found.group(2) if found.group(1) else self.entry
            elif instruction := parse_instruction(line):
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

    def users(self, instruction: Instruction) -> list[Instruction]:
        """Instructions that take its result, in order."""
        return self._users[instruction.name]

    def loops(self) -> list[Loop]:
        """All while loops."""
        whiles = [i for i in self.instructions() if i.opcode == "while"]
        return [Loop(i.name, i.called[0], self.trip_count(i)) for i in whiles]

    def work(self) -> Work:
        """What one run does, loops multiplied out; of conditionals see `branch_shares`."""
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

    def trip_count(self, loop: Instruction) -> int | None:
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

    def decides_step_cache(self, conditional: Instruction) -> bool:
        """Whether it is here that a step cache skips blocks or does not."""
        return conditional.source.endswith(f"{DECISION_SCOPE}/cond")

    def branch_shares(self, conditional: Instruction, costs: Sequence[float]) -> list[float]:
        """How often each branch of a conditional runs, a time it is reached.

        The costliest always, since what decides is not known before the program runs; where a step
        cache does, the costliest in `computed_share` and the other in the rest.

        Args:
            conditional: the instruction.
            costs: of its branches, in order.
        """
        costliest = max(range(len(costs)), key=costs.__getitem__)
        share = self.computed_share if self.decides_step_cache(conditional) else 1.0
        rest = (1.0 - share) / max(1, len(costs) - 1)
        return [share if i == costliest else rest for i in range(len(costs))]

    @functools.cache  # noqa: B019 (a program lives as long as its analysis)
    def _work(self, computation: str) -> Work:
        body = self.computations[computation]
        total = Work()
        for instruction in body.values():
            if instruction.collective:
                total += Work(collectives=(self.collective(instruction),))
            elif product := find_product(instruction, body):
                total += Work(product.flops)
            elif instruction.opcode == "while":
                count = self.trip_count(instruction)
                inside = self._work(instruction.called[0]).times(1 if count is None else count)
                total += inside
                total += Work(unknown_loops=(instruction.name,) if count is None else ())
            elif instruction.opcode == "conditional":
                works = [self._work(name) for name in instruction.called]
                shares = self.branch_shares(instruction, [work.flops for work in works])
                for work, share in zip(works, shares, strict=True):
                    total += work.times(share)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                for name in instruction.called:
                    total += self._work(name)
        return total

    def collective(self, instruction: Instruction) -> Collective:
        """What one that is or starts a collective (`Instruction.collective`) communicates."""
        kind, body = instruction.collective, self.computations[self.parent(instruction)]
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
