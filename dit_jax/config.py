"""The door of the configuration, where mistakes stop.

An experiment starts from `default_config()` and states only what differs. The keys, their defaults,
meanings and ranges stand beside what they configure (`options`).

Where one of several things is chosen by `name`, each has a namespace of its own (`process.ddpm`,
`process.edm`, ...); setting a key of a namespace that was not chosen is an error, since it would do
nothing.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from dit_jax import abbreviations
from dit_jax import defaults as defaults  # registers its keys
from dit_jax import options as options_lib
from dit_jax.nearest import nearest, one_of
from dit_jax.options import Option
from dit_jax.untrusted import parse_json

AnyConfig = Mapping | ml_collections.ConfigDict  # the latter is not registered as the former

# Keys that had another name, and have it still in runs and checkpoints of before.
RENAMED = {
    f"model.{key}": f"model.dit.{key}"
    for key in (
        "patch_size",
        "hidden_size",
        "depth",
        "num_heads",
        "mlp_ratio",
        "null_class",
        "learn_sigma",
        "time_frequency_spacing",
        "mlp_norm_epsilon",
        "layer_loop",
    )
}

# Keys that came after the first runs, and what those did: what a config.json without them means.
_LATER_KEYS = {"ema.warmup": False}


class ConfigError(ValueError):
    """A configuration that cannot mean what it says."""


def default_config() -> ml_collections.ConfigDict:
    """The default experiment: DiT-XL/2 on 256-pixel ImageNet latents, as in the paper."""
    tree = {}
    for path, known in options_lib.schema().items():
        *parents, leaf = path.split(".")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        section[leaf] = known.default
    return ml_collections.ConfigDict(tree, convert_dict=True).lock()


def flatten(config: AnyConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ('model.dit.depth', 28) pairs of every leaf."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, AnyConfig):
            yield from flatten(value, path + ".")
        else:
            yield path, tuple(value) if isinstance(value, list) else value


def nearest_key(key: str) -> str:
    """The documented key that a wrong one most likely means, as a hint to append to an error.

    A word of the field first ('lr'), then the same name in another section, then the spelling.
    """
    known = list(options_lib.schema())
    section, _, leaf = key.rpartition(".")
    meant = abbreviations.meant_by(leaf)
    same = [path for path in known if path.rpartition(".")[2] == leaf]
    if meant:
        match = [path for path in meant if path.startswith(f"{section}.")] or meant
    elif same:
        match = nearest(key, same, cutoff=0.0)
    else:
        match = nearest(key, known) or nearest(leaf, known, cutoff=0.4)
    return f"; did you mean config.{match[0]}?" if match else ""


def resolve(config: AnyConfig) -> ml_collections.ConfigDict:
    """Fills a partial configuration with the defaults and refuses what could not take effect.

    Args:
        config: an experiment's configuration, complete or not.

    Returns:
        A complete, locked configuration.

    Raises:
        ConfigError: an unknown key (with the nearest valid name), a value of another type, a key
            set in a namespace that was not chosen.
    """
    resolved, schema = default_config(), options_lib.schema()
    for path, value in _renamed(config):
        if path not in schema:
            raise ConfigError(f"unknown key config.{path}{nearest_key(path)}")
        value = _of_type(path, value, schema[path])
        section, _, leaf = path.rpartition(".")
        parent = resolved
        for part in section.split(".") if section else ():
            parent = parent[part]
        parent[leaf] = value
    _refuse_unused(resolved, {path: known.default for path, known in schema.items()})
    if message := options_lib.order_error(dict(flatten(resolved)), schema):
        raise ConfigError(message)
    return resolved


def leave_out_unchosen(
    config: ml_collections.ConfigDict, typed: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Resets what an experiment's file sets in namespaces that a flag has chosen others than.

    Args:
        config: the file's, with the command line's values in it; changed in place.
        typed: keys of the command line, 'process.name'. What it has typed itself stays, for
            `resolve` to refuse.

    Returns:
        {'process.name': {'process.flow.time_scale': 1000.0}}: by flag what was reset.
    """
    defaults, left_out = dict(flatten(default_config())), {}
    for section, selector in _selectors().items():
        chosen = f"{section}.{selector}"
        if chosen not in typed or section not in config:
            continue
        for path, value in list(flatten(config[section], f"{section}.")):
            _, namespace, *rest = path.split(".")
            unused = rest and namespace != config[section][selector] and path in defaults
            if not unused or path in typed or value == defaults[path]:
                continue
            left_out.setdefault(chosen, {})[path] = value
            parent = config
            *parents, leaf = path.split(".")
            for part in parents:
                parent = parent[part]
            with parent.ignore_type():
                parent[leaf] = defaults[path]
    return left_out


