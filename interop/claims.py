"""What configuration files say of a network, checked before a network is built by it.

Types come first, then counts, which are compared with the tensors that are there: a table of a
thousand million layers has no end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dit_jax.interop.tensor_file import InteropError, TensorFile, refusals
from dit_jax.quantities import counted
from dit_jax.untrusted import check_within, read_json, shown

# Counts of layers: each has tensors of its own.
_LAYERS = (
    "num_layers",
    "num_hidden_layers",
    "num_single_layers",
    "layers_per_block",
    "num_blocks",
    "depth",
    "single_depth",
)
_SIDES = ("sample_size", "image_size", "img_resolution")
_MAX_SIDE = 2**14
_MAX_WIDTHS = 64  # resolutions of a network
_MIN_ELEMENTS = 2**20
_MAX_DEPTH = 10_000


def read_object(file: Path, within: Path) -> dict[str, Any]:
    """The JSON object in a file of a folder.

    Args:
        file: The file.
        within: The folder that links may not lead out of (but for the hub's cache).

    Raises:
        InteropError: It is missing, no regular file, outside of the folder, or no JSON object.
    """
    try:
        with refusals():
            check_within(file, within)
            return read_json(file)
    except FileNotFoundError as error:
        raise InteropError(f"{file} is missing") from error
    except OSError as error:
        raise InteropError(f"{file} cannot be read: {error}") from error


def check_types(
    where: str | Path,
    values: Mapping[str, Any],
    *,
    counts: Collection[str] = (),
    integers: Collection[str] = (),
    numbers: Collection[str] = (),
    texts: Collection[str] = (),
    truths: Collection[str] = (),
    nullable: Collection[str] = (),
) -> None:
    """Refuse entries of other types; those that are absent are left to their defaults.

    Args:
        where: What says so, for the message.
        values: Entries by name.
        counts: Names of integers of at least 1.
        integers: Names of integers of at least 0.
        numbers: Names of finite numbers.
        texts: Names of strings.
        truths: Names of booleans.
        nullable: Those that may be null, too, which means their default.

    Raises:
        InteropError: An entry is not what it should be; says which.
    """
    expected = {name: ("an integer of at least 0", _is_count) for name in integers}
    expected |= {name: ("an integer of at least 1", _is_positive) for name in counts}
    expected |= {name: ("a finite number", _is_number) for name in numbers}
    expected |= {name: ("a string", lambda v: isinstance(v, str)) for name in texts}
    expected |= {name: ("true or false", lambda v: isinstance(v, bool)) for name in truths}
    for name, (kind, accepts) in expected.items():
        if name not in values or (values[name] is None and name in nullable):
            continue
        if not accepts(values[name]):
            found = "null" if values[name] is None else shown(values[name])
            raise InteropError(f"{where}: {name}={found}; expected {kind}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)


def check_counts(where: str | Path, values: Mapping[str, Any], file: TensorFile) -> None:
    """Refuse a network of more layers, or wider ones, than a file has tensors and elements.

    Args:
        where: What says so, for the message.
        values: Sizes of the network by name; lists of them, too.
        file: The weights.

    Raises:
        InteropError: It cannot be the network of these weights.
    """
    elements = max(_MIN_ELEMENTS, sum(spec.size for spec in file.specs.values()))
    stacked = [spec.shape[0] for name, spec in file.specs.items() if _is_stacked(name, spec.shape)]
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) > _MAX_WIDTHS:
            raise InteropError(f"{where}: {name} has {len(value)} entries; no network has as many")
        for number in value if isinstance(value, list | tuple) else [value]:
            if type(number) is not int:
                continue
            if name in _SIDES and number > _MAX_SIDE:
                raise InteropError(
                    f"{where}: {name}={shown(number)}; at most {_MAX_SIDE} is possible"
                )
            most = max([len(file.specs), *stacked]) if name in _LAYERS else elements
            if number > min(most, _MAX_DEPTH if name in _LAYERS else most):
                held = counted(most, "tensor" if name in _LAYERS else "number")
                raise InteropError(
                    f"{where}: {name}={shown(number)}, but {file.path} holds only {held}: they are "
                    "not of the same network"
                )


def _is_stacked(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds one of every layer, as this library's own files do."""
    stack, _, rest = name.partition(".")
    stacked = stack in ("blocks", "double_blocks", "single_blocks")
    return stacked and not rest.partition(".")[0].isdigit() and bool(shape)
