"""Ranges of numbers, of the configuration and of commands.

A value outside its range cannot mean anything; what fits only together with other values is checked
by the objects that are built from them. Imports nothing, so that commands can check at their door.
"""

import dataclasses
import math
from typing import Any

# Seeds of jax.random.key are 32 bits: larger ones would silently be the same as smaller ones.
LARGEST_SEED = 2**32 - 1
LARGEST_COUNT = 2**31 - 1  # of images, steps, ...: what an int32 holds


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; never NaN or infinite.

    Attributes:
        low: the smallest, None for no bound.
        high: the largest, None for no bound.
        above: `low` itself is left out.
        below: `high` itself is left out.
        also: single numbers outside it that have a meaning of their own.
        whole: integers alone.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        """Whether `value` is a number of the range."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if value in self.also:
            return True
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """'at least 1, a whole number', as it stands in errors."""
        bounds = []
        if self.low is not None:
            bounds.append(f"{'above' if self.above else 'at least'} {self.low}")
        if self.high is not None:
            bounds.append(f"{'below' if self.below else 'at most'} {self.high}")
        kind = "a whole number" if self.whole else "a finite number"
        text = " and ".join(bounds)
        if self.whole or len(bounds) < 2:
            text = f"{text}, {kind}" if text else kind
        return text + "".join(f"; or {value}" for value in self.also)


COUNT = Range(1, LARGEST_COUNT, whole=True)
PERIOD = Range(0, LARGEST_COUNT, whole=True)  # 0: never, none or by itself
SEED = Range(0, LARGEST_SEED, whole=True)
FINITE = Range()
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
SHARE_BELOW_ONE = Range(0, 1, below=True)
SOLVER_STEPS = Range(1, 100_000, whole=True)
GUIDANCE = Range(0, 1000)  # 0: no condition, 1: no guidance
