"""Safetensors files, read by memory map and streamed out.

The format: 8 bytes (the header's length, little-endian), the header in JSON, then the tensors'
bytes without gaps. The `safetensors` library judges whether a file is sound. The bytes are copied
out of a memory map of our own, because the library's NumPy side has no float8 and keeps every page
it has touched in memory until the file is closed.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.interop.tensor_file import (
    DTYPE_OF_SAFETENSORS,
    MAX_TENSORS,
    SAFETENSORS_OF_DTYPE,
    FileState,
    HashingWriter,
    InteropError,
    TensorFile,
    TensorSpec,
    check_names,
    check_writable,
    checked_arrays,
    raw_bytes,
    sha256_of,
)
from dit_jax.untrusted import (
    open_regular,
    shown,
)

# A hundred thousand tensors of long names; the safetensors library itself reads 100 MB.
MAX_HEADER_BYTES = 16 * 2**20
_MAX_DIMENSIONS = 64
_COPY_BYTES = 1 << 26  # of a mapping at a time


@dataclass(frozen=True)
class _Shard:
    """One safetensors file: its state when opened and where each tensor's bytes begin in it."""

    state: FileState
    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    metadata: dict[str, str]


class SafetensorsFile(TensorFile):
    """A safetensors checkpoint of one file."""

    kind = "safetensors"

    def __init__(self, path: Path):
        """Open the file; see `open_safetensors`."""
        self.path = path
        self._shard = _open_shard(path)
        self.specs, self.metadata = self._shard.specs, dict(self._shard.metadata)

    def _read(self, names: list[str]) -> Iterator[np.ndarray]:
        return _read_shard(self._shard, names)


