"""Network pickles of NVlabs (EDM's .pkl), read without running any code they carry.

Their training loop pickles whole networks. `torch_utils.persistence` puts the source code of every
module's class into the file, to be executed on loading; here it never is. Loading builds inert
records (inert_records.py) and calls nothing else: every name that the pickle mentions is
checked against their list first, and resolves to one of them or not at all.

What a file holds: {"ema": network, "loss_fn": ..., "augment_pipe": ..., "dataset_kwargs": {...}}.
The tensors inside are streams of torch.save within the pickle, read here by the same rules.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.interop.inert_records import (
    PERSISTENCE,
    STAND_INS,
    Container,
    PersistentObject,
    Tensor,
)
from dit_jax.interop.pickle_scan import ScanError, listed, scan_pickle
from dit_jax.interop.pt_files import LEGACY_MAGIC
from dit_jax.interop.tensor_file import InteropError, TensorFile, TensorSpec, check_names, refusals
from dit_jax.untrusted import open_regular, shown

_MAX_SETTINGS = 10_000


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # The names were checked before; this is the door they all pass.
        if f"{module}.{name}" not in STAND_INS:
            raise InteropError(f"{module}.{name}, which is refused")
        return STAND_INS[f"{module}.{name}"]


class NetworkPickle(TensorFile):
    """The tensors of a network in a pickle, named as its `state_dict` names them.

    The whole file is in memory while it is open (1.2 GB for ImageNet-64); arrays are views of it.
    `metadata`:

        weights             the entry read, such as "ema"; "" if the pickle is a network itself
        available_weights   entries that could be read
        classes             class name of every module, {"": "EDMPrecond", "model": "SongUNet", ..}
        arguments           positional and keyword arguments of the network: (args, kwargs)
        dataset             the entry "dataset_kwargs", or {}
    """

    kind = "edm_pkl"

    def __init__(self, path: Path, weights: str = "auto"):
        """Read the file; see `open_network_pickle`."""
        self.path = path
        content = _load(path)
        entry, network = _choose(path, content, weights)
        self._arrays: dict[str, np.ndarray] = {}
        classes: dict[str, str] = {}
        try:
            _collect(network, "", self._arrays, classes, set())
            arguments = (
                _Plain().copy(network.state.get("_init_args") or ()),
                _Plain().copy(network.state.get("_init_kwargs") or {}),
            )
            others = content if entry else {}
            dataset = _Plain().copy(others.get("dataset_kwargs") or {})
        except (InteropError, RecursionError) as error:
            raise InteropError(f"{path}: {error}") from error
        check_names(path, self._arrays)
        self.specs = {n: TensorSpec(a.shape, a.dtype) for n, a in self._arrays.items()}
        self.metadata = {
            "weights": entry,
            "available_weights": tuple(_networks(others)) if entry else (),
            "classes": classes,
            "arguments": arguments,
            "dataset": dataset,
        }

    def _read(self, names: list[str]) -> Iterator[np.ndarray]:
        for name in names:
            yield self._arrays[name].copy()


def looks_like_network_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle with `torch_utils.persistence` in it does."""
    with refusals(), open_regular(path) as file:
        beginning = file.read(4096)
    return beginning[:1] == b"\x80" and PERSISTENCE.rpartition(".")[0].encode() in beginning


def open_network_pickle(path: str | Path, *, weights: str = "auto") -> NetworkPickle:
    """Open a pickle of EDM's training loop, executing nothing of it.

    Args:
        path: The file.
        weights: The entry to read; "auto" is "ema" where there is one, else the only network.

    Raises:
        InteropError: It is damaged, names anything that EDM's networks do not need (all names are
            listed), or holds no network.
    """
    path = Path(path)
    if not path.is_file():
        raise InteropError(f"{path} is not a file; expected a network pickle (.pkl) of EDM")
    return NetworkPickle(path, weights)


