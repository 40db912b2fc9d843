import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import (
    DDPM,
    EDM,
    LogitNormal,
    LogNormal,
    RectifiedFlow,
    SpeeD,
    SpeeDFirstRelease,
    Uniform,
)
from dit_jax.diffusion.speed import increments

T = 1000
BETAS = np.linspace(1e-4, 2e-2, T)
KEPT = np.cumprod(1 - BETAS)
SLOPE = np.gradient(np.sqrt(1 - KEPT))
CONVERGED = int(np.argmax(SLOPE < 1e-4))
both_versions = pytest.mark.parametrize("version", [SpeeD, SpeeDFirstRelease])


def test_first_release_follows_its_formulas():
    distribution = SpeeDFirstRelease(DDPM())
    odds = np.tanh(1e6 * (SLOPE - 1e-4)) + 1.5
    np.testing.assert_allclose(distribution.probabilities(), odds / odds.sum(), rtol=1e-12)
    assert distribution.meaningful_steps == CONVERGED + 1 == 642
    t = np.array([0, 3, 500, 999])
    snr = KEPT[t] / (1 - KEPT[t])
    weight = distribution.weight(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(weight, 1 / (1 + snr), rtol=1e-5)


def test_paper_follows_its_formulas():
    distribution = SpeeD(DDPM())
    odds = np.where(np.arange(T) < 700, 5.0, 1.0)
    np.testing.assert_allclose(distribution.probabilities(), odds / odds.sum(), rtol=1e-12)
    assert distribution.meaningful_steps == CONVERGED + 1
    change = np.gradient(1 - KEPT)
    change = (change - change.min()) / (change.max() - change.min())
    expected = np.where(np.arange(T) < 700, 0.4 + 0.2 * change, 1.0)
    t = jnp.arange(T, dtype=jnp.float32)
    np.testing.assert_allclose(distribution.weight(t), expected, rtol=1e-6)
    assert SpeeD(DDPM(num_timesteps=100, beta_end=0.2)).converged_from == 70


@both_versions
@pytest.mark.parametrize(
    "process", [DDPM(), RectifiedFlow(), EDM()], ids=lambda p: type(p).__name__
)
def test_each_switch_acts_alone(version, process):
    key, t = jax.random.key(0), Uniform(process).sample(jax.random.key(1), 16)
    full = version(process)
    uniform = version(process, asymmetric=False)
    np.testing.assert_allclose(uniform.probabilities(), 1e-3)
    np.testing.assert_array_equal(uniform.weight(t), full.weight(t))
    unweighted = version(process, weighted=False)
    np.testing.assert_array_equal(unweighted.weight(t), np.ones(16))
    np.testing.assert_array_equal(unweighted.sample(key, 9), full.sample(key, 9))
    undualled = version(process, dual=False)
    np.testing.assert_array_equal(undualled.probabilities(), full.probabilities())
    assert not np.array_equal(undualled.sample(key, 9), full.sample(key, 9))
    np.testing.assert_array_equal(undualled.weight(t), full.weight(t))


@both_versions
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_second_half_of_a_batch_are_duals(version, n):
    distribution = version(DDPM())
    t = np.asarray(jax.jit(distribution.sample, static_argnums=1)(jax.random.key(n), n))
    drawn, middle = t[: n // 2 + 1], CONVERGED + 1
    duals = np.where(drawn < middle, middle - drawn, drawn - middle)
    np.testing.assert_array_equal(t[n // 2 + 1 :], duals[: n - (n // 2 + 1)])
    assert t.shape == (n,) and t.dtype == np.float32
    assert ((t == t.astype(int)) & (t >= 0) & (t < T)).all()


@both_versions
def test_draws_follow_the_probabilities(version):
    distribution = version(DDPM(), dual=False)
    t = np.asarray(distribution.sample(jax.random.key(0), 50_000)).astype(int)
    frequencies = np.bincount(t, minlength=T).reshape(20, -1).sum(1) / len(t)
    np.testing.assert_allclose(
        frequencies, distribution.probabilities().reshape(20, -1).sum(1), rtol=0.08
    )


def test_duals_spread_a_batch_more_evenly():
    means = {
        dual: np.std(
            [
                float(SpeeD(DDPM(), asymmetric=False, dual=dual, tau=T).sample(key, 16).mean())
                for key in jax.random.split(jax.random.key(0), 50)
            ]
        )
        for dual in (True, False)
    }
    assert means[True] < 0.8 * means[False]


def test_process_increments_of_flow_are_its_slope():
    table = increments(RectifiedFlow(), None, T)
    u = (np.arange(T) + 0.5) / T
    slope = (1 - u) / ((1 - u) ** 2 + u**2) ** 1.5 / T  # d sigma / sqrt(alpha^2 + sigma^2)
    np.testing.assert_allclose(table.noise[1:-1], slope[1:-1], rtol=1e-4, atol=1e-9)
    assert table.converged == np.argmax(slope < 1e-4)
    flow = SpeeD(RectifiedFlow(), dual=False)
    t = np.asarray(flow.sample(jax.random.key(3), 20_000))
    late = (t * T >= table.converged).mean()
    np.testing.assert_allclose(late, flow.probabilities()[table.converged :].sum(), rtol=0.15)
    cells = np.asarray(flow.cell(jnp.asarray(t)))
    np.testing.assert_array_equal(cells, np.floor(t.astype(np.float32) * np.float32(T)))


def test_process_increments_of_edm():
    # The log-normal base already avoids both ends, a log-uniform one does not.
    assert SpeeD(EDM()).increments.converged == T
    np.testing.assert_allclose(SpeeD(EDM()).probabilities(), 1 / T)
    uniform = SpeeDFirstRelease(EDM(), base=Uniform(EDM()))
    assert 0 < uniform.increments.converged < T
    odds = uniform.probabilities()
    np.testing.assert_allclose(odds.max() / odds.min(), 5, rtol=1e-6)
    for distribution in (SpeeD(EDM()), uniform, SpeeD(EDM(), base=LogNormal(EDM(), -0.4, 1.0))):
        t = np.asarray(distribution.sample(jax.random.key(0), 4001))
        assert np.isfinite(t).all() and (t > 0).all()
        weights = np.asarray(distribution.weight(jnp.asarray(t)))
        assert np.isfinite(weights).all() and weights.min() > 0
        cells = distribution.sample_cells(jax.random.split(jax.random.key(0))[0], 4001)
        # float32 quantiles at a cell's border may fall to its neighbour
        assert np.abs(np.asarray(distribution.cell(jnp.asarray(t))) - np.asarray(cells)).max() <= 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SpeeD(DDPM(), k=0.5), "k >= 1"),
        (lambda: SpeeD(DDPM(), lam=5.0), "lam in [0.5, 1], got 5.0"),
        (
            lambda: SpeeD(DDPM(num_timesteps=100), tau=700),
            "0 < tau <= 100, the number of cells, got 700",
        ),
        (lambda: SpeeD(RectifiedFlow(), grid_size=1), "grid_size >= 2, got 1"),
        (lambda: SpeeD(DDPM(), base=Uniform(DDPM())), "leave it None"),
        (
            lambda: SpeeD(RectifiedFlow(), base=LogitNormal(RectifiedFlow("flux"))),
            "another process",
        ),
        (lambda: SpeeDFirstRelease(DDPM(), p2_k=0.0).weight(jnp.ones(2)), "P2 needs k > 0"),
    ],
)
def test_errors_say_what_to_do(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)
