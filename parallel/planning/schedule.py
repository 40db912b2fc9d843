"""The predicted time of a compiled program: its kernels one after the other, collectives beside.

XLA writes a compiled program in the order in which it is launched. One stream of kernels is
followed in that order, each for the longer of its FLOPs over the peak and its bytes over the
bandwidth; one stream of communication takes what is started, and a '-done' makes the kernels wait
for it. Loops are followed once and multiplied by how often they run.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable

from dit_jax.parallel.planning.accelerators import Accelerator
from dit_jax.parallel.planning.hlo import Instruction
from dit_jax.parallel.planning.kernels import Kernel, find_kernel
from dit_jax.parallel.planning.program import Collective, Program


@dataclasses.dataclass(frozen=True)
class Communication:
    """A collective in the schedule; times each time it runs, in seconds.

    Attributes:
        collective: what is sent.
        source: functions it comes from.
        computation: in which it is started.
        seconds: it takes at the links' full speed.
        products: kernels between its start and its end that are matrix products or attention.
        product_seconds: how long these take.
        other_seconds: how long the other kernels in between take.
        exposed: how long kernels wait for it.
        is_synchronous: nothing can run beside it.
        count: how often it runs in a run of the program; a mean where that is not whole.
    """

    collective: Collective
    source: str
    computation: str
    seconds: float
    products: float
    product_seconds: float
    other_seconds: float
    exposed: float
    is_synchronous: bool
    count: float = 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A run of a program on one device, predicted.

    Attributes:
        seconds: from start to end.
        kernels: with how often each runs.
        communication: with how often each runs.
        unknown_loops: loops of unknown length, whose bodies are counted once.
    """

    seconds: float = 0.0
    kernels: tuple[Kernel, ...] = ()
    communication: tuple[Communication, ...] = ()
    unknown_loops: tuple[str, ...] = ()

    def times(self, count: float) -> "Schedule":
        """The same, `count` times."""
        if not count:
            return Schedule(unknown_loops=self.unknown_loops)
        return Schedule(
            self.seconds * count,
            tuple(dataclasses.replace(k, count=k.count * count) for k in self.kernels),
            tuple(dataclasses.replace(c, count=c.count * count) for c in self.communication),
            self.unknown_loops,
        )

    @property
    def kernel_seconds(self) -> float:
        """All kernels, without waiting."""
        return math.fsum(k.seconds * k.count for k in self.kernels)

    @property
    def exposed_seconds(self) -> float:
        """Waiting for collectives."""
        return math.fsum(c.exposed * c.count for c in self.communication)

    @property
    def product_seconds(self) -> float:
        """Matrix products and attention."""
        return math.fsum(k.seconds * k.count for k in self.kernels if k.is_product)

    @property
    def launches(self) -> float:
        """Kernels that are run."""
        return sum(k.count for k in self.kernels)

    def lengthening(self, shortest: float) -> float:
        """Seconds by which a run is longer if no kernel takes less than `shortest`."""
        return math.fsum(max(0.0, shortest - k.seconds) * k.count for k in self.kernels)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Kernels together by kind, with seconds, count, places in the program, FLOPs, bytes."""
        found = collections.defaultdict(lambda: dict.fromkeys(_TOTALS, 0.0))
        for kernel in self.kernels:
            entry = found[kernel.kind]
            entry["places"] += 1
            entry["count"] += kernel.count
            entry["seconds"] += kernel.seconds * kernel.count
            entry["flops"] += kernel.flops * kernel.count
            entry["bytes"] += kernel.nbytes * kernel.count
        return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))

    def longest(self, count: int = 10) -> list[Kernel]:
        """The kernels that take most of a run in all."""
        return sorted(self.kernels, key=lambda k: -k.seconds * k.count)[:count]


_TOTALS = ("seconds", "count", "places", "flops", "bytes")


def predict(program: Program, device: Accelerator) -> Schedule:
    """The schedule of a program compiled for `device`.

    Raises:
        ValueError: the program's order is not that of its execution.
    """
    if not program.is_scheduled:
        raise ValueError(
            "this program is not scheduled: expected the text of a program compiled for a GPU, "
            "compiled.as_text(), with is_scheduled=true in its first line"
        )
    return _Follower(program, device).follow(program.entry)


class _Follower:
    """Follows computations; every one once."""

    def __init__(self, program: Program, device: Accelerator):
        self.program, self.device = program, device

    @functools.cache  # noqa: B019 (lives as long as one prediction)
    def follow(self, computation: str) -> Schedule:
        """The schedule of one computation."""
        clock, busy_until = 0.0, 0.0  # of the kernels, of the links
        steps: list[Schedule] = []
        started: dict[str, tuple[Instruction, float, int]] = {}
        communication: list[Communication] = []
        for instruction in self.program.instructions(computation):
            inner = self._inner(instruction)
            if inner is not None:
                clock += inner.seconds
                steps.append(inner)
            elif found := self._collective(instruction):
                busy_until = max(clock, busy_until) + self._seconds(found)
                if _is_synchronous(instruction):
                    communication.append(
                        self._told(instruction, [], busy_until - clock, computation)
                    )
                    clock = busy_until
                else:
                    started[instruction.name] = (instruction, busy_until, len(steps))
            elif instruction.opcode.endswith("-done") and instruction.operands[0] in started:
                start, end, position = started.pop(instruction.operands[0])
                exposed = max(0.0, end - clock)
                clock += exposed
                between = steps[position:]
                communication.append(self._told(start, between, exposed, computation))
        return Schedule(
            clock,
            tuple(kernel for step in steps for kernel in step.kernels),
            (*(c for step in steps for c in step.communication), *communication),
            tuple(name for step in steps for name in step.unknown_loops),
        )

    def _inner(self, instruction: Instruction) -> Schedule | None:
        """What an instruction runs on the stream of kernels, None for nothing."""
        if instruction.opcode == "while":
            count = self.program.trip_count(instruction)
            inside = self.follow(instruction.called[0]).times(1 if count is None else count)
            unknown = (instruction.name,) if count is None else ()
            return dataclasses.replace(inside, unknown_loops=(*inside.unknown_loops, *unknown))
        if instruction.opcode == "conditional":
            branches = [self.follow(name) for name in instruction.called]
            seconds = [branch.seconds for branch in branches]
            shares = self.program.branch_shares(instruction, seconds)
            return _together(branch.times(s) for branch, s in zip(branches, shares, strict=True))
        if instruction.opcode == "call":
            return self.follow(instruction.called[0])
        if instruction.opcode.endswith("-start") and instruction.called:
            return None if self._collective(instruction) else self.follow(instruction.called[0])
        kernel = find_kernel(self.program, instruction, self.device)
        return Schedule(kernel.seconds, (kernel,)) if kernel else None

    def _collective(self, instruction: Instruction) -> Instruction | None:
        """The collective that an instruction is, starts, or wraps."""
        if instruction.collective:
            return instruction
        if instruction.opcode == "async-start":
            wrapped = self.program.instructions(instruction.called[0])
            return next((found for found in wrapped if found.collective), None)
        return None

    def _seconds(self, collective: Instruction) -> float:
        return self.device.seconds_of(self.program.collective(collective))

    def _told(
        self,
        instruction: Instruction,
        between: list[Schedule],
        exposed: float,
        computation: str,
    ) -> Communication:
        collective = self._collective(instruction)
        kernels = [kernel for step in between for kernel in step.kernels]
        products = [kernel for kernel in kernels if kernel.is_product]
        product_seconds = math.fsum(k.seconds * k.count for k in products)
        return Communication(
            collective=self.program.collective(collective),
            source=collective.source,
            computation=computation,
            seconds=self._seconds(collective),
            products=sum(kernel.count for kernel in products),
            product_seconds=product_seconds,
            other_seconds=math.fsum(k.seconds * k.count for k in kernels) - product_seconds,
            exposed=exposed,
            is_synchronous=_is_synchronous(instruction),
        )


def _together(schedules: Iterable[Schedule]) -> Schedule:
    """One after the other."""
    schedules = list(schedules)
    return Schedule(
        math.fsum(schedule.seconds for schedule in schedules),
        *(
            tuple(entry for schedule in schedules for entry in getattr(schedule, name))
            for name in ("kernels", "communication", "unknown_loops")
        ),
    )


def _is_synchronous(instruction: Instruction) -> bool:
    """Whether nothing runs beside it: it has no '-done', or XLA runs it among the kernels."""
    if not instruction.opcode.endswith("-start"):
        return True
    return bool(instruction.config.get("collective_backend_config", {}).get("is_sync"))