def _load(path: Path) -> Any:
    with refusals(), open_regular(path) as file:
        beginning = file.read(64)
        if beginning[:2] == b"PK" or LEGACY_MAGIC.to_bytes(10, "little") in beginning:
            raise InteropError(
                f"{path} is a file of torch.save, no network pickle; if it is a state dict of EDM, "
                "open it as edm_pt"
            )
        try:
            file.seek(0)
            refused = sorted(scan_pickle(file) - set(STAND_INS))
            if refused:
                raise InteropError(_refusal(path, refused))
            file.seek(0)
            return _Reader(file).load()
        except InteropError as error:
            if str(path) in str(error):
                raise
            raise InteropError(
                f"{path} holds what a network pickle of EDM does not: {error}. The file is "
                "refused; nothing was executed"
            ) from error
        # A damaged pickle makes the unpickler raise nearly anything.
        except Exception as error:
            raise InteropError(
                f"{path} is truncated, damaged or no pickle ({_reason(error)}); download or copy "
                "it again"
            ) from error


def _reason(error: Exception) -> str:
    """The scan's own words; those of an unpickler may repeat what is in the file."""
    return str(error) if isinstance(error, ScanError) else type(error).__name__


def _refusal(path: Path, refused: list[str]) -> str:
    return (
        f"{path} holds pickled objects that are not those of EDM's networks: "
        f"{listed(refused)}. Loading them could run code, so the file is refused; nothing was "
        "executed. If you trust the file, load it with its own code and save the state dict: "
        "torch.save(pickle.load(file)['ema'].state_dict(), path)"
    )


def _networks(content: Any) -> dict[str, PersistentObject]:
    """Those entries that are modules (a loss or an augmentation is persistent, too)."""
    entries = content.items() if isinstance(content, dict) else ()
    return {
        name: value
        for name, value in entries
        if isinstance(value, PersistentObject) and isinstance(value.state.get("_modules"), dict)
    }


def _choose(path: Path, content: Any, weights: str) -> tuple[str, PersistentObject]:
    alone = _networks({"": content})
    available = alone or _networks(content)
    if not available:
        found = content.items() if isinstance(content, dict) else [("all of it", content)]
        some = ", ".join(f"{shown(k)} ({type(v).__name__.strip('_')})" for k, v in list(found)[:8])
        raise InteropError(
            f"{path} holds no network of torch_utils.persistence; it holds {some or 'nothing'}"
        )
    chosen = weights
    if weights == "auto":
        chosen = "ema" if "ema" in available else next(iter(available))
    if chosen not in available or (weights == "auto" and chosen != "ema" and len(available) > 1):
        raise InteropError(
            f"{path} holds the networks {', '.join(map(shown, available))}; choose one of them "
            f"(weights={weights!r})"
        )
    return chosen, available[chosen]


def _collect(
    module: Any, prefix: str, arrays: dict[str, np.ndarray], classes: dict[str, str], seen: set[int]
) -> None:
    """The tensors of a module and of those below it, in the order of `state_dict`."""
    if not isinstance(module, PersistentObject | Container):
        raise InteropError(f"{prefix[:-1]!r} is no module of EDM")
    if id(module) in seen:
        raise InteropError(f"{prefix[:-1]!r} is a module that occurs twice")
    seen.add(id(module))
    state: Mapping[str, Any] = getattr(module, "state", {})
    classes[prefix[:-1]] = module.class_name
    hidden = state.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, value in _entries(state, group, prefix):
            if isinstance(value, Tensor) and not (group == "_buffers" and name in hidden):
                arrays[prefix + name] = value.array
            elif value is not None and not isinstance(value, Tensor):
                raise InteropError(f"{prefix}{name} is no dense tensor")
    for name, value in _entries(state, "_modules", prefix):
        if value is not None:
            _collect(value, f"{prefix}{name}.", arrays, classes, seen)


def _entries(state: Mapping[str, Any], group: str, prefix: str) -> Iterator[tuple[str, Any]]:
    values = state.get(group)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InteropError(f"the module {prefix[:-1]!r} has no {group}")
    return iter(values.items())


class _Plain:
    """Copies plain data, which may be one list many times over, to a limit."""

    def __init__(self) -> None:
        self._count = 0

    def copy(self, value: Any) -> Any:
        self._count += 1
        if self._count > _MAX_SETTINGS:
            raise InteropError("the settings are too large")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, list | tuple):
            return type(value)(self.copy(item) for item in value)
        if isinstance(value, dict):
            return {str(name): self.copy(item) for name, item in value.items()}
        raise InteropError(
            f"a {type(value).__name__.strip('_')} among the settings; expected numbers and strings"
        )
