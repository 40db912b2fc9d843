import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.models import DiTConfig, Network, Request, stack
from dit_jax.models import dit as dit_lib
from dit_jax.models.attention import LocalAttention
from tests.models.conftest import SMALL, random_inputs


def variant(small, **overrides):
    """Output and gradients of a network of the same parameters, executed differently."""
    config, params, (x, t, conditions) = small
    network = Network(dataclasses.replace(config, **overrides))

    def loss(params, x):
        out = network.apply(params, Request(x, t, conditions)).out
        return jnp.sin(out).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return out, gradients


@pytest.fixture(scope="module")
def plain(small):
    return variant(small, layer_loop="unroll", remat="none")


@pytest.mark.parametrize(
    ("layer_loop", "remat"),
    [
        ("scan", "none"),
        ("scan", "block"),
        ("scan", "dots"),
        ("scan", "activations"),
        ("unroll", "block"),
        ("unroll", "dots"),
    ],
)
def test_loops_and_rematerialisation_change_nothing(small, plain, layer_loop, remat):
    found = variant(small, layer_loop=layer_loop, remat=remat)
    norm = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    assert norm > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * norm), found, plain)


def test_rematerialisation_saves_less():
    def saved(remat):
        config = DiTConfig(**SMALL, remat=remat, layer_loop="scan")
        network = Network(config)
        params = jax.eval_shape(network.init, jax.random.key(0))
        x, t, conditions = random_inputs(config, batch=16)

        def loss(params):
            return network.apply(params, Request(x, t, conditions)).out.sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert saved("block") < saved("dots") < saved("none")
    assert saved("activations") < saved("none")


def test_layers_are_initialised_each_from_its_own_key():
    config = DiTConfig(**SMALL)
    make = lambda rngs: dit_lib.DiTBlock(config, rngs=rngs)  # noqa: E731
    blocks = stack.create_stack(make, config.depth, nnx.Rngs(params=jax.random.key(3)))
    stacked = nnx.to_pure_dict(nnx.state(blocks, nnx.Param))
    kernels = stacked["attn"]["qkv"]["kernel"]
    assert kernels.shape == (3, 48, 144)
    assert not np.allclose(kernels[0], kernels[1]) and not np.allclose(kernels[1], kernels[2])

    # The same three keys, one block after the other.
    keys = nnx.Rngs(params=jax.random.key(3)).fork(split=config.depth)["params"].key[...]
    for layer in range(config.depth):
        alone = nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=keys[layer])), nnx.Param))
        jax.tree.map(
            lambda a, b, layer=layer: np.testing.assert_allclose(a[layer], b, atol=1e-7),
            stacked,
            alone,
        )


def lowered_size(depth, layer_loop):
    config = DiTConfig(**{**SMALL, "depth": depth}, layer_loop=layer_loop)
    network = Network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    x, t, conditions = random_inputs(config)

    def loss(params):
        return network.apply(params, Request(x, t, conditions)).out.sum()

    return len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines())


def test_a_scanned_program_does_not_grow_with_depth():
    assert lowered_size(12, "scan") == lowered_size(4, "scan")
    assert lowered_size(12, "unroll") > 2 * lowered_size(4, "unroll")


def test_the_default_loop_goes_by_backend_and_errors_name_the_choices():
    assert stack.resolve_layer_loop("auto", "cpu") == "unroll"
    assert (
        stack.resolve_layer_loop("auto", "gpu") == stack.resolve_layer_loop("auto", "tpu") == "scan"
    )
    with pytest.raises(ValueError, match="expected one of auto, scan, unroll"):
        stack.resolve_layer_loop("loop")


def test_rematerialisation_saves_memory_by_default():
    def temporary_bytes(remat):
        network = Network(DiTConfig(**{**SMALL, "depth": 8}, remat=remat))
        params = jax.eval_shape(network.init, jax.random.key(0))
        x, t, conditions = random_inputs(network.config, batch=8)

        def loss(params, x):
            return jnp.square(network.apply(params, Request(x, t, conditions)).out).mean()

        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("block") < temporary_bytes("none") / 2


class Doubled:
    """Its state is used two times over, by `prefetch`, which counts how often it is called."""

    def __init__(self):
        self.calls = []

    def prefetch(self, state):
        jax.debug.callback(lambda: self.calls.append(1))
        return {"bias": 2 * state["bias"]}

    def __call__(self, q, k, v, state=None):
        out, _ = LocalAttention("einsum")(q, k, v)
        return out + state["bias"].mean(), {"bias": state["bias"] / 2 + 1}


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
@pytest.mark.parametrize("captured", [(), (0, 1, 2), (1,)])
def test_states_are_prefetched_once_a_layer(small, layer_loop, captured):
    config, params, (x, t, conditions) = small
    network = Network(dataclasses.replace(config, layer_loop=layer_loop))
    bias = jnp.arange(3, dtype=jnp.float32) * 0.1
    plain = Doubled()
    plain.prefetch = None  # nothing to do ahead: given the doubled state at once

    def call(strategy, bias):
        state = {"bias": bias[:, None]}
        arguments = {"attention": strategy, "carry": state, "features": captured}
        return network.apply(params, Request(x, t, conditions, **arguments))

    strategy = Doubled()
    found = jax.block_until_ready(jax.jit(lambda bias: call(strategy, bias))(bias))
    jax.effects_barrier()
    assert len(strategy.calls) == config.depth
    expected = jax.jit(lambda bias: call(plain, bias))(2 * bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
