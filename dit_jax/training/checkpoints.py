"""Checkpoints: everything a run needs to go on bit for bit, written while training continues.

A checkpoint is one orbax step directory holding the Method's state, the data iterator's state and a
fingerprint of the arrays. orbax writes it under a temporary name and renames it when complete, so
an interrupted write leaves the older checkpoints as they were; the fingerprint finds what a
damaged disk or a partial copy changed later.
"""

import contextlib
import dataclasses
import functools
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dit_jax.training import saved_averages
from dit_jax.tree_paths import by_path, path_of, paths_of

# What tensorstore appends to its messages, as [tensorstore_spec='{"context":...
_DETAILS = re.compile(r"\s*\[(?:tensorstore_spec|source locations?|domain)\b")


class CheckpointError(RuntimeError):
    """No checkpoint could be read or written."""


class MismatchError(CheckpointError):
    """A whole checkpoint, of another architecture or method."""


def reason_of(error: Exception) -> str:
    """What orbax or tensorstore says of a file, without the specification of the whole array."""
    text = str(error).strip().split(". See full")[0].split("\n")[0]
    return _DETAILS.split(text)[0].strip() or repr(error)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds.

    Attributes:
        step: updates made when it was written.
        state: the Method's state.
        data: the data iterator's state, a JSON-able dict.
        notes: a line about each average that the target has and the checkpoint has not, or the
            other way round (`saved_averages`).
    """

    step: int
    state: Any
    data: dict
    notes: list[str] = dataclasses.field(default_factory=list)


def _bit_sums(tree: Any) -> jax.Array:
    def bit_sum(leaf):
        bits = leaf.astype(jnp.uint32) if leaf.dtype == jnp.bool_ else leaf
        if bits.dtype.itemsize != 4:
            bits = jax.lax.bitcast_convert_type(
                bits, {1: jnp.uint8, 2: jnp.uint16, 8: jnp.uint32}[bits.dtype.itemsize]
            )
        else:
            bits = jax.lax.bitcast_convert_type(bits, jnp.uint32)
        return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jnp.stack([bit_sum(leaf) for leaf in jax.tree.leaves(tree)])


def _host_bit_sum(leaf: Any) -> int:
    bits = np.ascontiguousarray(leaf).reshape(-1)
    bits = bits.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[bits.itemsize])
    return int(bits.sum(dtype=np.uint32))


def _on_host(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or (
        leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())
    )


@functools.cache
def _compiled_bit_sums(mesh: jax.sharding.Mesh | None):
    # Every process reads the sums: they must be whole on each.
    whole = mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(_bit_sums, out_shardings=whole)


def fingerprint(tree: Any) -> list[int]:
    """Per leaf the sum of its bit patterns modulo 2^32: exact and independent of the sharding."""
    leaves = jax.tree.leaves(tree)
    if all(map(_on_host, leaves)):  # where they lie: a program for each tree takes seconds
        return [_host_bit_sum(leaf) for leaf in leaves]
    shardings = [leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array)]
    meshes = [s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
    several = jax.process_count() > 1 and meshes
    return [int(s) for s in np.asarray(_compiled_bit_sums(meshes[0] if several else None)(tree))]


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
        directory: where they are or will be; created if missing.
        keep_last: how many recent ones to keep.
        keep_every: also keep those whose step is a multiple of this; 0 for none.
        read_only: leave everything on disk as it is; another process may be writing.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        self.directory = Path(directory).absolute()
        self._made = not read_only and not self.directory.exists()
        if keep_last < 1:
            raise ValueError(f"training.keep_last={keep_last}: expected at least 1")
        if keep_every < 0:
            raise ValueError(f"training.keep_every={keep_every}: expected 0 or more")
        if read_only:  # orbax's own option of this name differs by warnings only
            options = ocp.CheckpointManagerOptions(create=False)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep_last,
                keep_period=keep_every or None,
                create=True,
                cleanup_tmp_directories=True,  # what a killed run had not finished writing
                enable_async_checkpointing=True,
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            # Named here, so that another process can read what is in a checkpoint before it does.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def refresh(self) -> list[int]:
        """As `steps`, read from the disk again: another process may have written and removed."""
        self._manager.reload()
        return self.steps()

    def path(self, step: int) -> Path:
        """Directory of the checkpoint of `step`."""
        return self.directory / str(step)

    def save(self, step: int, state: Any, data: dict) -> None:
        """Starts writing; returns once the arrays are copied off the device."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave({"fingerprint": fingerprint(state)}),
            ),
        )

    def wait(self) -> None:
        """Blocks until every started write is complete; raises what a write raised."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def restore(
        self, target: Any, step: int | None = None, *, set_aside: bool = False
    ) -> Restored | None:
        """The newest readable checkpoint, or that of `step`.

        Args:
            target: tree of `jax.ShapeDtypeStruct` with shardings, or of arrays, like the saved; its
                averages may be others.
            step: a particular checkpoint; then damage is an error instead of a step back.
            set_aside: rename damaged ones to '<step>.damaged', so that training can write that step
                again. Otherwise nothing on disk is touched.

        Returns:
            What was saved, or None where there is no checkpoint at all. A damaged checkpoint is
            named in a warning, and the one before it is taken.

        Raises:
            CheckpointError: checkpoints exist, but none can be read.
        """
        candidates = [step] if step is not None else self.steps()[::-1]
        if step is not None and step not in self.steps():
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.directory}; there are {self.steps()}"
            )
        damaged = []
        for candidate in candidates:
            cause = None
            try:
                found = self._read(target, candidate)
            except (MismatchError, MemoryError):
                raise
            except Exception as error:  # whatever orbax and tensorstore raise on damaged files
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                cause = error
                reason = reason_of(error)
            else:
                if fingerprint(found["state"]) == found["meta"]["fingerprint"]:
                    if set_aside:  # not before it is clear that the run goes on
                        self._set_aside(damaged)
                    state, notes = saved_averages.as_wanted(found["state"], target)
                    state, more = saved_averages.in_wanted_dtypes(state, target)
                    return Restored(candidate, state, found["data"], notes + more)
                reason = "its arrays are not the ones that were written"
            if step is not None:
                raise CheckpointError(
                    f"checkpoint {self.path(candidate)} cannot be read: {reason}"
                ) from cause
            logging.warning(
                "checkpoint %s is damaged (%s); trying the one before it",
                self.path(candidate),
                reason,
            )
            damaged.append(candidate)
        if candidates:
            raise CheckpointError(
                f"none of the checkpoints {candidates} in {self.directory} can be read; move the "
                "directory away to start again"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                self.path(step).rename(self.path(step).with_name(f"{step}.damaged"))
        self._manager.reload()

    def _as_saved(self, target: Any, step: int) -> Any:
        """`target` with the averages that the checkpoint has, and in its dtypes.

        A checkpoint of another network is not damaged: the error says what differs.
        """
        tree = self._manager.item_metadata(step)["state"].tree
        target = saved_averages.as_saved(target, tree)
        saved, wanted = by_path(tree), by_path(target)
        lines = [f"  {k}: only in the checkpoint" for k in sorted(saved.keys() - wanted.keys())]
        lines += [f"  {k}: not in the checkpoint" for k in sorted(wanted.keys() - saved.keys())]
        lines += [
            f"  {k}: {tuple(saved[k].shape)} in the checkpoint, {tuple(wanted[k].shape)} expected"
            for k in sorted(saved.keys() & wanted.keys())
            if tuple(saved[k].shape) != tuple(wanted[k].shape)
        ]
        if lines:
            shown = "\n".join(lines[:20] + ([f"  ... {len(lines) - 20} more"] * (len(lines) > 20)))
            raise MismatchError(
                f"checkpoint {self.path(step)} belongs to another configuration:\n{shown}"
            )

        def as_stored(path, leaf):
            dtype, sharding = saved[path_of(path)].dtype, getattr(leaf, "sharding", None)
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(as_stored, target)

    def inspect(self, target: Any, step: int) -> dict[str, int]:
        """Fingerprints by path of a checkpoint of a tree like `target`, but for its averages.

        Raises:
            MismatchError: it was not.
            CheckpointError: its description cannot be read.
        """
        try:
            names = jax.tree.leaves(paths_of(self._as_saved(target, step)))
            arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
            sums = self._manager.restore(step, args=arguments)["meta"]["fingerprint"]
            return dict(zip(names, sums, strict=True))
        except MismatchError:
            raise
        except Exception as error:  # whatever orbax and tensorstore raise on damaged files
            raise CheckpointError(
                f"checkpoint {self.path(step)} cannot be read: {reason_of(error)}"
            ) from error

    def _read(self, target: Any, step: int) -> Any:
        abstract = self._as_saved(jax.tree.map(ocp.utils.to_shape_dtype_struct, target), step)
        return self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                data=ocp.args.JsonRestore(),
                meta=ocp.args.JsonRestore(),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Closes; where an error is on its way already, without another that it caused."""
        if kind is None:
            self.close()
        elif issubclass(kind, Exception):  # not where somebody wants to be gone at once
            with contextlib.suppress(Exception):
                self.close()
            if jax.process_count() == 1:  # what was not finished takes space, of a full disk maybe
                for unfinished in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
                if self._made:  # a run that was refused leaves nothing
                    with contextlib.suppress(OSError):  # not empty
                        self.directory.rmdir()

    def close(self) -> None:
        """Waits for pending writes and releases orbax's threads."""
        self.wait()
        self._manager.close()
