"""Options: the keys of the configuration, each a field of the dataclass that it configures.

    @dataclasses.dataclass(frozen=True)
    class AdamW:
        beta1: float = option(0.9, "decay of the mean of gradients", SHARE_BELOW_ONE)

    register("optimizer", "adamw", AdamW)

A field made by `option` carries all there is to know of a key: its default, its meaning, its range
and the other key that it must not exceed. Defaults, `--help_config` and what the door of the
configuration refuses follow from these alone (`schema`). Registration turns the fields into
`config.<section>.<name>.<field>`; other fields of the dataclass are no keys.
"""

import dataclasses
import functools
import importlib
import os
from collections.abc import Mapping
from typing import Any

from dit_jax.ranges import FINITE, Range

_METADATA = "dit_jax.option"
EXTENSIONS = "DIT_JAX_EXTENSIONS"
"""The environment's variable that names modules which register more: MODULE,MODULE:FUNCTION,..."""

# What registers options when it is imported: the library, and the room of further methods. This
# module is below all of it and so knows it by name only.
_ROOMS = ("dit_jax.experiment", "dit_jax.distill")


class ExtensionError(ValueError):
    """What `EXTENSIONS` names is not there."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A key of the configuration.

    Attributes:
        default: a number, text, boolean or tuple of numbers.
        meaning: what `--help_config` says of it.
        within: the range of its number, or of each of a tuple's; None for what is no number.
        below: name of another option of the same dataclass, which it has to be below.
        at_most: name of another one, which it must not exceed.
        zero_is_open: 0 stands for an end that takes no part in that order.
        needs: name of another one, without which (0) it has no effect.
        interval: a tuple that is (low, high) or empty.
        size: a tuple that is (height, width) or empty.
        expected: of a text that has to be given where the choice is made, what to give.
    """

    default: Any
    meaning: str
    within: Range | None = None
    below: str = ""
    at_most: str = ""
    zero_is_open: bool = False
    needs: str = ""
    interval: bool = False
    size: bool = False
    expected: str = ""


def option(default: Any, meaning: str, within: Range | None = None, **more: Any) -> Any:
    """A field of a dataclass that is an option.

    Args:
        default: see `Option`.
        meaning: a phrase that completes the option's name.
        within: by default finite numbers, whole ones where the default is whole.
        **more: the other fields of `Option`.
    """
    if within is None and not isinstance(default, (bool, str)):
        within = Range(whole=True) if isinstance(default, int) else FINITE
    made = Option(default, meaning, within, **more)
    return dataclasses.field(default=default, metadata={_METADATA: made})


def same_option(owner: type, name: str, default: Any) -> Any:
    """The option `name` of another dataclass again, with a default of its own."""
    made = dataclasses.replace(options_of(owner)[name], default=default)
    return dataclasses.field(default=default, metadata={_METADATA: made})


def options_of(owner: type) -> dict[str, Option]:
    """The options among the fields of a dataclass, by name."""
    fields = dataclasses.fields(owner)
    return {f.name: f.metadata[_METADATA] for f in fields if _METADATA in f.metadata}


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Of what has none."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several things that a section chooses from.

    Attributes:
        owner: the dataclass its options are of.
        facts: what the configuration's door has to know of it.
    """

    owner: type
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the configuration.

    Attributes:
        shared: the options that it has whatever is chosen.
        chosen_by: the key that chooses, '' where there is nothing to choose.
        chosen: what it chooses by default.
        choices: what there is to choose, by name.
    """

    shared: dict[str, Option]
    chosen_by: str = ""
    chosen: str = ""
    choices: dict[str, Choice] = dataclasses.field(default_factory=dict)

    def own(self, name: str) -> dict[str, Option]:
        """The options of a choice that the section has not for all of them already."""
        options = options_of(self.choices[name].owner) if name in self.choices else {}
        return {key: found for key, found in options.items() if key not in self.shared}


# In the order they are shown in; what they hold is registered. '' are the keys that are in none.
_NAMES = ("", "model", "process", "timesteps", "loss", "teacher", "method", "data", "augmentation")
_NAMES += (
    "optimizer",
    "ema",
    "lora",
    "training",
    "sampling",
    "cache",
    "autoencoder",
    "evaluation",
    "mesh",
)
_SECTIONS = {name: Section({}) for name in _NAMES}


def register_section(
    name: str, shared: type | None = None, chosen_by: str = "", chosen: str = ""
) -> None:
    """Says what a section of the configuration has; see `Section`.

    Args:
        name: of the section, '' for keys that are in none.
        shared: a dataclass of options; None for none.
        chosen_by: the key that chooses one of what is registered for it.
        chosen: its default.
    """
    options = options_of(shared) if shared else {}
    _SECTIONS[name] = Section(options, chosen_by, chosen, _SECTIONS[name].choices)


