"""FLUX against diffusers' `FluxTransformer2DModel`, and its stacks against themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import RectifiedFlow, make_solver, schedule
from dit_jax.interop.flux_files import load_flux
from dit_jax.models import FluxConfig, Network, Request
from dit_jax.models.apart import Apart, is_apart
from dit_jax.models.flux import Flux, told_guidance
from dit_jax.models.flux_ahead import MOST_ROWS
from dit_jax.models.network import is_quantized
from dit_jax.models.step_cache import CachedNetwork, StepCache
from dit_jax.sampling import Sampler, image_keys
from dit_jax.target import targeting
from tests.references import diffusers_flux

DEV = FluxConfig.from_name("flux_tiny", guidance_embedding=True)
SCHNELL = FluxConfig.from_name("flux_tiny")


def random_request(config, size, *, reference=None, features=(), seed=1):
    random, batch = np.random.default_rng(seed), 2

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    told = {"text": draw(batch, 5, config.text_dim), "pooled": draw(batch, config.pooled_dim)}
    if config.guidance_embedding:
        # 1000 times these are numbers of bfloat16, to which they would be rounded in it.
        told["guidance"] = jnp.asarray([4.0, 1.0], jnp.float32)
    if reference:
        told["reference"] = draw(batch, *reference, config.in_channels)
    t = jnp.asarray([875.0, 125.0], jnp.float32)
    return Request(draw(batch, *size, config.in_channels), t, told, features=features)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of dev and schnell: diffusers' model, and network and parameters read from its folder."""
    found = {}
    for name, config in (("dev", DEV), ("schnell", SCHNELL)):
        model = diffusers_flux.create_model(config)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = (model, *load_flux(folder))
    return found


@pytest.fixture(scope="module")
def dev(models):
    """The unrolled network as a function, parameters, a request with a reference, the output."""
    _, network, params = models["dev"]
    params = jax.tree.map(np.asarray, params)
    network = Network(dataclasses.replace(network.config, layer_loop="unroll"))
    compiled = jax.jit(network.apply)

    def apply(params, request):
        return compiled(network.as_sampled(params), request)  # layers with arrays of their own

    request = random_request(network.config, (4, 8), reference=(6, 4))
    return apply, params, request, apply(params, request).out


def test_kontext_matches_diffusers(models, dev):
    _, _, request, out = dev
    expected = diffusers_flux.evaluate(models["dev"][0], request)
    assert out.dtype == jnp.float32 and np.std(expected) > 0.5
    np.testing.assert_allclose(out, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "size", "features"), [("dev", (8, 6), (0, 1, 2)), ("schnell", (6, 10), ())]
)
def test_the_scanned_network_matches_diffusers(models, name, size, features):
    model, network, params = models[name]
    network = Network(dataclasses.replace(network.config, layer_loop="scan"))
    request = random_request(network.config, size, features=features)
    result = jax.jit(network.apply)(params, request)
    expected = diffusers_flux.evaluate(model, request)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(result.out, expected, atol=1e-4, rtol=0)
    assert len(network.feature_shapes) == 4  # of both stacks
    assert [a.shape for a in result.features] == [(2, 4, 3, 32)] * len(features)
    for wrong in ((4,), (3, 0), (0, 0), (-1,)):
        with pytest.raises(ValueError, match="ascending numbers of 0 to 3"):
            jax.eval_shape(network.apply, params, request.replace(features=wrong))


def test_scanned_and_rematerialised_it_is_the_same_and_gradients_are_right(dev):
    apply, params, request, expected = dev
    config = dataclasses.replace(DEV, layer_loop="scan", remat="block")
    random = np.random.default_rng(2)
    direction = jax.tree.map(lambda a: random.normal(size=a.shape).astype(a.dtype), params)

    def loss(params):
        out = Network(config).apply(params, request).out
        return jnp.square(out).mean(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=0)
    assert all(np.isfinite(a).all() and np.any(a) for a in jax.tree.leaves(gradients))
    step = 1e-4

    def loss_at(by):
        moved = jax.tree.map(lambda p, d: p + np.float32(by) * d, params, direction)
        return np.square(np.asarray(apply(moved, request).out, np.float64)).mean()

    pairs = zip(*map(jax.tree.leaves, (gradients, direction)), strict=True)
    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert sum(np.vdot(*pair) for pair in pairs) == pytest.approx(slope, rel=0.02)


