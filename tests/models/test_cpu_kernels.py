"""The hand-written backward passes against JAX's own derivatives of the plain forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models import DiTConfig, Network, Request, attention, cpu_kernels, layers
from tests.compilations import OPTIMIZED
from tests.models.conftest import random_params

SMALL = DiTConfig(
    image_size=16, hidden_size=32, depth=2, num_heads=4, num_classes=10, custom_gradients="off"
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same_derivatives(custom, plain, *operands):
    cotangent = normal(9, *jax.eval_shape(plain, *operands).shape)

    def derive(function):
        def apply(cotangent, *operands):
            out, pull_back = jax.vjp(function, *operands)
            return out, pull_back(cotangent)

        return jax.jit(apply, compiler_options=OPTIMIZED)(cotangent, *operands)

    (out, gradients), (expected_out, expected_gradients) = derive(custom), derive(plain)
    np.testing.assert_allclose(out, expected_out, atol=2e-6, rtol=2e-6)
    for ours, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=2e-5)


def test_modulated_layer_norm():
    operands = 3 * normal(0, 3, 7, 16) + 1, normal(1, 3, 16), normal(2, 3, 16)
    assert_same_derivatives(
        cpu_kernels.modulated_layer_norm, layers.modulated_layer_norm, *operands
    )


def test_gated_residual():
    operands = normal(0, 3, 7, 16), normal(1, 3, 7, 16), normal(2, 3, 16)
    assert_same_derivatives(cpu_kernels.gated_residual, layers.gated_residual, *operands)


def test_gelu():
    x = jnp.linspace(-12, 12, 1001)
    assert_same_derivatives(cpu_kernels.gelu, lambda x: jax.nn.gelu(x, approximate=True), x)


@pytest.mark.parametrize(("longest_stored", "heads_apart"), [(512, 1024), (4, 1024), (4, 8)])
def test_attention(monkeypatch, longest_stored, heads_apart):
    monkeypatch.setattr(cpu_kernels, "_LONGEST_STORED", longest_stored)
    monkeypatch.setattr(cpu_kernels, "_HEADS_APART", heads_apart)
    operands = [2 * normal(i, 6, 9, 2, 8) for i in range(3)]
    assert_same_derivatives(cpu_kernels.attention, attention.einsum_attention, *operands)


def test_attention_with_fewer_queries_than_keys():
    operands = normal(0, 3, 4, 2, 8), normal(1, 3, 9, 2, 8), normal(2, 3, 9, 2, 8)
    assert_same_derivatives(cpu_kernels.attention, attention.einsum_attention, *operands)


def test_attention_of_bfloat16_has_gradients_of_bfloat16():
    operands = [normal(i, 2, 5, 2, 8) for i in range(3)]
    half = [operand.astype(jnp.bfloat16) for operand in operands]

    def gradients(*operands):
        return jax.grad(lambda *qkv: jnp.sin(cpu_kernels.attention(*qkv)).sum(), (0, 1, 2))(
            *operands
        )

    for ours, expected in zip(gradients(*half), gradients(*operands), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=0.05)


def test_large_scores_stay_finite():
    q, k, v = 100 * normal(0, 2, 5, 2, 8), 100 * normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
    grads = jax.grad(lambda *qkv: cpu_kernels.attention(*qkv).sum(), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("remat", ["none", "activations", "block", "dots"])
@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_whole_network(remat, layer_loop):
    plain = Network(SMALL)
    custom = Network(
        dataclasses.replace(
            SMALL, custom_gradients="on", attention="cpu", remat=remat, layer_loop=layer_loop
        )
    )
    params = random_params(plain, scale=0.2)
    x, t, label = normal(1, 4, 16, 16, 4), jnp.arange(4.0) * 100, jnp.arange(4)

    def loss(network):
        return lambda params: jnp.square(
            network.apply(params, Request(x, t, {"label": label})).out
        ).mean()

    expected = jax.jit(jax.value_and_grad(loss(plain)))(params)
    ours = jax.jit(jax.value_and_grad(loss(custom)))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(abs(b).max()) + 1e-7),
        ours,
        expected,
    )


def test_forward_mode_works_when_off_and_says_no_when_on():
    x, t, label = normal(1, 2, 16, 16, 4), jnp.arange(2.0), jnp.arange(2)
    params = Network(SMALL).init(jax.random.key(0))

    def tangent(network):
        return jax.jvp(
            lambda x: network.apply(params, Request(x, t, {"label": label})).out, (x,), (x,)
        )[1]

    assert tangent(Network(SMALL)).shape == (2, 16, 16, 8)
    with pytest.raises(TypeError, match="forward-mode"):
        tangent(Network(dataclasses.replace(SMALL, custom_gradients="on")))


def test_auto_is_on_for_cpus_only():
    assert cpu_kernels.resolve_custom_gradients("auto", "cpu")
    assert not cpu_kernels.resolve_custom_gradients("auto", "gpu")
    with pytest.raises(ValueError, match="custom_gradients='yes'"):
        DiTConfig(custom_gradients="yes")
