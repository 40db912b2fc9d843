import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.training import ema
from dit_jax.training.ema import EMA, power_function_exponent


def averaged(average, values):
    """The average of parameters that take these values one update after the other."""
    state = ema.init([average], {"w": jnp.float32(values[0])})
    for step, value in enumerate(values[1:], start=1):
        state = ema.update([average], state, {"w": jnp.float32(value)}, jnp.int32(step))
    return float(state[average.name]["w"])


def test_a_constant_decay_starts_from_the_initial_parameters():
    values = np.random.default_rng(0).normal(size=30)
    expected = values[0]
    for value in values[1:]:
        expected = 0.9 * expected + 0.1 * value
    assert averaged(EMA(decay=0.9), values) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 10, 500])
def test_a_warmed_up_decay_weighs_its_first_steps_less(steps):
    # While (1 + n) / (10 + n) < decay the update that ends step i weighs 9 (i + 9)! (n + 1)! /
    # ((i + 1)! (n + 10)!) after n steps, the initial parameters 10! (n + 1)! / (n + 10)!.
    def factorials(a, b):  # a! / b! of b <= a
        return math.prod(range(b + 1, a + 1))

    weights = [math.factorial(10) / factorials(steps + 10, steps + 1)]
    weights += [
        9 * factorials(i + 9, i + 1) / factorials(steps + 10, steps + 1)
        for i in range(1, steps + 1)
    ]
    assert sum(weights) == pytest.approx(1)
    values = np.random.default_rng(0).normal(size=steps + 1)
    average = EMA(decay=0.999, warmup=True)
    assert averaged(average, values) == pytest.approx(np.dot(weights, values), abs=1e-6)
    # Without: the random start still weighs 61 % after 500 steps.
    assert averaged(EMA(decay=0.999), [1.0, *([0.0] * steps)]) == pytest.approx(
        0.999**steps, rel=1e-4
    )


def test_the_warm_up_ends_at_the_decay():
    average = EMA(decay=0.9, warmup=True)
    shares = [float(average.share(jnp.int32(step))) for step in (1, 79, 80, 81, 10**6)]
    assert shares == pytest.approx([9 / 11, 9 / 89, 0.1, 0.1, 0.1], rel=1e-6)
    assert average.name == EMA(decay=0.9).name


def test_exponents_are_edm2s():
    # Karras et al. 2023, section 3.1: sigma_rel 0.05 and 0.10.
    assert power_function_exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert power_function_exponent(0.10) == pytest.approx(6.94, abs=0.01)
    for std in (0.01, 0.2, 0.25):
        g = power_function_exponent(std)
        assert (g + 1) / ((g + 2) ** 2 * (g + 3)) == pytest.approx(std**2)


@pytest.mark.parametrize("std", [0.05, 0.1])
def test_a_power_average_has_its_profile(std):
    # After n steps the weight of step i is that of a profile proportional to t^gamma: the share of
    # the first i steps is the product of what is kept, close to (i / n)^(gamma + 1).
    steps, average = 400, EMA(power_std=std)
    share = np.array([float(average.share(jnp.int32(i))) for i in range(1, steps + 1)])
    weights = share * np.append(np.cumprod((1 - share)[::-1])[::-1][1:], 1.0)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    times = (np.arange(steps) + 0.5) / steps
    mean = (weights * times).sum()
    width = np.sqrt((weights * (times - mean) ** 2).sum())
    gamma = power_function_exponent(std)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=0.01)
    assert width == pytest.approx(std, rel=0.02)
    values = np.random.default_rng(0).normal(size=steps + 1)
    assert averaged(average, values) == pytest.approx((weights * values[1:]).sum(), abs=1e-5)


@pytest.mark.parametrize("step", [1, 10, 10**4, 10**6, 2 * 10**7])
def test_shares_stay_exact_in_long_runs(step):
    exponent = power_function_exponent(0.1) + 1
    expected = -np.expm1(exponent * np.log1p(-1 / np.float64(step))) if step > 1 else 1.0
    found = float(EMA(power_std=0.1).share(jnp.int32(step)))
    assert found == pytest.approx(expected, rel=1e-5)
    assert float(EMA(decay=0.9999).share(jnp.int32(step))) == pytest.approx(1e-4, rel=1e-6)


def test_bfloat16_averages_move_and_follow_those_of_float32():
    # The parameters have moved by 2 %, of which an update is a fortieth of the distance between
    # two numbers of bfloat16: rounded to the nearest, nothing would ever change.
    start, end = jnp.ones((64, 64)), jnp.full((64, 64), 1.02)
    found = {}
    for dtype in ema.DTYPES:
        average = EMA(decay=0.99, dtype=dtype)
        state = ema.init([average], {"w": start})
        assert state[average.name]["w"].dtype == dtype
        update = jax.jit(lambda state, step, a=average: ema.update([a], state, {"w": end}, step))
        for step in range(1, 201):
            state = update(state, jnp.int32(step))
        found[dtype] = np.asarray(state[average.name]["w"].astype(jnp.float32))
    exact, half = found["float32"], found["bfloat16"]
    assert float(jnp.bfloat16(1 + 0.01 * 0.02)) == 1.0  # what rounding to the nearest gives
    assert abs(half.mean() - exact.mean()) < 2e-4 < exact.mean() - 1
    assert abs(half - exact).max() < 0.02
    assert half.std() < 2**-7


def test_stochastic_rounding_is_exact_on_average_and_keeps_what_is_not_finite():
    x = jnp.float32([1.001, -1.003, 3e-5, 0.0, 2.0, jnp.inf, -jnp.inf, jnp.nan])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: ema.stochastically_rounded(x, key))(keys)
    drawn = np.asarray(drawn.astype(jnp.float32))
    np.testing.assert_allclose(drawn[:, :5].mean(0), x[:5], rtol=3e-4)
    assert all(len(np.unique(drawn[:, i])) == 2 for i in range(3))  # its two neighbours
    assert (drawn[:, 3:7] == x[3:7]).all() and np.isnan(drawn[:, 7]).all()


def test_names_and_order():
    found = ema.averages((0.999, 0.9999), (0.05,))
    assert ema.averages((0.999, 0.9999), (0.05,), warmup=True)[1:] == [
        EMA(decay=0.9999, warmup=True),
        EMA(power_std=0.05),
    ]
    assert [average.name for average in found] == ["ema_0.999", "ema_0.9999", "ema_std0.05"]
    params = {"w": jnp.ones(3)}
    started = ema.init(found, params)
    assert list(started) == [average.name for average in found]
    assert started["ema_0.999"]["w"] is not params["w"]  # donated each by itself


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EMA(), "either a decay or a power_std"),
        (lambda: EMA(decay=0.9, power_std=0.1), "either a decay or a power_std"),
        (lambda: EMA(decay=1.0), "ema.decays: 1.0 is not in"),
        (lambda: EMA(power_std=0.3), "ema.power_stds: 0.3 is not between"),
        (lambda: EMA(power_std=0.1, warmup=True), "only an average of constant decay"),
        (lambda: ema.averages((0.9, 0.9)), "asked for twice"),
        (lambda: ema.averages((0.9,), dtype="float16"), "ema.dtype='float16': expected one of"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
