"""The names that a wrong one most likely means, for the errors that refuse it."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(given: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The names of `known` that are spelled most like `given`, the likeliest first.

    Args:
        given: a name that is not known.
        known: those that are; capitals make no difference.
        count: how many at most.
        cutoff: how alike they have to be, from 0 (not at all) to 1 (the same).
    """
    names: dict[str, str] = {}
    for name in known:
        names.setdefault(name.casefold(), name)
    given = given.casefold()
    found = difflib.get_close_matches(given, names, n=count + 4, cutoff=cutoff)
    found.sort(key=lambda name: not name.startswith(given))  # 'adam' is adamw rather than radam
    return [names[name] for name in found[:count]]


def did_you_mean(given: Any, known: Iterable[str], *, cutoff: float = 0.5, prefix: str = "") -> str:
    """'; did you mean heun?' of 'heunn', to end an error with; '' where nothing is alike.

    Args:
        given: a name that is not known, or something that is no name.
        known: those that are.
        cutoff: see `nearest`.
        prefix: shown before the name, as 'config.'.
    """
    found = nearest(given, known, cutoff=cutoff) if isinstance(given, str) else []
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def one_of(given: Any, known: Iterable[str]) -> str:
    """'expected one of euler, heun; did you mean heun?', of a name that is none of them."""
    known = list(known)
    listed = ", ".join(name or "''" for name in known)
    return f"expected one of {listed}{did_you_mean(given, known)}"
