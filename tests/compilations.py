"""Which programs are compiled, and how well."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

# compiler_options of programs that run thousands of times: unlike the others' (conftest.py), their
# running takes longer than compiling them. And of those that need tanh to the last digit: at level
# 0 it never reaches 1.
OPTIMIZED = {"xla_backend_optimization_level": 1}


def optimized(jitted: Any, **options: Any) -> Callable[..., Any]:
    """A jitted function, compiled as one that runs thousands of times; options are jax.jit's."""
    return jax.jit(jitted.__wrapped__, compiler_options=OPTIMIZED, **options)


@contextlib.contextmanager
def compilations(function: str) -> Iterator[list[str]]:
    """Collects the compilations of the jitted function of this name, as JAX logs them.

    The size of a function's cache is no count of them: it is shared with all other functions, and
    full in a long session.
    """
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if re.match(rf"Compiling jit\({function}\)", message):
                found.append(message)

    handler, logger = Collect(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)
