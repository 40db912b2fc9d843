"""What accelerators recompute, on CPUs: values, gradients and tangents are JAX's own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models import DiTConfig, Network, Request, layers, recomputation, stack
from dit_jax.parallel.mesh import create_mesh
from dit_jax.parallel.partitioning import ShardedPlacement, rules_for
from dit_jax.training.remat_choice import kept_bytes
from tests.models.conftest import SMALL, random_inputs, random_params


@pytest.fixture
def accelerator(monkeypatch):
    """Blocks as on accelerators, whatever the backend is."""
    monkeypatch.setattr(recomputation, "recomputes_elementwise", lambda backend=None: True)


def loss_of(network, request):
    return lambda params: jnp.sin(network.apply(params, request).out).sum()


def assert_close(found, expected, tolerance=2e-5):
    norm = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * norm), found, expected
    )


def test_gelu_is_jaxs_own_and_keeps_its_input_alone():
    with jax.enable_x64(True):
        x = jnp.linspace(-9, 9, 401, dtype=jnp.float64)
        tangent = jnp.cos(x)
        expected = jax.jvp(jax.nn.gelu, (x,), (tangent,))
        assert_close(jax.jvp(recomputation.gelu, (x,), (tangent,)), expected, 1e-12)
        second = jax.grad(lambda x: jax.jvp(jax.nn.gelu, (x,), (tangent,))[1].sum())(x)
        found = jax.grad(lambda x: jax.jvp(recomputation.gelu, (x,), (tangent,))[1].sum())(x)
        assert_close(found, second, 1e-12)
        gradient = jax.grad(lambda x: recomputation.gelu(x).sum())
        assert_close(gradient(x), jax.grad(lambda x: jax.nn.gelu(x).sum())(x), 1e-12)
    half = jnp.linspace(-9, 9, 64).astype(jnp.bfloat16)
    assert recomputation.gelu(half).dtype == gradient(half).dtype == jnp.bfloat16
    weight = jnp.ones((64, 3), jnp.bfloat16)
    kept = kept_bytes(lambda x: (recomputation.gelu(2 * x) @ weight).sum(), half)
    assert kept < kept_bytes(lambda x: (jax.nn.gelu(2 * x) @ weight).sum(), half)


@pytest.fixture(scope="module")
def plain():
    """A network with JAX's own derivatives, its parameters, request and their derivatives."""
    config = DiTConfig(**SMALL, custom_gradients="off", layer_loop="scan", remat="none")
    network = Network(config)
    x, t, conditions = random_inputs(config, batch=8)
    request, params = Request(x, t, conditions), random_params(network)
    return config, params, request, jax.jit(jax.value_and_grad(loss_of(network, request)))(params)


@pytest.mark.parametrize("remat", ["none", "activations", "dots", "block"])
def test_every_policy_has_the_plain_gradients(accelerator, plain, remat):
    config, params, request, expected = plain
    network = Network(dataclasses.replace(config, remat=remat))
    assert_close(jax.jit(jax.value_and_grad(loss_of(network, request)))(params), expected)


def test_bfloat16_has_the_plain_gradients_to_its_precision(accelerator, plain):
    config, params, request, expected = plain
    network = Network(dataclasses.replace(config, dtype="bfloat16", remat="activations"))
    value, gradients = jax.jit(jax.value_and_grad(loss_of(network, request)))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    assert float(value) == pytest.approx(float(expected[0]), rel=0.05, abs=1)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
        ours, theirs = np.ravel(ours), np.ravel(theirs)
        assert ours @ theirs > 0.99 * np.linalg.norm(ours) * np.linalg.norm(theirs)


def test_forward_mode_passes_and_its_gradient(accelerator, plain):
    config, params, request, _ = plain

    def tangent(network):
        def loss(params, t):
            return loss_of(network, dataclasses.replace(request, t=t))(params)

        def derivative(params):
            return jax.jvp(lambda t: loss(params, t), (request.t,), (jnp.ones_like(request.t),))[1]

        return jax.jit(jax.value_and_grad(derivative))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recomputation, "recomputes_elementwise", lambda backend=None: False)
        expected = tangent(Network(config))(params)
    network = Network(dataclasses.replace(config, remat="activations"))
    assert_close(tangent(network)(params), expected, 1e-4)


