"""Opening a source by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from dit_jax.data.digits import open_digits
from dit_jax.data.image_folder import open_image_folder
from dit_jax.data.jpeg_npz import open_jpeg_npz
from dit_jax.data.latents import open_latents
from dit_jax.data.pairs import open_pairs
from dit_jax.data.source import Source
from dit_jax.data.tfds import open_tfds
from dit_jax.defaults import register_namespace

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": open_digits,
    "image_folder": open_image_folder,
    "jpeg_npz": open_jpeg_npz,
    "latents": open_latents,
    "pairs": open_pairs,
    "tfds": open_tfds,
}


def register_source(name: str, opener: Callable[..., Source]) -> None:
    """Makes a source known under `name`.

    Args:
        name: As config.data.name.
        opener: Takes the split and options; those with defaults become config.data.<name>.<option>.
            Options called image_size (a side, or the height and width of what is not square) and
            channels are given the model's.

    Raises:
        ValueError: The name is another source's.
    """
    if SOURCES.get(name, opener) is not opener:
        raise ValueError(f"there is a data source {name!r} already")
    SOURCES[name] = opener
    parameters = inspect.signature(opener).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    register_namespace("data", name, options)


def options_of(name: str) -> tuple[str, ...]:
    """The options that a source's opener takes; () for an unknown one."""
    if name not in SOURCES:
        return ()
    return tuple(o for o in inspect.signature(SOURCES[name]).parameters if o != "split")


def open_source(name: str, split: str, **options: Any) -> Source:
    """Open a source of training or evaluation data by name.

    Args:
        name: "digits", "image_folder", "jpeg_npz", "latents", "pairs", "tfds" or what was
            registered.
        split: "train" or "test" (held out); tfds also takes its own split names.
        **options: What that source's opener takes: see `open_digits`, `open_image_folder`,
            `open_jpeg_npz`, `open_latents`, `open_pairs` and `open_tfds`.

    Raises:
        ValueError: Unknown source, or an option it does not take, with the nearest valid name;
            a required option is missing.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown data source {name!r}{_nearest(name, SOURCES)}")
    parameters = inspect.signature(SOURCES[name]).parameters
    accepted = [option for option in parameters if option != "split"]
    for option in options:
        if option not in accepted:
            raise ValueError(
                f"data source {name!r} has no option {option!r}{_nearest(option, accepted)}"
            )
    for option in accepted:
        if parameters[option].default is inspect.Parameter.empty and option not in options:
            raise ValueError(f"data source {name!r} needs the option {option!r}")
    return SOURCES[name](split, **options)


def _nearest(given: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    if not valid:
        return ": it takes none"
    matches = difflib.get_close_matches(given, valid, n=1)
    hint = f"; did you mean {matches[0]!r}?" if matches else "."
    return f"{hint} Valid names: {', '.join(sorted(valid))}"
