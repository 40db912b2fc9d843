"""Step caching against a plain loop over evaluations and blocks, which decides on the host."""

import dataclasses
import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import RectifiedFlow
from dit_jax.diffusion.samplers import make_solver, schedule
from dit_jax.experiment import SamplingPlan
from dit_jax.models import DiTConfig, Network, Request, layers
from dit_jax.models.attention import LocalAttention
from dit_jax.models.edm import SongUNetConfig
from dit_jax.models.step_cache import CachedNetwork, StepCache
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.sampling import Sampler, image_keys
from tests.models.conftest import random_params

CONFIG = DiTConfig(
    image_size=(8, 4),
    in_channels=3,
    hidden_size=32,
    depth=3,
    num_heads=4,
    num_classes=5,
    learn_sigma=False,
)
LABELS = np.array([1, 3, 0], np.int32)
STEPS = 12
CACHE = StepCache(0.1, warmup=3, max_reuses=2)


def make_sampler(cache=None, **overrides):
    network = Network(dataclasses.replace(CONFIG, **overrides))
    network = network if cache is None else CachedNetwork(network, cache)
    return Sampler(Denoiser(network, RectifiedFlow()), make_solver("euler"))


def draw(sampler, params, labels=LABELS, indices=(0, 1, 2), scale=1.0):
    keys = image_keys(0, np.asarray(indices))
    times = schedule(RectifiedFlow(), STEPS)
    method = sampler.counted if isinstance(sampler.denoiser.network, CachedNetwork) else sampler
    return jax.tree.map(np.asarray, method(params, keys, labels, times, scale))


@pytest.fixture(scope="module")
def params():
    """Random, and of time and class more than usual, so that images change at different rates."""
    return random_params(Network(CONFIG))


@pytest.fixture(scope="module")
def plain(params):
    return draw(make_sampler(), params)


class Loop:
    """One image after the other, one block after the other, decisions in Python."""

    def __init__(self, params):
        network = Network(CONFIG)
        self.module = nnx.merge(network.graph(params), params)
        graph, stacked = nnx.split(self.module.blocks)
        slices = [jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(CONFIG.depth)]  # noqa: B023
        blocks = [nnx.merge(graph, one) for one in slices]
        attention = LocalAttention("einsum", False)

        def start(x, t, label):
            tokens = self.module.x_embedder(layers.patchify(x, 2))
            tokens = tokens + layers.sincos_position_embedding(CONFIG.hidden_size, (4, 2))[None]
            return tokens, self.module._condition(t, {"label": label})

        self.start = jax.jit(start)
        self.first = jax.jit(lambda x, c: blocks[0](x, c, attention)[0])

        def rest(x, c):
            for block in blocks[1:]:
                x, _ = block(x, c, attention)
            return x

        self.rest = jax.jit(rest)
        self.end = jax.jit(lambda x, c: layers.unpatchify(self.module.final_layer(x, c), 2, (4, 2)))

    def image(self, noise, label, cache):
        """The image, and how many evaluations were computed."""
        process, times = RectifiedFlow(), schedule(RectifiedFlow(), STEPS)
        x, history, reuses, computed = noise[None], [], 0, 0
        for index, (t, s) in enumerate(itertools.pairwise(times)):
            t_b = jnp.full(1, t, jnp.float32)
            x_in, t_network = process.network_inputs(x, t_b)
            tokens, condition = self.start(x_in, t_network, np.array([label], np.int32))
            after = self.first(tokens, condition)
            added = np.asarray(after - tokens, np.float64)
            change = 1.0
            if history:
                change = np.abs(added - history[-1][1]).mean() / np.abs(history[-1][1]).mean()
            if index >= cache.warmup and reuses < cache.max_reuses and change < cache.threshold:
                reuses += 1
                out = after + self.expected(history, index, cache.order)
            else:
                out, reuses, computed = self.rest(after, condition), 0, computed + 1
                history.append((index, added, np.asarray(out - after, np.float64)))
            prediction = process.interpret(self.end(jnp.float32(out), condition), x, jnp.float32(t))
            x = x + (s - t) * process.velocity(prediction.x0, prediction.eps, jnp.float32(t))
        return np.asarray(x[0]), computed

    @staticmethod
    def expected(history, index, order):
        """Newton's differences over the times at which all blocks ran, as Taylor coefficients."""
        derivatives = [[entry[2] for entry in history]]
        times = [entry[0] for entry in history]
        for _ in range(order):
            former = derivatives[-1]
            steps = np.diff(times[len(times) - len(former) :])
            pairs = zip(itertools.pairwise(former), steps, strict=True)
            derivatives.append([(b - a) / h for (a, b), h in pairs])
        elapsed = index - times[-1]
        return sum(d[-1] * elapsed**n / math.factorial(n) for n, d in enumerate(derivatives))


