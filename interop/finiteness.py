"""NaN and infinity in a checkpoint, noticed while its tensors pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dit_jax.interop.tensor_file import InteropError, TensorFile
from dit_jax.quantities import counted

# Numbers looked at at once: what is made on the way stays small beside the largest tensor.
_PIECE = 1 << 22
_SHOWN = 8


class Finiteness:
    """What was seen of the tensors of one source.

    Attributes:
        allowed: whether NaN and infinity are let through, with a note.
        found: tensors with some, in the order in which they were seen: name -> what is in it.
    """

    def __init__(self, allowed: bool = False):
        self.allowed = allowed
        self.found: dict[str, str] = {}

    def look(self, name: str, array: np.ndarray) -> np.ndarray:
        """Notes NaN and infinity in `array`, which is returned as it is."""
        nan = infinite = 0
        flat = array.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE]
            if piece.dtype.kind in "iub" or np.isfinite(piece).all():
                continue
            here = int(np.isnan(piece).sum())
            nan, infinite = nan + here, infinite + int((~np.isfinite(piece)).sum()) - here
        if nan or infinite:
            kinds = [
                f"{count} {kind}" for count, kind in ((nan, "NaN"), (infinite, "inf")) if count
            ]
            self.found[name] = f"{' and '.join(kinds)} of {flat.size}"
        return array

    def watched(self, names: Iterable[str], arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """`arrays` as they come, looked at."""
        for name, array in zip(names, arrays, strict=True):
            yield self.look(name, array)
            del array  # not to hold it while the next one is read

    def listed(self) -> str:
        """The first tensors found, for messages."""
        shown = [f"{name} ({what})" for name, what in list(self.found.items())[:_SHOWN]]
        more = len(self.found) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

    def note(self) -> tuple[str, ...]:
        """What to say of tensors that were let through; () if there are none."""
        if not self.found:
            return ()
        return (f"NaN or infinity in {counted(len(self.found), 'tensor')}: {self.listed()}",)

    def require(self, path: Path, *, can_be_allowed: bool = True) -> None:
        """Refuses a source in which some were found, unless they are allowed.

        Args:
            path: of the source.
            can_be_allowed: whether its reader has an option to let them through.

        Raises:
            InteropError: with the names of the tensors.
        """
        if self.found and not self.allowed:
            remedy = ". allow_nonfinite (--allow_nonfinite) reads it all the same"
            raise InteropError(
                f"{path} has NaN or infinity in {len(self.found)} of its tensors: {self.listed()}. "
                "The training that wrote it diverged, or the file is damaged: take an earlier "
                f"checkpoint or a new copy{remedy if can_be_allowed else ''}"
            )


class WatchedFile(TensorFile):
    """A file whose tensors are looked at when they are read."""

    def __init__(self, file: TensorFile, finiteness: Finiteness):
        self.path, self.kind = file.path, file.kind
        self.specs, self.metadata = file.specs, file.metadata
        self._file, self._finiteness = file, finiteness

    def _read(self, names: list[str]) -> Iterator[np.ndarray]:
        return self._finiteness.watched(names, self._file.read(names))
