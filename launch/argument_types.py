"""Types of numbers and paths on command lines: what cannot mean anything ends at the door.

Imports nothing that takes time, so that mistakes are answered at once.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dit_jax import abbreviations, output_formats, ranges
from dit_jax.launch import spelling
from dit_jax.nearest import did_you_mean, nearest
from dit_jax.ranges import Range


def number(wanted: Range) -> Callable[[str], float]:
    """A type for argparse: a number of a range, never NaN or infinite.

    Args:
        wanted: integers alone if `wanted.whole`.
    """

    def parse(text: str) -> float:
        try:
            value = int(text) if wanted.whole else float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {wanted}") from error
        if value not in wanted:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {wanted}")
        return value

    return parse


count = number(ranges.COUNT)  # of images, devices, steps, ...
count_or_none = number(ranges.PERIOD)  # the same, or 0


def label(text: str) -> int | str:
    """A type for argparse: the number of a class, or its name."""
    try:
        int(text)
    except ValueError:
        return text
    return count_or_none(text)


def adapter(text: str) -> tuple[str, float]:
    """A type for argparse: a LoRA's file, FILE or FILE:WEIGHT."""
    path, _, end = text.rpartition(":")
    try:
        weight = float(end)
    except ValueError:
        if path and Path(path).exists() and not Path(text).exists():
            raise argparse.ArgumentTypeError(f"{text!r}: the weight {end!r} is no number") from None
        path, weight = text, 1.0
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FILE or FILE:WEIGHT")
    if weight == 0 or weight not in ranges.FINITE:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a weight other than 0, and finite")
    return path, weight


def tile(text: str) -> int:
    """A type for argparse: the side of a tile in latents, a quarter of which overlaps."""
    side = count(text)
    if side % 4:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a multiple of 4, as 64")
    return side


def image_size(text: str) -> int | tuple[int, int]:
    """A type for argparse: the side of a square in pixels, or HEIGHTxWIDTH."""
    sides = text.split("x")
    try:
        found = tuple(count(side) for side in sides)
    except argparse.ArgumentTypeError:
        found = ()
    if len(found) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a side in pixels, or HEIGHTxWIDTH")
    return found[0] if len(found) == 1 else found


seed = number(ranges.SEED)
time = number(ranges.NOT_NEGATIVE)  # of a process
share_below_one = number(ranges.SHARE_BELOW_ONE)
solver_steps = number(ranges.SOLVER_STEPS)
guidance_scale = number(ranges.GUIDANCE)


class Parser(argparse.ArgumentParser):
    """argparse's, which shows the text of its description as it is and knows the field's words."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args=None, namespace=None):
        """As argparse's; an option that does not exist ends with the one it may mean."""
        namespace, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._hint(rest[0])}")
        return namespace

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = did_you_mean(value, map(str, action.choices))
            raise argparse.ArgumentError(action, f"{error.message}{hint}") from None

    def format_help(self) -> str:
        """As argparse's, with commands named as this one was started."""
        return spelling.spelled(super().format_help())

    def error(self, message: str) -> NoReturn:
        """As argparse's, with commands named as this one was started."""
        super().error(spelling.spelled(message))

    def _hint(self, argument: str) -> str:
        name = argument.lstrip("-").partition("=")[0]
        known = [option for option in self._option_string_actions if option.startswith("--")]
        meant = [f"--{key.rpartition('.')[2]}" for key in abbreviations.meant_by(name)]
        match = [option for option in meant if option in known]
        match = match or nearest(f"--{name}", known, cutoff=0.6)
        return f"; did you mean {match[0]}?" if match and argument.startswith("-") else ""


class Interval(argparse.Action):
    """Two numbers, the lower one first."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Stores them."""
        low, high = values
        if low > high:
            parser.error(
                f"argument {option_string}: {low:g} {high:g}: expected the lower one first"
            )
        setattr(namespace, self.dest, values)


def _checked(check: Callable[[Path], object]) -> Callable[[str], Path]:
    """A type for argparse: a path whose name passes `check`, which raises a ValueError."""

    def parse(text: str) -> Path:
        path = Path(text)
        try:
            check(path)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return path

    return parse


picture = _checked(output_formats.picture_format)  # a picture to be written
samples = _checked(output_formats.samples_format)  # a grid, an .npz or a folder
folder = _checked(output_formats.require_folder)  # a folder to be made
json_file = _checked(lambda path: output_formats.require_suffix(path, ".json"))
html_file = _checked(lambda path: output_formats.require_suffix(path, ".html", ".htm"))
