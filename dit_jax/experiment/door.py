"""Where mistakes in a configuration stop: before anything is read or compiled."""

import dataclasses
import functools
import re

import ml_collections

from dit_jax.config import AnyConfig, ConfigError, flatten, resolve
from dit_jax.experiment.method import build_method
from dit_jax.experiment.network import build_process
from dit_jax.experiment.sampling import SamplingPlan, build_sampling
from dit_jax.named_options import renamed
from dit_jax.nearest import did_you_mean
from dit_jax.options import facts, schema, unmet_need
from dit_jax.training import ema
from dit_jax.training.method import Method


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An experiment with everything built that needs no data.

    Attributes:
        config: complete.
        method: of it.
        sampling: of it, too.
    """

    config: ml_collections.ConfigDict
    method: Method
    sampling: SamplingPlan


def prepare(config: AnyConfig) -> Prepared:
    """`config.resolve`, then builds everything that needs no data, so that mistakes stop here.

    Args:
        config: complete or not.

    Raises:
        ConfigError: a value no object accepts, or a combination that cannot work.
    """
    config = resolve(config)
    _check_weights(config)
    try:
        _check_intervals(config)
        return Prepared(config, build_method(config), build_sampling(config))
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(_of_keys(str(error), config)) from error


def resolve_config(config: AnyConfig) -> ml_collections.ConfigDict:
    """The complete configuration, checked as `prepare` does."""
    return prepare(config).config


def effect_error(config: ml_collections.ConfigDict, method: Method) -> str | None:
    """What of a run's configuration would do nothing, and why; None where all has an effect.

    Apart from `resolve_config`, as what earlier runs have recorded is read whatever it says.

    Args:
        config: resolved.
        method: its method.
    """
    known = schema()
    if message := unmet_need(dict(flatten(config)), known):
        return message
    name, teacher = config.method.name, config.teacher
    waiting = (
        ["guidance_scale", "guidance_interval"] if "teacher" not in method.frozen_names else []
    )
    if not (method.frozen_names or teacher.path):
        waiting += ["weights", "initialize_student"]
    for key in waiting:
        if teacher[key] != known[f"teacher.{key}"].default:
            return (
                f"config.teacher.{key}={teacher[key]!r} would do nothing: config.method.name="
                f"{name!r}, as it is configured, asks no teacher. Leave it out, or choose a method "
                "that learns from one"
            )
    if config.model.second_time != "none" and "second_time" not in facts("method", name)["reads"]:
        return (
            f"config.model.second_time={config.model.second_time!r} would do nothing: "
            f"config.method.name={name!r} tells the network of one time. Set 'none', or "
            "config.method.name='mean_flow'"
        )
    return None


def _of_keys(text: str, config: ml_collections.ConfigDict) -> str:
    """An object's error with its options named as keys, where that is clear."""
    if text.startswith("config."):
        return text
    chosen = {f"model.{config.model.name}", f"process.{config.process.name}"}
    chosen |= {f"timesteps.{config.timesteps.name}", f"method.{config.method.name}"}
    paths = [path for path, _ in flatten(config)]
    names = {}
    for path in paths:
        section, _, key = path.rpartition(".")
        if section in chosen or section == "model":
            names.setdefault(key, []).append(f"config.{path}")
    clear = {key: found[0] for key, found in names.items() if len(found) == 1}
    sections = "|".join({path.partition(".")[0] for path in paths})
    text = renamed(text, clear)
    return re.sub(rf"(?<![\w.\-])(?=(?:{sections})\.[a-z_]+)", "config.", text)


def _check_intervals(config: ml_collections.ConfigDict) -> None:
    """Refuses a guidance interval that holds none of the process's times: it would do nothing."""
    process = build_process(config)
    for path in (path for path, known in schema().items() if known.interval):
        *sections, key = path.split(".")
        interval = functools.reduce(lambda values, name: values[name], sections, config)[key]
        if interval and (interval[1] < process.clean_time or interval[0] > process.noise_time):
            raise ConfigError(
                f"config.{path}={tuple(interval)} holds no time of config.process.name="
                f"{config.process.name!r}, whose times go from {process.clean_time:g} to "
                f"{process.noise_time:g}"
            )


def _check_weights(config: ml_collections.ConfigDict) -> None:
    try:
        averages = ema.averages(config.ema.decays, config.ema.power_stds, dtype=config.ema.dtype)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.{error}") from error
    available = ["ema"] * bool(averages) + [average.name for average in averages] + ["raw"]
    if config.sampling.weights not in available:
        raise ConfigError(
            f"config.sampling.weights={config.sampling.weights!r}: expected one of "
            f"{', '.join(available)} (config.ema names the averages that are kept)"
            f"{did_you_mean(config.sampling.weights, available, cutoff=0.7)}"
        )
