"""Writing checkpoints of PyTorch, tensor by tensor and without PyTorch.

The file is what torch.save writes: an uncompressed zip archive with the pickled structure first
(data.pkl), then each tensor's bytes as a record of its own, so that torch.load reads it with
weights_only=True, and with mmap=True. torch.save itself needs all tensors in memory at once.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dit_jax.interop.tensor_file import (
    TORCH_OF_DTYPE,
    HashingWriter,
    TensorSpec,
    check_writable,
    checked_arrays,
    raw_bytes,
)

# torch.load places mapped tensors where the file has them; vector units like multiples of 64.
ALIGNMENT = 64
# Types with a storage class of their own; younger types are stored as bytes and named beside.
STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
}


def write_pt(
    path: str | Path, specs: Mapping[str, TensorSpec], arrays: Iterator[np.ndarray]
) -> str:
    """Write a state dict (an OrderedDict of tensors) as they come, one in memory at a time.

    Args:
        path: The file to write; an existing one is overwritten, and an error leaves it unfinished.
        specs: The tensors to come, by name.
        arrays: The tensors, in the order of `specs`.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        InteropError: If a tensor is not as announced, or their number is not.
    """
    path = Path(path)
    check_writable(path, specs)
    with path.open("wb") as file:
        # Without seek and tell, zipfile writes sizes and checksums after each record, as torch
        # does, so that the bytes are hashed in one pass.
        stream = HashingWriter(file)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            _write_record(archive, stream, "data.pkl", _pickle_structure(specs))
            _write_record(archive, stream, "byteorder", b"little")
            _write_record(archive, stream, "version", b"3\n")
            for index, (_, array) in enumerate(checked_arrays(path, specs, arrays)):
                _write_record(archive, stream, f"data/{index}", raw_bytes(array))
                del array
    return stream.hexdigest()


def _write_record(archive: zipfile.ZipFile, stream: HashingWriter, name: str, data) -> None:
    data = memoryview(data)
    record = zipfile.ZipInfo(f"archive/{name}")
    record.file_size = data.nbytes
    large = data.nbytes * 1.05 > zipfile.ZIP64_LIMIT
    # A local header is 30 bytes, the name, and extra fields, of which zipfile adds one of 20 bytes
    # to large records; ours ("FB", as torch's) fills up to the alignment.
    header = 30 + len(record.filename) + (20 if large else 0) + 4
    padding = -(stream.position + header) % ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(record, "w", force_zip64=large) as target:
        target.write(data)


def _pickle_structure(specs: Mapping[str, TensorSpec]) -> bytes:
    """The pickle (protocol 2) of an OrderedDict of tensors whose bytes are records 0, 1, ...."""
    parts = [pickle.PROTO + b"\x02", _EMPTY_ORDERED_DICT, pickle.MARK]
    for index, (name, spec) in enumerate(specs.items()):
        parts += [_text(name), _tensor(str(index), spec)]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _tensor(key: str, spec: TensorSpec) -> bytes:
    dtype = TORCH_OF_DTYPE[spec.dtype]
    strides = [1]
    for length in reversed(spec.shape[1:]):
        strides.insert(0, strides[0] * max(length, 1))
    if dtype in STORAGES:
        rebuild, storage, count = (
            "_rebuild_tensor_v2",
            _global("torch", STORAGES[dtype]),
            spec.size,
        )
        last = b""
    else:
        rebuild, storage = "_rebuild_tensor_v3", _global("torch.storage", "UntypedStorage")
        count, last = spec.nbytes, _global("torch", dtype)
    storage_id = [_text("storage"), storage, _text(key), _text("cpu"), _integer(count)]
    return b"".join(
        [
            _global("torch._utils", rebuild),
            pickle.MARK,
            _tuple(storage_id) + pickle.BINPERSID,
            _integer(0),  # Offset into the storage.
            _tuple(map(_integer, spec.shape)),
            _tuple(map(_integer, strides[: len(spec.shape)])),
            pickle.NEWFALSE,  # requires_grad
            _EMPTY_ORDERED_DICT,  # Backward hooks.
            last,
            pickle.TUPLE,
            pickle.REDUCE,
        ]
    )


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


_EMPTY_ORDERED_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _tuple(items) -> bytes:
    return b"".join([pickle.MARK, *items, pickle.TUPLE])
