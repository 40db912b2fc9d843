"""FLUX transformers on disk: diffusers' folders and original files, read and written.

    network, params = load_flux("FLUX.1-schnell")     # a pipeline, its transformer/, or a file
    save_flux("out", network, params)                 # for FluxTransformer2DModel.from_pretrained

Parameters are read one at a time, the largest first, and let go of once they are placed.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import experiment
from dit_jax.atomic import atomic_file, atomic_folder, check_destination
from dit_jax.interop import flux
from dit_jax.interop.claims import check_counts, read_object
from dit_jax.interop.finiteness import Finiteness, WatchedFile
from dit_jax.interop.found_model import FoundModel
from dit_jax.interop.parameters import abstract_params, flat_dtypes, flat_shapes, flatten, unflatten
from dit_jax.interop.prefixes import without_prefix
from dit_jax.interop.recognise import DIFFUSERS_FLUX, ORIGINAL_FLUX, description, find_architectures
from dit_jax.interop.sharded import find_weights
from dit_jax.interop.table import ParameterReader, Table, export_arrays, export_specs
from dit_jax.interop.tensors import InteropError, TensorFile, open_tensors, write_safetensors
from dit_jax.models import FluxConfig, Network
from dit_jax.models.apart import Apart
from dit_jax.models.linear import resolve_param_dtype

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
LAYOUTS = {"diffusers": flux.diffusers_table, "original": flux.original_table}


@dataclasses.dataclass(frozen=True)
class FluxFile:
    """A FLUX transformer on disk, of which no parameter has been read.

    Attributes:
        config: of the network.
        layout: one of `LAYOUTS`.
        file: the tensors, by the layout's names.
        notes: what a user should know about how it was understood.
    """

    config: FluxConfig
    layout: str
    file: TensorFile
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> Table:
        """The file's layout."""
        return LAYOUTS[self.layout](self.config)

    @property
    def param_dtype(self) -> str:
        """'bfloat16' if the file holds nothing else, else 'float32'."""
        narrow = all(spec.dtype == jnp.bfloat16 for spec in self.file.specs.values())
        return "bfloat16" if narrow else "float32"


