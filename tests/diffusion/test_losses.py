import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import DDPM, EDM, P2, MinSNR, NoWeight, RectifiedFlow, SpeeD, denoising_loss
from dit_jax.diffusion.losses import discretized_normal_log_likelihood

RNG = np.random.default_rng(0)
SHAPE = (10, 3, 3, 2)
X0 = jnp.asarray(np.clip(RNG.normal(size=SHAPE), -1, 1), jnp.float32)
EPS = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
T = np.array([0, 0, 1, 2, 7, 100, 400, 700, 998, 999])


def loss(process, raw, t, **options):
    t = jnp.asarray(t, jnp.float32)
    x_t = process.add_noise(X0, EPS, t)
    return denoising_loss(process, jnp.asarray(raw), X0, EPS, t, x_t, **options)


def vlb_float64(raw, t, processes_betas):
    """The variational term from DDPM's definitions, in float64, one index at a time."""
    betas = processes_betas
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    posterior = betas * (1 - before) / (1 - kept)
    terms = []
    for i, index in enumerate(t):
        x0, eps = np.asarray(X0[i], np.float64), np.asarray(EPS[i], np.float64)
        mean, fraction = np.split(raw[i].astype(np.float64), 2, axis=-1)
        x = np.sqrt(kept[index]) * x0 + np.sqrt(1 - kept[index]) * eps
        guess = (x - np.sqrt(1 - kept[index]) * mean) / np.sqrt(kept[index])
        a = betas[index] * np.sqrt(before[index]) / (1 - kept[index])
        b = (1 - before[index]) * np.sqrt(1 - betas[index]) / (1 - kept[index])
        low, high = np.log(posterior[max(index, 1)]), np.log(betas[index])
        log_variance = (fraction + 1) / 2 * (high - low) + low
        if index == 0:
            std = np.exp(0.5 * log_variance)

            def cdf(y):
                return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

            upper = cdf((x0 - a * guess - b * x + 1 / 255) / std)
            lower = cdf((x0 - a * guess - b * x - 1 / 255) / std)
            chance = np.select([x0 < -0.999, x0 > 0.999], [upper, 1 - lower], upper - lower)
            terms.append(-np.log(np.maximum(chance, 1e-12)).mean() / np.log(2))
        else:
            gap = (a * (x0 - guess)) ** 2
            kl = 0.5 * (log_variance - low + (np.exp(low) + gap) / np.exp(log_variance) - 1)
            terms.append(kl.mean() / np.log(2))
    return np.array(terms)


@pytest.mark.parametrize(
    ("process", "target"),
    [
        (DDPM(), lambda x, a, s: EPS),
        (DDPM(prediction="x0"), lambda x, a, s: X0),
        (DDPM(prediction="velocity"), lambda x, a, s: a * EPS - s * X0),
        (RectifiedFlow(), lambda x, a, s: X0 - EPS),
        (RectifiedFlow("flux"), lambda x, a, s: EPS - X0),
        (EDM(), lambda x, a, s: (X0 - x * 0.25 / (s**2 + 0.25)) / (0.5 * s / np.sqrt(s**2 + 0.25))),
    ],
    ids=["ddpm-eps", "ddpm-x0", "ddpm-velocity", "sit", "flux", "edm"],
)
def test_squared_error_of_the_raw_output(process, target):
    raw = RNG.normal(size=SHAPE).astype(np.float32)
    t = T if isinstance(process, DDPM) else np.linspace(0.01, 0.99, len(T))
    alpha = np.asarray(process.alpha(jnp.asarray(t, jnp.float32)), np.float64)[:, None, None, None]
    sigma = np.asarray(process.sigma(jnp.asarray(t, jnp.float32)), np.float64)[:, None, None, None]
    x = alpha * X0 + sigma * EPS
    expected = ((raw - target(x, alpha, sigma)) ** 2).mean((1, 2, 3))
    value, parts = loss(process, raw, t)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_array_equal(parts["mse"], value)
    assert set(parts) == {"mse"}
    weights = jnp.linspace(0.1, 2, len(T))
    value, parts = loss(process, raw, t, weights=weights)
    np.testing.assert_allclose(value, expected * np.asarray(weights), rtol=1e-4)
    np.testing.assert_allclose(parts["mse"], expected, rtol=1e-4)


def test_edm_natural_weight_is_lambda_on_x0():
    process, sigma = EDM(), np.geomspace(0.005, 50, len(T))
    raw = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
    t = jnp.asarray(sigma, jnp.float32)
    x0 = process.interpret(raw, process.add_noise(X0, EPS, t), t).x0
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    np.testing.assert_allclose(
        loss(process, raw, sigma)[0], weight * np.square(x0 - X0).mean((1, 2, 3)), rtol=2e-3
    )


