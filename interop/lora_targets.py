"""Where other libraries' modules are in our layers, found out from the tables of conversion.

A row of a table turns a foreign weight into (a part of) a kernel by moving its elements. What it
does to inputs and outputs is read off what it makes of a weight of their numbers, so that no name
and no permutation stands here a second time.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dit_jax.interop import dit, flux, kinds
from dit_jax.interop.edm import edm_table
from dit_jax.interop.parameters import parameter_shapes
from dit_jax.interop.table import LAYER, Row, Table, foreign_shapes
from dit_jax.interop.text_encoders import table_of
from dit_jax.models import DiTConfig, FluxConfig, Network
from dit_jax.models.edm_config import UNetConfig
from dit_jax.models.lora import layer_shapes
from dit_jax.models.text import CLIPTextConfig, T5Config, TextEncoder

_PROBED = 64  # rows and columns of a large weight that are looked at


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A foreign module's place in one of our layers.

    Attributes:
        module: its name there.
        ours: our layer's path.
        layer: its number in a stack; None for a layer by itself.
        shape: of the foreign weight, [out, in] or of a convolution.
        inputs: of each of our inputs the foreign one.
        outputs: of each output that is its own, in our order, the foreign one.
        columns: which of our outputs these are.
    """

    module: str
    ours: str
    layer: int | None
    shape: tuple[int, ...]
    inputs: np.ndarray
    outputs: np.ndarray
    columns: np.ndarray

    def our_factors(
        self, a: np.ndarray, b: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Foreign factors, a [r, in] and b [out, r], as ours: [i, r] and [r, width]."""
        ours = np.zeros((b.shape[1], width), np.float32)
        ours[:, self.columns] = b[self.outputs].T
        return np.ascontiguousarray(a[:, self.inputs].T, np.float32), ours

    def their_factors(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse, of one layer's factors, in the foreign module's own shapes."""
        rank = a.shape[1]
        theirs_a, theirs_b = np.empty(a.T.shape, a.dtype), np.empty((self.shape[0], rank), b.dtype)
        theirs_a[:, self.inputs] = a.T
        theirs_b[self.outputs] = b[:, self.columns].T
        points = (1,) * (len(self.shape) - 2)
        return theirs_a.reshape(rank, *self.shape[1:]), theirs_b.reshape(*theirs_b.shape, *points)


def normalised(module: str) -> str:
    """A module's name as all tools' spellings of it agree: kohya's have no points."""
    return module.replace(".", "_")


def tables_of(config: Any) -> Iterator[Table]:
    """The layouts a network is known in; that of the most common tools first."""
    if isinstance(config, FluxConfig):
        yield from (flux.diffusers_table(config), flux.original_table(config))
    elif isinstance(config, DiTConfig):
        yield from (dit.original_table(config), dit.diffusers_table(config))
    elif isinstance(config, UNetConfig):
        yield edm_table(config, parameter_shapes(Network(config)))
    elif isinstance(config, CLIPTextConfig | T5Config):
        yield table_of(config)
    known = kinds.registered().values()
    yield from (kind.table(config) for kind in known if isinstance(config, kind.config))


@functools.lru_cache(maxsize=8)
def targets(network: Network | TextEncoder) -> Mapping[str, Target]:
    """All modules that can have a LoRA, in every layout, by normalised name."""
    found: dict[str, Target] = {}
    for table in tables_of(network.config):
        for target in targets_of(network, table):
            found.setdefault(normalised(target.module), target)
    return found


def export_targets(network: Network) -> list[Target]:
    """Those of the layout that adapters are written in."""
    return list(targets_of(network, next(tables_of(network.config))))


def targets_of(network: Network | TextEncoder, table: Table) -> Iterator[Target]:
    """The modules of one layout, layer by layer."""
    layers, shapes = layer_shapes(network), parameter_shapes(network)
    for row in table.rows:
        ours = row.ours.removesuffix(".kernel")
        # Of equal copies none can be changed alone.
        if ours == row.ours or ours not in layers or row.copies:
            continue
        for part, (names, shape) in enumerate(
            zip(row.theirs, foreign_shapes(row, shapes[row.ours]), strict=True)
        ):
            moved = _moved(row, part, shape, layers[ours][-2:])
            if moved is None:
                continue
            for name in names.split("|"):
                module = re.sub(r"\.weight$", "", name)
                for layer in range(row.layers(shapes[row.ours])):
                    number = layer if row.stacked else None
                    yield Target(module.replace(LAYER, str(layer)), ours, number, shape, *moved)


def _moved(
    row: Row, part: int, shape: tuple[int, ...], kernel: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Inputs, outputs and columns of a `Target`; None if the row does more than move elements."""
    columns = row.parts(np.broadcast_to(np.arange(kernel[1]), kernel))[part]
    outs, ins = shape[0], math.prod(shape[1:])
    numbers = np.arange(outs).reshape(-1, *(1,) * (len(shape) - 1))
    by_output = row.transform.forward(np.broadcast_to(numbers, shape))
    by_input = row.transform.forward(np.broadcast_to(np.arange(ins).reshape(1, *shape[1:]), shape))
    if by_output.shape != columns.shape or columns.shape[0] != kernel[0]:
        return None
    outputs, inputs = by_output[0].copy(), by_input[:, 0].copy()
    some = tuple(slice(None, None, max(1, size // _PROBED)) for size in columns.shape)
    moves = (
        (columns[some] == columns[0][some[1]]).all()
        and (by_output[some] == outputs[some[1]]).all()
        and (by_input[some] == inputs[some[0], None]).all()
        and np.array_equal(np.sort(outputs), np.arange(outs))
        and np.array_equal(np.sort(inputs), np.arange(ins))
    )
    return (inputs, outputs, columns[0].copy()) if moves else None
