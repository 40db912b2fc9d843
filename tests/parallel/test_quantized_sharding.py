"""Products of 8-bit operands on a mesh: the bits of one device; quantised kernels by the rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.models import DiTConfig, Network
from dit_jax.models.quantization import quantized_product
from dit_jax.parallel.mesh import AXES
from dit_jax.parallel.partitioning import place_tree, rules_for

BATCH = ("data", "fsdp")


def whole_numbers(seed, *shape):
    """Exact in 8 bits, and so are their sums in any order: a difference is a wrong scale."""
    numbers = np.random.default_rng(seed).integers(-7, 8, shape)
    numbers.flat[-1] = 8  # the largest value is on the last device alone
    return jnp.asarray(numbers, jnp.float32)


@pytest.mark.parametrize("kernel_axes", [("fsdp", "tensor"), ("tensor", "fsdp")])
@pytest.mark.parametrize("quantization", ["fp8", "fp8_rowwise"])
def test_a_product_on_a_mesh_is_that_of_one_device(quantization, kernel_axes):
    mesh = jax.make_mesh((1, 2, 2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    x, kernel, dy = whole_numbers(0, 4, 8, 16), whole_numbers(1, 16, 32), whole_numbers(2, 4, 8, 32)

    @jax.jit
    def products(x, kernel, dy):
        y, backward = jax.vjp(
            lambda x, kernel: quantized_product(x, kernel, None, quantization, jnp.float32),
            x,
            kernel,
        )
        return y, *backward(dy)

    expected = products(x, kernel, dy)
    np.testing.assert_array_equal(expected[0], x @ kernel)
    places = PartitionSpec(BATCH, "sequence"), PartitionSpec(*kernel_axes), PartitionSpec(BATCH)
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip((x, kernel, dy), places, strict=True)
    ]
    for found, one in zip(products(*placed), expected, strict=True):
        np.testing.assert_array_equal(found, one)


def test_quantised_kernels_are_divided_as_those_they_are_of_and_scales_are_whole():
    config = DiTConfig(hidden_size=64, depth=2, num_heads=4, quantization="fp8_rowwise")
    network = Network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    sizes = {"data": 1, "fsdp": 2, "tensor": 4, "sequence": 1}

    def specs(tree):
        return {found.path: found.spec for found in place_tree(tree, rules_for("dit"), sizes)}

    wide, narrow = specs(params), specs(jax.eval_shape(network.quantize, params))
    for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"):
        path = f"blocks/{layer}/kernel"
        assert wide[path] != narrow[path] and set(wide[path]) == {None, "fsdp", "tensor"}
        assert tuple(narrow[path]) == (None, wide[path][2], wide[path][1])
        assert narrow[f"{path}_scale"] == PartitionSpec()
    assert narrow["blocks/adaLN_modulation/kernel"] == wide["blocks/adaLN_modulation/kernel"]