def _renamed(config: AnyConfig) -> Iterator[tuple[str, Any]]:
    """`flatten`, with the names that keys have now.

    A DiT's keys of before stood beside those of all networks, in a U-Net's configuration too: there
    they meant nothing, and are left out.
    """
    given = dict(flatten(config))
    is_dit = given.get("model.name", "dit") == "dit"
    for path, value in given.items():
        if path not in RENAMED:
            yield path, value
        elif is_dit:
            new = RENAMED[path]
            if new in given and given[new] != value:
                raise ConfigError(
                    f"config.{path}={value!r} is called config.{new} now, and is given as "
                    f"{given[new]!r} too: leave the first out"
                )
            yield new, value


def _of_type(path: str, value: Any, known: Option) -> Any:
    """The value of one key as the type of its default, its numbers within their range."""
    given, default, element_range = value, known.default, known.within
    if isinstance(default, tuple):
        value = value if isinstance(value, tuple) else (value,)
        kind = "int" if element_range.whole else "float"
        kinds, wanted = (int,) if element_range.whole else (int, float), f"a tuple of {kind}"
        fits = all(type(element) in kinds for element in value)
        if kind == "float" and fits:
            value = tuple(float(element) for element in value)
    else:
        wanted = type(default).__name__
        if isinstance(default, float) and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        fits = type(value) is type(default)
    if not fits:
        inner = isinstance(given, tuple) and isinstance(default, tuple)
        wrong = next(e for e in given if type(e) not in kinds) if inner else given
        raise ConfigError(
            f"config.{path}={given!r} {'holds a value' if inner else 'is'} of type "
            f"{type(wrong).__name__}, expected {wanted} (default {default!r}"
            f"{'; () for none' if isinstance(default, tuple) else ''})"
        )
    if message := options_lib.number_error(path, value, known):
        raise ConfigError(message)
    return value


def _selectors() -> dict[str, str]:
    """By section the key that chooses one of its namespaces."""
    sections = options_lib.sections()
    return {name: found.chosen_by for name, found in sections.items() if found.chosen_by}


def _refuse_unused(config: ml_collections.ConfigDict, defaults: dict[str, Any]) -> None:
    for section, selector in _selectors().items():
        chosen = config[section][selector]
        for path, value in flatten(config[section]):
            namespace, dot, _ = path.partition(".")
            full = f"{section}.{path}"
            if dot and namespace != chosen and value != defaults[full]:
                raise ConfigError(
                    f"config.{full}={value!r} would do nothing: config.{section}.{selector} is "
                    f"{chosen!r}. Set config.{section}.{selector}={namespace!r} or leave it out"
                )
    _refuse_unread(config, defaults)
    if config.optimizer.schedule == "constant" and config.optimizer.final_learning_rate:
        raise ConfigError(
            "config.optimizer.final_learning_rate would do nothing with schedule='constant': "
            "set config.optimizer.schedule to 'cosine' or 'linear'"
        )
    chosen = config.model.name
    learn_sigma = config.model.get(chosen, {}).get("learn_sigma", False)
    is_iddpm = config.process.edm.preconditioning == "iddpm"
    if learn_sigma and config.process.name == "edm" and not is_iddpm:
        raise ConfigError(
            f"config.model.{chosen}.learn_sigma=True would do nothing with config.process.name="
            f"'edm', which has no learned variance: set config.model.{chosen}.learn_sigma=False"
        )
    learned_variance = learn_sigma and config.process.name == "ddpm"
    if not learned_variance and config.loss.vlb_weight != defaults["loss.vlb_weight"]:
        raise ConfigError(
            "config.loss.vlb_weight would do nothing: it needs config.process.name='ddpm' and "
            f"config.model.{chosen}.learn_sigma=True"
        )


