"""Autoencoders in diffusers folders and in bare weights files: configuration, reading, writing."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.atomic import atomic_folder
from dit_jax.interop.autoencoder_tables import diffusers_table, original_table
from dit_jax.interop.claims import check_counts, check_types, read_object
from dit_jax.interop.parameters import abstract_params, flat_shapes, flatten
from dit_jax.interop.prefixes import without_prefix
from dit_jax.interop.recognise import AUTOENCODERS, description
from dit_jax.interop.sharded import INDEX_SUFFIXES, find_weights, shards_of
from dit_jax.interop.table import export_arrays, export_specs, load_params
from dit_jax.interop.tensor_file import sha256_of
from dit_jax.interop.tensors import InteropError, TensorFile, open_tensors, write_safetensors
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Params
from dit_jax.models.linear import resolve_param_dtype
from dit_jax.nearest import one_of
from dit_jax.untrusted import shown

_WITHIN_DIFFUSION = "first_stage_model."
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_MAX_RESOLUTIONS = 16

# Architectures by name, for files that hold weights and no configuration. The scaling factors of
# others with the same tensors differ (SDXL 0.13025, SD3 1.5305 and 0.0609): hence the warning.
KNOWN = {
    "sd": AutoencoderKLConfig(scaling_factor=0.18215),
    "flux": AutoencoderKLConfig(
        scaling_factor=0.3611,
        shift_factor=0.1159,
        latent_channels=16,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


# Keys of config.json that are ours under the same name, with diffusers' defaults.
_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "force_upcast": True,
}


def config_from_diffusers(
    values: Mapping[str, Any], *, dtype: str = "auto", where: str = CONFIG
) -> AutoencoderKLConfig:
    """An `AutoencoderKL`'s config.json as ours.

    Args:
        values: the JSON's values; absent ones have diffusers' defaults (sd-vae-ft-mse and -ema,
            whose files are older than the key scaling_factor, rely on 0.18215).
        dtype: of the computation, see `AutoencoderKLConfig`.
        where: for errors.

    Raises:
        InteropError: another class, an option this network does not have, or a value out of range.
    """
    if values.get("_class_name") != "AutoencoderKL":
        found = shown(values.get("_class_name")).strip("'")
        raise InteropError(f"{where} describes a {found}; expected an AutoencoderKL")
    widths = values.get("block_out_channels", [64])
    is_list = isinstance(widths, list | tuple) and 1 <= len(widths) <= _MAX_RESOLUTIONS
    if not is_list or not all(type(width) is int and width > 0 for width in widths):
        raise InteropError(
            f"{where}: block_out_channels={shown(widths)}; expected a list of integers"
        )
    _check_types(values, where)
    count = len(widths)
    fixed = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "latents_mean": None,
        "latents_std": None,
    }
    for name, wanted in fixed.items():
        found = values.get(name, wanted)
        if (list(found) if isinstance(found, list | tuple) else found) != wanted:
            raise InteropError(
                f"{where}: {name}={shown(found)}; this AutoencoderKL has {wanted!r} and nothing "
                "else"
            )
    chosen = {name: values.get(name, default) for name, default in _DEFAULTS.items()}
    chosen["block_out_channels"] = tuple(chosen["block_out_channels"])
    size = chosen["sample_size"]
    chosen["sample_size"] = min(size) if isinstance(size, list) else size
    try:
        return AutoencoderKLConfig(
            **chosen, shift_factor=values.get("shift_factor") or 0.0, dtype=dtype
        )
    except (TypeError, ValueError) as error:
        raise InteropError(f"{where}: {error}") from error


def _check_types(values: Mapping[str, Any], where: str) -> None:
    lists = ("block_out_channels", "sample_size")
    by_kind = {
        kind: [n for n, v in _DEFAULTS.items() if type(v) is kind and n not in lists]
        for kind in (int, float, bool)
    }
    numbers = [*by_kind[float], "shift_factor"]
    check_types(
        where,
        values,
        integers=by_kind[int],
        numbers=numbers,
        truths=by_kind[bool],
        nullable=("shift_factor",),
    )
    size = values.get("sample_size", 32)
    sizes = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(type(side) is int and side > 0 for side in sizes):
        raise InteropError(f"{where}: sample_size={shown(size)}; expected an integer, or two")


def config_to_diffusers(config: AutoencoderKLConfig) -> dict[str, Any]:
    """The config.json of the `AutoencoderKL` with the same function."""
    count = len(config.block_out_channels)
    values = {name: getattr(config, name) for name in _DEFAULTS}
    values["block_out_channels"] = list(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "latents_mean": None,
        "latents_std": None,
        "shift_factor": config.shift_factor,  # 0.0, not null: diffusers' FluxPipeline adds it
        **values,
    }


def identify(file: TensorFile) -> str:
    """Which of `KNOWN` the tensors of a file without configuration look like.

    Raises:
        InteropError: none, with what its shapes say.
    """
    channels = _latent_channels(file)
    for name, config in KNOWN.items():
        if config.latent_channels == channels:
            return name
    raise InteropError(
        f"{file.path}: latents of {channels} channels are neither Stable Diffusion's (4) nor "
        f"Flux's (16): give the diffusers folder, whose {CONFIG} describes it"
    )


def _latent_channels(file: TensorFile) -> int:
    for prefix in ("", _WITHIN_DIFFUSION):
        spec = file.specs.get(f"{prefix}decoder.conv_in.weight")
        if spec is not None and len(spec.shape) == 4:
            return spec.shape[1]
    raise InteropError(f"{file.path} holds no AutoencoderKL: {description(file.specs)}")


def load_autoencoder(
    path: str | os.PathLike,
    *,
    which: str = "",
    dtype: str = "auto",
    param_dtype: str = "auto",
    sharding: Any = None,
) -> tuple[AutoencoderKL, Params, str]:
    """Reads an autoencoder.

    Args:
        path: a diffusers folder (config.json and weights), a pipeline's folder (its vae/), or a
            bare weights file in either layout.
        which: for a bare file: 'sd' or 'flux' (`KNOWN`); default: by its tensors, with a warning
            that names the scaling factor thereby assumed.
        dtype: of the computation, see `AutoencoderKLConfig`.
        param_dtype: what parameters are stored in, see there; 'auto' is bfloat16 for a file that
            holds nothing else, and float32 for any other.
        sharding: where the parameters are put; default: the first device.

    Returns:
        The autoencoder, its parameters, and the SHA-256 of the weights file.

    Raises:
        InteropError: no autoencoder there, another architecture, or weights that differ from the
            configuration (one error with all differences).
    """
    config, file, weights = _open(Path(path).expanduser(), which, dtype)
    only_bfloat16 = all(spec.dtype == jnp.bfloat16 for spec in file.specs.values())
    in_file = "bfloat16" if only_bfloat16 else "float32"
    if resolve_param_dtype(param_dtype, in_file) == "bfloat16":
        config = dataclasses.replace(config, param_dtype="bfloat16")
    autoencoder = AutoencoderKL(config)
    original = any("mid.block_1." in name for name in file.specs)
    table = (original_table if original else diffusers_table)(config)
    params = load_params(
        table,
        abstract_params(autoencoder),
        file,
        put=lambda path, array: jax.device_put(array, sharding),
    )
    return autoencoder, params, _sha256(weights)


def read_autoencoder_config(path: str | os.PathLike) -> AutoencoderKLConfig:
    """The configuration of an autoencoder, without reading its weights.

    Raises:
        InteropError: as `load_autoencoder`.
    """
    return _open(Path(path).expanduser(), "", "auto")[0]


def _open(path: Path, which: str, dtype: str) -> tuple[AutoencoderKLConfig, TensorFile, Path]:
    """Configuration, tensors and weights file of what `load_autoencoder` is to read."""
    if path.is_dir():
        folder = path / "vae" if (path / "vae" / CONFIG).is_file() else path
        if which:
            raise InteropError(f"which={which!r} is for bare weights; {folder} has a {CONFIG}")
        values, weights = _read_config(folder, path), _find_weights(folder)
        file = _by_own_names(open_tensors(weights, within=path))
        config = config_from_diffusers(values, dtype=dtype, where=str(folder / CONFIG))
        check_counts(folder / CONFIG, values, file)
    elif path.is_file():
        file, weights = _by_own_names(open_tensors(path)), path
        config = _known_config(file, which, dtype)
    else:
        raise InteropError(
            f"no autoencoder at {path}: expected a diffusers folder or a file, or one on the hub, "
            "for instance hub:stabilityai/sd-vae-ft-mse"
        )
    _latent_channels(file)  # another architecture is told as such, not as a thousand differences
    return config, file, weights


def _read_config(folder: Path, within: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InteropError(f"{folder} has no {CONFIG}: it is no autoencoder saved by diffusers")
    return read_object(path, within)


def _find_weights(folder: Path) -> Path:
    found = find_weights(folder)
    if found != folder:
        return found
    variants = sorted(folder.glob("*.safetensors"))
    if len(variants) == 1:
        return variants[0]
    names = f"several: {', '.join(v.name for v in variants)}" if variants else "none"
    raise InteropError(f"expected {WEIGHTS} in {folder}; found {names}. Give a file's path instead")


def _by_own_names(file: TensorFile) -> TensorFile:
    """The autoencoder in a file, whatever stands before its names; warns if something does."""
    if any(name.startswith(_WITHIN_DIFFUSION) for name in file.specs):
        return file  # a whole Stable Diffusion, which the tables know
    file, notes = without_prefix(file, AUTOENCODERS)
    for note in notes:
        warnings.warn(f"{file.path}: {note}", stacklevel=5)
    return file


def _known_config(file: TensorFile, which: str, dtype: str) -> AutoencoderKLConfig:
    if which and which not in KNOWN:
        raise InteropError(f"which={which!r}: {one_of(which, KNOWN)}")
    name = which or identify(file)
    config = KNOWN[name]
    if not which:
        warnings.warn(
            f"{file.path} has no {CONFIG}: taken for the {name!r} autoencoder, scaling factor "
            f"{config.scaling_factor}, shift {config.shift_factor}",
            stacklevel=4,
        )
    return AutoencoderKLConfig(**{**vars(config), "dtype": dtype})


def _sha256(path: Path) -> str:
    """Of a file; of an index and its shards one after another."""
    files = [path]
    if path.name.endswith(INDEX_SUFFIXES):
        files += [path.parent / shard for shard in shards_of(path)]
    digests = [sha256_of(file) for file in files]
    joined = "".join(digests).encode()
    return digests[0] if len(digests) == 1 else hashlib.sha256(joined).hexdigest()


def save_autoencoder(
    folder: str | os.PathLike,
    autoencoder: AutoencoderKL,
    params: Params,
    *,
    dtype: Any = np.float32,
    layout: str = "diffusers",
) -> str:
    """Writes an autoencoder for diffusers' `AutoencoderKL.from_pretrained(folder)`.

    Args:
        folder: must not exist; it appears complete or not at all.
        autoencoder: what to write.
        params: its parameters.
        dtype: of the tensors.
        layout: 'diffusers', or 'original' for the original names (with our config.json beside).

    Returns:
        The SHA-256 of the weights file.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: `layout` is unknown.
    """
    tables = {"diffusers": diffusers_table, "original": original_table}
    if layout not in tables:
        raise ValueError(f"layout={layout!r}: {one_of(layout, tables)}")
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: delete it or choose another folder")
    table, shapes = tables[layout](autoencoder.config), flat_shapes(params)
    leaves = dict(flatten(params))
    with atomic_folder(folder) as temporary:
        arrays = export_arrays(table, shapes, lambda path: np.asarray(leaves[path]), dtype)
        specs = export_specs(table, shapes, dtype)
        metadata = {"format": "pt"}
        digest = write_safetensors(temporary / WEIGHTS, specs, arrays, metadata=metadata)
        text = json.dumps(config_to_diffusers(autoencoder.config), indent=2)
        (temporary / CONFIG).write_text(text + "\n")
    return digest
