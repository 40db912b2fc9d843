"""EDM's U-Nets on many devices: exact modes equal one device, stale ones equal a plain loop."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import EDM
from dit_jax.diffusion.samplers import make_solver, schedule
from dit_jax.experiment import SamplingPlan
from dit_jax.models import Network, Request
from dit_jax.models.edm import DhariwalUNetConfig, SongUNetConfig
from dit_jax.parallel.network import BATCH_AXES, PATCH_AXES
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.parallel.unet import UNET_MODES, ParallelUNet
from dit_jax.sampling import Sampler, image_keys
from tests.long import long
from tests.models.conftest import random_params
from tests.parallel.device_loop import DeviceLoop

SMALL = {"image_size": 14, "num_classes": 7, "channel_mult": (1, 2), "num_blocks": 1}
DDPMPP = SongUNetConfig(**SMALL, model_channels=16, attn_resolutions=(7,), remat="block")
NCSNPP = dataclasses.replace(
    DDPMPP,
    embedding_type="fourier",
    channel_mult_noise=2,
    encoder_type="residual",
    resample_filter=(1, 3, 3, 1),
)
ADM = DhariwalUNetConfig(**SMALL, model_channels=64, attn_resolutions=(14, 7))
TINY = dataclasses.replace(DDPMPP, image_size=7, channel_mult=(1,))
CONFIGS = {"DDPM++": DDPMPP, "NCSN++": NCSNPP, "ADM": ADM, "tiny": TINY}


def make_mesh(devices, guidance=1):
    shape = (guidance, 1, 1, devices)
    return Mesh(
        np.asarray(jax.devices()[: devices * guidance]).reshape(shape), (*BATCH_AXES, *PATCH_AXES)
    )


def inputs(config, seed=1):
    """7 rows at the coarsest resolution, uneven over 2, 3 and 4 devices; not square."""
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(2, config.image_size, 6, 3)), jnp.float32)
    t = jnp.asarray(random.normal(size=2), jnp.float32)
    return x, t, {"label": jnp.asarray([3, 7], jnp.int32)}


@functools.cache
def single(name):
    """(network, parameters, output of one device)."""
    network = Network(CONFIGS[name])
    params = random_params(network)
    out = np.asarray(jax.jit(network.apply)(params, Request(*inputs(network.config))).out)
    assert out.std() > 0.1
    return network, params, out


@pytest.mark.parametrize(
    ("name", "devices"),
    [("DDPM++", 3), ("NCSN++", 2), ("ADM", 4)],
)
def test_full_sync_equals_one_device(name, devices):
    network, params, expected = single(name)
    parallel = ParallelUNet(network, make_mesh(devices), "full_sync")
    found = jax.jit(parallel.apply)(params, Request(*inputs(network.config))).out
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def three_evaluations(parallel, params):
    """Outputs of a warm-up and two evaluations that follow it, on different inputs."""
    warmup = dataclasses.replace(parallel, is_warmup=True)
    state, outs = (), []
    apply = {True: jax.jit(warmup.apply), False: jax.jit(parallel.apply)}
    for i in range(3):
        result = apply[i == 0](params, Request(*inputs(parallel.config, i), carry=state))
        outs.append(np.asarray(result.out))
        state = result.carry
    return outs


@pytest.mark.parametrize(
    ("name", "mode", "devices"),
    [
        *(("tiny", mode, 3) for mode in UNET_MODES[1:]),
        long("NCSN++", "corrected_async_gn", 2),
    ],
)
def test_stale_modes_equal_a_loop_over_devices(name, mode, devices):
    network, params, _ = single(name)
    found = three_evaluations(ParallelUNet(network, make_mesh(devices), mode), params)
    loop = DeviceLoop(network, params, devices, mode)
    for i, out in enumerate(found):
        expected = loop(*inputs(network.config, i))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(out, expected, atol=1e-5 * scale, rtol=0)
    exact = np.asarray(jax.jit(network.apply)(params, Request(*inputs(network.config, 2))).out)
    assert np.abs(found[2] - exact).mean() > 1e-2  # what is stale makes a difference


def plan_of(steps):
    network = Network(TINY)
    process = EDM()
    sampler = Sampler(Denoiser(network, process), make_solver("euler"))
    return SamplingPlan(sampler, schedule(process, steps), 2.0)


def draw(plan, params, parallel=None):
    if parallel is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # too few steps to pay
            plan = parallel.distribute(plan, batch_size=1)
    return np.asarray(plan.bind(params)(image_keys(0, np.arange(1)), np.array([3], np.int32)))


def test_sampling_a_unet_on_many_devices():
    params = random_params(Network(TINY))
    plan = plan_of(3)
    expected = draw(plan, params)
    tolerance = 1e-4 * np.abs(expected).max()
    options = {"patch_devices": 3, "devices": tuple(jax.devices()[:6]), "split_guidance": True}
    exact = draw(plan, params, ImageParallel("displaced", warmup_steps=3, **options))
    np.testing.assert_allclose(exact, expected, atol=tolerance, rtol=0)
    displaced = draw(plan, params, ImageParallel("displaced", warmup_steps=1, **options))
    assert np.isfinite(displaced).all()
    assert tolerance < np.abs(displaced - expected).max() < np.abs(expected).max()


def test_naive_devices_see_nothing_of_each_other():
    network, params, expected = single("tiny")
    apply = jax.jit(ParallelUNet(network, make_mesh(2), "naive").apply)
    x, t, conditions = inputs(TINY)
    found = apply(params, Request(x, t, conditions)).out
    assert np.abs(found - expected).mean() > 1e-2
    other = apply(params, Request(x.at[:, 4:].set(0), t, conditions)).out
    np.testing.assert_array_equal(found[:, :4], other[:, :4])


@pytest.mark.parametrize(
    ("mode", "devices", "message"),
    [
        ("ring", 2, "parallel='ring' is not for U-Nets: expected one of displaced"),
        ("displaced", 8, "7 rows at the network's coarsest .* over 8 devices.*Use 7 devices"),
        ("displaced", 4, "needs the states that a warm-up leaves"),
    ],
)
def test_what_cannot_be_is_refused(mode, devices, message):
    network = Network(DDPMPP)
    params = jax.eval_shape(network.init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        ParallelUNet(network, make_mesh(devices), mode).apply(params, Request(*inputs(DDPMPP)))


def collectives_behind_layers(mode):
    """How many of an evaluation's collectives send what was computed by a layer, and how many are
    there."""
    parallel = ParallelUNet(Network(DDPMPP), make_mesh(2), mode)
    params = jax.eval_shape(parallel.network.init, jax.random.key(0))
    x, t, conditions = inputs(DDPMPP)
    states = parallel.state_shapes(x.shape)
    request = Request(x, t, conditions, carry=states)
    program = jax.make_jaxpr(parallel.apply)(params, request)
    (sharded,) = (eqn for eqn in program.eqns if eqn.primitive.name == "shard_map")
    computed, behind, count = set(), 0, 0
    for eqn in sharded.params["jaxpr"].eqns:
        sources = {var for var in eqn.invars if not hasattr(var, "val")}
        is_computed = bool(sources & computed)
        if eqn.primitive.name.startswith(("ppermute", "all_gather", "psum")):
            count, behind = count + 1, behind + is_computed
        if is_computed or any(name in str(eqn) for name in ("conv_general", "dot_general")):
            computed.update(eqn.outvars)
    return behind, count


def test_what_a_displaced_evaluation_sends_was_known_when_it_began():
    behind, count = collectives_behind_layers("displaced")
    assert behind == 0 and count > 20
    assert collectives_behind_layers("sync_gn")[0] > 5  # every normalisation but the first
