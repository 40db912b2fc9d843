"""Signals that a long computation answers by saving first."""

from __future__ import annotations

import os
import signal
from types import TracebackType


class Interruption:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts as it did before.

    Around the steps only: until the first one there is nothing to save, and a compilation would
    keep the flag waiting.

    Args:
        unit: what is finished before saving, for people: "step".

    Attributes:
        signal: which one came, or None.
    """

    def __init__(self, unit: str):
        self.signal: int | None = None
        self._unit = unit

    def __enter__(self) -> Interruption:
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: signals are the caller's business
                break
        return self

    def _handle(self, number, frame):
        if self.signal is not None:
            self._pass_on(number, frame)
            return
        self.signal = number
        name = signal.Signals(number).name
        print(f"{name}: saving after this {self._unit} (a second one ends at once) ...", flush=True)

    def _pass_on(self, number, frame):
        """Acts as without this class; its handler stays, so that it is seen to have them."""
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            signal.signal(number, previous)
            os.kill(os.getpid(), number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
