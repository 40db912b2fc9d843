"""Checkpoints whose tensors' names have something before them, as wrappers and trainers write it.

DistributedDataParallel puts 'module.' before all names, torch.compile '_orig_mod.', Lightning the
attribute that holds the network ('model.', 'net.', 'ema.'), beside which there may be those of a
loss or of a second copy. No list of such names is needed: a prefix is what stands before the names
by which an architecture is recognised.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from dit_jax.interop.recognise import find_architectures, without_compiled
from dit_jax.interop.tensor_file import InteropError, TensorFile
from dit_jax.quantities import counted


class RenamedFile(TensorFile):
    """Some tensors of a file under other names.

    Args:
        file: the file.
        names: our name -> its name.
        metadata: instead of the file's.
    """

    def __init__(self, file: TensorFile, names: Mapping[str, str], metadata: Mapping[str, Any]):
        self.path, self.kind, self.metadata = file.path, file.kind, metadata
        self.specs = {name: file.specs[there] for name, there in names.items()}
        self._file, self._names = file, names

    def _read(self, names: list[str]) -> Iterator[np.ndarray]:
        return self._file.read([self._names[name] for name in names])


def without_prefix(
    file: TensorFile, architectures: Collection[str], choice: str = ""
) -> tuple[TensorFile, tuple[str, ...]]:
    """The network in a file by its own names, whatever stands before them there.

    Args:
        file: the file.
        architectures: names of those that are looked for (`recognise`).
        choice: which of several networks: its prefix or a part of it, such as 'ema'; by default
            the average, as where a checkpoint has several entries.

    Returns:
        The file itself if nothing stands before the names, else the part of it that is the network;
        and what to say of that.

    Raises:
        InteropError: several networks to choose from, or no such one.
    """
    names = _without_compiled(file)
    found = {
        prefix: architecture
        for prefix, architecture in find_architectures(names).items()
        if architecture in architectures
    }
    if not found:
        return file, ()
    prefix = _choose(file, list(found), choice)
    if not prefix and len(found) == 1 and all(ours == there for ours, there in names.items()):
        return file, ()
    others = [other for other in found if other != prefix]
    chosen = {
        name.removeprefix(prefix): there
        for name, there in names.items()
        if name.startswith(prefix) and not any(_belongs(name, o, prefix) for o in others)
    }
    metadata = dict(file.metadata)
    if others:
        metadata["weights"] = prefix.rstrip(".") or "model"
    return RenamedFile(file, chosen, metadata), _notes(file, names, chosen, prefix, others)


def _belongs(name: str, other: str, prefix: str) -> bool:
    """Whether a name under `prefix` is of a network whose prefix is longer."""
    return len(other) > len(prefix) and name.startswith(other)


def _without_compiled(file: TensorFile) -> dict[str, str]:
    """Names without the parts that torch.compile adds -> as they are in the file."""
    names: dict[str, str] = {}
    for there in file.specs:
        ours = without_compiled(there)
        if ours in names:
            raise InteropError(
                f"{file.path} has both {names[ours]!r} and {there!r}, which are one name without "
                "the prefix '_orig_mod' of torch.compile"
            )
        names[ours] = there
    return names


def _parts(prefix: str) -> list[str]:
    return prefix.lower().replace("_", ".").split(".")


def _choose(file: TensorFile, prefixes: list[str], choice: str) -> str:
    if choice:
        wanted = [p for p in prefixes if choice == p.rstrip(".") or choice in _parts(p)]
        if not wanted and choice in ("raw", "model") and "" in prefixes:
            wanted = [""]
        exact = [p for p in wanted if choice == p.rstrip(".")]
        wanted = exact or wanted
    elif len(prefixes) == 1:
        wanted = prefixes
    else:
        averages = [p for p in prefixes if "ema" in _parts(p)]
        bare = [p for p in prefixes if not p]
        wanted = averages or bare
    if len(wanted) == 1:
        return wanted[0]
    listed = ", ".join(f"{p!r}" if p else "no prefix" for p in prefixes)
    asked = f"not one of them is {choice!r}" if choice and not wanted else "which one is meant?"
    names = "|".join(p.rstrip(".") or "model" for p in prefixes)
    raise InteropError(
        f"{file.path} holds {len(prefixes)} networks, whose tensors begin with {listed}; {asked} "
        f"Say it with --weights={names}"
    )


def _notes(
    file: TensorFile,
    names: Mapping[str, str],
    chosen: Mapping[str, str],
    prefix: str,
    others: list[str],
) -> tuple[str, ...]:
    notes = []
    if prefix:
        notes.append(f"the tensors' names begin with {prefix!r}, which was left out")
    if any(ours != there for ours, there in names.items()):
        notes.append("'_orig_mod', which torch.compile adds to names, was left out")
    if others:
        others = [other.rstrip(".") or "model" for other in others]
        taken = prefix.rstrip(".") or "model"
        notes.append(
            f"of several networks in the file {taken!r} was taken; --weights={'|'.join(others)} "
            "takes another"
        )
    used = set(chosen.values())
    left = [there for there in file.specs if there not in used]
    left = [n for n in left if not any(n.startswith(other) for other in others if other)]
    if left:
        groups = sorted({name.partition(".")[0] for name in left})
        shown = ", ".join(groups[:6]) + (", ..." if len(groups) > 6 else "")
        notes.append(
            f"left aside as not of the network: {counted(len(left), 'tensor')} outside "
            f"{prefix!r}: {shown}"
        )
    return tuple(notes)