def test_sharded_gradients_are_the_plain_ones(accelerator, plain):
    config, params, request, expected = plain
    placement = ShardedPlacement(create_mesh(data=2, fsdp=4), rules_for("dit"))
    network = Network(dataclasses.replace(config, remat="activations"))
    shardings = placement.state_shardings(params)
    placed = jax.device_put(params, shardings)
    with placement.tracing():
        loss = jax.jit(jax.value_and_grad(loss_of(network, request)))
        assert_close(loss(placed), expected)


def blocks_loss(remat, dtype="bfloat16", depth=3, **overrides):
    """(loss, shapes of parameters and tokens) of a stack of blocks."""
    config = DiTConfig(
        **{**SMALL, "depth": depth, "hidden_size": 96, **overrides},
        custom_gradients="off",
        layer_loop="scan",
        remat=remat,
        dtype=dtype,
    )
    network = Network(config)
    x, t, conditions = random_inputs(config, batch=8)
    loss = loss_of(network, Request(x, t, conditions))
    return config, loss, jax.eval_shape(network.init, jax.random.key(0))


def test_parameters_as_computed_compute_the_same(plain):
    config, params, request, _ = plain
    network = Network(dataclasses.replace(config, dtype="bfloat16"))
    computed = network.as_computed(params)
    assert computed["blocks"]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert computed["t_embedder"]["fc1"]["kernel"].dtype == jnp.float32
    apply = jax.jit(lambda params: network.apply(params, request).out)
    np.testing.assert_array_equal(apply(computed), apply(params))
    of_float32 = Network(config).as_computed(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (of_float32, params)), strict=True))


def kept_of_a_layer(remat):
    kept = [kept_bytes(*blocks_loss(remat, depth=depth)[1:]) for depth in (3, 2)]
    return kept[0] - kept[1]


def test_activations_keep_eleven_arrays_a_layer_and_blocks_one(accelerator):
    # x, q, k, v, attention's and its projection's results, the MLP's 4 + 1, each [8, 16, 96] of
    # bfloat16; the modulation [8, 6, 96]. XLA's attention keeps no statistics.
    array = 8 * 16 * 96 * 2
    assert kept_of_a_layer("activations") == 11 * array + 8 * 6 * 96 * 2
    assert kept_of_a_layer("block") == array
    assert kept_of_a_layer("dots") == 10 * array + 8 * 6 * 96 * 2


def test_no_product_is_computed_twice_with_activations(accelerator):
    def products(remat):
        _, loss, params = blocks_loss(remat)
        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        # Einsum attention's two products are its own; its backward pass computes scores again.
        return text.count("dot_general")

    assert products("activations") <= products("none") + 2
    assert products("block") >= products("none") + 5


def test_gradients_of_a_scan_are_stacked_in_the_dtype_they_were_computed_in():
    config, loss, params = blocks_loss("none")
    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    depth, dim = config.depth, config.hidden_size
    # Weights, too, are converted a layer at a time: none of all layers' in bfloat16 is an input.
    stacked = f"tensor<{depth}x{dim}x{4 * dim}xbf16>"
    assert stacked in text
    assert f"tensor<{depth}x{dim}x{4 * dim}xf32>" in text


def test_auto_goes_by_backend_and_errors_name_the_policies():
    assert recomputation.resolve_remat("auto", "cpu") == "none"
    assert recomputation.resolve_remat("auto", "gpu") == "activations"
    assert recomputation.resolve_remat("block", "cpu") == "block"
    with pytest.raises(ValueError, match="remat='all': expected one of"):
        recomputation.resolve_remat("all")
    assert stack.resolve_layer_loop("auto", "cpu", remat="auto") == "unroll"


def test_elementwise_work_is_left_to_xla_on_cpus():
    assert not recomputation.recomputes_elementwise("cpu")
    assert recomputation.recomputes_elementwise("gpu")
    x = jnp.ones((2, 3, 8))
    text = str(jax.make_jaxpr(layers.modulated_layer_norm)(x, x[:, 0], x[:, 1]))
    assert "remat" not in text and math.prod(x.shape) == 48
