"""Which devices a collective of a compiled program joins, in all ways XLA writes it."""

import itertools
import math
import re

import numpy as np

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)(]*(?:\([^)]*\))?)\))? *(\{[^}]*\})"
)
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")


def replica_groups(text: str, num_devices: int) -> np.ndarray:
    """The groups of a collective, a row of device ids each.

    Args:
        text: of the instruction: groups listed ({{0,1},{2,3}}), as a reshaped and transposed range
            ([4,2]<=[2,4]T(1,0)), as axes of a mesh (mesh['a'=2,'b'=4] {'b'}; 'b':(2)2 for a part
            of an axis), or {} for one group of all.
        num_devices: how many there are.

    Raises:
        ValueError: groups of different sizes, or written in another way.
    """
    if found := _MESH.search(text):
        return _mesh_groups(*found.groups())
    if found := _IOTA.search(text):
        shape, source, order = found.groups()
        return _range(source, order).reshape(_integers(shape))
    found = _LISTED.search(text)
    if found is None and "replica_groups=" in text:
        raise ValueError(f"cannot read the groups of this collective: {text[:300]}")
    if not found or not found.group(1):
        return np.arange(num_devices)[None]
    rows = [list(map(int, row.split(","))) for row in re.findall(r"\{([\d, ]+)\}", found.group(1))]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"groups of different sizes: {found.group(0)}")
    return np.array(rows)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _range(shape: str, order: str | None) -> np.ndarray:
    """0, 1, ... in a shape ('2,4'), its axes then reordered ('1,0')."""
    ids = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return ids.transpose(_integers(order)) if order else ids


def _mesh_groups(mesh: str, devices: str | None, axes: str) -> np.ndarray:
    """Groups of devices along some axes of a mesh, whose devices are in order or `devices`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    grouped = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    ]
    # Every axis as the parts before, inside and after what of it is grouped.
    cuts = {name: {1, size} for name, size in sizes.items()}
    for name, before, size in grouped:
        cuts[name] |= {before, before * size}
    parts = [
        (name, low, high // low)
        for name in sizes
        for low, high in itertools.pairwise(sorted(cuts[name]))
    ]
    ids = np.arange(math.prod(sizes.values()))
    if devices and (found := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", devices)):
        ids = _range(*found.groups())
    elif devices:
        ids = np.array(_integers(devices))
    ids = ids.reshape([size for *_, size in parts])
    inside = [
        i
        for name, before, size in grouped
        for i, (other, low, _) in enumerate(parts)
        if other == name and before <= low < before * size
    ]
    outside = [i for i in range(len(parts)) if i not in inside]
    size = math.prod(parts[i][2] for i in inside)
    return ids.transpose(*outside, *inside).reshape(-1, size)
