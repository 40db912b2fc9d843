"""The data of a configuration, checked against what its network takes."""

import math
from collections.abc import Iterable

import ml_collections

from dit_jax import conditions as conditions_lib
from dit_jax import data as data_lib
from dit_jax.config import ConfigError, choose
from dit_jax.data.buckets import parse_buckets
from dit_jax.data.latents import caption_command, extraction_command
from dit_jax.data.registry import SOURCES
from dit_jax.data.with_constant import WithConstant
from dit_jax.experiment.network import build_network, size_setting
from dit_jax.experiment.sampling import build_sampling
from dit_jax.models import Network
from dit_jax.named_options import options_named
from dit_jax.options import schema


def open_data(config: ml_collections.ConfigDict, split: str):
    """The source of `config.data`, checked against `config.model`.

    Raises:
        ConfigError: images or classes are not what the model takes, with the values to set.
    """
    name, model = config.data.name, config.model
    choose(SOURCES, name, "data.name")
    options = config.data[name].to_dict() if name in config.data else {}
    for key, value in options.items():
        if value == "" and schema()[f"data.{name}.{key}"].expected:
            raise ConfigError(_missing_data(config, f"config.data.{name}.{key}"))
    options = {key: value for key, value in options.items() if value != ""}
    taken = data_lib.options_of(name)
    network = build_network(config)
    wanted = network.sample_shape
    height, width, channels = wanted
    of_model = {"image_size": height if height == width else (height, width), "channels": channels}
    options.update({key: value for key, value in of_model.items() if key in taken})
    if name == "pairs":
        process = config.process[config.process.name].to_dict()
        options.update(process={"name": config.process.name, **process})
        if config.method.name == "kd":
            options.update(times=build_sampling(config).times[:-1].tolist())
    with options_named(_data_names(config, options)):
        source = data_lib.open_source(name, split, **options)
    source = _with_guidance(source, config, network)
    info = source.info
    if info.buckets:
        _require_buckets(config, network, info)
    elif tuple(info.image_shape) != wanted:
        *size, channels = info.image_shape
        raise ConfigError(
            f"{name} delivers images of {tuple(info.image_shape)}, the model takes {wanted}: set "
            f"{size_setting(config, size)} and config.model.in_channels={channels}"
        )
    missing = [
        key for key, c in network.conditions.items() if c.required and key not in info.conditions
    ]
    unused = [key for key in info.conditions if key not in (*network.conditions, "label")]
    if missing or unused:
        raise ConfigError(
            f"{name} tells of an image {', '.join(info.conditions) or 'nothing'}; the network of "
            f"config.model.name={model.name!r} takes "
            f"{conditions_lib.describe(network.conditions)}: choose data and a network that fit"
        )
    misfits = [
        f"{key} {found.describe()}, the network takes {network.conditions[key].describe()}"
        for key, found in info.declared.items()
        if key in network.conditions and not network.conditions[key].admits(found)
    ]
    if misfits:
        raise ConfigError(
            f"{name} tells of an image {'; '.join(misfits)}: "
            f"{_text_sizes(config, info, network)}choose data and a network that fit"
        )
    if info.num_classes != model.num_classes and model.num_classes:
        raise ConfigError(
            f"{name} has {info.num_classes} classes, the model {model.num_classes}: set "
            f"config.model.num_classes={info.num_classes}"
        )
    return source


def _text_sizes(
    config: ml_collections.ConfigDict, info: data_lib.DatasetInfo, network: Network
) -> str:
    """'set KEY=VALUE, or ' where sizes of a network's text are all that does not fit the data."""
    if config.model.name != "flux":
        return ""
    keys = {"text": "text_dim", "pooled": "pooled_dim"}
    wanted = [
        f"config.model.flux.{key}={info.declared[name].shape[-1]}"
        for name, key in keys.items()
        if name in info.declared
        and len(info.declared[name].shape) == len(network.conditions[name].shape)
        and info.declared[name].shape[-1] != config.model.flux[key]
    ]
    return f"set {' and '.join(wanted)}, or " if wanted else ""


def _with_guidance(
    source: data_lib.Source, config: ml_collections.ConfigDict, network: Network
) -> data_lib.Source:
    """The source, which tells of the guidance scale of config.data if the network is told one."""
    scale = config.data.guidance
    if "guidance" in network.conditions and "guidance" not in source.info.conditions:
        return WithConstant(source, "guidance", scale)
    if scale != schema()["data.guidance"].default:
        raise ConfigError(
            f"config.data.guidance={scale} would do nothing: the network takes "
            f"{conditions_lib.describe(network.conditions)}, or the data tell of it. Leave it out"
        )
    return source


