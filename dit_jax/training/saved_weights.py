"""Reading one set of weights out of a run's checkpoint, few arrays at a time.

A checkpoint holds four or more trees of the network's size (parameters, averages, the optimizer's
moments). Sampling and conversion need one of them, and conversion one array of it at a time.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dit_jax.training import workdir
from dit_jax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    MismatchError,
    fingerprint,
    paths_of,
    reason_of,
)
from dit_jax.training.method import Method
from dit_jax.tree_paths import by_path

_MOST_REMOVED = 10  # checkpoints that a run may remove before they were read
# Of arrays that are read together: each reading opens the checkpoint anew, which takes longer than
# a small array does.
_TOGETHER = 64 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class SavedWeights:
    """One set of weights of one checkpoint; nothing is read before it is asked for.

    Attributes:
        directory: the checkpoint's.
        name: of the weights, 'raw' or an average's.
        step: updates they have seen.
        leaves: nested like the parameters, the path in the checkpoint of each.
        fingerprints: by path in the checkpoint.
        sizes: bytes by path in the checkpoint.
    """

    directory: Path
    name: str
    step: int
    leaves: Any
    fingerprints: Mapping[str, int]
    sizes: Mapping[str, int]

    def read(self, path: str) -> np.ndarray:
        """Reads one array, in host memory.

        Args:
            path: in the checkpoint, a leaf of `leaves`.

        Raises:
            CheckpointError: it is damaged.
        """
        return self._read([path])[path]

    def _read(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Some arrays, all of them in host memory; raises as `read`, of the first that is wrong."""
        item: Any = jax.ShapeDtypeStruct((), np.float32)
        options: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        items, restore_args = (_nested({path: leaf for path in paths}) for leaf in (item, options))
        try:
            arguments = ocp.args.PyTreeRestore(
                items, restore_args=restore_args, partial_restore=True
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                found = by_path(checkpointer.restore(self.directory / "state", args=arguments))
        except Exception as error:  # whatever orbax and tensorstore raise on damaged files
            if len(paths) > 1:  # which one it is
                return {path: self.read(path) for path in paths}
            raise CheckpointError(
                f"checkpoint {self.directory} cannot be read at {paths[0]}: {reason_of(error)}"
            ) from error
        for path in paths:
            if fingerprint(found[path])[0] != self.fingerprints[path]:
                raise CheckpointError(
                    f"checkpoint {self.directory} is damaged: {path} is not what was written"
                )
        return found

    def _in_order(self) -> Iterator[np.ndarray]:
        """All arrays, in the order of `leaves`; few of them, or one, are in memory together."""
        together: list[str] = []
        for path in jax.tree.leaves(self.leaves):
            if together and sum(self.sizes[p] for p in (*together, path)) > _TOGETHER:
                yield from self._take(together)
                together = []
            together.append(path)
        yield from self._take(together)

    def _take(self, paths: Sequence[str]) -> Iterator[np.ndarray]:
        found = self._read(paths)
        for path in paths:
            yield found.pop(path)

    def load(
        self, put: Callable[[np.ndarray], Any] = lambda array: array, shapes: Any = None
    ) -> Any:
        """Reads all arrays, each handed to `put` before the next is read, or the next few.

        Args:
            put: makes a leaf of an array.
            shapes: nested like the parameters, with the dtypes to read them as; by default those
                they were saved in.
        """
        arrays = self._in_order()
        if shapes is None:
            return jax.tree.map(lambda _: put(next(arrays)), self.leaves)

        def load(_, shape):
            return put(next(arrays).astype(shape.dtype, copy=False))

        return jax.tree.map(load, self.leaves, shapes)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b': 1, 'a/c': 2} as {'a': {'b': 1, 'c': 2}}."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def choose_weights(available: Mapping[str, Any], wanted: str) -> str:
    """The name in `available` (`Method.weights`) that `wanted` means; 'ema' is the first average.

    Raises:
        CheckpointError: there are no such weights, with those there are.
    """
    averages = [name for name in available if name != "raw"]
    name = averages[0] if wanted == "ema" and averages else wanted
    if name not in available:
        raise CheckpointError(f"no weights {wanted!r}; there are {', '.join(available)}")
    return name


class RunWeights:
    """A set of weights in all checkpoints of a run.

    Args:
        directory: the run's workdir.
        method: the run's, for the structure of its state.
        weights: 'raw', 'ema' (the first average), or an average's name.

    Attributes:
        steps: of the checkpoints, ascending.

    Raises:
        CheckpointError: there is no checkpoint, or no such weights.
    """

    def __init__(self, directory: Path, method: Method, weights: str = "ema"):
        self._saved = Path(directory) / workdir.CHECKPOINTS
        if not self._saved.is_dir():
            raise CheckpointError(f"{directory} has no checkpoint yet: train first")
        self._checkpoints = Checkpoints(self._saved, read_only=True)
        self.steps = self._checkpoints.steps()
        if not self.steps:
            raise CheckpointError(f"{directory} has no checkpoint yet: train first")
        key = jax.eval_shape(lambda: jax.random.key(0))  # which compiles nothing
        self._state = {
            "state": jax.eval_shape(method.init, key),
            "key": jax.eval_shape(jax.random.key_data, key),
        }
        self._paths = paths_of(self._state)
        # A Method's weights are parts of its state: of a state of paths they are the paths.
        available = method.weights(self._paths["state"])
        self._name = choose_weights(available, weights)
        self._leaves = available[self._name]
        arrays = by_path(self._state)
        self._sizes = {
            path: math.prod(arrays[path].shape) * arrays[path].dtype.itemsize
            for path in jax.tree.leaves(self._leaves)
        }

    def open(self, step: int | None = None) -> SavedWeights:
        """The weights of the checkpoint of `step`, by default the newest.

        Raises:
            CheckpointError: there is none of that step, or its description is damaged.
            MismatchError: it is of another configuration.
        """
        step = self.steps[-1] if step is None else step
        if step not in self.steps:
            raise CheckpointError(
                f"no checkpoint of step {step} in {self._saved}; there are {self.steps}"
            )
        found = self._checkpoints.inspect(self._state, step)
        if any(path not in found for path in jax.tree.leaves(self._leaves)):
            raise MismatchError(
                f"checkpoint {self._checkpoints.path(step)} has no {self._name}: that average was "
                "added to the run later. Choose other weights (raw, ...) or a newer step"
            )
        where, sizes = self._checkpoints.path(step), self._sizes
        return SavedWeights(where, self._name, step, self._leaves, found, sizes)

    def load(
        self, put: Callable[[np.ndarray], Any], step: int | None = None, shapes: Any = None
    ) -> tuple[SavedWeights, Any]:
        """Reads all arrays of the newest checkpoint that can be read, or of `step`.

        The run may be training: checkpoints that it removed meanwhile are passed over, and those
        that it wrote are found.

        Args:
            put: makes a leaf of an array.
            step: which checkpoint.
            shapes: see `SavedWeights.load`.

        Returns:
            Where they are from, and the arrays as `put` made them, nested like the parameters.

        Raises:
            CheckpointError: none can be read, or that of `step` cannot.
        """
        damaged, removed = [], []
        while len(removed) < _MOST_REMOVED:
            left = [s for s in self.steps if s not in damaged and s not in removed]
            if step is None and not left:
                break
            candidate = left[-1] if step is None else step
            try:
                saved = self.open(candidate)
                return saved, saved.load(put, shapes)
            except CheckpointError as error:
                self.steps = self._checkpoints.refresh()
                is_there = candidate in self.steps
                if step is not None or (isinstance(error, MismatchError) and is_there):
                    raise
                (damaged if is_there else removed).append(candidate)
                if is_there:
                    logging.warning("%s; trying another one", error)
        tried = f"none of the checkpoints {sorted(damaged + removed)} in {self._saved} can be read"
        if removed:
            tried += (
                f": {removed} were removed while they were read. A run that is training keeps its "
                "newest ones for longer with a higher config.training.keep_last or "
                "config.training.checkpoint_every"
            )
        raise CheckpointError(tried)
