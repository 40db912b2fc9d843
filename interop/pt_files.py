"""Checkpoints of PyTorch (.pt, .pth, .bin), read without running any code they carry.

A file holds a state dict, or a dictionary of state dicts and other things, as training scripts
write it: fast-DiT's {"model", "ema", "opt", "args"}. Its `TensorFile.metadata`:

    weights            the entry read, such as "ema"; "" if the file is a state dict itself
    available_weights  the entries that could be read
    args               the entry "args" (an argparse.Namespace or a dict) as a plain dict, or {}
    other_entries      names of the entries that hold no weights and are not read, such as "opt"
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.interop.pickle_scan import NAMESPACE, PickleScan, listed, scan, unsafe_parts
from dit_jax.interop.storages import read_storages
from dit_jax.interop.tensor_file import (
    DTYPE_OF_TORCH,
    FileState,
    InteropError,
    TensorFile,
    TensorSpec,
    check_names,
)
from dit_jax.untrusted import FileRefusedError, check_inflation, open_regular, open_zip, shown

if TYPE_CHECKING:
    import torch

# Mapped pages stay resident until the mapping goes: a new one is made after so many bytes.
REMAP_BYTES = 128 * 2**20
# torch.save before 1.6: five pickles (magic number, version, machine, contents, storages' keys).
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES, _LEGACY_CONTENTS = 5, 3
_MAX_PICKLE_BYTES = 64 * 2**20
# Of the version, the byte order and the like, which torch.load reads whole.
_MAX_OTHER_BYTES = 2**20
_MAX_INFLATION = 8
_MAX_ARGUMENTS, _MAX_DEPTH = 100_000, 50


class PtFile(TensorFile):
    """A state dict in a file of torch.save."""

    kind = "pt"

    def __init__(self, path: Path, weights: str = "auto", keep_names: bool = False):
        """Open the file; see `open_pt`."""
        self.path = path
        self._state = FileState.of(path)
        self._mappable, names = _scan(path)
        self._namespace = NAMESPACE in names
        content = self._load()
        entry, state_dict, metadata = _choose(path, content, weights)
        self._entry, self.metadata = entry, metadata
        # Our name -> name in the file.
        check_names(path, state_dict)
        names_there = list(state_dict)
        self._names = dict(zip(names_there, names_there, strict=True))
        if not keep_names:
            self._names = _strip_prefixes(path, names_there)
        self.specs = {
            name: _spec(path, name, state_dict[there]) for name, there in self._names.items()
        }

    def _read(self, names: list[str]) -> Iterator[np.ndarray]:
        position = 0
        while position < len(names):
            self._state.check()
            content = self._load()
            state_dict = content[self._entry] if self._entry else content
            mapped = 0
            while position < len(names) and (not self._mappable or mapped < REMAP_BYTES):
                name = names[position]
                yield _to_numpy(state_dict[self._names[name]], self.specs[name])
                mapped += self.specs[name].nbytes
                position += 1
            del content, state_dict

    def _load(self) -> Any:
        import torch

        allowed = (
            torch.serialization.safe_globals([argparse.Namespace])
            if self._namespace
            else nullcontext()
        )
        try:
            with allowed:
                return torch.load(
                    self.path, map_location="cpu", weights_only=True, mmap=self._mappable
                )
        # A damaged file makes torch raise nearly anything.
        except Exception as error:
            raise InteropError(
                f"{self.path} cannot be read by torch.load(weights_only=True); it is truncated, "
                f"damaged or of an unsupported kind: {_reason(error)}"
            ) from error


def _reason(error: Exception) -> str:
    """The cause alone: torch adds the advice to load without weights_only, which is no advice."""
    text = str(error)
    cause = re.search(r"WeightsUnpickler error:\s*(.*)", text)
    reason = cause[1] if cause else f"{type(error).__name__}: {text.strip().partition(chr(10))[0]}"
    if "Unsupported operand" in reason:
        reason += " (save it again with torch.save's default pickle_protocol)"
    return reason


def open_pt(path: Path, *, weights: str = "auto", keep_names: bool = False) -> PtFile:
    """Open a file of torch.save.

    Args:
        path: A file in the zip format (mapped into memory) or in the format before PyTorch 1.6,
            which cannot be mapped: each reading holds the whole file in memory.
        weights: "ema", "model" or another entry that holds a state dict; "auto" is "ema" where
            there is one, else "model", else the only one there is.
        keep_names: Give names as they are in the file, with what DistributedDataParallel and
            torch.compile put before them.

    Raises:
        InteropError: If the file is damaged, names classes other than those of tensors and plain
            data, or has no such weights; or torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise InteropError(f"reading {path} needs torch: pip install -e '.[interop]'")
    return PtFile(path, weights, keep_names)


