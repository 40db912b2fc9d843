"""EDM's networks (NVlabs): the table of their state dicts, and their configuration.

Parameters have the same names here and there ('enc.32x32_block0.conv0', ...), so that the table
follows from the shapes. The configuration is in the pickles; in a state dict it is read off names
and shapes. Buffers: the resampling filters are constants of the architecture, checked and written;
the random frequencies of NCSN++'s time features are part of the weights.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dit_jax.diffusion.preconditioning import IDDPM, VE, VP
from dit_jax.diffusion.process import EDM
from dit_jax.interop.parameters import Shapes
from dit_jax.interop.table import Constant, Row, Table
from dit_jax.interop.tensors import InteropError, TensorFile
from dit_jax.interop.transforms import Transform, conv, identity, linear, pointwise_conv
from dit_jax.models.edm import DhariwalUNetConfig, SongUNetConfig

PREFIX = "model."  # of the network within EDMPrecond
# The classes' own defaults, in the order of their arguments.
_SIZES = {"img_resolution": None, "img_channels": None, "label_dim": 0, "use_fp16": False}
# Of every preconditioning its arguments between those and model_type, with its name here and what
# they are called in `EDM`; and the default model_type.
_WRAPPERS: dict[str, tuple[str, dict[str, tuple[str, float]], str]] = {
    "EDMPrecond": (
        "edm",
        {
            "sigma_min": ("sigma_min", 0.0),
            "sigma_max": ("sigma_max", math.inf),
            "sigma_data": ("sigma_data", 0.5),
        },
        "DhariwalUNet",
    ),
    "VPPrecond": (
        "vp",
        {
            "beta_d": ("vp_beta_d", 19.9),
            "beta_min": ("vp_beta_min", 0.1),
            "M": ("num_timesteps", 1000),
            "epsilon_t": ("vp_epsilon_t", 1e-5),
        },
        "SongUNet",
    ),
    "VEPrecond": (
        "ve",
        {"sigma_min": ("ve_sigma_min", 0.02), "sigma_max": ("ve_sigma_max", 100.0)},
        "SongUNet",
    ),
    "iDDPMPrecond": (
        "iddpm",
        {
            "C_1": ("iddpm_c_1", 0.001),
            "C_2": ("iddpm_c_2", 0.008),
            "M": ("num_timesteps", 1000),
        },
        "DhariwalUNet",
    ),
}
_SHARED = {"augment_dim": 0, "channel_mult_emb": 4, "dropout": 0.10, "label_dropout": 0.0}
_NETWORKS: dict[str, tuple[str, type, dict[str, Any]]] = {
    "SongUNet": (
        "song_unet",
        SongUNetConfig,
        {
            **_SHARED,
            "model_channels": 128,
            "channel_mult": (1, 2, 2, 2),
            "num_blocks": 4,
            "attn_resolutions": (16,),
            "embedding_type": "positional",
            "channel_mult_noise": 1,
            "encoder_type": "standard",
            "decoder_type": "standard",
            "resample_filter": (1, 1),
        },
    ),
    "DhariwalUNet": (
        "dhariwal_unet",
        DhariwalUNetConfig,
        {
            **_SHARED,
            "model_channels": 192,
            "channel_mult": (1, 2, 3, 4),
            "num_blocks": 3,
            "attn_resolutions": (32, 16, 8),
        },
    ),
}
UNetConfig = SongUNetConfig | DhariwalUNetConfig


@dataclasses.dataclass(frozen=True)
class Preconditioned:
    """A network with EDM's preconditioning.

    Attributes:
        network: its configuration here.
        process: sigma_data, and the noise levels to sample at: EDM's own, within those that the
            network supports.
        label_dropout: share of labels that its training left out.
    """

    network: UNetConfig
    process: EDM = dataclasses.field(default_factory=EDM)
    label_dropout: float = 0.0


def edm_table(
    config: UNetConfig, shapes: Shapes, prefix: str = PREFIX, process: Any = None
) -> Table:
    """The layout of an EDM network's state dict.

    Args:
        config: of the network.
        shapes: of our parameters by path.
        prefix: 'model.' for the preconditioned network's state dict, '' for the network's alone.
        process: of the network; iDDPM's has a table of noise levels in its state dict.

    Raises:
        InteropError: the network has a second time, for which EDM has no parameters.
    """
    if config.second_time != "none":
        raise InteropError(
            f"EDM's networks know one time; this one sees a second (model.second_time="
            f"{config.second_time!r}) and has parameters for it that no EDM state dict holds"
        )
    rows = tuple(_row(path, shape, prefix) for path, shape in shapes.items())
    constants = tuple(
        Constant(f"{prefix}{name}.resample_filter", lambda: _filter(config))
        for name in _resampling_layers(config)
    )
    if isinstance(process, EDM) and process.preconditioning == "iddpm" and prefix:
        levels = process.coefficients.table
        # The original accumulates them in float32, one rounding a level.
        tolerance = 1e-4 * float(levels[0])
        constants += (Constant("u", lambda: levels, tolerance),)
    return Table(f"{type(config).__name__.removesuffix('Config')} of EDM", rows, constants)


def _row(path: str, shape: tuple[int, ...], prefix: str) -> Row:
    module, _, leaf = path.rpartition(".")
    names = {"kernel": "weight", "scale": "weight"}
    return Row(path, f"{prefix}{module}.{names.get(leaf, leaf)}", _transform(path, shape))


def _transform(path: str, shape: tuple[int, ...]) -> Transform:
    *_, layer, leaf = path.split(".")
    if leaf != "kernel":
        return identity()
    if len(shape) == 4:
        return conv()
    is_linear = layer == "affine" or layer.startswith("map_")
    return linear() if is_linear else pointwise_conv()


def _resampling_layers(config: UNetConfig) -> list[str]:
    """The convolutions with a filter: in blocks that change the resolution, and beside them."""
    names = []
    for part, plan in (("enc", config.encoder), ("dec", config.decoder)):
        for layer in plan:
            name = f"{part}.{layer.name}"
            if layer.kind == "block" and layer.resample != "none":
                names += [f"{name}.conv0", f"{name}.skip"]
            elif layer.kind in ("aux_down", "aux_up", "aux_residual"):
                names.append(name)
    return names


def _filter(config: UNetConfig) -> np.ndarray:
    taps = np.asarray(config.style.resample_filter, np.float32)
    return np.outer(taps, taps)[None, None] / taps.sum() ** 2


def prefix_of(names: Any) -> str:
    """What stands before the network's names in a state dict."""
    return PREFIX if any(name.startswith(f"{PREFIX}enc.") for name in names) else ""


