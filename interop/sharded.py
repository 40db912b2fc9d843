"""Checkpoints in several files: an index (*.index.json) and the shards it names, beside it.

diffusers writes large models so, as safetensors or, with safe_serialization=False, as files of
torch.save, which are read by the same rules as any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.interop.pt_files import open_pt
from dit_jax.interop.safetensors_files import open_safetensors
from dit_jax.interop.tensor_file import InteropError, TensorFile, check_names, refusals
from dit_jax.quantities import counted
from dit_jax.untrusted import check_file_name, check_within, read_json, shown

PT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
# How one of several files is called: 'diffusion_pytorch_model-00001-of-00002'.
_SHARD = re.compile(r"(?P<name>.+)-(?P<place>\d{5,})-of-(?P<count>\d{5,})")


class ShardedFile(TensorFile):
    """A checkpoint of several files.

    Args:
        path: the index.
        parts: tensor name -> the file that holds it.
        metadata: the index's.
    """

    def __init__(self, path: Path, parts: Mapping[str, TensorFile], metadata: Mapping[str, Any]):
        self.path, self.metadata = path, dict(metadata)
        self._parts = dict(parts)
        self.kind = next(iter(self._parts.values())).kind
        self.specs = {name: part.specs[name] for name, part in self._parts.items()}

    def _read(self, names: list[str]) -> Iterator[np.ndarray]:
        position = 0
        while position < len(names):
            part = self._parts[names[position]]
            # Neighbours in the same shard are read in one go.
            end = position + 1
            while end < len(names) and self._parts[names[end]] is part:
                end += 1
            yield from part.read(names[position:end])
            position = end


def open_sharded(path: Path) -> ShardedFile:
    """Open the shards that an index names, which lie beside it.

    Raises:
        InteropError: If the index is not one, names files outside its folder, or disagrees with
            the shards; or a shard cannot be read.
    """
    weight_map, metadata = _read_index(path)
    shards: dict[str, TensorFile] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not (path.parent / file).is_file():
            raise InteropError(
                f"{path} names the shard {file!r}, which is not beside it; download all of "
                f"{', '.join(sorted(set(weight_map.values()))[:100])}"
            )
        with refusals():
            check_within(path.parent / file, path.parent)
        shards[file] = _open_shard(path.parent / file)
    for name, file in weight_map.items():
        if name not in shards[file].specs:
            raise InteropError(f"{path} says that {shown(name)} is in {file}, where it is not")
    unlisted = [
        f"{shown(name)} ({file})"
        for file, shard in shards.items()
        for name in shard.specs
        if weight_map.get(name) != file
    ]
    if unlisted:
        raise InteropError(
            f"{path} does not list {counted(len(unlisted), 'tensor')} of its shards: "
            f"{', '.join(unlisted[:5])}; are index and shards of the same checkpoint?"
        )
    return ShardedFile(path, {name: shards[file] for name, file in weight_map.items()}, metadata)


def shard_place(path: Path) -> re.Match | None:
    """The parts 'name', 'place' and 'count' of the name of one of several files; None of others."""
    match = _SHARD.fullmatch(path.stem)
    return match if match and int(match["count"]) > 1 else None


def refuse_shard(path: Path) -> None:
    """Refuses one of the files of a checkpoint in several, which is no checkpoint by itself.

    Raises:
        InteropError: its name says that it is one; says what to give.
    """
    match = shard_place(path)
    if not match:
        return
    index = path.with_name(match["name"] + _index_suffix(path))
    what = f"{path} is shard {int(match['place'])} of {int(match['count'])} of a checkpoint"
    if index.is_file():
        raise InteropError(f"{what}: give its folder, {path.parent}, or the index, {index.name}")
    raise InteropError(
        f"{what}, whose index is missing: put {index.name}, which lists the shards, beside it, "
        f"and give the folder, {path.parent}"
    )


def _index_suffix(shard: Path) -> str:
    return INDEX_SUFFIXES[0 if shard.suffix == ".safetensors" else 1]


def _open_shard(path: Path) -> TensorFile:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    return open_pt(path, keep_names=True)


def shards_of(index: Path) -> list[str]:
    """Names of the files that an index names, which lie beside it.

    Raises:
        InteropError: If it is no index.
    """
    return sorted(set(_read_index(index)[0].values()))


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    with refusals():
        index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InteropError(
            f"{path} is JSON but no index of shards: it has no 'weight_map' from tensor names to "
            "files; give the weights (.safetensors, .index.json, .pt)"
        )
    check_names(path, weight_map)
    for file in weight_map.values():
        # An index from elsewhere must not reach other folders.
        with refusals():
            check_file_name(file, path)
        if (path.parent / file).suffix not in (".safetensors", *PT_SUFFIXES):
            raise InteropError(
                f"{path} names the shard {file!r}: expected .safetensors, or a file of torch.save "
                f"({', '.join(PT_SUFFIXES)})"
            )
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


# How diffusers and transformers call the weights of a model, best first.
_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
DIFFUSERS_NAMES = tuple(f"diffusion_pytorch_model{suffix}" for suffix in _SUFFIXES)
TRANSFORMERS_NAMES = (
    *(f"model{suffix}" for suffix in _SUFFIXES[:2]),
    *(f"pytorch_model{suffix}" for suffix in _SUFFIXES[2:]),
)


def find_weights(folder: Path, names: tuple[str, ...] = DIFFUSERS_NAMES) -> Path:
    """The weights of a model that a library saved; the folder itself if none are called so."""
    return next((folder / name for name in names if (folder / name).is_file()), folder)
