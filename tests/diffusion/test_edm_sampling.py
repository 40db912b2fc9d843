import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import EDM, denoising_loss, make_solver, sample, schedule
from tests.references import torch_edm

KEY = jax.random.key(5)
SHAPE = (3, 2, 2, 4)
RANDOM = np.random.default_rng(11)
WEIGHTS, OUT = RANDOM.normal(size=(4, 16)) * 0.6, RANDOM.normal(size=(16, 4)) * 0.3
PROCESSES = {
    "edm": EDM(),
    "vp": EDM(preconditioning="vp"),
    "ve": EDM(preconditioning="ve", sigma_min=0.02, sigma_max=100.0),
    "iddpm": EDM(preconditioning="iddpm", sigma_min=0.0065),
}
CHURN = {"s_churn": 8.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}


def network(x, noise, xp):
    """A small random network of the preconditioned input and c_noise."""
    return xp.tanh(x @ xp.asarray(WEIGHTS, x.dtype) + xp.sin(3 * noise)) @ xp.asarray(OUT, x.dtype)


def denoise_with(process):
    def denoise(x, t, carry):
        x_in, noise = process.network_inputs(x, t)
        raw = network(x_in, noise[:, None, None, None], jnp)
        return process.interpret(raw, x, t), carry

    return denoise


def denoise_in_float64(kind):
    def denoise(x, sigma):
        skip, out, scale, noise = torch_edm.coefficients(kind, sigma)
        return skip * x + out * network(scale * x, noise, np)

    return denoise


def rounding(kind):
    levels = torch_edm.iddpm_levels()
    return lambda s: levels[np.abs(levels - s).argmin()] if kind == "iddpm" else s


@pytest.mark.parametrize("churn", [{}, CHURN], ids=["deterministic", "stochastic"])
@pytest.mark.parametrize("kind", PROCESSES)
def test_trajectories_are_those_of_algorithm_2(kind, churn):
    process, steps = PROCESSES[kind], 18
    times = schedule(process, steps)
    noises = [
        np.asarray(jax.random.normal(jax.random.fold_in(KEY, i), SHAPE), "d") for i in range(steps)
    ]
    start = np.random.default_rng(2).normal(size=SHAPE)
    found, _ = jax.jit(
        lambda x: sample(
            make_solver("heun", **churn), process, denoise_with(process), x, times, KEY
        )
    )(jnp.asarray(start * times[0], jnp.float32))

    low, high = process.sigma_min, process.sigma_max
    ramp = np.arange(steps) / (steps - 1)
    sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    sigmas = np.append([rounding(kind)(s) for s in sigmas], 0.0)
    np.testing.assert_allclose(times, sigmas, rtol=1e-3)  # of the float32 table's lowest levels
    expected = torch_edm.sample(
        denoise_in_float64(kind),
        start * sigmas[0],
        sigmas,
        rounding(kind),
        noises,
        *churn.values(),
    )
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("kind", PROCESSES)
def test_coefficients_are_those_of_table_1(kind):
    process = PROCESSES[kind]
    sigma = np.geomspace(process.sigma_min, process.sigma_max, 200).astype("f")
    found = [
        f(jnp.asarray(sigma))
        for f in (process.c_skip, process.c_out, process.c_in, process.c_noise)
    ]
    expected = torch_edm.coefficients(kind, sigma.astype("d"))
    if kind == "iddpm":  # nearest levels but for ties within rounding
        assert np.mean(found[3] != expected[3]) < 0.05
        assert np.abs(found[3] - expected[3]).max() <= 1
        found, expected = found[:3], expected[:3]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_unweighted_loss_has_the_published_weight(kind):
    """lambda(sigma) |D - x0|^2 (EDM, equation 2), whose lambda is 1 / sigma^2 for all but EDM's."""
    process = PROCESSES[kind]
    sigma = np.geomspace(0.05, 50, 5).astype("f")
    x0, eps, raw = (jnp.asarray(RANDOM.normal(size=(5, 2, 2, 3)), jnp.float32) for _ in range(3))
    t = jnp.asarray(sigma)
    x = process.add_noise(x0, eps, t)
    loss, _ = denoising_loss(process, raw, x0, eps, t, x)
    skip, out, _, _ = (
        a[:, None, None, None] for a in torch_edm.coefficients(kind, sigma.astype("d"))
    )
    weight = 1 / sigma**2 if kind != "edm" else (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    denoised = skip * np.asarray(x, "d") + out * np.asarray(raw, "d")
    expected = weight * ((denoised - np.asarray(x0, "d")) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", PROCESSES)
def test_everything_is_finite_at_both_ends(kind):
    process = PROCESSES[kind]
    t = jnp.asarray([0.0, process.sigma_min, process.sigma_max])
    x, raw = (jnp.asarray(RANDOM.normal(size=(3, 2)), jnp.float32) for _ in range(2))

    def outputs(t):
        prediction = process.interpret(raw, x, t)
        return (*process.network_inputs(x, t), prediction.x0, prediction.eps, *process.raw_row(t))

    for value in (*outputs(t), *jax.jacobian(outputs)(t)):
        assert np.isfinite(value).all()
    np.testing.assert_allclose(outputs(t)[2][0], x[0], atol=1e-6)  # clean data is its own x0


def test_iddpm_rounds_to_its_table():
    process = PROCESSES["iddpm"]
    table = process.coefficients.table
    np.testing.assert_allclose(table, torch_edm.iddpm_levels(), rtol=1e-3)
    np.testing.assert_array_equal(process.time_from_sigma_ratio(jnp.asarray(table)), table)
    np.testing.assert_array_equal(process.c_noise(jnp.asarray(table)), 999.0 - np.arange(1001))
    between = jnp.asarray(0.4 * table[300] + 0.6 * table[301])
    assert float(process.time_from_sigma_ratio(between)) == table[301]
    assert set(schedule(process, 18).tolist()) <= set(table.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preconditioning": "ddpm"}, "Unknown preconditioning 'ddpm': expected 'edm', 'vp'"),
        ({"vp_beta_d": 10.0}, "vp_beta_d would do nothing with preconditioning 'edm': it is of vp"),
        ({"num_timesteps": 500, "preconditioning": "ve"}, "num_timesteps would do nothing"),
        ({"preconditioning": "iddpm"}, r"noise levels from 0\.0064\d* to 20291"),
        ({"preconditioning": "vp", "sigma_max": 200.0}, r"from 0\.001\d* to 152"),
        ({"preconditioning": "ve", "ve_sigma_min": 200.0}, "ve_sigma_min < ve_sigma_max"),
        ({"preconditioning": "vp", "vp_beta_min": 0.0}, "vp_beta_min > 0"),
        ({"preconditioning": "iddpm", "iddpm_c_1": 1.5}, r"iddpm_c_1 in \(0, 1\)"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EDM(), **options)