def from_arguments(file: TensorFile) -> Preconditioned:
    """The configuration in a pickle: the arguments that its network was created with.

    Raises:
        InteropError: another preconditioning or network, or an argument unknown to EDM.
    """
    classes = file.metadata["classes"]
    if classes[""] not in _WRAPPERS:
        raise InteropError(
            f"{file.path}: its network is a {classes['']}; expected one of {', '.join(_WRAPPERS)}"
        )
    name, options, default_model = _WRAPPERS[classes[""]]
    defaults = _SIZES | {key: value for key, (_, value) in options.items()}
    defaults |= {"model_type": default_model}
    positional, keywords = file.metadata["arguments"]
    given = dict(zip(defaults, positional, strict=False)) | keywords
    if len(positional) > len(defaults) or not given:
        raise InteropError(f"{file.path}: the arguments of its {classes['']} were not recorded")
    outer = {key: given.pop(key, default) for key, default in defaults.items()}
    model = outer["model_type"]
    if model not in _NETWORKS or classes.get("model") != model:
        raise InteropError(
            f"{file.path}: its network is a {classes.get('model')}, configured as {model}; "
            f"expected one of {', '.join(_NETWORKS)}"
        )
    _, _, defaults = _NETWORKS[model]
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise InteropError(
            f"{file.path}: its {model} has arguments that EDM's has not: "
            f"{', '.join(f'{name}={given[name]!r}' for name in unknown)}"
        )
    values = defaults | {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    label_dropout = float(values.pop("label_dropout"))
    sizes = (outer["img_resolution"], outer["img_channels"], outer["label_dim"])
    network = _network(file, model, *sizes, learn_sigma=name == "iddpm", **values)
    try:
        process = _process(name, {ours: outer[key] for key, (ours, _) in options.items()})
    except (TypeError, ValueError) as error:
        raise InteropError(f"{file.path}: {error}") from error
    return Preconditioned(network, process, label_dropout)


def _process(name: str, options: dict[str, Any]) -> EDM:
    """The process with EDM's own noise levels, within those that the network knows."""
    if name == "edm":
        low, high = float(options.pop("sigma_min")), float(options.pop("sigma_max"))
    else:
        options = {
            key: int(value) if key == "num_timesteps" else float(value)
            for key, value in options.items()
        }
        own = {key.removeprefix(f"{name}_"): value for key, value in options.items()}
        low, high = {"vp": VP, "ve": VE, "iddpm": IDDPM}[name](**own).sigma_range
    return EDM(
        sigma_min=max(EDM.sigma_min, low),
        sigma_max=min(EDM.sigma_max, high),
        preconditioning=name,
        **options,
    )


def _network(
    file: TensorFile, model: str, image_size: Any, in_channels: Any, num_classes: Any, **values: Any
) -> UNetConfig:
    _, config, _ = _NETWORKS[model]
    try:
        return config(
            image_size=image_size, in_channels=in_channels, num_classes=num_classes, **values
        )
    except (TypeError, ValueError) as error:
        raise InteropError(
            f"{file.path}: its {model} is not one of this library: {error}"
        ) from error


def from_tensors(file: TensorFile) -> Preconditioned:
    """The configuration that names and shapes of a state dict tell.

    Not told, and taken as EDM's defaults: dropout, sigma_data and the range of noise levels.

    Raises:
        InteropError: it is no EDM U-Net, or one that predicts a variance (iDDPM's).
    """
    prefix = prefix_of(file.specs)
    shapes = {
        name.removeprefix(prefix): spec.shape
        for name, spec in file.specs.items()
        if name.startswith(prefix)
    }
    try:
        return Preconditioned(_network_from_shapes(file, prefix, shapes))
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise InteropError(
            f"{file.path} is no complete EDM U-Net; there is no {error.args[0]!r}"
        ) from error


def _network_from_shapes(file: TensorFile, prefix: str, shapes: Shapes) -> UNetConfig:
    image_size = _image_size(file, shapes)
    top = f"{image_size}x{image_size}"
    is_song = f"dec.{top}_aux_norm.weight" in shapes
    emb_channels, noise_channels = shapes["map_layer0.weight"]
    first, in_channels, *_ = shapes[f"enc.{top}_conv.weight"]
    base = first if is_song else noise_channels
    sides = [image_size]
    while f"enc.{sides[-1] // 2}x{sides[-1] // 2}_down.norm0.weight" in shapes:
        sides.append(sides[-1] // 2)
    blocks = [f"enc.{side}x{side}_block0" for side in sides]
    widths = [shapes[f"{block}.conv0.weight"][0] for block in blocks]
    for name, width in [("map_layer0", emb_channels), *zip(blocks, widths, strict=True)]:
        if width % base:
            raise InteropError(f"{file.path}: {name} has {width} channels, no multiple of {base}")
    out = shapes[f"dec.{top}_aux_conv.weight" if is_song else "out_conv.weight"][0]
    if out != in_channels:
        raise InteropError(
            f"{file.path}: {in_channels} channels in and {out} out: this network predicts more "
            "than EDM's, as iDDPM's does a variance"
        )
    values: dict[str, Any] = {
        "model_channels": base,
        "channel_mult": tuple(width // base for width in widths),
        "channel_mult_emb": emb_channels // base,
        "num_blocks": sum(
            re.fullmatch(f"enc.{top}_block\\d+.norm0.weight", n) is not None for n in shapes
        ),
        "attn_resolutions": tuple(
            side
            for side, block in zip(sides, blocks, strict=True)
            if f"{block}.qkv.weight" in shapes
        ),
        "augment_dim": shapes.get("map_augment.weight", (0, 0))[1],
    }
    if is_song:
        values |= _song_values(file, prefix, shapes, sides, noise_channels // base)
    num_classes = shapes.get("map_label.weight", (0, 0))[1]
    model = "SongUNet" if is_song else "DhariwalUNet"
    return _network(file, model, image_size, in_channels, num_classes, **values)


def _image_size(file: TensorFile, shapes: Shapes) -> int:
    matches = [re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name) for name in shapes]
    sizes = [int(match[1]) for match in matches if match]
    if len(sizes) != 1:
        raise InteropError(
            f"{file.path} is no EDM U-Net: expected one tensor named as enc.32x32_conv.weight"
        )
    return sizes[0]


def _song_values(
    file: TensorFile, prefix: str, shapes: Shapes, sides: list[int], channel_mult_noise: int
) -> dict[str, Any]:
    beside = [f"enc.{side}x{side}_aux" for side in sides[1:2]]
    encoder_type = "standard"
    for kind in ("skip", "residual"):
        if any(f"{name}_{kind}.weight" in shapes for name in beside):
            encoder_type = kind
    lowest = f"dec.{sides[-1]}x{sides[-1]}_aux_norm.weight"
    filters = [name for name in shapes if name.endswith(".resample_filter")]
    if len(sides) > 1 and not filters:
        raise InteropError(
            f"{file.path} has no resample_filter, which no other tensor tells: it is not a "
            "complete state dict"
        )
    taps: tuple[float, ...] = (1, 1)
    if filters:
        (found,) = file.read([f"{prefix}{filters[0]}"])
        if found.ndim != 4:
            raise InteropError(f"{file.path}: {filters[0]} is {list(found.shape)}, no filter")
        taps = _taps(found)
    return {
        "embedding_type": "fourier" if "map_noise.freqs" in shapes else "positional",
        "channel_mult_noise": channel_mult_noise,
        "encoder_type": encoder_type,
        "decoder_type": "skip" if len(sides) > 1 and lowest in shapes else "standard",
        "resample_filter": taps,
    }


def _taps(resample_filter: np.ndarray) -> tuple[float, ...]:
    """The separable filter, in whole numbers where it is of such, as (1, 3, 3, 1)."""
    row = resample_filter.astype(np.float64).sum(axis=(0, 1, 2))
    taps = row / np.abs(row).min()
    whole = np.rint(taps)
    if np.isfinite(taps).all() and np.abs(taps - whole).max() < 1e-3:
        return tuple(int(tap) for tap in whole)
    return tuple(float(tap) for tap in row)


def sections(found: Preconditioned) -> dict[str, Mapping[str, Any]]:
    """The sections of a configuration that describe the model and how it is sampled.

    The sampling settings are those that EDM's authors recommend: 18 steps of Heun's method (35
    network evaluations) at 32 pixels, 40 above (79), and 256 with churn for ImageNet at 64 (511).
    """
    network, process = found.network, found.process
    sampling: dict[str, Any] = {"solver": "heun", "steps": 18 if network.image_size <= 32 else 40}
    if network.image_size == 64 and network.num_classes == 1000:
        churn = {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
        sampling |= {"steps": 256, "heun": churn}
    return {
        "model": model_section(network),
        "process": {"name": "edm", "edm": dataclasses.asdict(process)},
        "method": {"label_dropout": found.label_dropout},
        "sampling": sampling,
    }


def model_section(network: UNetConfig) -> dict[str, Any]:
    """What the architecture decides, as values of `config.model`."""
    name, _, defaults = _NETWORKS[type(network).__name__.removesuffix("Config")]
    values = dataclasses.asdict(network)
    shared = ("image_size", "in_channels", "num_classes", "augment_dim", "second_time")
    own = {key: values[key] for key in defaults if key in values and key not in shared}
    return {"name": name, **{key: values[key] for key in shared}, name: own}


def constructor(network: UNetConfig, process: EDM) -> str:
    """The call of EDM's code that makes the network a state dict is of."""
    model = type(network).__name__.removesuffix("Config")
    _, _, defaults = _NETWORKS[model]
    values = dataclasses.asdict(network)
    own = {key: values[key] for key in defaults if key in values}
    (wrapper, options), *_ = (
        (name, options)
        for name, (ours, options, _) in _WRAPPERS.items()
        if ours == process.preconditioning
    )
    # The range of EDM's own is of sampling, here in the process.
    told = {
        key: getattr(process, ours)
        for key, (ours, _) in options.items()
        if ours not in ("sigma_min", "sigma_max")
    }
    arguments = {
        "img_resolution": network.image_size,
        "img_channels": network.in_channels,
        "label_dim": network.num_classes,
        **told,
        "model_type": model,
    } | {key: list(v) if isinstance(v, tuple) else v for key, v in own.items()}
    return f"{wrapper}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
