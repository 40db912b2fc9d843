"""What runs only with DIT_JAX_LONG=1: further cases of what a shorter one proves already."""

import os
from typing import Any

import pytest

LONG = os.environ.get("DIT_JAX_LONG", "") not in ("", "0")
only_long = pytest.mark.skipif(not LONG, reason="minutes more: set DIT_JAX_LONG=1")


def long(*values: Any) -> Any:
    """A case of `pytest.mark.parametrize` that waits for DIT_JAX_LONG=1."""
    return pytest.param(*values, marks=only_long)