def register(section: str, name: str, owner: type, **facts: Any) -> None:
    """Makes a choice of a section known, and its options keys of the configuration.

    Args:
        section: 'model', 'process', 'timesteps', 'loss', 'method', 'data', 'optimizer', 'sampling'.
        name: of the choice: its options are config.<section>.<name>.<option>, but for those that
            the section has for all choices (config.model.image_size).
        owner: a dataclass; its fields made by `option` are the options.
        **facts: what the door has to know; of methods see `dit_jax.experiment.register_method`.

    Raises:
        ValueError: the name is taken.
    """
    found = _SECTIONS[section]
    taken = name in (found.chosen_by, *found.shared)
    if taken or found.choices.get(name, Choice(owner)).owner is not owner:
        raise ValueError(f"config.{section}.{name} is there already: choose another name")
    found.choices[name] = Choice(owner, facts)


def facts(section: str, name: str) -> Mapping[str, Any]:
    """What the door has to know of a choice; nothing of one there is not."""
    choice = sections()[section].choices.get(name)
    return choice.facts if choice else {}


def sections() -> dict[str, Section]:
    """All sections by name, in the order they are shown in."""
    for room in _ROOMS:
        importlib.import_module(room)
    _import_extensions(os.environ.get(EXTENSIONS, ""))
    return _SECTIONS


@functools.cache
def _import_extensions(names: str) -> None:
    """Imports MODULE,MODULE:FUNCTION,...; a function named is called.

    Raises:
        ExtensionError: there is no such module or function.
    """
    for name in filter(None, names.split(",")):
        module, _, function = name.strip().partition(":")
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or "\0"):
                raise  # what the extension imports is not there
            raise ExtensionError(
                f"{EXTENSIONS}={names}: there is no module {error.name}; is its folder on "
                "PYTHONPATH?"
            ) from error
        if function:
            if not hasattr(imported, function):
                raise ExtensionError(f"{EXTENSIONS}={names}: {module} has no {function}")
            getattr(imported, function)()


def extensions(chosen: Mapping[str, str]) -> list[str]:
    """What `EXTENSIONS` has to name for what is chosen, as {'sampling': 'overshoot'}."""
    owners = [
        _SECTIONS[section].choices[name].owner
        for section, name in chosen.items()
        if name in _SECTIONS[section].choices
    ]
    modules = {owner.__module__ for owner in owners}
    named = os.environ.get(EXTENSIONS, "").replace(" ", "").split(",")
    entries = {entry.partition(":")[0]: entry for entry in named}  # with functions to call
    outside = (name for name in modules if not name.startswith("dit_jax."))
    return sorted(entries.get(name, name) for name in outside)


def schema() -> dict[str, Option]:
    """Every key of the configuration by its path, as 'model.dit.depth'."""
    found = {}
    for name, section in sections().items():
        prefix = f"{name}." if name else ""
        if section.chosen_by:
            names = " | ".join(section.choices)
            found[f"{prefix}{section.chosen_by}"] = Option(section.chosen, names)
        found.update({f"{prefix}{key}": value for key, value in section.shared.items()})
        for choice in section.choices:
            own = section.own(choice)
            found.update({f"{prefix}{choice}.{key}": value for key, value in own.items()})
    return found


def number_error(path: str, value: Any, known: Option) -> str | None:
    """What is wrong with the number, or numbers, of one key; None where nothing is.

    Args:
        path: of the key.
        value: of the type of its default, a tuple perhaps of anything.
        known: what the key is.
    """
    wanted = known.within
    if wanted is None or isinstance(value, (bool, str)):
        return None
    if not isinstance(value, tuple):
        return None if value in wanted else f"config.{path}={value!r}: expected {wanted}"
    if any(element not in wanted for element in value):
        return f"config.{path}={value!r}: expected every element {wanted}"
    if known.size and len(value) not in (0, 2):
        return f"config.{path}={value!r}: expected (height, width) or ()"
    if known.interval:
        if len(value) not in (0, 2):
            return f"config.{path}={value!r}: expected (low, high) or ()"
        if value and value[0] > value[1]:
            return f"config.{path}={value!r}: expected (low, high), the lower one first"
    return None


def order_error(values: Mapping[str, Any], known: Mapping[str, Option]) -> str | None:
    """What two keys of a flat, complete configuration are not in order; None where all are."""
    for path, option in known.items():
        other = option.below or option.at_most
        if not other:
            continue
        limit = f"{path.rpartition('.')[0]}.{other}"
        low, high = values[path], values[limit]
        if option.zero_is_open and 0 in (low, high):
            continue
        if not (low < high if option.below else low <= high):
            relation = "below" if option.below else "at most"
            return f"config.{path}={low!r}: expected {relation} config.{limit}={high!r}"
    return None


def unmet_need(values: Mapping[str, Any], known: Mapping[str, Option]) -> str | None:
    """What of a flat, complete configuration waits for another key; None where nothing does."""
    for path, option in known.items():
        if not option.needs or values[path] == option.default:
            continue
        needed = f"{path.rpartition('.')[0]}.{option.needs}"
        if not values[needed]:
            return (
                f"config.{path}={values[path]!r} would do nothing with config.{needed}="
                f"{values[needed]!r}: set config.{needed} too, or leave config.{path} out"
            )
    return None
