import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.diffusion import DDPM, EDM, PROCESSES, RectifiedFlow
from dit_jax.diffusion.process import KINDS

VARIANTS = [
    DDPM(),
    DDPM(prediction="x0"),
    DDPM(num_timesteps=50, beta_end=0.3, prediction="velocity"),
    RectifiedFlow(),
    RectifiedFlow(network_convention="flux", time_scale=1000.0),
    EDM(),
    EDM(sigma_data=1.3, sigma_min=0.01, sigma_max=20.0),
]
NAMES = [f"{type(p).__name__}-{i}" for i, p in enumerate(VARIANTS)]
every_process = pytest.mark.parametrize("process", VARIANTS, ids=NAMES)


def inner_times(process, fractions):
    """Times at fractions of the way from little to much noise, away from the two ends."""
    if isinstance(process, EDM):
        low, high = np.log(process.sigma_min), np.log(process.sigma_max)
        return np.exp(low + np.asarray(fractions) * (high - low))
    low, high = (0, process.noise_time) if isinstance(process, DDPM) else (0.02, 0.98)
    return low + np.asarray(fractions) * (high - low)


@functools.partial(jax.jit, static_argnums=(0,))
def round_trips(process, x0, eps, t):
    """Errors of every conversion of a kind into another and back, relative to the values."""
    x = process.add_noise(x0, eps, t)
    errors = []
    for source in KINDS:
        p, q = process.row(source, t)
        value = p[:, None] * x0 + q[:, None] * eps
        for to in KINDS:
            back = process.convert(process.convert(value, source, to, x, t), to, source, x, t)
            errors.append(
                jnp.max(jnp.abs(back - value) / (1 + jnp.max(jnp.abs(value), axis=1))[:, None])
            )
    return jnp.stack(errors)


@every_process
@settings(max_examples=25, deadline=None)
@given(
    fractions=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    seed=st.integers(0, 2**31 - 1),
)
def test_conversions_round_trip(process, fractions, seed):
    rng = np.random.default_rng(seed)
    t = jnp.asarray(inner_times(process, fractions), jnp.float32)
    x0, eps = rng.normal(size=(2, 3, 4)).astype(np.float32)
    errors = round_trips(process, x0, eps, t)
    # Going through x0 (or eps) and back amplifies float32 rounding by alpha / sigma (or its
    # inverse).
    ratio = np.asarray(process.sigma_ratio(t))
    assert errors.max() < 3e-6 * max(ratio.max(), 1 / ratio.min())


