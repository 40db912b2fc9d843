"""The mechanism of every conversion: one table an architecture, read in both directions.

A table says, parameter by parameter, which foreign tensors hold it and by which bijection. Import,
export and the errors about tensors that are missing, unexpected or of another shape all come from
the same rows, so that what was imported is exported bit for bit.

Nothing here holds more than one row's tensors at a time: a row is read, transformed and handed on.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from dit_jax.interop.finiteness import Finiteness, WatchedFile
from dit_jax.interop.parameters import Shapes, flat_dtypes, flat_shapes, unflatten
from dit_jax.interop.tensors import InteropError, TensorFile, TensorSpec
from dit_jax.interop.transforms import Transform, identity
from dit_jax.quantities import spelled_numbers

LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters and the foreign tensors that hold it.

    Attributes:
        ours: path in our parameters, 'blocks.attn.qkv.kernel'.
        theirs: foreign name, or several names whose tensors are joined along `axis` (a fused qkv).
            With '{layer}' in it, one tensor a layer: ours has the layers as its leading axis, or,
            with `copies`, is what all of them hold equally. Alternatives of one name are separated
            by '|'; the first is written, any is read.
        transform: of every single foreign tensor.
        axis: of ours (without the layer axis) along which parts are joined.
        copies: number of equal copies a '{layer}' name stands for; 0: it stands for layers.
        sizes: of the parts along `axis`, where they are not all the same.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform
    axis: int = -1
    copies: int = 0
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        if isinstance(self.theirs, str):
            object.__setattr__(self, "theirs", (self.theirs,))

    @property
    def layered(self) -> bool:
        """Whether there is a foreign tensor a layer (or a copy)."""
        return LAYER in self.theirs[0]

    def layers(self, shape: tuple[int, ...]) -> int:
        """How often each name occurs, for our parameter's `shape`."""
        return (self.copies or shape[0]) if self.layered else 1

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading layer axis."""
        return self.layered and not self.copies

    def parts(self, ours: np.ndarray) -> list[np.ndarray]:
        """Views of the parts of ours (of one layer) that the foreign tensors hold."""
        if len(self.theirs) == 1:
            return [ours]
        places = np.cumsum(self.sizes)[:-1] if self.sizes else len(self.theirs)
        return np.split(ours, places, axis=self.axis)


def affine(ours: str, theirs: str | tuple[str, ...], transform: Transform, **options) -> list[Row]:
    """The rows of a layer's kernel and bias, named '.weight' and '.bias' outside."""
    theirs = (theirs,) if isinstance(theirs, str) else theirs

    def names(leaf):
        return tuple("|".join(f"{n}.{leaf}" for n in name.split("|")) for name in theirs)

    return [
        Row(f"{ours}.kernel", names("weight"), transform, **options),
        Row(f"{ours}.bias", names("bias"), identity(), **options),
    ]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A foreign tensor that is no parameter here: written as computed, checked when read.

    Attributes:
        theirs: foreign name.
        value: computes it, float32.
        tolerance: largest accepted deviation of a file's values.
    """

    theirs: str
    value: Callable[[], np.ndarray]
    tolerance: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Table:
    """An architecture's parameters in another library's layout.

    Attributes:
        architecture: its name for people.
        rows: one a parameter of ours.
        constants: foreign tensors without a parameter of ours; they may be absent from a file.
        ignored: regular expressions of foreign names without meaning (counters, buffers).
    """

    architecture: str
    rows: tuple[Row, ...]
    constants: tuple[Constant, ...] = ()
    ignored: tuple[str, ...] = ()


def native_table(shapes: Shapes) -> Table:
    """Our own layout: every parameter under its path."""
    rows = tuple(Row(path, (path,), identity()) for path in shapes)
    return Table("dit-jax", rows)


def foreign_shapes(row: Row, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the row's parts: the inverse applied to an array that takes no memory."""
    ours = np.broadcast_to(np.float32(0), shape[1:] if row.stacked else shape)
    return [tuple(row.transform.inverse(part).shape) for part in row.parts(ours)]


def _check_rows(table: Table, shapes: Shapes) -> None:
    """A table that does not cover the parameters exactly is a mistake of this library."""
    covered = [row.ours for row in table.rows]
    if sorted(covered) != sorted(shapes):
        difference = sorted(set(covered) ^ set(shapes))
        raise AssertionError(
            f"the table of {table.architecture} and the network differ in {difference}"
        )


