"""JSON of unknown origin: bounded, and with the type of everything checked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from dit_jax.untrusted.files import FileRefusedError, open_regular, shown

MAX_JSON_BYTES = 16 * 2**20  # parsed, some 20 times as much
MAX_COUNT = 2**53
_MAX_DEPTH = 64

_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def parse_json(text: str | bytes, where: str | os.PathLike, kind: type = dict) -> Any:
    """Parse JSON whose outermost value is an object (`dict`) or a list.

    Raises:
        FileRefusedError: It is not JSON, nested too deeply, or another kind of value.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        at = f"at line {error.lineno}, column {error.colno}"
        raise FileRefusedError(f"{os.fspath(where)} is not JSON ({at})") from None
    except UnicodeDecodeError:
        raise FileRefusedError(f"{os.fspath(where)} is not JSON: it is no text") from None
    except RecursionError:
        raise FileRefusedError(f"{os.fspath(where)} is nested too deeply") from None
    except ValueError:  # a number of more digits than Python reads
        raise FileRefusedError(f"{os.fspath(where)} has a number without end") from None
    if not _is_shallow(value):
        raise FileRefusedError(f"{os.fspath(where)} is nested too deeply")
    if not isinstance(value, kind):
        raise FileRefusedError(
            f"{os.fspath(where)} holds {_NAMES[type(value)]}; expected {_NAMES[kind]} in JSON"
        )
    return value


def _is_shallow(value: Any) -> bool:
    waiting = [(value, 1)] if isinstance(value, dict | list) else []
    while waiting:
        parent, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            return False
        children = parent.values() if isinstance(parent, dict) else parent
        waiting += [(v, depth + 1) for v in children if isinstance(v, dict | list)]
    return True


def read_json(
    path: str | os.PathLike, kind: type = dict, *, max_bytes: int = MAX_JSON_BYTES
) -> Any:
    """Read a JSON file whose outermost value is an object (`dict`) or a list.

    Raises:
        FileRefusedError: It is no regular file, too long, not JSON, or another kind of value.
        OSError: It cannot be read.
    """
    return parse_json(read_json_text(path, max_bytes=max_bytes), path, kind)


def read_json_text(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The text of a JSON file, to be parsed by `parse_json`.

    Raises:
        FileRefusedError: It is no regular file, too long, or no text.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise FileRefusedError(
            f"{os.fspath(path)} is longer than {max_bytes} bytes, the most that is read of JSON"
        )
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileRefusedError(f"{os.fspath(path)} is not JSON: it is no text") from None


class Fields:
    """The entries of a JSON object, each read with its type and range checked.

    Args:
        values: The object.
        where: The file and the place in it, for messages.

    Raises:
        FileRefusedError: (All methods) the entry is missing, or not what it should be.
    """

    def __init__(self, values: Any, where: str | os.PathLike):
        self.where = os.fspath(where)
        if not isinstance(values, Mapping):
            raise self._refusal("", values, "an object")
        self._values = values

    def _refusal(self, name: str, value: Any, expected: str) -> FileRefusedError:
        entry = f"{name} is " if name else "it is "
        return FileRefusedError(f"{self.where}: {entry}{shown(value)}; expected {expected}")

    def _get(self, name: str, expected: str) -> Any:
        if name not in self._values:
            raise FileRefusedError(f"{self.where}: {name} is missing; expected {expected}")
        return self._values[name]

    def check_names(self, names: list[str]) -> None:
        """Refuse entries that are missing, and others than these."""
        missing, unknown = set(names) - set(self._values), set(self._values) - set(names)
        if missing or unknown:
            listed = [shown(name) for name in sorted(map(str, unknown))[:8]]
            raise FileRefusedError(
                f"{self.where}: missing fields {sorted(missing)}, unknown fields "
                f"[{', '.join(listed)}]"
            )

    def text(self, name: str) -> str:
        """A string."""
        value = self._get(name, "a string")
        if not isinstance(value, str):
            raise self._refusal(name, value, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(name, "a list of strings")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._refusal(name, value, "a list of strings")
        return tuple(value)

    def count(self, name: str, least: int = 0, most: int = MAX_COUNT) -> int:
        """An integer in a range, both ends included."""
        expected = f"an integer from {least} to {most}"
        value = self._get(name, expected)
        if type(value) is not int or not least <= value <= most:
            raise self._refusal(name, value, expected)
        return value

    def counts(self, name: str, length: int, least: int, most: int) -> tuple[int, ...]:
        """A list of `length` integers in a range."""
        expected = f"a list of {length} integers from {least} to {most}"
        value = self._get(name, expected)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(type(item) is int and least <= item <= most for item in value)
        ):
            raise self._refusal(name, value, expected)
        return tuple(value)

    def axes(self, name: str, longest: int, most: int) -> tuple[int | None, ...]:
        """A shape: at most `longest` sizes from 1 to `most`, or null for one that is not fixed."""
        expected = f"a list of at most {longest} sizes from 1 to {most}, or null"
        value = self._get(name, expected)
        if (
            not isinstance(value, list)
            or len(value) > longest
            or not all(i is None or (type(i) is int and 1 <= i <= most) for i in value)
        ):
            raise self._refusal(name, value, expected)
        return tuple(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._get(name, "true or false")
        if not isinstance(value, bool):
            raise self._refusal(name, value, "true or false")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._get(name, "a finite number")
        if not _is_finite(value):
            raise self._refusal(name, value, "a finite number")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self._get(name, "a list of finite numbers")
        if not isinstance(value, list) or not all(map(_is_finite, value)):
            raise self._refusal(name, value, "a list of finite numbers")
        return tuple(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self._get(name, "an object")
        if not isinstance(value, dict):
            raise self._refusal(name, value, "an object")
        return value

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        value = self._get(name, "a list of objects")
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._refusal(name, value, "a list of objects")
        return [Fields(item, f"{self.where}: {name}[{i}]") for i, item in enumerate(value)]

    def object(self, name: str) -> Fields:
        """An object, to be checked in turn."""
        return Fields(self.mapping(name), f"{self.where}: {name}")


def _is_finite(value: Any) -> bool:
    # (An integer beyond the largest float cannot become one.)
    if type(value) is int:
        return abs(value) < 2**1023
    return type(value) is float and math.isfinite(value)
