"""What models of all formats become: a configuration of this library and a reader."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax import experiment
from dit_jax.config import default_config
from dit_jax.interop.finiteness import Finiteness, WatchedFile
from dit_jax.interop.found_model import FoundModel
from dit_jax.interop.parameters import parameter_shapes
from dit_jax.interop.prefixes import RenamedFile
from dit_jax.interop.table import ParameterReader, Table, native_table
from dit_jax.interop.tensors import InteropError, TensorFile
from dit_jax.models import network_name

# What of a network's configuration says how it is run, not what it is.
_EXECUTION = (
    "layer_loop",
    "remat",
    "attention",
    "custom_gradients",
    "dtype",
    "param_dtype",
    "quantization",
)


def configured(model: Mapping[str, Any], **sections: Mapping[str, Any]) -> Any:
    """A resolved configuration: the defaults with these sections' values."""
    config = default_config()
    for section, values in {"model": model, **sections}.items():
        for name, value in values.items():
            if isinstance(value, Mapping):
                config[section][name].update(value)
            else:
                config[section][name] = value
    return experiment.resolve_config(config)


def model_section(network_config: Any) -> dict[str, Any]:
    """The part of a network's configuration that the architecture decides, for `config.model`."""
    name = network_name(network_config)
    own = default_config().model.get(name, {})
    values = {
        key: value
        for key, value in dataclasses.asdict(network_config).items()
        if key not in _EXECUTION
    }
    shared = {key: value for key, value in values.items() if key not in own}
    return {"name": name, **shared, name: {key: values[key] for key in own if key in values}}


def found_model(
    kind: str, path: Path, config: Any, table: Table | None, file: TensorFile, **more: Any
) -> FoundModel:
    """A model whose parameters `table` finds in `file`.

    Args:
        kind: of the format.
        path: of the file or folder.
        config: resolved.
        table: of names; None for our own.
        file: the tensors.
        more: further fields of `FoundModel`.

    Raises:
        InteropError: tensors that are missing, not expected, or of other shapes.
    """
    shapes = parameter_shapes(experiment.build_network(config))
    seen = Finiteness()
    try:
        reader = ParameterReader(table or native_table(shapes), shapes, WatchedFile(file, seen))
    except InteropError as error:
        if not isinstance(file, RenamedFile):
            raise
        raise InteropError(f"{error}\n(read so: {'; '.join(more.get('notes', ()))})") from error
    paths, dtypes = tuple(reader.paths()), reader.file_dtypes
    return FoundModel(
        kind, path, config, reader, paths, finiteness=seen, file_dtypes=dtypes, **more
    )


def require_applies(condition: bool, name: str, value: Any, kind: str, reason: str) -> None:
    """Refuses an option of a command that a kind has no use for.

    Raises:
        InteropError: `condition` does not hold.
    """
    if not condition:
        raise InteropError(f"--{name}={value} does not apply: a {kind} {reason}")