def _scan(path: Path) -> tuple[bool, set[str]]:
    """Refuse a file that names unsafe classes; say whether it can be mapped, and its names."""
    try:
        with open_regular(path) as file:
            zipped = file.read(2) == b"PK"  # torch.load looks at the beginning, too.
        return _scan_zip(path) if zipped else (False, _scan_legacy(path))
    except InteropError:
        raise
    except FileRefusedError as error:
        raise InteropError(f"{error}; download or copy it again") from error
    except (ValueError, EOFError) as error:
        raise InteropError(
            f"{path} is truncated, or no file of torch.save: {error}; download or copy it again"
        ) from error


def _require_safe(path: Path, found: PickleScan) -> None:
    unsafe = unsafe_parts(found)
    if unsafe:
        raise InteropError(
            f"{path} holds pickled objects that are not tensors or plain data: "
            f"{listed(unsafe)}. Loading them could run code, so the file is refused; nothing "
            "was executed. If you trust the file, load it where those classes are defined and "
            "save its state dict alone: torch.save(model.state_dict(), path)"
        )


def _scan_zip(path: Path) -> tuple[bool, set[str]]:
    with open_zip(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        pickles = [name for name in sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") for name in sizes):
            raise InteropError(
                f"{path} is a TorchScript program, not weights; save module.state_dict() instead"
            )
        if len(pickles) != 1:
            kind = "a NumPy .npz" if any(n.endswith(".npy") for n in sizes) else "a zip archive"
            raise InteropError(f"{path} looks like {kind}, not like a file of torch.save")
        if sizes[pickles[0]] > _MAX_PICKLE_BYTES:
            raise InteropError(
                f"{path} describes its tensors in {sizes[pickles[0]]} bytes; at most "
                f"{_MAX_PICKLE_BYTES} are read"
            )
        stream = io.BytesIO(archive.read(pickles[0]))
        found = scan(stream)
        _require_safe(path, found)
        stream.seek(0)
        _check_records(path, sizes, pickles[0], read_storages(stream))
        compressed = [e for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED]
        check_inflation(path, compressed, _MAX_INFLATION)
    # torch.load would map compressed storages as if they were not.
    return not compressed, found.names


def _check_records(
    path: Path, sizes: Mapping[str, int], data_pickle: str, storages: Mapping[str, int]
) -> None:
    """Compare the archive's records with the tensors that they are for.

    Mapped by torch.load, one that is too short would read on into the next; one that is too long
    would be decompressed to what no tensor needs.
    """
    folder = data_pickle.removesuffix("data.pkl")
    wanted = {f"{folder}data/{key}": nbytes for key, nbytes in storages.items()}
    for record, nbytes in wanted.items():
        if sizes.get(record) != nbytes:
            raise ValueError(
                f"the record {shown(record)} should have {nbytes} bytes by its tensors' shapes, "
                f"it has {sizes.get(record, 'none')}"
            )
    for record, nbytes in sizes.items():
        if record not in wanted and record != data_pickle and nbytes > _MAX_OTHER_BYTES:
            raise ValueError(f"{nbytes} bytes in the record {shown(record)} belong to no tensor")


def _scan_legacy(path: Path) -> set[str]:
    with open_regular(path) as stream:
        _refuse_tar(path, stream.read(512))
        stream.seek(0)
        _require_safe(path, scan(stream))
        stream.seek(0)
        if LEGACY_MAGIC.to_bytes(10, "little") not in stream.read(64):
            raise InteropError(
                f"{path} is a plain pickle, not a file of torch.save; nothing in it was "
                "executed. Load it where you trust it and save its state dict by torch.save"
            )
        stream.seek(0)
        names: set[str] = set()
        for index in range(_LEGACY_PICKLES):
            start = stream.tell()
            found = scan(stream)
            _require_safe(path, found)
            names |= found.names
            if index == _LEGACY_CONTENTS:
                end = stream.tell()
                stream.seek(start)
                storages = read_storages(io.BytesIO(stream.read(end - start)))
        rest = os.fstat(stream.fileno()).st_size - stream.tell()
        if sum(storages.values()) > rest:
            raise ValueError(
                f"its tensors should have {sum(storages.values())} bytes, {rest} are there"
            )
    return names


def _refuse_tar(path: Path, beginning: bytes) -> None:
    """torch.load takes a tar archive for one of its oldest files, whatever it begins with."""
    try:
        tarfile.TarInfo.frombuf(beginning, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return
    raise InteropError(f"{path} is a tar archive; unpack it")


def _is_state_dict(value: Any) -> bool:
    import torch

    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _choose(
    path: Path, content: Any, weights: str
) -> tuple[str, Mapping[str, torch.Tensor], dict[str, Any]]:
    """The entry to read ("" for the whole), its tensors, and the metadata."""
    import torch

    if not isinstance(content, dict):
        raise InteropError(
            f"{path} holds {_describe(content)}; expected a state dict or a dictionary of them"
        )
    available = tuple(k for k, v in content.items() if isinstance(k, str) and _is_state_dict(v))
    metadata: dict[str, Any] = {"weights": "", "available_weights": available, "args": {}}
    if available:
        preferred = next((name for name in ("ema", "model") if name in available), None)
        chosen = weights
        if weights == "auto":
            chosen = available[0] if len(available) == 1 else preferred
        if chosen not in available:
            raise InteropError(
                f"{path} has the weights {', '.join(name[:80] for name in available[:8])}; choose "
                f"one of them instead of {weights!r}"
            )
        others = tuple(str(key) for key in content if key != "args" and key not in available)
        metadata |= {"weights": chosen, "other_entries": others}
        metadata["args"] = _plain_args(path, content.get("args"))
        return chosen, content[chosen], metadata
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise InteropError(
            f"{path} holds no weights: its entries are "
            f"{', '.join(f'{shown(k)} ({_describe(v)})' for k, v in list(content.items())[:8])}"
        )
    if weights != "auto":
        raise InteropError(
            f"{path} is a single state dict, there are no weights {weights!r} to choose; leave "
            "the choice at 'auto'"
        )
    metadata["other_entries"] = tuple(str(key) for key in content if key not in tensors)
    return "", tensors, metadata


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dictionary of {len(value)}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _plain_args(path: Path, args: Any) -> dict[str, Any]:
    """A Namespace or dictionary of plain values as a dictionary."""
    if args is None:
        return {}
    plain = _Plain(path).copy("args", args)
    return plain if isinstance(plain, dict) else {"args": plain}


class _Plain:
    """Copies plain data, which may be one list many times over, to a limit."""

    def __init__(self, path: Path):
        self._path, self._count = path, 0

    def copy(self, name: str, value: Any, depth: int = 0) -> Any:
        self._count += 1
        if self._count > _MAX_ARGUMENTS or depth > _MAX_DEPTH:
            raise InteropError(f"{self._path}: its entry 'args' is too large to be arguments")
        if value is None or type(value) in (bool, int, float, complex, str, bytes):
            return value
        if type(value) in (list, tuple, set):
            items = enumerate(value)
            return type(value)(self.copy(f"{name}[{i}]", v, depth + 1) for i, v in items)
        if type(value) is argparse.Namespace:
            value = vars(value)
        if isinstance(value, dict):
            return {
                self.copy(name, k, depth + 1): self.copy(f"{name}.{k}", v, depth + 1)
                for k, v in value.items()
            }
        raise InteropError(
            f"{self._path}: {name[:100]} is {_describe(value)}; only plain values (numbers, "
            "strings, lists, dictionaries) are read"
        )


def _strip_prefixes(path: Path, names: list[str]) -> dict[str, str]:
    """Names without what DistributedDataParallel and torch.compile put before them -> as given."""
    ours = {}
    # "module." only if it is before all: it may also be a submodule's true name.
    bare = [".".join(part for part in n.split(".") if part != "_orig_mod") for n in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    for name, there in zip(bare, names, strict=True):
        if name in ours:
            raise InteropError(
                f"{path} has both {ours[name]!r} and {there!r}, which are one name without the "
                "prefixes of torch.compile and DistributedDataParallel"
            )
        ours[name] = there
    return ours


def _spec(path: Path, name: str, tensor: torch.Tensor) -> TensorSpec:
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or dtype not in DTYPE_OF_TORCH:
        raise InteropError(
            f"{path}: tensor {name!r} is a {tensor.layout} tensor of {tensor.dtype} on "
            f"{tensor.device}; dense tensors of {', '.join(DTYPE_OF_TORCH)} are read"
        )
    return TensorSpec(tuple(tensor.shape), DTYPE_OF_TORCH[dtype])


def _to_numpy(tensor: torch.Tensor, spec: TensorSpec) -> np.ndarray:
    import torch

    array = np.empty(spec.shape, spec.dtype)
    if spec.size:
        # Through torch, whose copy knows strides and conjugate views; as bytes, because NumPy's
        # bfloat16 is unknown to it.
        target = torch.from_numpy(array.reshape(-1).view(np.uint8))
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return array
