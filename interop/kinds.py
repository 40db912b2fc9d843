"""The kinds of models on disk: the library's own, and state dicts of networks from outside.

    register_state_dict("mine_pt", MyConfig, my_table, my_network)

Then `launch/convert.py --to=mine_pt` writes one, and 'mine_pt:FILE' is read wherever a model is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dit_jax import options
from dit_jax.interop.table import Table
from dit_jax.interop.tensor_file import TensorFile

KINDS = ("dit_jax", "dit_pt", "sit_pt", "diffusers", "edm_pkl", "edm_pt", "flux_pt")


@dataclasses.dataclass(frozen=True)
class StateDict:
    """How one kind of file holds a network.

    Attributes:
        config: type of the network's configuration.
        table: a configuration of it -> the table of its parameters' names in the file.
        network: such a file -> the configuration of the network in it, by its tensors' shapes and
            its metadata; raises `InteropError` if it holds another.
        sections: of the configuration of what such a file holds, beside config.model, as
            {"process": {"name": "flow"}, "sampling": {"solver": "euler"}}.
    """

    config: type
    table: Callable[[Any], Table]
    network: Callable[[TensorFile], Any]
    sections: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_REGISTERED: dict[str, StateDict] = {}


def register_state_dict(
    kind: str,
    config: type,
    table: Callable[[Any], Table],
    network: Callable[[TensorFile], Any],
    sections: Mapping[str, Any] | None = None,
) -> None:
    """Makes a kind of state dict known.

    Args:
        kind: its name for --to and --from, and before the colon of KIND:SRC.
        config: see `StateDict`, as all that follows.
        table: of the parameters' names.
        network: reads the network's configuration off a file.
        sections: what else is known of such a model; by default the configuration's defaults.

    Raises:
        ValueError: the name is another kind's.
    """
    made = StateDict(config, table, network, dict(sections or {}))
    if kind in ("auto", "hub", *KINDS) or _REGISTERED.get(kind, made) != made:
        raise ValueError(f"there is a kind {kind!r} already")
    _REGISTERED[kind] = made


def registered() -> Mapping[str, StateDict]:
    """All that are known, by kind; imports what `options.EXTENSIONS` names."""
    options.sections()
    return _REGISTERED


def kinds() -> tuple[str, ...]:
    """`KINDS`, and those that were registered."""
    return (*KINDS, *registered())
