"""Functions of this library in double precision, to hold derivatives in single precision against.

The networks compute in float32 whatever they are given. What they compute is traced and evaluated
again, operation by operation, with every float32 in it a float64.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def _double(value: Any) -> Any:
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    value = np.asarray(value)
    return value.astype(np.float64) if value.dtype == np.float32 else value


def _double_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    single = np.dtype(np.float32)
    return {
        name: np.dtype(np.float64) if isinstance(value, np.dtype) and value == single else value
        for name, value in parameters.items()
    }


def _evaluate(jaxpr: core.Jaxpr, constants: list[Any], arguments: list[Any]) -> list[Any]:
    values: dict[Any, Any] = {}

    def read(atom):
        return _double(atom.val) if isinstance(atom, core.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, map(_double, constants), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        inputs, name = [read(atom) for atom in equation.invars], equation.primitive.name
        if name in _CALLS:
            inner = equation.params[_CALLS[name]]
            closed = isinstance(inner, core.ClosedJaxpr)
            consts = inner.consts if closed else []
            outputs = _evaluate(inner.jaxpr if closed else inner, consts, inputs)
        else:
            outputs = equation.primitive.bind(*inputs, **_double_parameters(equation.params))
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def in_float64(function: Callable[..., jax.Array], *arguments: Any) -> Callable[..., np.ndarray]:
    """`function`, which returns one array, traced at `arguments` and evaluated in double precision.

    Loops and rematerialisation are not taken apart: trace unrolled layers.
    """
    closed = jax.make_jaxpr(function)(*arguments)

    def evaluate(*arguments):
        with jax.enable_x64(True):
            leaves = [_double(leaf) for leaf in jax.tree.leaves(arguments)]
            return np.asarray(_evaluate(closed.jaxpr, closed.consts, leaves)[0])

    return evaluate
