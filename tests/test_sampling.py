"""Sampling programs: what an image depends on, what recompiles, how batches are split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import DDPM, RectifiedFlow
from dit_jax.diffusion.samplers import make_solver, schedule
from dit_jax.models import DiTConfig, Network
from dit_jax.parallel.mesh import DataParallel, create_mesh
from dit_jax.sampling import Sampler, generate, image_keys
from tests.compilations import compilations
from tests.models.conftest import random_params

CONFIG = DiTConfig(image_size=4, in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
LABELS = np.array([0, 1, 2, 3, 0, 1, 2, 2], np.int32)


def make_sampler(solver="ddpm", process=None, **overrides):
    process = process or DDPM(learned_variance=True)
    learned = getattr(process, "learned_variance", False)
    config = dataclasses.replace(CONFIG, **{"learn_sigma": learned, **overrides})
    return Sampler(Denoiser(Network(config), process), make_solver(solver))


@pytest.fixture(scope="module")
def stochastic():
    """The ancestral sampler with learned variance, its parameters and times."""
    sampler = make_sampler()
    times = schedule(sampler.denoiser.process, 4)
    return sampler, random_params(sampler.denoiser.network), times


@pytest.fixture(scope="module")
def flow():
    sampler = make_sampler("heun", RectifiedFlow())
    return sampler, random_params(sampler.denoiser.network), schedule(RectifiedFlow(), 4)


def draw(setup, indices, labels=LABELS, seed=0, scale=2.0, **options):
    sampler, params, times = setup
    keys = image_keys(seed, np.asarray(indices))
    return np.asarray(sampler(params, keys, labels[indices], times, scale, **options))


@pytest.mark.parametrize("name", ["stochastic", "flow"])
def test_an_image_depends_on_seed_and_number_only(name, request):
    setup = request.getfixturevalue(name)
    whole = draw(setup, np.arange(8))
    assert whole.shape == (8, 4, 4, 2) and whole.dtype == np.float32 and np.isfinite(whole).all()
    scale = np.abs(whole).max()
    np.testing.assert_allclose(draw(setup, [5]), whole[[5]], atol=1e-5 * scale)
    np.testing.assert_allclose(draw(setup, [7, 5, 0]), whole[[7, 5, 0]], atol=1e-5 * scale)
    spread = [np.abs(whole[4] - whole[0]).max(), np.abs(draw(setup, [5], seed=1) - whole[5]).max()]
    assert min(spread) > 0.05  # the same label but another number; another seed


def test_over_devices_images_are_the_same(stochastic):
    placement = DataParallel(create_mesh())
    sampler, params, times = stochastic
    keys = jax.device_put(image_keys(0, np.arange(8)), placement.split)
    params = jax.device_put(params, placement.replicated)
    images = sampler(params, keys, LABELS, times, 2.0)
    assert len(images.sharding.device_set) == 8
    assert images.addressable_shards[0].data.shape[0] == 1
    expected = draw(stochastic, np.arange(8))
    np.testing.assert_allclose(images, expected, atol=1e-5 * np.abs(expected).max())


def test_only_another_number_of_steps_recompiles():
    # A width that no other test has, so that nothing is compiled before.
    sampler = make_sampler("heun", RectifiedFlow(), hidden_size=24)
    params, times = random_params(sampler.denoiser.network), schedule(RectifiedFlow(), 4)
    setup = (sampler, params, times)
    with compilations("_sample") as compiled:
        draw(setup, np.arange(4))
        assert len(compiled) == 1
        draw(setup, np.arange(4), scale=3.0, seed=7)
        draw(setup, np.arange(4, 8))
        draw(setup, np.arange(4), scale=jnp.float32(1.5))
        shifted = np.array(times, copy=True)
        shifted[1:-1] *= 0.9
        draw((sampler, params, shifted), np.arange(4))
        draw((sampler, jax.tree.map(lambda a: a * 0.5, params), times), np.arange(4))
        equal = make_sampler("heun", RectifiedFlow(), hidden_size=24)
        draw((equal, params, times), np.arange(4))
        assert len(compiled) == 1
        for _ in range(2):
            draw((sampler, params, schedule(RectifiedFlow(), 5)), np.arange(4))
        assert len(compiled) == 2
        # An interval is another program, its ends are inputs.
        for low in (0.1, 0.3):
            draw(setup, np.arange(4), guidance_interval=(low, 0.8))
        assert len(compiled) == 3


def test_guidance(flow):
    plain = draw(flow, np.arange(4), scale=1.0)
    np.testing.assert_allclose(draw(flow, np.arange(4), scale=jnp.float32(1.0)), plain, atol=1e-4)
    guided = draw(flow, np.arange(4), scale=3.0)
    assert np.abs(guided[:3] - plain[:3]).max() > 0.05
    np.testing.assert_allclose(guided[3], plain[3], atol=1e-4)  # no class: nothing to guide to
    mixed = draw(flow, np.arange(4), scale=jnp.array([1.0, 3.0, 1.0, 3.0]))
    np.testing.assert_allclose(mixed[::2], plain[::2], atol=1e-4)
    np.testing.assert_allclose(mixed[1], guided[1], atol=1e-4)
    always = draw(flow, np.arange(4), scale=3.0, guidance_interval=(0.0, 1.0))
    np.testing.assert_allclose(always, guided, atol=1e-4)
    never = draw(flow, np.arange(4), scale=3.0, guidance_interval=(2.0, 3.0))
    np.testing.assert_allclose(never, plain, atol=1e-4)


@pytest.mark.parametrize("label", [-1, 4])
def test_label_errors(flow, label):
    labels = np.array([0, label], np.int32)
    with pytest.raises(ValueError, match=rf"label {label} is out of range: .* 0 to 2, and 3 for"):
        draw(flow, [0, 1], labels)


def test_unconditional_networks_take_no_labels_and_guidance_errors():
    sampler = make_sampler("euler", RectifiedFlow(), num_classes=0)
    params, times = random_params(sampler.denoiser.network), schedule(RectifiedFlow(), 2)
    keys = image_keys(0, np.arange(3))
    images = sampler(params, keys, None, times)
    zeros = sampler(params, keys, np.zeros(3, np.int32), times)
    np.testing.assert_array_equal(images, zeros)
    with pytest.raises(
        ValueError,
        match=r"guidance_scale=2\.0 needs a network that knows",
    ):
        sampler(params, keys, None, times, 2.0)


def test_batches_are_split_and_the_last_is_filled_up(flow):
    sampler, params, times = flow
    sizes, done = [], []

    def sample(keys, labels):
        sizes.append((len(keys), len(labels)))
        return sampler(params, keys, labels, times)

    def collect(batch_size, start=0):
        batches = generate(
            sample,
            LABELS[:7],
            seed=0,
            batch_size=batch_size,
            start=start,
            progress=lambda count, seconds: done.append(count),
        )
        return list(batches)

    pieces = collect(3)
    assert [len(piece) for piece in pieces] == [3, 3, 1] and done == [3, 6, 7]
    assert sizes == [(3, 3)] * 3
    whole = np.concatenate(collect(7))
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)
    resumed = np.concatenate(collect(3, start=3))
    np.testing.assert_allclose(resumed, whole[3:], atol=1e-5)
