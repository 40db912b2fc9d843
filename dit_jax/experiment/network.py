"""Network, process and denoiser of a configuration, and when two networks are the same."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import ml_collections

from dit_jax import conditions as conditions_lib
from dit_jax.config import AnyConfig, ConfigError, choose, resolve
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import PROCESSES
from dit_jax.diffusion.process import Process
from dit_jax.models import NETWORK_CONFIGS, Network


def network_of(section: Mapping[str, Any]) -> Network:
    """The network of a model section alone, as records hold it."""
    return build_network(resolve({"model": section}))


def build_network(config: ml_collections.ConfigDict) -> Network:
    """The network of `config.model`."""
    fields = config.model.to_dict()
    name = fields.pop("name")
    create = choose(NETWORK_CONFIGS, name, "model.name")
    own = fields.get(name, {})
    fields.update(own)
    wanted = {field.name for field in dataclasses.fields(create)}
    if "learn_sigma" in wanted and "learn_sigma" not in own:
        # U-Nets of iDDPM's preconditioning have its channels, and leave them unused.
        process = config.process
        fields["learn_sigma"] = (process.name, process.edm.preconditioning) == ("edm", "iddpm")
    network = Network(create(**{key: fields[key] for key in fields if key in wanted}))
    size = tuple(fields["input_size"])
    return network.at_size(size) if size else network


# What of config.model decides neither shapes nor meaning of parameters: how a network is run. The
# image size neither: positions are computed, and a network may go on at another resolution.
_EXECUTION = (
    "image_size",
    "input_size",
    "remat",
    "attention",
    "custom_gradients",
    "dtype",
    "param_dtype",
    "quantization",
)
# What a network may have beyond one whose parameters it starts from: its parameters start fresh,
# and where they make no difference at first.
_ADDITIONS = {"second_time": "none", "augment_dim": 0}
_NOTHING = object()


def architecture(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values of `config.model` that decide shapes and meaning of parameters, by flat key."""
    chosen = config.model.name
    named_by_size = getattr(NETWORK_CONFIGS.get(chosen), "layers_are_named_by_size", False)
    values = {}
    for key, value in config.model.items():
        if isinstance(value, AnyConfig):
            if key == chosen:
                values.update({f"{key}.{name}": v for name, v in value.items()})
        elif key not in _EXECUTION or (key == "image_size" and named_by_size):
            values[key] = tuple(value) if isinstance(value, list) else value
    # Of training, of how a network is run, and of plans.
    for key in ("dropout", "layer_loop", "text_length"):
        values.pop(f"{chosen}.{key}", None)
    return values


def require_same_network(
    found: ml_collections.ConfigDict, wanted: ml_collections.ConfigDict, source: str
) -> None:
    """Refuses parameters of a checkpoint for a configuration whose network is another.

    Args:
        found: the checkpoint's configuration.
        wanted: the experiment's.
        source: the checkpoint, for the error.

    Raises:
        ConfigError: with the values to set.
    """
    flags = [
        f"  config.model.{key} is {own!r}, the checkpoint's {its!r}: "
        + shlex.quote(f"--config.model.{key}={its}")
        for key, (its, own) in network_differences(found, wanted).items()
    ]
    if flags:
        raise ConfigError(f"{source} is a checkpoint of another network:\n" + "\n".join(flags))


def network_differences(
    found: ml_collections.ConfigDict, wanted: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
    """Where the network of a checkpoint is another than an experiment's.

    Args:
        found: the checkpoint's configuration.
        wanted: the experiment's.

    Returns:
        (the checkpoint's value, the experiment's) by key of `config.model`, None for one that is
        not there.
    """
    found, wanted = architecture(found), architecture(wanted)
    both = {key: (found.get(key), wanted.get(key)) for key in sorted(found.keys() | wanted.keys())}
    return {
        key: (its, own)
        for key, (its, own) in both.items()
        if its != own and its != _ADDITIONS.get(key, _NOTHING)
    }


def require_trainable(config: ml_collections.ConfigDict) -> None:
    """Refuses trained parameters in less than float32, which small updates would not change.

    Of a LoRA they are its factors, whose network may be stored in bfloat16.

    Raises:
        ConfigError: with what to set.
    """
    if config.model.param_dtype not in ("auto", "float32") and not config.lora.rank:
        raise ConfigError(
            f"config.model.param_dtype={config.model.param_dtype!r} is for sampling and "
            "evaluation: trained parameters are float32, as small updates vanish in fewer bits. "
            "Set --config.model.param_dtype=auto; what products are computed in is "
            "config.model.dtype"
        )
    if config.model.quantization == "int8":
        raise ConfigError(
            "config.model.quantization='int8' is for sampling and evaluation: rounded weights take "
            "no gradients. Set 'fp8', 'fp8_rowwise' or 'te', which train, or 'none'"
        )


def size_setting(config: ml_collections.ConfigDict, size: tuple[int, int]) -> str:
    """The key, with its value, that makes inputs of a (height, width), for hints."""
    height, width = size
    if height == width and not config.model.input_size:
        return f"config.model.image_size={height}"
    return f"config.model.input_size={height},{width}"


def build_process(config: ml_collections.ConfigDict) -> Process:
    """The noising process of `config.process`."""
    process = choose(PROCESSES, config.process.name, "process.name")
    options = config.process[config.process.name].to_dict()
    if config.process.name == "ddpm":
        options["learned_variance"] = build_network(config).learn_sigma
    return process(**options)


def build_denoiser(config: ml_collections.ConfigDict) -> Denoiser:
    """Network and process."""
    return Denoiser(build_network(config), build_process(config))


def unguidable(config: ml_collections.ConfigDict) -> str:
    """Why a model cannot be guided, after "guidance_scale=...", or "" if it can."""
    network = build_network(config)
    if not network.conditions:
        return "needs a class-conditional model; config.model.num_classes is 0"
    labels = "label" in network.conditions
    if not conditions_lib.can_guide(network.conditions):
        if not labels:
            return (
                "needs conditions that can be left out, and this model takes "
                f"{conditions_lib.describe(network.conditions)}. Use guidance_scale=1"
            )
        return (
            "needs a null class, and this model has none (config.model.dit.null_class is False): "
            "it was trained without label dropout. Use guidance_scale=1"
        )
    if not config.method.label_dropout:
        names, nulls = ("labels", "its null class means")
        if not labels:
            names, nulls = ("conditions", "their null values mean")
        return (
            f"needs a model that has also seen images without {names}; this one never has "
            f"(config.method.label_dropout is 0.0), so {nulls} nothing. Use "
            "guidance_scale=1, or train with --config.method.label_dropout=0.1"
        )
    return ""