def test_variational_term_and_its_switch():
    process = DDPM(learned_variance=True)
    raw = np.concatenate(
        [EPS + 0.5 * RNG.normal(size=SHAPE), RNG.uniform(-1.2, 1.2, size=SHAPE)], -1
    )
    raw = raw.astype(np.float32)
    expected = vlb_float64(raw, T, np.linspace(1e-4, 2e-2, 1000))
    weights = SpeeD(process).weight(jnp.asarray(T, jnp.float32))
    value, parts = loss(process, raw, T, weights=weights, vlb_weight=0.25)
    np.testing.assert_allclose(parts["vlb"], expected, rtol=1e-4)
    # Weights multiply the squared error alone.
    np.testing.assert_allclose(value, weights * parts["mse"] + 0.25 * parts["vlb"], rtol=1e-6)
    np.testing.assert_allclose(loss(process, raw, T)[0], parts["mse"] + parts["vlb"], rtol=1e-6)


def test_variational_term_trains_only_the_variance():
    process = DDPM(learned_variance=True)
    raw = RNG.normal(size=(*SHAPE[:-1], 4)).astype(np.float32) * 3

    gradient = jax.grad(lambda raw: loss(process, raw, T)[1]["vlb"].sum())(jnp.asarray(raw))
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[..., :2] == 0).all() and (np.asarray(gradient)[..., 2:] != 0).any()
    both = jax.grad(lambda raw: loss(process, raw, T)[0].sum())(jnp.asarray(raw))
    alone = jax.grad(lambda raw: loss(DDPM(), raw, T)[0].sum())(jnp.asarray(raw[..., :2]))
    np.testing.assert_allclose(np.asarray(both)[..., :2], alone, rtol=1e-6)


def test_discretized_likelihood_sums_to_one():
    levels = jnp.linspace(-1, 1, 256)[:, None]
    logp = discretized_normal_log_likelihood(
        levels, jnp.full_like(levels, 0.3), jnp.full_like(levels, -2.0)
    )
    np.testing.assert_allclose(np.exp(logp).sum(), 1, rtol=1e-3)


def test_p2_and_min_snr_agree_with_their_formulas():
    t = np.array([0, 50, 300, 999])
    kept = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[t]
    snr, times = kept / (1 - kept), jnp.asarray(t, jnp.float32)
    cut = np.minimum(snr, 5)
    np.testing.assert_allclose(P2(2.0, 0.5)(DDPM(), times), (2 + snr) ** -0.5, rtol=1e-5)
    for prediction, expected in (("eps", cut / snr), ("x0", cut), ("velocity", cut / (snr + 1))):
        weight = MinSNR()(DDPM(prediction=prediction), times)
        np.testing.assert_allclose(weight, expected, rtol=1e-4, err_msg=prediction)
    u = np.array([0.1, 0.5, 0.9])
    expected = np.minimum(((1 - u) / u) ** 2, 5) * u**2
    np.testing.assert_allclose(
        MinSNR()(RectifiedFlow(), jnp.asarray(u, jnp.float32)), expected, rtol=1e-5
    )
    c_out = 0.5 * u / np.sqrt(u**2 + 0.25)
    expected = np.minimum(1 / u**2, 5) * c_out**2
    np.testing.assert_allclose(MinSNR()(EDM(), jnp.asarray(u, jnp.float32)), expected, rtol=1e-5)
    np.testing.assert_array_equal(NoWeight()(EDM(), times), np.ones(4))


@pytest.mark.parametrize("weight", [NoWeight(), P2(), MinSNR()], ids=repr)
@pytest.mark.parametrize(
    "process",
    [DDPM(), DDPM(prediction="x0"), DDPM(prediction="velocity"), RectifiedFlow(), EDM()],
    ids=str,
)
def test_weights_and_gradients_are_finite_at_the_ends(process, weight):
    t = np.array([process.clean_time, process.noise_time] * 5)
    weights = weight(process, jnp.asarray(t, jnp.float32))
    assert np.isfinite(weights).all() and (np.asarray(weights) >= 0).all()
    gradient = jax.grad(lambda raw: loss(process, raw, t, weights=weights)[0].sum())(
        jnp.ones(SHAPE)
    )
    assert np.isfinite(gradient).all()


def test_errors_say_what_to_do():
    with pytest.raises(
        ValueError, match="learn_sigma and the process's learned_variance must agree"
    ):
        loss(DDPM(learned_variance=True), np.ones(SHAPE, np.float32), T)
    with pytest.raises(ValueError, match=r"got k=0.0 and gamma=1.0"):
        P2(k=0.0, gamma=1.0)
    with pytest.raises(ValueError, match=r"gamma > 0, got -1.0"):
        MinSNR(-1.0)
