"""Tests of programs compiled for GPUs that are not there run where JAX's CUDA plugin is."""

import pytest

from dit_jax.parallel.planning.compilers import EXTRA, missing_plugin

needs_plugin = pytest.mark.skipif(
    bool(missing_plugin()), reason=f"compiles for GPUs: needs JAX's CUDA plugin ({EXTRA})"
)
