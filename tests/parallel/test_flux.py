"""FLUX's joint sequence on many devices: text on all of them, the image's rows divided."""

import dataclasses
import importlib
import math
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import experiment
from dit_jax.conditions import Condition
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import RectifiedFlow
from dit_jax.diffusion.samplers import make_solver, schedule
from dit_jax.experiment import SamplingPlan
from dit_jax.models import FluxConfig, Network, Request, lora
from dit_jax.models.flux_config import PRESETS
from dit_jax.models.step_cache import CachedNetwork, StepCache
from dit_jax.parallel.mesh import DataParallel, create_mesh
from dit_jax.parallel.partitioning import ShardedPlacement, rules_for
from dit_jax.parallel.planning import programs
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.sampling import Sampler, image_keys
from dit_jax.target import targeting
from tests.long import long, only_long
from tests.models.conftest import random_params
from tests.models.test_lora import drawn

# 10 rows of 3 patches: over 4 devices some rows are padding.
CONFIG = FluxConfig.from_name("flux_tiny", image_size=(20, 6), num_heads=4, layer_loop="scan")
FLOW = RectifiedFlow(network_convention="flux", time_scale=1000.0)
STEPS = 8


def conditions(batch, seed=1):
    random = np.random.default_rng(seed)
    shapes = {"text": (5, CONFIG.text_dim), "pooled": (CONFIG.pooled_dim,)}
    return {
        name: jnp.asarray(random.normal(size=(batch, *shape)), jnp.float32)
        for name, shape in shapes.items()
    }


def make_plan(steps=STEPS, config=CONFIG):
    sampler = Sampler(Denoiser(Network(config), FLOW), make_solver("euler"))
    return SamplingPlan(sampler, schedule(FLOW, steps), 1.0)


