"""Diffusion transformers in JAX: networks, diffusion mathematics, data, training, evaluation."""

import importlib
from typing import Any

from dit_jax import rooms

__version__ = "0.1.0"

rooms.find_in_checkout()

# What users import from here, and the modules that have it: imported when it is asked for, since
# `import dit_jax` loads neither JAX nor any room.
_LAZY = {"FluxPipeline": "dit_jax.pipelines.flux"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted((*globals(), *_LAZY))