@every_process
def test_conversions_agree_with_closed_forms(process):
    rng = np.random.default_rng(0)
    t = jnp.asarray(inner_times(process, [0.3, 0.5, 0.7]), jnp.float32)
    x0, eps = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    x = process.add_noise(x0, eps, t)
    alpha, sigma = np.asarray(process.alpha(t))[:, None], np.asarray(process.sigma(t))[:, None]
    values = {"x0": x0, "eps": eps, "score": -eps / sigma}
    values["velocity"] = {
        DDPM: alpha * eps - sigma * x0,
        RectifiedFlow: eps - x0,
        EDM: eps,
    }[type(process)]
    np.testing.assert_allclose(
        process.velocity(x0, eps, t), values["velocity"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(process.score(eps, t), values["score"], rtol=1e-5)
    for source in KINDS:
        for to in KINDS:
            # x0 of EDM's middle noise levels, and the like, carries rounding of x.
            tolerance = 3e-6 * max(1, float((sigma / alpha).max()), float((alpha / sigma).max()))
            converted = process.convert(values[source], source, to, x, t)
            scale = 1 + np.abs(values[to])
            np.testing.assert_allclose(converted / scale, values[to] / scale, atol=tolerance)


@every_process
def test_interpret_inverts_target(process):
    rng = np.random.default_rng(1)
    t = jnp.asarray(inner_times(process, [0.2, 0.5, 0.8]), jnp.float32)
    x0, eps = jnp.asarray(rng.normal(size=(2, 3, 2, 2, 1)), jnp.float32)
    x = process.add_noise(x0, eps, t)
    prediction = process.interpret(process.target(x0, eps, t), x, t)
    ratio = np.asarray(process.sigma_ratio(t))
    np.testing.assert_allclose(prediction.x0, x0, atol=3e-6 * max(1, ratio.max()))
    np.testing.assert_allclose(prediction.eps, eps, atol=3e-6 * max(1, 1 / ratio.min()))
    assert prediction.variance_fraction is None


@every_process
def test_ends_of_time_are_finite_with_finite_gradients(process):
    rng = np.random.default_rng(2)
    value, x = rng.normal(size=(2, 2, 3)).astype(np.float32)
    t = jnp.array([process.clean_time, process.noise_time], jnp.float32)

    def everything(value, x, t):
        total = jnp.sum(process.snr(t) * 1e-12) + jnp.sum(process.sigma_ratio(t) * 1e-12)
        # Every kind once as source and once as target: a conversion is a solve, then a sum.
        for source, to in zip(KINDS, reversed(KINDS), strict=True):
            total += jnp.sum(process.convert(value, source, to, x, t))
        prediction = process.interpret(value, x, t)
        inputs, network_time = process.network_inputs(x, t)
        total += jnp.sum(prediction.x0 + prediction.eps + inputs) + jnp.sum(network_time)
        return total + jnp.sum(process.target(value, x, t))

    result, gradients = jax.jit(jax.value_and_grad(everything, argnums=(0, 1, 2)))(value, x, t)
    assert np.isfinite(result)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


def test_parallel_rows_say_what_x_says():
    x = jnp.array([[1.0, -2.0]])
    flow = RectifiedFlow()
    # Clean data is its own x0, whatever a network says of it; pure noise is its own eps.
    np.testing.assert_array_equal(flow.convert(9 * x, "x0", "x0", x, jnp.zeros(1)), x)
    np.testing.assert_array_equal(flow.convert(9 * x, "eps", "eps", x, jnp.ones(1)), x)
    np.testing.assert_array_equal(flow.convert(9 * x, "eps", "x0", x, jnp.ones(1)), 0 * x)


@every_process
def test_ends_and_inverse_of_sigma_ratio(process):
    clean, noise = jnp.float32(process.clean_time), jnp.float32(process.noise_time)
    assert process.alpha(clean) == 1 and process.sigma(clean) == 0
    np.testing.assert_allclose(
        process.prior_scale, np.hypot(process.alpha(noise), process.sigma(noise)), rtol=2e-3
    )
    t = jnp.asarray(inner_times(process, np.linspace(0, 1, 33)), jnp.float32)
    t = jnp.concatenate([t, jnp.array([process.clean_time])])
    np.testing.assert_allclose(
        process.time_from_sigma_ratio(process.sigma_ratio(t)), t, rtol=1e-4, atol=1e-4
    )
    assert (np.diff(process.sigma_ratio(jnp.sort(t))) > 0).all()
    np.testing.assert_allclose(
        process.snr(t[:-1]), (process.alpha(t) / process.sigma(t))[:-1] ** 2, rtol=1e-5
    )


def test_ddpm_tables_agree_with_diffusers():
    import torch
    from diffusers import DDPMScheduler

    process, t = DDPM(), np.arange(1000)
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    kept = scheduler.alphas_cumprod.numpy()
    np.testing.assert_allclose(process.alpha(jnp.asarray(t, jnp.float32)), np.sqrt(kept), rtol=3e-5)
    # diffusers accumulates the product in float32, which shows where 1 - alpha-bar is small.
    sigma = process.sigma(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(sigma, np.sqrt(1 - kept), rtol=2e-4)
    exact = np.sqrt(1 - np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    np.testing.assert_allclose(sigma, exact, rtol=1e-6)
    theirs = [float(scheduler._get_variance(int(i), variance_type="fixed_small")) for i in t[1:]]
    np.testing.assert_allclose(process.tables.posterior_variance[1:], theirs, rtol=3e-3)
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 4, 3)).astype(np.float32)
    some = np.array([0, 17, 500, 999])
    theirs = scheduler.add_noise(torch.tensor(x0), torch.tensor(eps), torch.tensor(some))
    ours = DDPM().add_noise(jnp.asarray(x0), jnp.asarray(eps), jnp.asarray(some, jnp.float32))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_ddpm_interpolates_log_sigma_ratio_between_indices():
    process = DDPM()
    at = np.asarray(process.sigma_ratio(jnp.array([41.0, 41.25, 42.0, -0.5, 0.0])))
    np.testing.assert_allclose(
        np.log(at[1]), 0.75 * np.log(at[0]) + 0.25 * np.log(at[2]), rtol=1e-5
    )
    np.testing.assert_allclose(at[3], 0.5 * at[4], rtol=1e-6)


def test_edm_preconditioning_agrees_with_table_1():
    process, rng = EDM(), np.random.default_rng(3)
    sigma = np.array([0.002, 0.4, 80.0])
    x, raw = rng.normal(size=(2, 3, 4))
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / np.sqrt(sigma**2 + 0.25)
    expected = c_skip[:, None] * x + c_out[:, None] * raw
    t = jnp.asarray(sigma, jnp.float32)
    prediction = process.interpret(jnp.asarray(raw, jnp.float32), jnp.asarray(x, jnp.float32), t)
    np.testing.assert_allclose(prediction.x0, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(process.c_skip(t), c_skip, rtol=1e-6)
    np.testing.assert_allclose(process.c_out(t), c_out, rtol=1e-6)
    inputs, network_time = process.network_inputs(jnp.asarray(x, jnp.float32), t)
    np.testing.assert_allclose(inputs, x / np.sqrt(sigma**2 + 0.25)[:, None], rtol=1e-5)
    np.testing.assert_allclose(network_time, np.log(sigma) / 4, rtol=1e-5)


def test_network_conventions_of_flow_are_mirror_images():
    rng = np.random.default_rng(4)
    x, velocity = jnp.asarray(rng.normal(size=(2, 2, 3)), jnp.float32)
    sit, flux = RectifiedFlow(), RectifiedFlow("flux", time_scale=1000.0)
    t = jnp.float32(0.3)
    _, sit_time = sit.network_inputs(x, t)
    _, flux_time = flux.network_inputs(x, jnp.array([0.3, 0.6]))
    np.testing.assert_allclose(sit_time, [0.7, 0.7], rtol=1e-6)
    np.testing.assert_allclose(flux_time, [300.0, 600.0], rtol=1e-6)
    one, other = sit.interpret(-velocity, x, t), flux.interpret(velocity, x, t)
    np.testing.assert_allclose(one.eps - one.x0, velocity, atol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_learned_variance_is_split_off():
    rng = np.random.default_rng(5)
    raw = jnp.asarray(rng.uniform(-1, 1, size=(2, 4, 4, 6)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32)
    t = jnp.array([3.0, 900.0])
    prediction = DDPM(learned_variance=True).interpret(raw.astype(jnp.bfloat16), x, t)
    assert prediction.x0.dtype == prediction.variance_fraction.dtype == jnp.float32
    np.testing.assert_allclose(prediction.variance_fraction, (raw[..., 3:] + 1) / 2, atol=5e-3)
    plain = DDPM().interpret(raw[..., :3], x, t)
    np.testing.assert_allclose(prediction.eps, plain.eps, atol=5e-3)


def test_processes_are_static_values():
    assert {DDPM(), DDPM(), EDM()} == {DDPM(), EDM()}
    assert all(dataclasses.is_dataclass(cls) for cls in PROCESSES.values())
    prior = EDM().sample_prior(jax.random.key(0), (64, 8, 8, 1))
    assert abs(float(prior.std()) - 80) < 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DDPM(num_timesteps=1), "num_timesteps >= 2, got 1"),
        (lambda: DDPM(beta_start=0.3, beta_end=0.2), "beta_start <= beta_end < 1, got 0.3 and 0.2"),
        (lambda: DDPM(prediction="noise"), "'noise': expected 'eps', 'x0' or 'velocity'"),
        (lambda: RectifiedFlow("sd3"), "'sd3': expected 'sit'"),
        (lambda: RectifiedFlow(time_scale=0.0), "time_scale > 0, got 0.0"),
        (lambda: EDM(sigma_data=0.0), "sigma_data > 0, got 0.0"),
        (lambda: EDM(sigma_min=9.0, sigma_max=8.0), "sigma_min < sigma_max, got 9.0 and 8.0"),
        (lambda: EDM().row("noise", jnp.ones(2)), "'noise': expected one of x0, eps"),
        (
            lambda: DDPM().interpret(jnp.ones((2, 8)), jnp.ones((2, 4)), jnp.ones(2)),
            "learned_variance=False reads a mean only, shape (2, 4), from the network, which "
            "returned (2, 8)",
        ),
        (
            lambda: DDPM().add_noise(jnp.ones((2, 4)), jnp.ones((2, 4)), jnp.ones(3)),
            "one value per example, shape (2,)",
        ),
    ],
)
def test_errors_say_what_to_do(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)
