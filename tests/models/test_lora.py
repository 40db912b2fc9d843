"""LoRA in the networks: no layer drops it, and it is the same merged, quantised, split, swapped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr

from dit_jax.models import (
    DhariwalUNetConfig,
    DiTConfig,
    FluxConfig,
    Network,
    Request,
    SongUNetConfig,
    layers,
    lora,
    recomputation,
)
from dit_jax.models.linear import Linear, Precision
from dit_jax.models.step_cache import CachedNetwork, StepCache
from dit_jax.tree_paths import by_path
from tests.models.conftest import random_inputs, random_params
from tests.models.test_flux import random_request

UNET = {"image_size": 8, "num_classes": 3, "model_channels": 8, "channel_mult": (1, 2)}
UNET |= {"num_blocks": 1, "attn_resolutions": (4,), "augment_dim": 2}
CONFIGS = {
    "flux": FluxConfig.from_name("flux_tiny", guidance_embedding=True, layer_loop="scan"),
    "dit": DiTConfig(image_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3),
    "song_unet": SongUNetConfig(**UNET, channel_mult_noise=1),
    "dhariwal_unet": DhariwalUNetConfig(**UNET | {"model_channels": 32}),
}


def request_of(config):
    if isinstance(config, FluxConfig):
        return random_request(config, (4, 6))
    x, t, conditions = random_inputs(config)
    if getattr(config, "augment_dim", 0):
        conditions["augment"] = jnp.ones((2, config.augment_dim))
    return Request(x, t, conditions)


def drawn(network, seed=0, rank=2, paths=None, spread=0.1):
    """A random adapter of all layers, or some."""
    random, shapes, factors = np.random.default_rng(seed), lora.layer_shapes(network), {}
    for path in paths or shapes:
        *stack, i, o = shapes[path]
        factors[path] = tuple(
            random.normal(size=shape).astype(np.float32) * spread
            for shape in ((*stack, i, rank), (*stack, rank, o))
        )
    return lora.Adapter(factors)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_no_layer_of_any_network_drops_its_factors(name):
    network = Network(CONFIGS[name])
    params = jax.tree.map(
        lambda like: np.zeros(like.shape, like.dtype),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    adapted = lora.attach(network, params, [(drawn(network), 1.0)])
    paths = {path.rpartition("/")[0] for path in by_path(adapted) if "lora_a" in path}
    assert {path.replace("/", ".") for path in paths} == lora.layer_shapes(network).keys()
    request = request_of(CONFIGS[name])
    jaxpr = jax.make_jaxpr(lambda params: network.apply(params, request).out)(adapted).jaxpr
    _, used = dce_jaxpr(jaxpr, [True])
    unused = [path for path, is_used in zip(by_path(adapted), used, strict=True) if not is_used]
    assert not [path for path in unused if "lora" in path]


def test_two_adapters_are_the_sum_of_their_changes_and_so_are_they_merged():
    network = Network(CONFIGS["dit"])
    params, request = random_params(network), request_of(CONFIGS["dit"])
    some = ["blocks.attn.qkv", "final_layer.linear"]
    adapters = [(drawn(network, 1), 0.5), (drawn(network, 2, 3, some), -2.0)]
    apply = jax.jit(network.apply)
    separate = lora.attach(network, params, adapters, rank=8)
    assert separate["blocks"]["attn"]["qkv"]["lora_a"].shape == (2, 16, 8)
    merged = lora.merge(separate)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    by_hand = jax.tree.map(lambda a: a, params)
    for adapter, weight in adapters:
        for path, (a, b) in adapter.factors.items():
            *parents, name = path.split(".")
            node = by_hand
            for part in parents:
                node = node[part]
            kernel = node[name]["kernel"] + weight * np.matmul(a, b)
            node[name] = {**node[name], "kernel": kernel}
    expected = apply(by_hand, request).out
    assert np.abs(expected - apply(params, request).out).max() > 0.1
    np.testing.assert_allclose(apply(merged, request).out, expected, atol=1e-5)
    np.testing.assert_allclose(apply(separate, request).out, expected, atol=1e-5)
    cached = CachedNetwork(network, StepCache(threshold=0.5, warmup=1, max_reuses=1))
    step = jax.jit(cached.apply)
    first = step(separate, request.replace(carry=cached.carried(2, (4, 4)).state))
    again = step(separate, request.replace(carry=first.carry))
    np.testing.assert_array_equal(again.carry.cache.reuses, [1, 1])
    for result in (first, again):
        np.testing.assert_allclose(result.out, expected, atol=1e-5)


def test_of_layers_with_arrays_of_their_own_it_is_the_same():
    network = Network(dataclasses.replace(CONFIGS["dit"], layer_loop="unroll"))
    params, request = random_params(network), request_of(network.config)
    adapters = [(drawn(network), 0.5)]
    stacked = lora.attach(network, params, adapters)
    beside, apart = (
        lora.attach(network, network.as_sampled(params), adapters),
        network.as_sampled(stacked),
    )
    expected = network.as_sampled(lora.merge(stacked))
    apply = jax.jit(network.apply)
    out = apply(stacked, request).out
    for adapted in (beside, apart):
        np.testing.assert_allclose(apply(adapted, request).out, out, atol=1e-5)
        merged = lora.merge(adapted)
        assert jax.tree.structure(merged) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_beside_quantised_kernels_it_stays_wide(quantization):
    config = dataclasses.replace(CONFIGS["dit"], quantization=quantization)
    network, request = Network(config), request_of(config)
    adapter = drawn(network, paths=["blocks.mlp.fc1"], spread=0.3)
    params = network.quantize(random_params(network))
    adapted = lora.attach(network, params, [(adapter, 1.0)])
    layer = jax.tree.map(lambda a: a[0], adapted["blocks"]["mlp"]["fc1"])
    module = Linear(16, 64, rngs=nnx.Rngs(0), precision=Precision(quantization=quantization))
    module.quantize()
    module.adapt(2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16)), jnp.float32)
    found = nnx.merge(nnx.split(module)[0], layer)(x)
    module.lora_a, module.lora_b = nnx.data(None), nnx.data(None)
    del layer["lora_a"], layer["lora_b"]
    base = nnx.merge(nnx.split(module)[0], layer)(x)
    a, b = (factor[0] for factor in adapter.factors["blocks.mlp.fc1"])
    np.testing.assert_allclose(found - base, x @ a @ b, atol=1e-5)
    shapes = [jax.eval_shape(network.apply, p, request).out.shape for p in (params, adapted)]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="cannot be merged into quantised kernels"):
        lora.merge(adapted)


def test_on_accelerators_normalised_products_have_it_too(monkeypatch):
    random = np.random.default_rng(0)
    layer = Linear(6, 4, rngs=nnx.Rngs(0))
    layer.adapt(2)
    layer.lora_a, layer.lora_b = (
        nnx.Param(jnp.asarray(random.normal(size=shape), jnp.float32)) for shape in ((6, 2), (2, 4))
    )
    x, shift, scale = (
        jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 3, 6), (2, 6), (2, 6))
    )
    expected, _ = layers.modulated_product(layer, x, shift, scale)
    monkeypatch.setattr(recomputation, "recomputes_elementwise", lambda backend=None: True)
    found, _ = layers.modulated_product(layer, x, shift, scale)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_factors_have_the_dtype_of_their_kernels():
    config = dataclasses.replace(CONFIGS["dit"], dtype="bfloat16", param_dtype="bfloat16")
    network = Network(config)
    params = jax.tree.map(
        lambda like: jnp.zeros(like.shape, like.dtype),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    adapted = lora.attach(network, params, [(drawn(network), 1.0)])
    assert adapted["blocks"]["attn"]["qkv"]["lora_a"].dtype == jnp.bfloat16
    assert adapted["final_layer"]["linear"]["lora_b"].dtype == jnp.float32
    assert lora.merge(adapted)["blocks"]["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert lora.padded_rank(9) == 16 and lora.padded_rank(1) == 1


def test_errors():
    network = Network(CONFIGS["dit"])
    params = random_params(network)
    adapter = drawn(network, paths=["blocks.attn.qkv"])
    other = drawn(Network(dataclasses.replace(CONFIGS["dit"], hidden_size=32)))
    with pytest.raises(ValueError, match=r"(?s)differences.*blocks.attn.qkv has factors"):
        lora.attach(network, params, [(other, 1.0)])
    with pytest.raises(ValueError, match="nothing is no linear layer"):
        lora.attach(network, params, [(adapter, 1.0)], layers=["nothing"])
    with pytest.raises(ValueError, match=r"rank=1: blocks\.attn\.qkv needs 2 for 1 adapter"):
        lora.attach(network, params, [(adapter, 1.0)], rank=1)
    with pytest.raises(ValueError, match="weight nan: expected a number"):
        lora.attach(network, params, [(adapter, float("nan"))])
    with pytest.raises(ValueError, match="matches none of the network's linear layers"):
        lora.choose_layers(network, "double.*")
    with pytest.raises(ValueError, match="is no regular expression"):
        lora.choose_layers(network, "(")
    assert {*lora.choose_layers(network, "attention")} == {"blocks.attn.qkv", "blocks.attn.proj"}