def test_a_step_cache_skips_all_blocks_but_the_first(dev):
    _, params, request, expected = dev
    network = Network(dataclasses.replace(DEV, layer_loop="scan"))
    cached = CachedNetwork(network, StepCache(threshold=0.5, warmup=1, max_reuses=1))
    apply = jax.jit(cached.apply)
    first = apply(params, request.replace(carry=cached.carried(2, (4, 8)).state))
    np.testing.assert_allclose(first.out, expected, atol=2e-5)
    # With other blocks after the first it is the same: they are not run.
    broken = dict(params, single_blocks=jax.tree.map(jnp.zeros_like, params["single_blocks"]))
    again = apply(broken, request.replace(carry=first.carry))
    np.testing.assert_allclose(again.out, expected, atol=2e-5)
    np.testing.assert_array_equal(again.carry.cache.reuses, [1, 1])
    with pytest.raises(ValueError, match="with a step cache"):
        cached.apply(params, request.replace(carry=first.carry, features=(0,)))


def test_modulations_of_all_steps_are_computed_before_the_first_where_that_pays(dev, monkeypatch):
    apply, params, request, _ = dev
    network = Network(dataclasses.replace(DEV, layer_loop="unroll", dtype="float32"))
    times = jnp.asarray([875.0, 125.0])
    assert network.ahead(params, times, request.conditions) is None  # on a CPU
    with targeting("gpu"):
        ahead = network.ahead(network.as_sampled(params), times, request.conditions)
        many = jnp.linspace(0.0, 1000.0, MOST_ROWS // 2 + 1)
        assert network.ahead(params, many, request.conditions) is None
    own = jax.tree.map(lambda leaf: leaf[1], ahead)
    request = request.replace(t=jnp.full(2, 125.0))
    told = apply(params, request.replace(ahead=own)).out
    np.testing.assert_allclose(told, apply(params, request).out, atol=1e-5)

    # A sampler's evaluations compute none then: only the rows of all steps are asked for.
    shapes, condition = [], Flux.condition
    monkeypatch.setattr(
        Flux, "condition", lambda self, t, told: shapes.append(t.shape) or condition(self, t, told)
    )
    flow = RectifiedFlow(network_convention="flux", time_scale=1000.0)
    sampler = Sampler(Denoiser(network, flow), make_solver("euler"))
    inputs = (params, image_keys(0, np.arange(2)), request.conditions, schedule(flow, 3))
    for platform, expected in (("cpu", (2,)), ("gpu", (2 * 3,))):
        with targeting(platform):
            jax.eval_shape(lambda *inputs: sampler(*inputs), *inputs)
        assert shapes == [expected]
        shapes.clear()


def stacked(params):
    return jax.tree.map(np.asarray, params, is_leaf=is_apart)


def test_layers_with_arrays_of_their_own_are_stacked_and_quantised_again(dev):
    _, params, _, _ = dev
    network = Network(dataclasses.replace(DEV, layer_loop="unroll", quantization="int8"))
    apart = network.as_sampled(params)
    assert isinstance(apart["single_blocks"]["linear1"]["kernel"], Apart)
    assert network.as_sampled(apart) == apart
    assert jax.tree.all(jax.tree.map(np.array_equal, stacked(apart), params))
    one, other = (jax.jit(network.quantize)(given) for given in (params, apart))
    assert is_quantized(one) and is_quantized(other)
    assert jax.tree.all(jax.tree.map(np.array_equal, stacked(other), one))
    scanned = Network(DEV)
    assert scanned.as_sampled(params) is params


def test_bfloat16_is_close_and_parameters_can_be_stored_in_it(dev):
    _, params, request, expected = dev
    network = Network(
        dataclasses.replace(DEV, dtype="bfloat16", param_dtype="bfloat16", layer_loop="scan")
    )
    stored = jax.eval_shape(network.init, jax.random.key(0))
    kernels = stored["single_blocks"]["linear1"]["kernel"], stored["x_embedder"]["kernel"]
    assert all(kernel.dtype == jnp.bfloat16 for kernel in kernels)
    assert stored["final_layer"]["linear"]["kernel"].dtype == jnp.float32
    params = jax.tree.map(lambda a, like: np.asarray(a).astype(like.dtype), params, stored)
    out = jax.jit(network.apply)(params, request).out
    assert out.dtype == jnp.float32
    error = np.abs(out - expected).mean() / np.abs(expected).mean()
    assert 1e-4 < error < 0.1


def test_in_bfloat16_the_guidance_scale_is_rounded_as_published():
    scales = jnp.asarray([3.5, 4.0])
    np.testing.assert_array_equal(told_guidance(scales, jnp.dtype("bfloat16")), [3504, 4000])
    np.testing.assert_array_equal(told_guidance(scales, jnp.dtype("float32")), [3500, 4000])


def test_only_products_of_blocks_are_quantised():
    config = dataclasses.replace(SCHNELL, quantization="int8")
    shapes = jax.eval_shape(
        lambda key: Network(config).quantize(Network(config).init(key)), jax.random.key(0)
    )
    narrow = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if leaf.dtype == jnp.int8
    }
    streams = [f"double_blocks/{stream}" for stream in ("image", "text")]
    layers = [
        f"{s}/{name}" for s in streams for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    ]
    layers += ["single_blocks/linear1", "single_blocks/linear2"]
    assert narrow == {f"{layer}/kernel" for layer in layers}


