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
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interop.pickle_scan import NAMESPACE, read_storages, scan_pickle, unsafe_names
from interop.pt_writer import STORAGES
from interop.tensor_file import DTYPE_OF_TORCH, FileState, InteropError, TensorFile, TensorSpec

if TYPE_CHECKING:
    import torch

# Mapped pages stay resident until the mapping goes: a new one is made after so many bytes.
REMAP_BYTES = 128 * 2**20
# torch.save before 1.6: five pickles (magic number, version, machine, contents, storages' keys).
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5
# Bytes of an element by storage class; an UntypedStorage counts bytes.
_ITEM_SIZES = {storage: DTYPE_OF_TORCH[dtype].itemsize for dtype, storage in STORAGES.items()}


class PtFile(TensorFile):
    """A state dict in a file of torch.save."""

    kind = "pt"

    def __init__(self, path: Path, weights: str = "auto"):
        """Open the file; see `open_pt`."""
        self.path = path
        self._state = FileState.of(path)
        self._mappable, names = _scan(path)
        self._namespace = NAMESPACE in names
        content = self._load()
        entry, state_dict, metadata = _choose(path, content, weights)
        self._entry, self.metadata = entry, metadata
        # Our name -> name in the file.
        self._names = _strip_prefixes(path, list(state_dict))
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


def open_pt(path: Path, *, weights: str = "auto") -> PtFile:
    """Open a file of torch.save.

    Args:
        path: A file in the zip format (mapped into memory) or in the format before PyTorch 1.6,
            which cannot be mapped: each reading holds the whole file in memory.
        weights: "ema", "model" or another entry that holds a state dict; "auto" is "ema" where
            there is one, else "model", else the only one there is.

    Raises:
        InteropError: If the file is damaged, names classes other than those of tensors and plain
            data, or has no such weights; or torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise InteropError(f"reading {path} needs torch: pip install -e '.[interop]'")
    return PtFile(path, weights)


def _scan(path: Path) -> tuple[bool, set[str]]:
    """Refuse a file that names unsafe classes; say whether it can be mapped, and its names."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # torch.load looks at the beginning, too.
        mappable, names = _scan_zip(path) if zipped else (False, _scan_legacy(path))
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        if isinstance(error, InteropError):
            raise
        raise InteropError(
            f"{path} is truncated, or no file of torch.save: {error}; download or copy it again"
        ) from error
    unsafe = unsafe_names(names)
    if unsafe:
        raise InteropError(
            f"{path} holds pickled objects that are not tensors or plain data: "
            f"{', '.join(unsafe)}. Loading them could run code, so the file is refused; nothing "
            "was executed. If you trust the file, load it where those classes are defined and "
            "save its state dict alone: torch.save(model.state_dict(), path)"
        )
    return mappable, names


def _scan_zip(path: Path) -> tuple[bool, set[str]]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.namelist()
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") for name in entries):
            raise InteropError(
                f"{path} is a TorchScript program, not weights; save module.state_dict() instead"
            )
        if len(pickles) != 1:
            kind = "a NumPy .npz" if any(n.endswith(".npy") for n in entries) else "a zip archive"
            raise InteropError(
                f"{path} looks like {kind}, not like a file of torch.save; it holds "
                f"{', '.join(entries[:5])}"
            )
        with archive.open(pickles[0]) as stream:
            names = scan_pickle(stream)
        if not unsafe_names(names):
            _check_records(archive, pickles[0])
        # torch.load would map compressed storages as if they were not.
        mappable = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    return mappable, names


def _check_records(archive: zipfile.ZipFile, data_pickle: str) -> None:
    """Mapped by torch.load, a record that is too short would read on into the next one."""
    with archive.open(data_pickle) as stream:
        storages = read_storages(stream)
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    for key, (storage, count) in storages.items():
        nbytes = count * _ITEM_SIZES.get(storage, 1)
        record = data_pickle.removesuffix("data.pkl") + f"data/{key}"
        if sizes.get(record, -1) < nbytes:
            raise ValueError(
                f"record {record} should have {nbytes} bytes, it has {sizes.get(record, 'none')}"
            )


def _scan_legacy(path: Path) -> set[str]:
    with path.open("rb") as stream:
        names = scan_pickle(stream)
        if not unsafe_names(names):
            stream.seek(0)
            if LEGACY_MAGIC.to_bytes(10, "little") not in stream.read(64):
                raise InteropError(
                    f"{path} is a plain pickle, not a file of torch.save; nothing in it was "
                    "executed. Load it where you trust it and save its state dict by torch.save"
                )
            stream.seek(0)
            for _ in range(_LEGACY_PICKLES):
                names |= scan_pickle(stream)
    return names


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
                f"{path} has the weights {', '.join(available)}; choose one of them instead of "
                f"{weights!r}"
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
            f"{', '.join(f'{k!r} ({_describe(v)})' for k, v in list(content.items())[:8])}"
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
    plain = _plain(path, "args", args)
    return plain if isinstance(plain, dict) else {"args": plain}


def _plain(path: Path, name: str, value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if type(value) in (list, tuple, set):
        return type(value)(_plain(path, f"{name}[{i}]", item) for i, item in enumerate(value))
    if type(value) is argparse.Namespace:
        value = vars(value)
    if isinstance(value, dict):
        return {_plain(path, name, k): _plain(path, f"{name}.{k}", v) for k, v in value.items()}
    raise InteropError(
        f"{path}: {name} is {_describe(value)}; only plain values (numbers, strings, lists, "
        "dictionaries) are read"
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