def _read_shard(shard: _Shard, names: list[str]) -> Iterator[np.ndarray]:
    shard.state.check()
    with (
        open_regular(shard.state.path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
    ):
        for name in names:
            yield _copy(mapping, shard.offsets[name], shard.specs[name])


def _copy(mapping: mmap.mmap, offset: int, spec: TensorSpec) -> np.ndarray:
    array = np.empty(spec.shape, spec.dtype)
    target = raw_bytes(array) if spec.nbytes else array
    for start in range(0, spec.nbytes, _COPY_BYTES):
        end = min(start + _COPY_BYTES, spec.nbytes)
        # Released at once, so that the mapping can be closed while the caller holds the array.
        with memoryview(mapping) as view, view[offset + start : offset + end] as piece:
            target[start:end] = np.frombuffer(piece, np.uint8)
        if hasattr(mmap, "MADV_DONTNEED"):
            # Pages read count as resident until then: a large tensor would be there twice.
            first = (offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, first, offset + end - first)
    return array


def open_safetensors(path: Path) -> SafetensorsFile:
    """Open one safetensors file.

    Raises:
        InteropError: If the file is truncated, or its header is not sound.
    """
    return SafetensorsFile(path)


def _open_shard(path: Path) -> _Shard:
    state = FileState.of(path)
    header, start = _read_header(path, state.size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InteropError(f"{path}: __metadata__ must map strings to strings")
    check_names(path, header)
    specs, extents = {}, {}
    for name, entry in header.items():
        specs[name], extents[name] = _parse_entry(path, name, entry)
    _check_extents(path, extents, state.size - start)
    _check_by_library(path)
    return _Shard(
        state, specs, {name: start + begin for name, (begin, _) in extents.items()}, metadata
    )


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with open_regular(path) as file:
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            raise InteropError(f"{path} has {size} bytes, too few for a safetensors file")
        (length,) = struct.unpack("<Q", length_bytes)
        if length > MAX_HEADER_BYTES:
            raise InteropError(
                f"{path} is not a safetensors file: it would begin with a header of {length} "
                f"bytes; at most {MAX_HEADER_BYTES} are read"
            )
        if 8 + length > size:
            raise InteropError(
                f"{path} is truncated within its header: {8 + length} bytes expected, {size} "
                "there; download or copy it again"
            )
        text = file.read(length)
    # Counted before they are parsed, which takes far more memory.
    entries = text.count(b'"data_offsets"')
    if entries > MAX_TENSORS or text.count(b"{") > 4 * MAX_TENSORS:
        raise InteropError(
            f"{path} has {entries} tensors in its header; a file of more than {MAX_TENSORS} is not "
            "read"
        )
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except InteropError as error:
        raise InteropError(f"{path}: the safetensors header cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "not JSON"
        raise InteropError(f"{path}: the safetensors header cannot be read: {reason}") from error
    if not isinstance(header, dict):
        raise InteropError(f"{path}: the safetensors header is no table of tensors")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InteropError(f"{shown(name)} is there twice")
            seen.add(name)
    return table


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorSpec, tuple[int, int]]:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, extent = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _is_sizes(shape) or not _is_sizes(extent) or len(extent) != 2:
        raise InteropError(
            f"{path}: the header's entry of {shown(name)} is malformed: expected "
            '{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}'
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_OF_SAFETENSORS:
        raise InteropError(
            f"{path}: tensor {shown(name)} has the type {shown(dtype)}, which is not supported; "
            f"known are {', '.join(DTYPE_OF_SAFETENSORS)}"
        )
    spec = TensorSpec(tuple(shape), DTYPE_OF_SAFETENSORS[dtype])
    if extent[1] - extent[0] != spec.nbytes:
        raise InteropError(
            f"{path}: the header gives {shown(name)} {extent[1] - extent[0]} bytes, but "
            f"{spec.dtype.name}{shown(shape)} has {shown(spec.nbytes)}; the file is damaged"
        )
    if math.prod(max(length, 1) for length in shape) >= 2**48:  # of no elements, and yet too large
        raise InteropError(f"{path}: {shown(name)} has the impossible shape {shown(shape)}")
    return spec, (extent[0], extent[1])


def _check_extents(path: Path, extents: Mapping[str, tuple[int, int]], available: int) -> None:
    """The tensors must fill the data without overlap, gap, or end beyond the file's."""
    previous, end = "the header", 0
    for name, (begin, stop) in sorted(extents.items(), key=lambda item: item[1]):
        if begin != end:
            relation = "overlaps" if begin < end else "leaves a gap to"
            raise InteropError(f"{path}: tensor {name!r} {relation} {previous}; it is damaged")
        previous, end = repr(name), stop
    if end > available:
        raise InteropError(
            f"{path} is truncated: its tensors need {end} bytes after the header, {available} are "
            "there; download or copy it again"
        )
    if end < available:
        raise InteropError(f"{path} has {available - end} bytes after its last tensor; damaged?")


def _check_by_library(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise InteropError(f"{path} is not a sound safetensors file: {error}") from error


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    arrays: Iterator[np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write tensors as they come, one in memory at a time.

    Tensors lie in the file in the order of `specs`, wider types before narrower ones: the format
    has no padding, and PyTorch maps a tensor only at a multiple of its element's size.

    Args:
        path: The file to write; an existing one is overwritten, and an error leaves it unfinished.
        specs: The tensors to come, by name.
        arrays: The tensors, in the order of `specs`.
        metadata: Strings for the header's `__metadata__`, such as {"format": "pt"}.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        InteropError: If a tensor is not as announced, or their number is not.
    """
    path = Path(path)
    check_writable(path, specs)
    layout = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header, offsets = _make_header(path, specs, layout, metadata)
    in_order = layout == list(specs)
    with path.open("wb") as file:
        stream = HashingWriter(file)
        stream.write(header)
        for name, array in checked_arrays(path, specs, arrays):
            if not in_order:
                file.seek(offsets[name])
            stream.write(raw_bytes(array))
            del array
    return stream.hexdigest() if in_order else sha256_of(path)


def _make_header(
    path: Path,
    specs: Mapping[str, TensorSpec],
    layout: list[str],
    metadata: Mapping[str, str] | None,
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the first tensor, and the position of every tensor in the file."""
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(part, str) for item in metadata.items() for part in item):
            raise InteropError(f"{path}: metadata must map strings to strings, got {metadata!r}")
        header["__metadata__"] = dict(metadata)
    position, begins = 0, {}
    for name in layout:
        if name == "__metadata__":
            raise InteropError(f"{path}: no tensor can be named '__metadata__' in this format")
        spec = specs[name]
        begins[name] = position
        header[name] = {
            "dtype": SAFETENSORS_OF_DTYPE[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise InteropError(f"{path}: a header of {len(text)} bytes is too long for the format")
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {n: start + b for n, b in begins.items()}