def _refuse_unread(config: ml_collections.ConfigDict, defaults: dict[str, Any]) -> None:
    """Refuses what is set of sections that the chosen method does not read."""
    name = config.method.name
    known = options_lib.facts("method", name)
    if not known:
        return  # refused where it is built, with those there are
    reads = known["reads"]
    if "variance" not in reads:
        unread = ("loss.vlb_weight",) if "loss" in reads else ("loss.",)
        _refuse_changed(config, defaults, unread, "it is of config.method.name='denoising'")
    weighting = options_lib.facts("timesteps", config.timesteps.name).get("weights_loss")
    if weighting and "loss" not in reads:
        raise ConfigError(
            f"config.timesteps.name={config.timesteps.name!r} weights the loss of "
            f"config.method.name='denoising', which {name!r} has not: choose another distribution"
        )
    if "timesteps" not in reads:
        _refuse_changed(config, defaults, ("timesteps.",), "pairs have times of their own")
    if config.augmentation.probability and "augmentation" not in reads:
        raise ConfigError(
            f"config.augmentation.probability={config.augmentation.probability} would do nothing: "
            f"config.method.name={name!r} augments no images"
        )


def _refuse_changed(
    config: ml_collections.ConfigDict, defaults: dict[str, Any], prefixes: tuple, reason: str
) -> None:
    for path, value in flatten(config):
        if path.startswith(prefixes) and value != defaults[path]:
            raise ConfigError(f"config.{path}={value!r} would do nothing: {reason}")


def choose(known: Mapping[str, Any], name: str, key: str) -> Any:
    """What is called `name` among `known`, as config.<key> asks.

    Raises:
        ConfigError: nothing is; with the names there are.
    """
    if name not in known:
        raise ConfigError(f"config.{key}={name!r}: {one_of(name, known)}")
    return known[name]


def choices(config: ml_collections.ConfigDict) -> dict[str, str]:
    """What is chosen in every section that has a choice, as {'model': 'dit'}."""
    found = options_lib.sections()
    return {name: config[name][s.chosen_by] for name, s in found.items() if s.chosen_by}


def differences(old: AnyConfig, new: AnyConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, as {'model.dit.depth': (old, new)}; absent values are None."""
    old, new = dict(flatten(old)), dict(flatten(new))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def to_json(config: ml_collections.ConfigDict, *, without: Sequence[str] = ()) -> str:
    """The configuration as JSON text, `without` some keys ('ema.warmup')."""
    values = config.to_dict()
    for path in without:
        section, _, leaf = path.rpartition(".")
        del values[section][leaf]
    return json.dumps(values, indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads `to_json`'s text back, checked like any other configuration.

    A key that is younger than the text has the value that runs had before there was such a key.

    Raises:
        ValueError: it is not JSON, or no object.
        ConfigError: a key or value that is not known.
    """
    values = parse_json(text, "the configuration")
    for path, value in earlier_values(text).items():
        section, _, leaf = path.rpartition(".")
        if isinstance(values.setdefault(section, {}), dict):  # else `resolve` says what is wrong
            values[section].setdefault(leaf, value)
    return resolve(values)


def earlier_values(text: str) -> dict[str, Any]:
    """Keys that `to_json`'s text is too old to have, with what it means without them."""
    present = {path for path, _ in flatten(parse_json(text, "the configuration"))}
    return {path: value for path, value in _LATER_KEYS.items() if path not in present}
