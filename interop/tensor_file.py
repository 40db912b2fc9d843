"""What a file of named tensors is to this library, whatever its format.

Tensors are NumPy arrays; bfloat16 and float8, which NumPy lacks, are the types of `ml_dtypes`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np

from dit_jax.nearest import nearest
from dit_jax.quantities import counted
from dit_jax.untrusted import FileRefusedError, open_regular, shown


class InteropError(ValueError):
    """A checkpoint that cannot be read, written or converted; the message says what to do."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor, in the axis order of its file.

    Attributes:
        shape: Lengths of the axes; () for a scalar.
        dtype: A NumPy type, or a type of `ml_dtypes` for bfloat16 and float8.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(length) for length in self.shape))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * self.dtype.itemsize

    def __str__(self):
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


class TensorFile(ABC):
    """Named tensors of a checkpoint, read one at a time.

    Between two calls of `read` nothing is open or mapped: a checkpoint larger than the memory is
    read with the memory of one tensor at a time.

    Attributes:
        path: The file opened; for a sharded checkpoint its index.
        kind: "safetensors", "pt" or "edm_pkl".
        specs: Name to shape and type, in the order of the file.
        metadata: What else the file says: the `__metadata__` of safetensors; for .pt files see
            `dit_jax.interop.pt_files`.
    """

    path: Path
    kind: Literal["safetensors", "pt", "edm_pkl"]
    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, Any]

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield tensors one at a time, in the order of `names`, each an array of its own.

        Args:
            names: Names among `specs`; a name may come twice.

        Raises:
            InteropError: If the file has no such tensor (at once), was changed or removed since it
                was opened, or cannot be read to the end (while iterating).
        """
        names = list(names)
        unknown = [name for name in names if name not in self.specs]
        if unknown:
            close = nearest(unknown[0], self.specs, count=3, cutoff=0.6)
            hint = f"; close names: {', '.join(close)}" if close else ""
            raise InteropError(
                f"{self.path} has no tensor named {', '.join(map(repr, unknown[:5]))}"
                f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}; it has "
                f"{counted(len(self.specs), 'tensor')}{hint}"
            )
        return self._read(names)

    @abstractmethod
    def _read(self, names: list[str]) -> Iterator[np.ndarray]:
        """Yield the tensors; all names are known."""


@dataclass(frozen=True)
class FileState:
    """Size and time of a file, to notice that it was written to between opening and reading."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Look at the file now."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Raise an InteropError unless the file is as it was."""
        try:
            now = FileState.of(self.path)
        except OSError as error:
            raise InteropError(f"{self.path} was removed after it was opened") from error
        if now != self:
            raise InteropError(
                f"{self.path} was changed after it was opened: {self.size} bytes then, {now.size} "
                "now; wait until it is written and open it again"
            )


class HashingWriter:
    """A binary stream that can only be appended to, and knows the SHA-256 of what it wrote."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._hash = hashlib.sha256()
        self.position = 0

    def write(self, data) -> int:
        """Append bytes, or anything with a buffer of bytes."""
        view = memoryview(data)
        self._stream.write(view)
        self._hash.update(view)
        self.position += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Flush the stream below."""
        self._stream.flush()

    def hexdigest(self) -> str:
        """SHA-256 of everything written so far."""
        return self._hash.hexdigest()


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Files that are not read (`dit_jax.untrusted`), as errors of this room."""
    try:
        yield
    except FileRefusedError as error:
        raise InteropError(str(error)) from error


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    with refusals(), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """The elements of an array in C order as uint8 [nbytes]; no copy of a contiguous array."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def checked_arrays(
    path: Path, specs: Mapping[str, TensorSpec], arrays: Iterable[np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Pair arrays with the specs they were announced by, keeping none of them.

    Raises:
        InteropError: At the first array of another shape or type, or if there are too few or too
            many arrays.
    """
    arrays = iter(arrays)
    for count, (name, spec) in enumerate(specs.items()):
        try:
            array = np.asarray(next(arrays))
        except StopIteration:
            raise InteropError(
                f"{path}: {len(specs)} tensors were announced, only {count} came; the first "
                f"missing one is {name!r}"
            ) from None
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise InteropError(
                f"{path}: tensor {name!r} was announced as {spec}, but came as "
                f"{TensorSpec(array.shape, array.dtype)}"
            )
        yield name, array
        # Not to hold this array while the next one is made.
        del array
    if next(arrays, None) is not None:
        raise InteropError(f"{path}: more arrays came than the {len(specs)} announced")


# Name in safetensors and in torch of every type that is read and written.
_TYPES = (
    (np.dtype(np.bool_), "BOOL", "bool"),
    (np.dtype(np.uint8), "U8", "uint8"),
    (np.dtype(np.int8), "I8", "int8"),
    (np.dtype(np.uint16), "U16", "uint16"),
    (np.dtype(np.int16), "I16", "int16"),
    (np.dtype(np.uint32), "U32", "uint32"),
    (np.dtype(np.int32), "I32", "int32"),
    (np.dtype(np.uint64), "U64", "uint64"),
    (np.dtype(np.int64), "I64", "int64"),
    (np.dtype(np.float16), "F16", "float16"),
    (np.dtype(ml_dtypes.bfloat16), "BF16", "bfloat16"),
    (np.dtype(np.float32), "F32", "float32"),
    (np.dtype(np.float64), "F64", "float64"),
    (np.dtype(np.complex64), "C64", "complex64"),
    (np.dtype(ml_dtypes.float8_e4m3fn), "F8_E4M3", "float8_e4m3fn"),
    (np.dtype(ml_dtypes.float8_e5m2), "F8_E5M2", "float8_e5m2"),
    (np.dtype(ml_dtypes.float8_e4m3fnuz), "F8_E4M3FNUZ", "float8_e4m3fnuz"),
    (np.dtype(ml_dtypes.float8_e5m2fnuz), "F8_E5M2FNUZ", "float8_e5m2fnuz"),
    (np.dtype(ml_dtypes.float8_e8m0fnu), "F8_E8M0", "float8_e8m0fnu"),
)
DTYPE_OF_SAFETENSORS = {name: dtype for dtype, name, _ in _TYPES}
SAFETENSORS_OF_DTYPE = {dtype: name for dtype, name, _ in _TYPES}
DTYPE_OF_TORCH = {name: dtype for dtype, _, name in _TYPES}
TORCH_OF_DTYPE = {dtype: name for dtype, _, name in _TYPES}


MAX_TENSORS, MAX_NAME = 100_000, 1024


def check_names(path: Path, names: Collection[Any]) -> None:
    """Raise an InteropError for more tensors, or longer names, than any checkpoint has."""
    if len(names) > MAX_TENSORS:
        raise InteropError(
            f"{path} has {len(names)} tensors; a file of more than {MAX_TENSORS} is not read"
        )
    for name in names:
        if len(name) > MAX_NAME:
            raise InteropError(f"{path}: {shown(name)} is no name of a tensor")


def check_writable(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Raise an InteropError for names and types that no checkpoint format has."""
    for name, spec in specs.items():
        if not isinstance(name, str) or not name:
            raise InteropError(f"{path}: the name of a tensor must be a string, not {name!r}")
        if spec.dtype not in SAFETENSORS_OF_DTYPE:
            raise InteropError(
                f"{path}: tensor {name!r} is {spec}, a type the format does not have; cast it to "
                f"one of {', '.join(TORCH_OF_DTYPE.values())}"
            )