def open_flux(path: str | os.PathLike) -> FluxFile:
    """Opens a FLUX transformer without reading its parameters.

    Args:
        path: a diffusers pipeline's folder, that of its transformer, a file of weights with
            config.json beside it, or a file in the original layout.

    Raises:
        InteropError: no FLUX transformer there; another model is named.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InteropError(f"{path} does not exist")
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        if (folder / CONFIG).is_file():
            return _open_diffusers(folder, path)
        raise InteropError(
            f"{path} is no FLUX of diffusers: expected a pipeline's folder with transformer/, or "
            f"that of the transformer with {CONFIG} and {WEIGHTS} (or an index of shards)"
        )
    file = open_tensors(path, keep_names=True)
    found = set(find_architectures(file.specs).values())
    if ORIGINAL_FLUX in found:
        return _open_original(file)
    if DIFFUSERS_FLUX in found and not (path.parent / CONFIG).is_file():
        raise InteropError(
            f"{path} is a transformer of diffusers, whose {CONFIG} is not beside it: download "
            "that, too, and give the folder"
        )
    if DIFFUSERS_FLUX in found:
        return _open_diffusers(path.parent, path.parent, path)
    raise InteropError(f"{path} holds no FLUX transformer: {description(file.specs)}")


def _open_diffusers(folder: Path, within: Path, weights: Path | None = None) -> FluxFile:
    where = folder / CONFIG
    values = read_object(where, within)
    flux.check_diffusers_types(values, where)
    config = flux.config_from_diffusers(values, where=where)
    file = open_tensors(weights or find_weights(folder), within=within, keep_names=True)
    if DIFFUSERS_FLUX not in find_architectures(file.specs).values():
        raise InteropError(f"{file.path} holds no {DIFFUSERS_FLUX}: {description(file.specs)}")
    check_counts(where, values, file)
    file, notes = without_prefix(file, (DIFFUSERS_FLUX,))
    return FluxFile(config, "diffusers", file, notes)


def _open_original(file: TensorFile) -> FluxFile:
    file, notes = without_prefix(file, (ORIGINAL_FLUX,))
    config, assumed = flux.config_from_original(file)
    return FluxFile(config, "original", file, (*notes, *assumed))


def load_flux(
    path: str | os.PathLike,
    *,
    param_dtype: str = "auto",
    put: Callable[[str, np.ndarray], Any] | None = None,
    **execution: Any,
) -> tuple[Network, dict[str, Any]]:
    """Reads a FLUX transformer.

    Args:
        path: see `open_flux`.
        param_dtype: what parameters are stored in; 'auto' is bfloat16 for a file that holds nothing
            else, and float32 for any other.
        put: (path, array) -> leaf, for instance onto sharded devices, one parameter at a time, or
            one layer's, without the axis of layers, where `Network.is_apart`; default: the first
            device.
        execution: dtype, quantization, layer_loop, remat, attention of the network.

    Returns:
        The network and its parameters, as `Network.as_sampled` gives them.

    Raises:
        InteropError: see `open_flux`; weights that differ from the configuration (one error with
            all differences), or NaN or infinity in them.
    """
    found = open_flux(path)
    stored = resolve_param_dtype(param_dtype, found.param_dtype)
    network = Network(dataclasses.replace(found.config, param_dtype=stored, **execution))
    seen = Finiteness()
    reader = ParameterReader(
        found.table, flat_shapes(abstract_params(network)), WatchedFile(found.file, seen)
    )
    params = read_params(network, reader, put)
    seen.require(found.file.path, can_be_allowed=False)
    return network, params


def load_found_flux(
    found: FoundModel,
    *,
    param_dtype: str = "auto",
    put: Callable[[str, np.ndarray], Any] | None = None,
    **execution: Any,
) -> tuple[Network, dict[str, Any]]:
    """Reads a FLUX transformer that `open_model` found: a run's, or one in any format.

    Args:
        found: of which no parameter has been read.
        param_dtype: see `load_flux`, like what follows.
        put: see there.
        execution: see there.

    Returns:
        As `load_flux`.

    Raises:
        InteropError: it is another model, denoises otherwise than FLUX, or holds NaN or infinity.
    """
    require_flux(found)
    stored = resolve_param_dtype(param_dtype, found.param_dtype)
    network = Network(dataclasses.replace(found.network.config, param_dtype=stored, **execution))
    params = read_params(network, found.read, put)
    found.finiteness.require(found.path)
    return network, params


def require_flux(found: FoundModel) -> None:
    """Refuses a model that a FLUX pipeline cannot take in place of its transformer.

    Raises:
        InteropError: it is another model, or denoises otherwise than FLUX.
    """
    if not isinstance(found.network.config, FluxConfig):
        raise InteropError(f"{found.path} is a {found.network.config.title}, no FLUX transformer")
    others = flux.differences(found.network.config, experiment.build_process(found.config))
    if others:
        raise InteropError(f"{found.path} is sampled otherwise than FLUX is: {others[0]}")


def read_params(
    network: Network,
    read: Callable[[str, np.dtype], np.ndarray],
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """A transformer's parameters, one at a time, the largest first, as `load_flux` gives them.

    Args:
        network: whose they are.
        read: (path, dtype) -> array.
        put: see `load_flux`.
    """
    abstract = abstract_params(network)
    shapes, dtypes = flat_shapes(abstract), flat_dtypes(abstract)
    put = put or (lambda path, array: jax.device_put(array))

    def placed(path: str) -> Any:
        array = read(path, dtypes[path])
        if network.is_apart and path.partition(".")[0] in network.config.stacks:
            return Apart(tuple(put(path, layer) for layer in array))
        return put(path, array)

    # A parameter is held twice while it is placed: last, when all others are there, a small one.
    largest_first = sorted(shapes, key=lambda path: -np.prod(shapes[path]))
    return unflatten([(path, placed(path)) for path in largest_first])


def save_flux(
    folder: str | os.PathLike,
    network: Network,
    params: Mapping[str, Any],
    *,
    dtype: str = "",
    overwrite: bool = False,
) -> str:
    """Writes a transformer for diffusers' `FluxTransformer2DModel.from_pretrained(folder)`.

    Args:
        folder: appears complete or not at all.
        network: what to write.
        params: its parameters, read one at a time.
        dtype: of the tensors, 'float32', 'bfloat16' or 'float16'; by default what the network
            stores its products' parameters in.
        overwrite: replace what is there.

    Returns:
        The SHA-256 of the weights file.

    Raises:
        InteropError: diffusers' class cannot have this shape; NaN or infinity in the parameters.
        FileExistsError: `folder` exists.
    """
    check_destination(Path(folder), overwrite=overwrite)
    values = flux.config_to_diffusers(network.config)
    with atomic_folder(Path(folder), overwrite=overwrite) as temporary:
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        return _write(temporary / WEIGHTS, "diffusers", network, params, dtype)


def save_flux_original(
    file: str | os.PathLike,
    network: Network,
    params: Mapping[str, Any],
    *,
    dtype: str = "",
    overwrite: bool = False,
) -> str:
    """Writes a transformer in the layout of the original code; see `save_flux`."""
    check_destination(Path(file), overwrite=overwrite)
    with atomic_file(Path(file), overwrite=overwrite) as temporary:
        return _write(Path(temporary.name), "original", network, params, dtype)


def _write(path: Path, layout: str, network: Network, params: Mapping[str, Any], dtype: str) -> str:
    stored = jnp.dtype(dtype or resolve_param_dtype(network.config.param_dtype))
    table, shapes, leaves = LAYOUTS[layout](network.config), flat_shapes(params), flatten(params)
    arrays = dict(leaves)
    specs = export_specs(table, shapes, stored)
    seen = Finiteness()
    written = seen.watched(specs, _exported(table, shapes, arrays, stored))
    digest = write_safetensors(path, specs, written, metadata={"format": "pt"})
    seen.require(path, can_be_allowed=False)
    return digest


def _exported(
    table: Table, shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, Any], dtype: Any
) -> Iterator[np.ndarray]:
    return export_arrays(table, shapes, lambda path: np.asarray(arrays[path]), dtype)