def resolve_names(table: Table, shapes: Shapes, file: TensorFile) -> dict[str, list[str]]:
    """Finds every tensor of the table in a file.

    Returns:
        For each of our paths the names to read: layer by layer, part by part.

    Raises:
        InteropError: one error with all that is missing, unexpected or of another shape.
    """
    _check_rows(table, shapes)
    names: dict[str, list[str]] = {}
    used: set[str] = set()
    problems: list[str] = []
    for row in table.rows:
        wanted = foreign_shapes(row, shapes[row.ours])
        names[row.ours], missing, misshaped = [], {}, {}
        for layer in range(row.layers(shapes[row.ours])):
            for pattern, shape in zip(row.theirs, wanted, strict=True):
                options = [o.replace(LAYER, str(layer)) for o in pattern.split("|")]
                name = next((o for o in options if o in file.specs), None)
                if name is None:
                    missing.setdefault((pattern, shape), []).append(layer)
                    continue
                used.add(name)
                names[row.ours].append(name)
                found = file.specs[name].shape
                if not row.transform.accepts(found, shape):
                    misshaped.setdefault((pattern, shape, found), []).append(layer)
        for (pattern, shape), layers in missing.items():
            named = _with_layers(pattern, layers)
            problems.append(f"  missing: {named} {list(shape)} (ours: {row.ours})")
        for (pattern, shape, found), layers in misshaped.items():
            named = _with_layers(pattern, layers)
            problems.append(
                f"  shape: {named} is {list(found)}, expected {list(shape)} (ours: {row.ours} "
                f"{list(shapes[row.ours])})"
            )
    used |= {constant.theirs for constant in table.constants}
    for name in sorted(set(file.specs) - used):
        if not any(re.fullmatch(pattern, name) for pattern in table.ignored):
            problems.append(f"  unexpected: {name} {list(file.specs[name].shape)}")
    if problems:
        raise InteropError(
            f"{file.path} does not hold the {table.architecture} that its configuration describes "
            f"({len(problems)} differences):\n" + "\n".join(problems)
        )
    return names


def _with_layers(pattern: str, layers: list[int]) -> str:
    return pattern.split("|")[0].replace(LAYER, spelled_numbers(layers))


class ParameterReader:
    """Our parameters, read one at a time from a file of another layout.

    Everything that can be wrong with names, shapes and constants is found on construction, before
    any large tensor is read.

    Args:
        table: the file's layout.
        shapes: of our parameters by path.
        file: the tensors.

    Raises:
        InteropError: see `resolve_names`; or a constant has other values than expected.
    """

    def __init__(self, table: Table, shapes: Shapes, file: TensorFile):
        self.table, self.shapes, self.file = table, dict(shapes), file
        self._rows = {row.ours: row for row in table.rows}
        self._names = resolve_names(table, shapes, file)
        for constant in table.constants:
            if constant.theirs in file.specs:
                self._check_constant(constant)

    def paths(self) -> list[str]:
        """Our paths, in the table's order."""
        return list(self._rows)

    def file_dtypes(self, path: str) -> set[np.dtype]:
        """In which the file stores the tensors of one parameter."""
        return {np.dtype(self.file.specs[name].dtype) for name in self._names[path]}

    def __call__(self, path: str, dtype: Any = np.float32) -> np.ndarray:
        """Reads one parameter as `dtype`; at most it and one foreign tensor are held.

        Raises:
            InteropError: integers where weights belong; copies that should be equal differ.
        """
        row, shape = self._rows[path], self.shapes[path]
        arrays = self.file.read(self._names[path])
        if not row.layered and len(row.theirs) == 1:  # no second copy of a large tensor
            array = self._weights(next(arrays), self._names[path][0])
            return np.ascontiguousarray(row.transform.forward(array), dtype)
        ours = np.empty(shape, dtype)
        layers = row.layers(shape)
        for layer in range(layers):
            target = ours[layer] if row.stacked else ours
            parts = row.parts(target)
            for index, part in enumerate(parts):
                name = self._names[path][layer * len(parts) + index]
                value = row.transform.forward(self._weights(next(arrays), name))
                if row.copies and layer:
                    _require_equal(value.astype(dtype), part, name, self.file)
                else:
                    part[...] = value
        return ours

    def _weights(self, array: np.ndarray, name: str) -> np.ndarray:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InteropError(f"{self.file.path}: {name} holds {array.dtype}, not weights")
        return array

    def _check_constant(self, constant: Constant) -> None:
        (found,) = self.file.read([constant.theirs])
        expected = constant.value()
        if found.shape != expected.shape:
            raise InteropError(
                f"{self.file.path}: {constant.theirs} is {list(found.shape)}, expected "
                f"{list(expected.shape)}"
            )
        deviation = float(np.abs(found.astype(np.float32) - expected).max(initial=0.0))
        precision = float(jnp.finfo(found.dtype).eps)
        if not deviation <= max(constant.tolerance, precision):
            raise InteropError(
                f"{self.file.path}: {constant.theirs} is fixed in the {self.table.architecture}, "
                f"but the file's values differ from it by up to {deviation:.3g}: this is another "
                "architecture (learned or interpolated positions?)"
            )