def test_the_published_models_have_twelve_billion_parameters():
    for name, billions in (("flux_dev", 11.901), ("flux_schnell", 11.891)):
        network = Network(FluxConfig.from_name(name))
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert count / 1e9 == pytest.approx(billions, abs=0.001)
        assert network.config.axes_channels == (16, 56, 56)
        assert network.config.title == f"FLUX.1 {name.removeprefix('flux_')}"
    # 2 x 57 blocks x 12 width^2 x 4608 tokens, and attention's 4 x 57 x width x 4608^2.
    flops = FluxConfig.from_name("flux_dev").flops_per_example
    assert flops / 1e12 == pytest.approx(59.5 + 14.9, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (8, 9)}, "multiples of 2"),
        ({"num_classes": 10}, r"set model\.num_classes=0"),
        ({"second_time": "r"}, r"set model\.second_time='none'"),
        ({"num_heads": 3}, "multiple of model.flux.num_heads"),
        ({"hidden_size": 12}, "say how by model.flux.rotary_channels"),
        ({"rotary_channels": (4, 6, 5)}, "3 even numbers whose sum is the 16"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_errors_of_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SCHNELL, **changes)


def test_errors_of_conditions(models):
    _, network, params = models["dev"]
    request = random_request(DEV, (4, 4))
    for name in ("text", "pooled", "guidance"):
        told = {key: value for key, value in request.conditions.items() if key != name}
        with pytest.raises(ValueError, match=f"missing: {name}"):
            network.apply(params, request.replace(conditions=told))
    with pytest.raises(ValueError, match="unknown: guidance"):
        models["schnell"][1].apply(params, request)
    told = request.conditions | {"reference": jnp.zeros((2, 3, 4, 4))}
    with pytest.raises(ValueError, match="latents of 3x4 and 4x4"):
        jax.eval_shape(network.apply, params, request.replace(conditions=told))
