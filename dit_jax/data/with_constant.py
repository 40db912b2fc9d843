"""A source whose examples are all told one more number: the guidance scale of FLUX.1 dev."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int, UInt64

from dit_jax.conditions import Condition
from dit_jax.data.source import Batch, Example, Source


class WithConstant(Source):
    """A source with a further condition that is the same number for every example.

    Args:
        source: What is read.
        name: Of the condition, which the source does not have.
        value: Of every example, float32.
    """

    def __init__(self, source: Source, name: str, value: float):
        self._source, self._name, self._value = source, name, np.float32(value)
        self.slow_to_read, self.bucket_of = source.slow_to_read, source.bucket_of
        self.info = dataclasses.replace(
            source.info,
            conditions=(*source.info.conditions, name),
            declared={**source.info.declared, name: Condition()},
        )

    def __getitem__(self, index: int) -> Example:
        """Return example `index`."""
        return {**self._source[index], self._name: self._value}

    def describe(self, index: int) -> str:
        """Name example `index`."""
        return self._source.describe(index)

    def require_horizontal_flip(self) -> None:
        """Raise a ValueError if this source cannot deliver mirrored examples."""
        self._source.require_horizontal_flip()

    def batch(
        self,
        indices: Int[np.ndarray, " b"],
        *,
        draws: UInt64[np.ndarray, " b"] | None = None,
        horizontal_flip: bool = False,
    ) -> Batch:
        """Read several examples; see `Source.batch`."""
        batch = self._source.batch(indices, draws=draws, horizontal_flip=horizontal_flip)
        return {**batch, self._name: np.full(len(indices), self._value)}
