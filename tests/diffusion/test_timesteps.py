import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dit_jax.diffusion import (
    DDPM,
    EDM,
    LogitNormal,
    LogNormal,
    LogStudentT,
    RectifiedFlow,
    TruncatedLogNormal,
    Uniform,
)

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


def truncated(standard, mean, std, low, high):
    """Quantiles and cdf of exp(mean + std X), X `standard`, between low and high."""
    ends = standard.cdf((np.log([low, high]) - mean) / std)
    quantile = lambda u: np.exp(mean + std * standard.ppf(ends[0] + u * np.ptp(ends)))  # noqa: E731
    cdf = lambda s: (standard.cdf((np.log(s) - mean) / std) - ends[0]) / np.ptp(ends)  # noqa: E731
    return quantile, cdf


@pytest.mark.parametrize(
    ("distribution", "standard", "ends"),
    [
        (TruncatedLogNormal(EDM()), scipy.stats.norm(), (0.002, 80)),
        (TruncatedLogNormal(EDM(), -1.1, 0.5, 1.0, 9.0), scipy.stats.norm(), (1, 9)),
        (LogStudentT(EDM(), min_time=1.0), scipy.stats.t(0.01), (1, 80)),
        (LogStudentT(EDM(), 0.5, 1.0, 0.1, 20.0, df=3.0), scipy.stats.t(3), (0.1, 20)),
    ],
    ids=["log_normal", "log_normal_narrow", "log_student_t", "log_student_t_narrow"],
)
def test_truncated_distributions_are_drawn_by_their_inverse_cdf(distribution, standard, ends):
    quantile, cdf = truncated(standard, distribution.mean, distribution.std, *ends)
    u = np.linspace(0.001, 0.999, 500)
    np.testing.assert_allclose(
        distribution.quantile(jnp.asarray(u, jnp.float32)), quantile(u), rtol=1e-3
    )
    t = draw(distribution)
    assert t.min() >= np.float32(ends[0]) and t.max() <= np.float32(ends[1])
    assert_follows(t, cdf)


def test_truncated_distributions_of_other_processes():
    flow = draw(TruncatedLogNormal(RectifiedFlow(), 0.0, 1.5, 0.2, 0.9))
    assert flow.min() >= np.float32(0.2) and flow.max() <= np.float32(0.9)
    _, cdf = truncated(scipy.stats.norm(), 0.0, 1.5, 0.25, 9.0)
    assert_follows(flow / (1 - flow), cdf)
    t = draw(LogStudentT(DDPM(), min_time=300))
    assert (t == np.round(t)).all() and t.min() >= 300 and t.max() <= 999
    for process in (RectifiedFlow(), DDPM()):  # their own ends, where sigma / alpha has none
        for distribution in (TruncatedLogNormal(process), LogStudentT(process)):
            t = distribution.quantile(jnp.array([0.0, 1.0]))
            assert np.isfinite(t).all() and t[0] >= 0 and t[1] <= process.noise_time


def test_no_weights_of_their_own():
    for distribution in (
        Uniform(DDPM()),
        LogNormal(EDM()),
        LogitNormal(RectifiedFlow()),
        LogStudentT(EDM()),
    ):
        t = distribution.sample(jax.random.key(0), 5)
        assert t.dtype == jnp.float32 and hash(distribution) == hash(distribution)
        np.testing.assert_array_equal(distribution.weight(t), np.ones(5))


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="use LogNormal with EDM"):
        LogitNormal(EDM())
    with pytest.raises(ValueError, match=r"std must be > 0, got 0.0"):
        LogNormal(EDM(), std=0.0)
    with pytest.raises(ValueError, match=r"within EDM's own is 90.0 to 80.0"):
        TruncatedLogNormal(EDM(), min_time=90.0)
    with pytest.raises(ValueError, match=r"df > 0, got 0"):
        LogStudentT(EDM(), df=0)
    with pytest.raises(TypeError, match="DDPM's times are indices"):
        Uniform(DDPM()).quantile(jnp.array(0.5))