@pytest.mark.parametrize(
    ("order", "layer_loop"), [(0, "scan"), (1, "scan"), (2, "unroll"), (0, "unroll")]
)
def test_a_loop_on_the_host_makes_the_same_images(params, plain, order, layer_loop):
    cache = dataclasses.replace(CACHE, order=order)
    images, share = draw(make_sampler(cache, layer_loop=layer_loop), params)
    noise = [
        jax.random.normal(jax.random.fold_in(key, 0), images.shape[1:])
        for key in image_keys(0, np.arange(3))
    ]
    loop = Loop(params)
    for number, label in enumerate(LABELS):
        expected, computed = loop.image(noise[number], label, cache)
        assert share[number] == pytest.approx(computed / STEPS)
        np.testing.assert_allclose(images[number], expected, atol=2e-5 * np.abs(expected).max())
    assert 0.3 < share.mean() < 0.9
    assert 1e-4 < np.abs(images - plain).max() / np.abs(plain).max() < 0.2


def test_images_decide_for_themselves(params):
    sampler = make_sampler(CACHE)
    images, share = draw(sampler, params, scale=2.0)
    assert len(set(share.tolist())) > 1  # their decisions differ
    for number in range(3):
        alone, own = draw(sampler, params, LABELS[[number]], [number], scale=2.0)
        assert own[0] == share[number]
        np.testing.assert_allclose(alone[0], images[number], atol=1e-5 * np.abs(images).max())


def test_nothing_skipped_is_plain_sampling_and_the_most_is_counted(params, plain):
    images, share = draw(make_sampler(StepCache(1e-9)), params)
    np.testing.assert_allclose(images, plain, atol=1e-5 * np.abs(plain).max())
    assert (share == 1).all()
    _, share = draw(make_sampler(StepCache(0.99, warmup=2, max_reuses=4)), params)
    assert (share == 4 / 12).all()  # two, and then one of five


@pytest.mark.parametrize(
    ("mode", "options"),
    [("synchronous", {}), ("displaced", {}), ("tensor", {}), ("ring", {"split_guidance": True})],
)
def test_on_many_devices(params, mode, options):
    sampler = make_sampler(CACHE)
    plan = SamplingPlan(sampler, schedule(RectifiedFlow(), STEPS), 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few steps
        placement = ImageParallel(mode, patch_devices=4, **options).distribute(plan, batch_size=3)
    keys = image_keys(0, np.arange(3))
    placed = placement.plan.sampler
    images, share = placed.counted(
        placement.place(params), jax.device_put(keys, placement.split), LABELS, plan.times, 2.0
    )
    expected, expected_share = draw(sampler, params, scale=2.0)
    if mode == "displaced":  # other keys and values, so other decisions
        assert np.asarray(share).max() < 0.95
        error = np.abs(np.asarray(images) - expected).max() / np.abs(expected).max()
        assert 1e-5 < error < 0.5
    else:
        np.testing.assert_array_equal(share, expected_share)
        np.testing.assert_allclose(images, expected, atol=1e-4 * np.abs(expected).max())


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"threshold=2: expected a number between 0 and 1"):
        StepCache(2)
    with pytest.raises(ValueError, match="order=2 extrapolates from 3 evaluations"):
        StepCache(0.1, order=2)
    with pytest.raises(ValueError, match=r"order=3: expected 0 \(reuse\), 1 or 2"):
        StepCache(0.1, order=3)
    with pytest.raises(ValueError, match="max_reuses=0: expected at least 1"):
        StepCache(0.1, max_reuses=0)
    with pytest.raises(ValueError, match="cannot pay in 4 evaluations"):
        CACHE.check(4)
    with pytest.raises(ValueError, match="makes 2 a step, some of the same time"):
        dataclasses.replace(CACHE, order=1).check(20, 2)
    with pytest.raises(ValueError, match="skips blocks of a stack, which DDPM"):
        CachedNetwork(Network(SongUNetConfig(image_size=8)), CACHE)
    with pytest.raises(ValueError, match="nothing to count"):
        make_sampler().counted({}, image_keys(0, np.arange(1)), None, np.ones(2))
    request = Request(np.zeros((1, 8, 4, 3)), np.zeros(1), {"label": np.zeros(1, np.int32)})
    network = CachedNetwork(Network(CONFIG), CACHE)
    with pytest.raises(ValueError, match="with a step cache: expected none"):
        params = jax.eval_shape(Network(CONFIG).init, jax.random.key(0))
        jax.eval_shape(network.apply, params, request.replace(features=(1,)))