def distribute(plan, parallel, batch=1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few steps to pay
        return parallel.distribute(plan, batch_size=batch)


@pytest.fixture(scope="module")
def params():
    return random_params(Network(CONFIG))


@pytest.fixture(scope="module")
def evaluated(params):
    """An evaluation on one device: the request and the output."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(1, 20, 6, CONFIG.in_channels)), jnp.float32)
    reference = jnp.asarray(random.normal(size=(1, 4, 8, CONFIG.in_channels)), jnp.float32)
    told = conditions(1) | {"reference": reference}
    request = Request(x, jnp.asarray([625.0]), told)
    return request, np.asarray(jax.jit(Network(CONFIG).apply)(params, request).out)


def told_ahead(params, request):
    """The request with its modulations computed before."""
    with targeting("gpu"):
        network = Network(dataclasses.replace(CONFIG, dtype="float32"))
        ahead = network.ahead(params, request.t, request.conditions)
    return request.replace(ahead=jax.tree.map(lambda leaf: leaf[0], ahead))


@pytest.mark.parametrize(
    ("mode", "devices", "options"),
    [
        ("synchronous", 4, {}),
        ("ulysses", 2, {}),
        ("ring", 4, {"ulysses": 2}),
        ("tensor", 2, {}),
        *(long(mode, 4, {}) for mode in ("ulysses", "ring", "tensor")),
        *(long(mode, 2, {}) for mode in ("synchronous", "ring")),
    ],
)
def test_exact_modes_are_the_single_device(params, evaluated, mode, devices, options):
    request, expected = evaluated
    placement = distribute(make_plan(), ImageParallel(mode, patch_devices=devices, **options))
    network = placement.plan.sampler.denoiser.network
    placed = placement.place(params)
    out = jax.jit(network.apply)(placed, told_ahead(params, request)).out
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert len(out.sharding.device_set) == devices
    kernel = placed["single_blocks"]["linear1"]["kernel"]
    parts = devices if mode == "tensor" else 1
    assert kernel.addressable_shards[0].data.size * parts == kernel.size


def test_with_a_lora_tensor_parallelism_is_the_single_device(params, evaluated):
    network, (request, base) = Network(CONFIG), evaluated
    adapted = lora.attach(network, params, [(drawn(network), 1.0)])
    expected = jax.jit(network.apply)(lora.merge(adapted), request).out
    placement = distribute(make_plan(), ImageParallel("tensor", patch_devices=2))
    out = jax.jit(placement.plan.sampler.denoiser.network.apply)(placement.place(adapted), request)
    np.testing.assert_allclose(out.out, expected, atol=1e-4)
    assert np.abs(expected - base).max() > 0.05


@pytest.mark.parametrize("devices", [2, long(4)])
def test_displaced_patches_are_exact_where_nothing_has_changed(params, evaluated, devices):
    """Then stale keys and values are fresh ones: of both stacks, the prefetched ones too."""
    request, expected = evaluated
    parallel = ImageParallel("displaced", patch_devices=devices, warmup_steps=1)
    network = distribute(make_plan(), parallel).plan.sampler.denoiser.network
    start = network.carried(1, (20, 6))
    warm = jax.jit(start.warmup.apply)(params, request.replace(carry=start.state))
    np.testing.assert_allclose(warm.out, expected, atol=1e-4)
    apply = jax.jit(network.apply)
    stale = apply(params, request.replace(carry=warm.carry))
    np.testing.assert_allclose(stale.out, expected, atol=1e-4)
    again = apply(params, request.replace(carry=stale.carry))
    np.testing.assert_allclose(again.out, expected, atol=1e-4)
    other = apply(params, request.replace(x=request.x + 0.1, carry=again.carry))
    moved = jax.jit(Network(CONFIG).apply)(params, request.replace(x=request.x + 0.1)).out
    error = np.abs(other.out - moved).mean() / np.abs(moved - expected).mean()
    assert 1e-3 < error < 0.5


def draw(params, parallel=None, cache=None):
    plan, keys = make_plan(), image_keys(0, np.arange(1))
    if cache is not None:
        denoiser = plan.sampler.denoiser
        denoiser = dataclasses.replace(denoiser, network=CachedNetwork(denoiser.network, cache))
        plan = dataclasses.replace(
            plan, sampler=dataclasses.replace(plan.sampler, denoiser=denoiser)
        )
    if parallel is not None:
        plan = distribute(plan, parallel)
    return np.asarray(plan.bind(params)(keys, conditions(1)))


def psnr(images, expected):
    return 10 * np.log10(np.square(np.ptp(expected)) / np.square(images - expected).mean())


@pytest.mark.parametrize("devices", [long(2), long(4)])
def test_displaced_patches_are_closer_to_one_device_than_naive_ones(params, devices):
    expected = draw(params)
    displaced = ImageParallel("displaced", patch_devices=devices, warmup_steps=2)
    found = psnr(draw(params, displaced), expected)
    assert found > 40
    assert found > psnr(draw(params, ImageParallel("naive", patch_devices=devices)), expected) + 6


@only_long
def test_a_step_cache_skips_the_same_on_many_devices(params):
    cache = StepCache(threshold=0.9, warmup=1)
    expected, everything = draw(params, cache=cache), draw(params)
    assert np.abs(expected - everything).max() > 1e-3
    parallel = ImageParallel("synchronous", patch_devices=2)
    np.testing.assert_allclose(draw(params, parallel, cache), expected, atol=1e-4)


def test_its_sampler_is_planned_with_the_usual_length_of_a_text():
    config = importlib.import_module("dit_jax.configs.flux_dev").get_config()
    config.model.update(image_size=8, in_channels=4)
    config.model.flux.update(
        {key: value for key, value in PRESETS["flux_tiny"].items() if key in config.model.flux}
    )
    config = experiment.resolve_config(config)
    network = experiment.build_network(config)
    told = programs.needed_conditions(network, 3)
    assert {name: array.shape for name, array in told.items()} == {
        "text": (3, 8, 16),
        "pooled": (3, 12),
        "guidance": (3,),
    }
    (planned,) = programs.plan_sampling(
        config, DataParallel(create_mesh(devices=jax.devices()[:1]))
    ).programs
    assert "while" in planned.lower().as_text()
    endless = {"text": Condition((None, 4))}
    with pytest.raises(ValueError, match="names no usual one"):
        programs.needed_conditions(types.SimpleNamespace(conditions=endless), 1)


@only_long
@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 4}])
def test_training_is_divided_by_its_rules(axes):
    config = importlib.import_module("dit_jax.configs.flux_tiny").get_config()
    config.model.flux.update(layer_loop="scan", depth=1, single_depth=1)
    method = experiment.build_method(experiment.resolve_config(config))
    random, batch = np.random.default_rng(0), 8
    told = {"text": (batch, 3, 16), "pooled": (batch, 12)}
    arrays = {name: random.normal(size=shape).astype("float32") for name, shape in told.items()}
    image = random.normal(size=(batch, 8, 8, 4)).astype("float32")
    frozen = {"nulls": {name: jnp.zeros(shape[1:]) for name, shape in told.items()}}
    devices = jax.devices()[: math.prod(axes.values())]
    placements = (
        DataParallel(create_mesh(devices=devices[:1])),
        ShardedPlacement(create_mesh(devices=devices, **{"data": 1, **axes}), rules_for("flux")),
    )
    losses = []
    state = jax.device_get(jax.jit(method.init)(jax.random.key(0)))
    state = dataclasses.replace(state, params=random_params(method.denoiser.network, scale=0.1))
    for placement in placements:
        shardings = placement.state_shardings(jax.eval_shape(lambda s: s, state))
        own = jax.device_put(state, shardings)
        data = placement.put_batch({"image": image, "conditions": arrays})
        with placement.tracing():
            _, metrics = jax.jit(method.update)(own, data, jax.random.key(1), frozen)
        losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    assert losses[0][1] > 0.01
    np.testing.assert_allclose(*losses, rtol=1e-4)
