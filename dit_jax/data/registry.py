"""Opening a source by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from dit_jax.data.digits import DigitsOptions, open_digits
from dit_jax.data.image_folder import ImageFolderOptions, open_image_folder
from dit_jax.data.jpeg_npz import JpegNpzOptions, open_jpeg_npz
from dit_jax.data.latents import LatentsOptions, open_latents
from dit_jax.data.pairs import PairsOptions, open_pairs
from dit_jax.data.source import Source
from dit_jax.data.tfds import TfdsOptions, open_tfds
from dit_jax.nearest import one_of
from dit_jax.options import NoOptions, option, register, register_section
from dit_jax.ranges import PERIOD

SOURCES: dict[str, Callable[..., Source]] = {}


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Keys of config.data, whatever the source."""

    horizontal_flip: bool = option(False, "mirror half of the training images")
    guidance: float = option(
        1.0, "the scale that a network which is told one (FLUX.1 dev) is told of every image"
    )
    num_workers: int = option(0, "processes that read and decode; 0: a thread of this one", PERIOD)


register_section("data", DataOptions, "name", "latents")


def register_source(name: str, opener: Callable[..., Source], options: type = NoOptions) -> None:
    """Makes a source known under `name`.

    Args:
        name: As config.data.name.
        opener: Takes the split and, by name, the options. It is given the model's image_size (a
            side, or the height and width of what is not square) and channels where it has
            arguments of these names.
        options: A dataclass whose fields, each made by `options.option`, become
            config.data.<name>.<field>. An empty text stands for "not given", and is not handed on.

    Raises:
        ValueError: The name is another source's.
    """
    if SOURCES.get(name, opener) is not opener:
        raise ValueError(f"there is a data source {name!r} already")
    register("data", name, options)
    SOURCES[name] = opener


register_source("digits", open_digits, DigitsOptions)
register_source("image_folder", open_image_folder, ImageFolderOptions)
register_source("jpeg_npz", open_jpeg_npz, JpegNpzOptions)
register_source("latents", open_latents, LatentsOptions)
register_source("pairs", open_pairs, PairsOptions)
register_source("tfds", open_tfds, TfdsOptions)


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
        raise ValueError(f"unknown data source {name!r}{_valid(name, SOURCES)}")
    parameters = inspect.signature(SOURCES[name]).parameters
    accepted = [each for each in parameters if each != "split"]
    for given in options:
        if given not in accepted:
            raise ValueError(
                f"data source {name!r} has no option {given!r}{_valid(given, accepted)}"
            )
    for needed in accepted:
        if parameters[needed].default is inspect.Parameter.empty and needed not in options:
            raise ValueError(f"data source {name!r} needs the option {needed!r}")
    return SOURCES[name](split, **options)


def _valid(given: str, valid: Iterable[str]) -> str:
    valid = sorted(valid)
    return f": {one_of(given, valid)}" if valid else ": it takes none"
