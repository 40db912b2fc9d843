"""The platform that programs are made for: what 'auto' is for a device that is not there."""

import jax
import jax.numpy as jnp
import pytest

from dit_jax.models import attention, cpu_kernels, linear, stack
from dit_jax.target import target_platform, targeting


def choices():
    """What 'auto' stands for."""
    dtype = linear.resolve_dtype("auto")
    return (
        dtype.name,
        attention.resolve_implementation("auto", dtype, 64),
        stack.resolve_layer_loop("auto"),
        cpu_kernels.resolve_custom_gradients("auto"),
    )


def test_auto_is_that_of_the_target():
    assert target_platform() == jax.default_backend() == "cpu"
    here = choices()
    assert here == ("float32", "einsum", "unroll", True)
    with targeting("gpu"):
        assert choices() == ("bfloat16", "cudnn", "scan", False)
        with targeting("cpu"):
            assert choices() == here
    with targeting("tpu"):
        assert choices() == ("bfloat16", "xla", "scan", False)
    assert choices() == here


def test_a_function_is_traced_anew_for_another_target():
    f = jax.jit(lambda x: x.astype(linear.resolve_dtype("auto")))
    x = jnp.ones(2)
    assert f(x).dtype == jnp.float32
    with targeting("gpu"):
        assert f(x).dtype == jnp.bfloat16
    assert f(x).dtype == jnp.float32


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="target 'cuda': expected one of cpu, gpu, tpu"):
        targeting("cuda")
