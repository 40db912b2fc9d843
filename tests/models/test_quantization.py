"""Products of 8-bit operands: against NumPy, their gradients, stored weights, what stays wide."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.models import DiTConfig, Network, Request
from dit_jax.models.linear import Precision, product
from dit_jax.models.network import is_quantized
from dit_jax.models.quantization import (
    E4M3,
    E5M2,
    quantize,
    quantize_kernel,
    quantized_product,
    require_quantization,
)
from dit_jax.target import targeting
from tests.models.conftest import random_inputs, random_params

FP8 = ("fp8", "fp8_rowwise")
SMALL = {"image_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
KERNELS = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")  # of a block


def drawn(seed, *shape, spread=3.0):
    """Rows of very different sizes, so that scales matter."""
    random = np.random.default_rng(seed)
    rows = np.exp(spread * random.normal(size=(*shape[:-1], 1)))
    return (rows * random.normal(size=shape)).astype(np.float32)


def reference(x, dtype, axes):
    """(values, scale) in NumPy: the least power of two that keeps the largest in range."""
    largest = np.abs(x.astype(np.float64)).max(axis=axes, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(largest / float(ml_dtypes.finfo(dtype).max)))
    return (x.astype(np.float64) / scale).astype(np.float32).astype(dtype), scale


def dequantized(x, dtype, axes):
    values, scale = reference(x, dtype, axes)
    return values.astype(np.float64) * scale


def axes_of(quantization, x, contracted):
    return contracted if quantization == "fp8_rowwise" else tuple(range(x.ndim))


@pytest.mark.parametrize("given_dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,)])
def test_values_and_scales_are_those_of_numpy(dtype, axes, given_dtype):
    x = drawn(0, 64, 48).astype(given_dtype)
    values, scale = jax.jit(quantize, static_argnums=(1, 2))(x, jnp.dtype(dtype), axes)
    expected, expected_scale = reference(x, jnp.dtype(dtype), axes)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(
        np.asarray(values, np.float32), np.asarray(expected.astype(np.float32))
    )


@settings(max_examples=40, deadline=None)
@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32))
def test_the_largest_value_is_just_in_range(largest):
    for dtype in (E4M3, E5M2):
        values, scale = quantize(jnp.asarray([largest, 0.0]), dtype, (0,))
        top, value = float(jnp.finfo(dtype).max), float(values[0])
        assert np.isfinite(value) and top / 2 <= value <= top
        assert float(np.log2(scale[0])).is_integer()
        assert abs(value * float(scale[0]) / largest - 1) <= 2.0 ** -(jnp.finfo(dtype).nmant + 1)


def test_zeros_and_what_is_not_finite():
    values, scale = quantize(jnp.asarray([[0.0, 0.0], [jnp.inf, 1.0], [jnp.nan, 1.0]]), E4M3, (1,))
    assert np.isfinite(np.asarray(scale)).all()
    np.testing.assert_array_equal(np.asarray(values[0], np.float32), 0)
    assert np.isnan(np.asarray(values[1:], np.float32)).all()
    kernel = jnp.asarray(drawn(1, 4, 3))
    for quantization in FP8:
        y = quantized_product(jnp.zeros((2, 4)), kernel, None, quantization, jnp.float32)
        np.testing.assert_array_equal(y, 0)
        bad = jnp.full((2, 4), jnp.inf)
        assert not np.isfinite(
            quantized_product(bad, kernel, None, quantization, jnp.float32)
        ).any()


def applied(x, kernel, quantization, dtype):
    function = functools.partial(
        quantized_product, scale=None, quantization=quantization, dtype=jnp.dtype(dtype)
    )
    return jax.jit(function)(jnp.asarray(x), jnp.asarray(kernel))


@pytest.mark.parametrize("quantization", [*FP8, "int8"])
def test_whole_numbers_are_multiplied_without_an_error(quantization):
    # Sums are exact in any order: so these are bits, of a kernel quantised before or at the call.
    random = np.random.default_rng(0)
    x, kernel = random.integers(-8, 9, (4, 16)), random.integers(-8, 9, (16, 8))
    kernel[0] = 127 if quantization == "int8" else 8  # the largest, the scale a power of two
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    np.testing.assert_array_equal(applied(x, kernel, quantization, "float32"), x @ kernel)
    stored = quantize_kernel(kernel, quantization)
    once = quantized_product(x, *stored, quantization, jnp.bfloat16)
    np.testing.assert_array_equal(once, (x @ kernel).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", FP8)
def test_a_product_is_that_of_the_quantised_operands_in_float32(quantization, dtype):
    x, kernel = drawn(2, 5, 7, 32, spread=1), drawn(3, 32, 24, spread=1)
    y = applied(x, kernel, quantization, dtype)
    exact = dequantized(x, E4M3, axes_of(quantization, x, (2,))) @ dequantized(
        kernel, E4M3, axes_of(quantization, kernel, (0,))
    )
    assert y.dtype == dtype and y.shape == (5, 7, 24)
    rounding = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    error = np.abs(np.asarray(y, np.float64) - exact)
    assert (error <= rounding * np.abs(exact) + 1e-6 * np.abs(exact).max()).all()
    # And it is a quantised one: not the product itself.
    assert np.abs(exact - x.astype(np.float64) @ kernel).max() > 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize("quantization", FP8)
def test_gradients_are_products_of_e5m2_and_e4m3(quantization):
    x, kernel, dy = drawn(4, 6, 5, 32, spread=1), drawn(5, 32, 24, spread=1), drawn(6, 6, 5, 24)
    _, backward = jax.vjp(
        lambda x, w: quantized_product(x, w, None, quantization, jnp.float32),
        jnp.asarray(x),
        jnp.asarray(kernel),
    )
    dx, dkernel = backward(jnp.asarray(dy))
    axes = functools.partial(axes_of, quantization)
    expected = (
        dequantized(dy, E5M2, axes(dy, (2,))) @ dequantized(kernel, E4M3, axes(kernel, (1,))).T
    )
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    rows = (0, 1)
    expected = np.einsum(
        "bli,blo->io",
        dequantized(x, E4M3, axes(x, rows)),
        dequantized(dy, E5M2, axes(dy, rows)),
    )
    np.testing.assert_allclose(dkernel, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("quantization", FP8)
def test_formats_of_all_three_products_and_of_what_is_kept(quantization):
    x, kernel = jnp.ones((8, 32), jnp.bfloat16), jnp.ones((32, 16))

    def loss(x, kernel):
        return quantized_product(x, kernel, None, quantization, jnp.bfloat16).sum()

    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, kernel).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    formats = sorted((line.count("f8E4M3FN"), line.count("f8E5M2>")) for line in products)
    assert formats == [(1, 1), (1, 1), (2, 0)]
    dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
    assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)
    _, residuals = jax.eval_shape(lambda x: jax.vjp(lambda x: loss(x, kernel), x), x)
    kept = [leaf for leaf in jax.tree.leaves(residuals) if leaf.shape == x.shape]
    assert [leaf.dtype for leaf in kept] == [jnp.dtype(E4M3)]


def test_int8_weights_are_rounded_to_a_scale_an_output_channel():
    kernel, x = drawn(7, 32, 24, spread=0), drawn(8, 5, 32, spread=0)
    kernel[:, 3] = 0
    values, scale = quantize_kernel(jnp.asarray(kernel), "int8")
    assert values.dtype == jnp.int8 and values.shape == (24, 32) and scale.shape == (24,)
    restored = np.asarray(values, np.float32) * np.asarray(scale)[:, None]
    assert np.abs(restored.T - kernel).max() <= 0.51 * np.abs(kernel).max() / 127
    y = quantized_product(jnp.asarray(x), values, scale, "int8", jnp.float32)
    np.testing.assert_allclose(y, x @ restored.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(restored[3], 0)


@functools.cache
def models(quantization, layer_loop):
    """A small network with and without quantisation, its parameters and inputs."""
    config = DiTConfig(**SMALL, layer_loop=layer_loop)
    network = Network(dataclasses.replace(config, quantization=quantization))
    x, t, conditions = random_inputs(config)
    return Network(config), network, random_params(network), Request(x, t, conditions)


@functools.cache
def outputs(quantization, layer_loop):
    plain, network, params, request = models(quantization, layer_loop)
    quantized = jax.jit(network.quantize)(params)
    apply = jax.jit(lambda params: network.apply(params, request).out)
    return plain.apply(params, request).out, apply(params), apply(quantized), quantized


@pytest.mark.parametrize(
    ("quantization", "layer_loop"),
    [("fp8", "scan"), ("fp8", "unroll"), ("fp8_rowwise", "scan"), ("int8", "scan")],
)
def test_quantised_once_is_quantised_at_every_call(quantization, layer_loop):
    plain, at_every_call, once, _ = outputs(quantization, layer_loop)
    np.testing.assert_allclose(at_every_call, once, rtol=1e-4, atol=1e-5)  # sums in another order
    error = np.abs(np.asarray(once) - plain).mean() / np.abs(plain).mean()
    assert 1e-4 < error < (0.02 if quantization == "int8" else 0.2)


@pytest.mark.parametrize("quantization", [*FP8, "int8"])
def test_stored_kernels_are_8_bits_in_the_layout_of_the_kernel_and_the_rest_is_as_it_was(
    quantization,
):
    _, _, params, _ = models(quantization, "scan")
    quantized = outputs(quantization, "scan")[3]
    assert is_quantized(quantized) and not is_quantized(params)
    changed = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(quantized):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        before = functools.reduce(lambda tree, key: tree.get(key.key, {}), path, params)
        if isinstance(before, dict) or leaf.dtype != before.dtype:
            changed[name] = leaf
        else:
            np.testing.assert_array_equal(leaf, before)
    names = {f"blocks/{kernel}/{leaf}" for kernel in KERNELS for leaf in ("kernel", "kernel_scale")}
    assert set(changed) == names
    depth, dim, scales = SMALL["depth"], SMALL["hidden_size"], 1 if quantization == "fp8" else None
    kernel, scale = changed["blocks/mlp/fc1/kernel"], changed["blocks/mlp/fc1/kernel_scale"]
    assert kernel.shape == (depth, 4 * dim, dim) and scale.shape == (depth, scales or 4 * dim)
    # Half the bytes of bfloat16.
    narrow = sum(leaf.nbytes for name, leaf in changed.items() if name.endswith("/kernel"))
    wide = sum(params["blocks"][a][b]["kernel"].size * 2 for a, b in map(split, KERNELS))
    assert narrow * 2 == wide
    assert sum(leaf.nbytes for name, leaf in changed.items() if "scale" in name) < 0.1 * narrow


def split(name):
    return name.split("/")


def test_roles_of_conditions_embeddings_and_output_are_never_quantised():
    precision = Precision("bfloat16", quantization="fp8")
    x, kernel = jnp.asarray(drawn(9, 4, 32)), jnp.asarray(drawn(10, 32, 8))
    for role in ("conditioning", "modulation", "embedding", "output"):
        assert precision.quantization_of(role) == "none"
        expected = product(x, kernel, Precision("bfloat16"), role)
        np.testing.assert_array_equal(product(x, kernel, precision, role), expected)
    assert precision.quantization_of("hidden") == "fp8"
    plain = product(x, kernel, Precision("bfloat16"))
    assert not np.array_equal(product(x, kernel, precision), plain)
    _, network, params, request = models("fp8", "scan")
    text = jax.jit(lambda params: network.apply(params, request).out).lower(params).as_text()
    narrow = [line for line in text.splitlines() if "dot_general" in line and "f8E4M3FN" in line]
    assert len(narrow) == len(KERNELS)


@pytest.mark.parametrize(
    ("quantization", "remat"), [("fp8", "none"), ("fp8", "dots"), ("fp8_rowwise", "block")]
)
def test_gradients_of_a_network_are_near_those_in_float32(quantization, remat):
    plain, network, params, request = models(quantization, "scan")
    network = Network(dataclasses.replace(network.config, remat=remat))

    def gradient(network):
        return jax.jit(jax.grad(lambda p: jnp.square(network.apply(p, request).out).mean()))(params)

    for path, (exact, found) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), gradient(plain), gradient(network)),
        is_leaf=lambda value: isinstance(value, tuple),
    ):
        cosine = (exact * found).sum() / (jnp.linalg.norm(exact) * jnp.linalg.norm(found))
        assert cosine > 0.9, path


def test_bad_input():
    with pytest.raises(ValueError, match="quantization='fp4': expected one of none, fp8"):
        DiTConfig(quantization="fp4")
    with targeting("tpu"), pytest.raises(ValueError, match="would convert them to 16 bits for a"):
        require_quantization("fp8")
    require_quantization("fp8")  # a CPU computes the same numbers
    plain, network, params, _ = models("fp8", "scan")
    with pytest.raises(ValueError, match="nothing would be quantised"):
        plain.quantize(params)
    quantized = outputs("fp8", "scan")[3]
    with pytest.raises(ValueError, match="quantised already"):
        network.quantize(quantized)


def test_a_gpu_without_8_bit_floats_is_refused(monkeypatch):
    class Device:
        device_kind, compute_capability = "NVIDIA A100-SXM4-80GB", "8.0"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with targeting("gpu"):
        with pytest.raises(ValueError, match=r"A100-SXM4-80GB \(compute capability 8.0\) has no"):
            require_quantization("fp8_rowwise")
        require_quantization("int8")
        monkeypatch.setattr(Device, "compute_capability", "9.0")
        require_quantization("fp8")


def test_there_is_no_forward_mode():
    kernel = jnp.ones((4, 4))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(
            lambda x: quantized_product(x, kernel, None, "fp8", jnp.float32),
            (jnp.ones((2, 4)),),
            (jnp.ones((2, 4)),),
        )