def _data_names(config: ml_collections.ConfigDict, options: Iterable[str]) -> dict[str, str]:
    """What a source's options, in its errors, are called in the configuration."""
    names = {key: f"config.data.{config.data.name}.{key}" for key in options}
    return names | {
        "image_size": f"config.model.{'input_size' if config.model.input_size else 'image_size'}",
        "channels": "config.model.in_channels",
        "num_classes": "config.model.num_classes",
    }


def _missing_data(config: ml_collections.ConfigDict, key: str) -> str:
    """What to do where an experiment's data were not named."""
    model, name = config.model, config.data.name
    if name != "latents":
        expected = schema()[key.removeprefix("config.")].expected
        return f"{key} is empty: set --{key}={expected}"
    network = build_network(config)
    if "text" in network.conditions:
        pixels = tuple(8 * side for side in network.sample_shape[:2])
        return (
            f"{key} is empty. This experiment trains on latents of images and embeddings of their "
            f"captions, which are made once:\n  {caption_command(pixels, 'features')}\n"
            "(PICTURES: a folder of images with metadata.jsonl, see docs/data.md.) Then train with"
            f"\n  --{key}=features"
        )
    vae = 8 if model.in_channels == 4 else 1  # pixels a latent's side, of Stable Diffusion's
    pixels = tuple(vae * side for side in network.sample_shape[:2])
    lines = [
        f"{key} is empty. This experiment trains on latents of images, which are made once:",
        f"  {extraction_command(pixels, 'latents')}",
        "(IMAGES: a folder with a subfolder of images for every class.) Then train with",
        f"  --{key}=latents",
    ]
    if model.name == "dit" and config.method.name == "denoising":
        small = {"dit.depth": 2, "dit.hidden_size": 96, "dit.num_heads": 4}
        digits = {"image_size": 8, "in_channels": 1, "num_classes": 10} | small
        flags = [f"--config.model.{name}={value}" for name, value in digits.items()]
        lines += [
            "To try it without ImageNet: a small network on the digits that scikit-learn brings,",
            f"  --config.data.name=digits {' '.join(flags)} --config.training.batch_size=64",
            "or python launch/train.py --config=configs/cifar10_dit.py on CIFAR-10",
        ]
    return "\n".join(lines)


def _require_buckets(
    config: ml_collections.ConfigDict, network: Network, info: data_lib.DatasetInfo
) -> None:
    """Refuses images of sizes that the network does not take."""
    found, multiple = info.image_shape[-1], network.side_multiple
    if found != config.model.in_channels:
        raise ConfigError(f"{info.name} has {found} channels: set config.model.in_channels={found}")
    for bucket in info.buckets:
        if any(side % multiple for side in bucket.size):
            raise ConfigError(
                f"{info.name} has a bucket {bucket} (height x width), but the network of "
                f"config.model.name={config.model.name!r} takes sides that are multiples of "
                f"{multiple}: {_other_buckets(config, info, multiple)}"
            )
        network.at_size(bucket.size)


def _other_buckets(
    config: ml_collections.ConfigDict, info: data_lib.DatasetInfo, multiple: int
) -> str:
    """What to set for buckets whose sides are all multiples of `multiple`."""
    given = config.data.get(config.data.name, {}).get("buckets", "")
    kind, _, number = given.partition(":")
    if not given:
        return "make the data again, in such sizes"
    if kind == "auto":
        text = f"auto:{math.lcm(int(number), multiple)}"
    else:
        sizes = [
            [multiple * max(1, round(side / multiple)) for side in size]
            for size in parse_buckets(given, 0)
        ]
        text = ",".join(dict.fromkeys("{}x{}".format(*size) for size in sizes))
    return f"set --config.data.{config.data.name}.buckets={text}"


def require_augmented(
    config: ml_collections.ConfigDict, info: data_lib.DatasetInfo, initial: bool
) -> None:
    """Refuses parameters for labels of augmentation that a run from scratch would never see.

    Args:
        config: resolved, of a run that is to begin.
        info: of its data, which may bring such labels.
        initial: whether the run starts from a model, whose network it then has to have.

    Raises:
        ConfigError: with what to set.
    """
    dim = config.model.augment_dim
    if dim and not (config.augmentation.probability or "augment" in info.conditions or initial):
        raise ConfigError(
            f"config.model.augment_dim={dim} would do nothing: no image is augmented. Set "
            "config.augmentation.probability, or config.model.augment_dim=0"
        )
