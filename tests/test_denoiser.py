"""Everything a denoiser says of one noisy image is one and the same prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import DDPM, EDM, RectifiedFlow
from dit_jax.models import DiTConfig, Network, Request
from tests.models.conftest import random_params

CONDITIONS = {"label": jnp.array([0, 2, 3])}
CASES = {
    "ddpm": (DDPM(learned_variance=True), True, [3.0, 400.5, 900.0]),
    "ddpm velocity": (DDPM(prediction="velocity"), False, [3.0, 400.0, 900.0]),
    "sit": (RectifiedFlow(), False, [0.1, 0.5, 0.9]),
    "sit with unused variance": (RectifiedFlow(), True, [0.1, 0.5, 0.9]),
    "flux": (RectifiedFlow(network_convention="flux", time_scale=1000.0), False, [0.1, 0.5, 0.9]),
    "edm": (EDM(), False, [0.1, 1.0, 20.0]),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    process, learn_sigma, t = request.param
    config = DiTConfig(
        image_size=4,
        in_channels=2,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=3,
        learn_sigma=learn_sigma,
    )
    denoiser = Denoiser(Network(config), process)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(3, 4, 4, 2)), jnp.float32)
    return denoiser, random_params(denoiser.network), x, jnp.array(t)


def test_all_conversions_are_of_one_prediction(case):
    denoiser, params, x, t = case
    process, arguments = denoiser.process, (params, Request(x, t, CONDITIONS))
    x0, eps = denoiser.x0(*arguments), denoiser.eps(*arguments)
    at = lambda f: f(t)[:, None, None, None]  # noqa: E731
    alpha, sigma = at(process.alpha), at(process.sigma)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x, atol=2e-4)
    np.testing.assert_allclose(denoiser.score(*arguments), -eps / sigma, rtol=1e-4, atol=1e-5)
    if isinstance(process, DDPM):
        velocity = alpha * eps - sigma * x0
    elif isinstance(process, RectifiedFlow):
        velocity = eps - x0
    else:
        velocity = eps
    scale = np.abs(velocity).max()
    np.testing.assert_allclose(denoiser.velocity(*arguments), velocity, atol=1e-4 * scale)
    # And the network's raw output is the process's target for just this x0 and eps.
    raw = denoiser.raw(*arguments).out[..., :2]
    scale = max(1.0, float(np.abs(x0).max()))
    np.testing.assert_allclose(process.target(x0, eps, t), raw, atol=1e-3 * scale)


def test_variance_is_kept_where_it_is_used_and_dropped_elsewhere(case):
    denoiser, params, x, t = case
    raw = denoiser.raw(params, Request(x, t, CONDITIONS)).out
    prediction = denoiser.predict(params, Request(x, t, CONDITIONS))
    if denoiser.process.learned_variance:
        assert raw.shape == (3, 4, 4, 4) and prediction.variance_fraction.shape == x.shape
    else:
        assert raw.shape == x.shape and prediction.variance_fraction is None


def test_a_condition_matters_and_a_denoiser_is_static(case):
    denoiser, params, x, t = case
    other = {"label": jnp.array([1, 2, 3])}
    x0, changed = (
        denoiser.x0(params, Request(x, t, CONDITIONS)),
        denoiser.x0(params, Request(x, t, other)),
    )
    assert not np.allclose(x0[0], changed[0])
    np.testing.assert_allclose(x0[1:], changed[1:], atol=1e-5)
    jitted = jax.jit(Denoiser.x0, static_argnums=0)
    np.testing.assert_allclose(jitted(denoiser, params, Request(x, t, CONDITIONS)), x0, atol=1e-4)