def _require_equal(value: np.ndarray, first: np.ndarray, name: str, file: TensorFile) -> None:
    if not np.array_equal(value, first, equal_nan=True):
        raise InteropError(
            f"{file.path}: {name} differs from its copy in the first block (by up to "
            f"{np.abs(value - first).max():.3g}). Here all blocks share one; a model whose copies "
            "were trained apart cannot be represented"
        )


def load_params(
    table: Table,
    abstract: Any,
    file: TensorFile,
    *,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """Reads all parameters, one at a time.

    Args:
        table: the file's layout.
        abstract: nested `jax.ShapeDtypeStruct`s of the parameters (`jax.eval_shape(init, key)`).
        file: the tensors.
        put: (path, array) -> leaf, for instance onto sharded devices; by default arrays stay in
            host memory. Arrays have the dtype that `abstract` says.

    Returns:
        The nested parameters.

    Raises:
        InteropError: see `ParameterReader`; or there is NaN or infinity in a tensor.
    """
    seen = Finiteness()
    reader = ParameterReader(table, flat_shapes(abstract), WatchedFile(file, seen))
    put = put or (lambda path, array: array)
    dtypes = flat_dtypes(abstract)
    params = unflatten((path, put(path, reader(path, dtypes[path]))) for path in reader.paths())
    seen.require(file.path, can_be_allowed=False)
    return params


def export_specs(table: Table, shapes: Shapes, dtype: Any = np.float32) -> dict[str, TensorSpec]:
    """The foreign tensors of a table in the order in which `export_arrays` makes them."""
    _check_rows(table, shapes)
    specs: dict[str, TensorSpec] = {}
    dtype = np.dtype(dtype)
    for row in table.rows:
        wanted = foreign_shapes(row, shapes[row.ours])
        for layer in range(row.layers(shapes[row.ours])):
            for pattern, shape in zip(row.theirs, wanted, strict=True):
                name = pattern.split("|")[0].replace(LAYER, str(layer))
                specs[name] = TensorSpec(shape, dtype)
    for constant in table.constants:
        specs[constant.theirs] = TensorSpec(tuple(constant.value().shape), dtype)
    return specs


def export_arrays(
    table: Table, shapes: Shapes, get: Callable[[str], np.ndarray], dtype: Any = np.float32
) -> Iterator[np.ndarray]:
    """The foreign tensors, contiguous, in the order of `export_specs`.

    Args:
        table: the layout to write.
        shapes: of our parameters by path.
        get: our parameter of a path, float32; called once a row, its result let go after it.
        dtype: of the tensors.
    """
    dtype = np.dtype(dtype)
    for row in table.rows:
        ours = np.asarray(get(row.ours))
        for layer in range(row.layers(shapes[row.ours])):
            one = ours[layer] if row.stacked else ours
            for part in row.parts(one):
                with np.errstate(over="ignore"):  # the writer looks for infinity
                    theirs = row.transform.inverse(part).astype(dtype, copy=False)
                yield np.ascontiguousarray(theirs)
        del ours, one, part, theirs
    for constant in table.constants:
        yield constant.value().astype(dtype)
