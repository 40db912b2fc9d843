import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dit_jax.diffusion import DDPM, EDM, LogitNormal, LogNormal, RectifiedFlow, Uniform

N = 20_000


def draw(distribution, n=N):
    return np.asarray(jax.jit(distribution.sample, static_argnums=1)(jax.random.key(5), n))


def assert_follows(values, cdf):
    assert scipy.stats.kstest(values, cdf).statistic < 0.015  # 1.5 / sqrt(N) is 0.0106


def test_uniform():
    t = draw(Uniform(DDPM(num_timesteps=10, beta_end=0.5)))
    counts = np.bincount(t.astype(int), minlength=10)
    assert (t == t.astype(int)).all() and len(counts) == 10
    np.testing.assert_allclose(counts / N, 0.1, atol=0.01)
    assert_follows(draw(Uniform(RectifiedFlow())), scipy.stats.uniform.cdf)
    assert_follows(draw(Uniform(EDM())), scipy.stats.loguniform(0.002, 80).cdf)


def test_log_normal_is_normal_in_log_sigma_ratio():
    assert_follows(np.log(draw(LogNormal(EDM()))), scipy.stats.norm(-1.2, 1.2).cdf)
    flow = draw(LogNormal(RectifiedFlow(), 0.5, 0.8))
    assert_follows(np.log(flow / (1 - flow)), scipy.stats.norm(0.5, 0.8).cdf)
    t = draw(LogNormal(DDPM()))
    assert (t == np.round(t)).all() and t.min() >= 0 and t.max() <= 999
    ratio = np.asarray(DDPM().sigma_ratio(jnp.asarray(t)))
    assert abs(np.log(ratio).mean() + 1.2) < 0.03


def test_logit_normal():
    t = draw(LogitNormal(RectifiedFlow(), 0.5, 0.8))
    assert_follows(np.log(t / (1 - t)), scipy.stats.norm(0.5, 0.8).cdf)
    t = draw(LogitNormal(DDPM(), -0.4, 1.0))
    assert (t == np.floor(t)).all() and t.min() >= 0 and t.max() <= 999
    middle = (t + 0.5) / 1000
    assert_follows(np.log(middle / (1 - middle)), scipy.stats.norm(-0.4, 1.0).cdf)


@pytest.mark.parametrize(
    "distribution",
    [
        Uniform(RectifiedFlow()),
        Uniform(EDM()),
        LogNormal(EDM()),
        LogNormal(RectifiedFlow()),
        LogitNormal(RectifiedFlow(), 0.3, 1.4),
    ],
    ids=repr,
)
def test_quantiles_invert_cdf_and_match_the_float64_table(distribution):
    u = np.linspace(0.001, 0.999, 200)
    t = distribution.quantile(jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(distribution.cdf(t), u, atol=1e-5)
    ratio = distribution.process.sigma_ratio(t)
    np.testing.assert_allclose(ratio, distribution.sigma_ratio_quantile(u), rtol=2e-4)
    assert_follows(
        np.asarray(distribution.cdf(jnp.asarray(draw(distribution)))), scipy.stats.uniform.cdf
    )
    ends = distribution.quantile(jnp.array([0.0, 1.0]))
    assert np.isfinite(ends).all() and np.isfinite(distribution.cdf(ends)).all()


def test_no_weights_of_their_own():
    for distribution in (Uniform(DDPM()), LogNormal(EDM()), LogitNormal(RectifiedFlow())):
        t = distribution.sample(jax.random.key(0), 5)
        assert t.dtype == jnp.float32 and hash(distribution) == hash(distribution)
        np.testing.assert_array_equal(distribution.weight(t), np.ones(5))


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="use LogNormal with EDM"):
        LogitNormal(EDM())
    with pytest.raises(ValueError, match=r"std must be > 0, got 0.0"):
        LogNormal(EDM(), std=0.0)
    with pytest.raises(TypeError, match="DDPM's times are indices"):
        Uniform(DDPM()).quantile(jnp.array(0.5))
