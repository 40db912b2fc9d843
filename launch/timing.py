"""Where a command's time goes: wall time by phase, compilations on an account of their own."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import jax

from dit_jax.quantities import table
from dit_jax.training.metrics import format_duration

# Durations that JAX reports of making a program; they may lie in one another.
_COMPILATION = "/jax/core/compile/"


class Stopwatch:
    """Adds up the wall time of phases, what JAX compiles in them excepted.

    Args:
        started: when the command began, by time.perf_counter(); default: now.

    Attributes:
        started: as given.
        seconds: by phase, without compilations.
        compiling: seconds in which JAX traced, lowered or compiled, inside phases or not.
    """

    def __init__(self, started: float | None = None):
        self.started = time.perf_counter() if started is None else started
        self.seconds: dict[str, float] = {}
        self._compiled: list[tuple[float, float]] = []  # disjoint, in order of time
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def close(self) -> None:
        """Listens to JAX no longer."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        if event.startswith(_COMPILATION):
            end = time.perf_counter()
            start = end - duration
            while self._compiled and self._compiled[-1][1] > start:  # it was inside this one
                start = min(start, self._compiled.pop()[0])
            self._compiled.append((start, end))

    @property
    def compiling(self) -> float:
        """Seconds so far."""
        return sum(end - start for start, end in self._compiled)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds what happens inside to `phase`; phases do not lie in one another."""
        started, compiled = time.perf_counter(), self.compiling
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.add(phase, elapsed - (self.compiling - compiled))

    def add(self, phase: str, seconds: float) -> None:
        """Adds seconds measured elsewhere."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def times(clock: Stopwatch, more: Sequence[tuple[str, str]] = ()) -> str:
    """The table of where the time went; the last row of the clock's is the sum of those above.

    Args:
        clock: of a command that has noted the phase "importing".
        more: rows below, (name, value).
    """
    named = {"importing": clock.seconds["importing"], "compiling": clock.compiling, **clock.seconds}
    total = time.perf_counter() - clock.started
    named["data, checkpoints and the rest"] = total - sum(named.values())
    named["everything together"] = total
    rows = [(name, format_duration(seconds)) for name, seconds in named.items()]
    return table([("where the time went", ""), *rows, *more])
