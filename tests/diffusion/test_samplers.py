"""Every solver against diffusers, or against NumPy in float64 where diffusers has no such sampler,
on the same noise and network."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import (
    DDPM,
    EDM,
    SOLVERS,
    Prediction,
    RectifiedFlow,
    make_solver,
    sample,
    schedule,
)

KEY = jax.random.key(11)
SHAPE = (2, 3, 3, 2)
NOISE = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


def step_noise(steps):
    """What `sample` documents: the noise of step i is drawn from fold_in(key, i)."""
    draw = jax.jit(jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(KEY, i), SHAPE)))
    return np.asarray(draw(jnp.arange(steps)), np.float64)


def run(solver, process, denoise, times, x=NOISE, carry=None):
    compiled = jax.jit(lambda x, times, key: sample(solver, process, denoise, x, times, key, carry))
    return compiled(jnp.asarray(x * process.prior_scale, jnp.float32), times, KEY)


@functools.cache
def diffusers_scheduler(name, **options):
    import diffusers

    shared = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    return getattr(diffusers, name).from_config({**shared, **options})


def follow_diffusers(scheduler, network, process, times, variance=False, **each_step):
    """Runs a diffusers scheduler; each_step maps names to lists with one argument a step."""
    import torch

    x = NOISE.astype(np.float64)
    timesteps = scheduler.timesteps
    for i, timestep in enumerate(timesteps):
        _, eps, fraction = network(process, x, times[i])
        raw = np.concatenate([eps, 2 * fraction - 1], -1) if variance else eps
        raw, state = (torch.tensor(np.moveaxis(a, -1, 1).copy()) for a in (raw, x))
        extra = {name: values[i] for name, values in each_step.items()}
        x = scheduler.step(raw, timestep, state, **extra).prev_sample.numpy()
        x = np.moveaxis(x, 1, -1)
    return x


def channels_first(noise):
    import torch

    return [torch.tensor(np.moveaxis(z, -1, 1).copy()) for z in noise]


@pytest.mark.parametrize(
    ("variance", "spacing"),
    [
        ("learned", "linspace"),
        ("fixed_large", "linspace"),
        # With other variances diffusers adds noise also in the step to clean data, as t > 0.
        ("fixed_small", "trailing"),
    ],
)
def test_ancestral_agrees_with_diffusers(toy_denoise, reference, monkeypatch, variance, spacing):
    from diffusers.schedulers import scheduling_ddpm

    process, steps = DDPM(), 25
    kind = "learned_range" if variance == "learned" else variance
    scheduler = diffusers_scheduler(
        "DDPMScheduler", variance_type=kind, clip_sample=False, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    noise = iter(channels_first(step_noise(steps)))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(noise))
    times = schedule(process, steps, spacing)
    learned = variance == "learned"
    expected = follow_diffusers(scheduler, reference[1], process, times, variance=learned)
    ours, _ = run(
        make_solver("ddpm", variance=variance), process, toy_denoise(process, learned), times
    )
    np.testing.assert_allclose(ours, expected, atol=5e-4)  # theirs: alpha-bar in float32


@pytest.mark.parametrize("variance", ["auto", "fixed_large"])
def test_respaced_ancestral_agrees_with_numpy(toy_denoise, reference, variance):
    alpha_sigma, network = reference
    process, steps = DDPM(), 250
    times = schedule(process, steps)
    noise, x = step_noise(steps), NOISE.astype(np.float64)
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        kept, kept_next = alpha_sigma(process, t)[0] ** 2, alpha_sigma(process, s)[0] ** 2
        beta = 1 - kept / kept_next  # of the respaced chain
        x0, _, fraction = network(process, x, t)
        x = np.sqrt(kept_next) * beta * x0 + (1 - kept_next) * np.sqrt(1 - beta) * x
        x = x / (1 - kept)
        if s >= 0:
            small = np.log(beta * (1 - kept_next) / (1 - kept))
            log_variance = fraction * np.log(beta) + (1 - fraction) * small
            log_variance = np.log(beta) if variance == "fixed_large" else log_variance
            x = x + np.exp(0.5 * log_variance) * noise[i]
    ours, _ = run(
        make_solver("ddpm", variance=variance), process, toy_denoise(process, True), times
    )
    np.testing.assert_allclose(ours, x, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_agrees_with_diffusers(toy_denoise, reference, eta, spacing):
    process, steps = DDPM(), 20
    scheduler = diffusers_scheduler("DDIMScheduler", clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    # diffusers' last leading step would also add noise of the variance of clean data: none.
    times = schedule(process, steps, spacing)
    noise = channels_first(step_noise(steps))
    etas = [eta] * steps
    expected = follow_diffusers(
        scheduler, reference[1], process, times, eta=etas, variance_noise=noise
    )
    ours, _ = run(make_solver("ddim", eta=eta), process, toy_denoise(process), times)
    np.testing.assert_allclose(ours, expected, atol=5e-4)


def test_ddim_with_eta_one_is_ancestral_with_the_posterior_variance(toy_denoise):
    process, times = DDPM(), schedule(DDPM(), 12)
    one, _ = run(make_solver("ddim", eta=1.0), process, toy_denoise(process), times)
    other, _ = run(make_solver("ddpm"), process, toy_denoise(process), times)
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_euler_agrees_with_diffusers_on_flow(toy_denoise, reference):
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    process, steps = RectifiedFlow(), 12
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    times = schedule(process, steps, shift=3.0)
    np.testing.assert_allclose(scheduler.sigmas, times, atol=1e-6)
    x = torch.tensor(NOISE)
    for i, t in enumerate(scheduler.timesteps):
        x0, eps, _ = reference[1](process, x.numpy().astype(np.float64), times[i])
        x = scheduler.step(torch.tensor(eps - x0), t, x).prev_sample.float()
    ours, _ = run(make_solver("euler"), process, toy_denoise(process), times)
    np.testing.assert_allclose(ours, x.numpy(), atol=1e-5)


def heun_numpy(network, process, times, noise, s_churn, s_min, s_max, s_noise):
    """Algorithm 2 of Karras et al., in NumPy; flow's slope is its velocity."""

    def slope(x, t):
        x0, eps, _ = network(process, x, t)
        return eps - x0 if isinstance(process, RectifiedFlow) else eps

    steps = len(times) - 1
    x = NOISE.astype(np.float64) * process.prior_scale
    times = np.asarray(times, np.float64)
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        gamma = min(s_churn / steps, np.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        up = t * (1 + gamma)
        x = x + np.sqrt(up**2 - t**2) * s_noise * noise[i]
        d = slope(x, up)
        end = x + (s - up) * d
        x = x + (s - up) * (d + slope(end, s)) / 2 if s > 0 else end
    return x


@pytest.mark.parametrize("churn", [{}, dict(s_churn=6.0, s_min=0.05, s_max=50.0, s_noise=1.003)])
def test_heun_agrees_with_algorithm_2(toy_denoise, reference, churn):
    process, steps = EDM(), 10
    times = schedule(process, steps)
    options = dict(s_churn=0.0, s_min=0.0, s_max=np.inf, s_noise=1.0) | churn
    expected = heun_numpy(reference[1], process, times, step_noise(steps), **options)
    ours, evaluations = run(
        make_solver("heun", **churn), process, toy_denoise(process), times, carry=0
    )
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    assert evaluations == 2 * steps - 1 == make_solver("heun").evaluations(steps)


def test_heun_on_flow_agrees_with_numpy(toy_denoise, reference):
    process, times = RectifiedFlow(), schedule(RectifiedFlow(), 8)
    expected = heun_numpy(reference[1], process, times, np.zeros((8, *SHAPE)), 0, 0, 1, 1)
    ours, _ = run(make_solver("heun"), process, toy_denoise(process), times)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def dpmpp_2m_numpy(alpha_sigma, network, process, times):
    """Algorithm 2 of Lu et al., with infinite lambda at either end as in their first-order step."""
    x, last = NOISE.astype(np.float64) * process.prior_scale, None
    times = np.asarray(times, np.float64)
    with np.errstate(divide="ignore"):
        lambdas = [np.log(a) - np.log(s) for a, s in (alpha_sigma(process, t) for t in times)]
    for i in range(len(times) - 1):
        (_, sigma), (alpha_next, sigma_next) = (alpha_sigma(process, t) for t in times[i : i + 2])
        h = lambdas[i + 1] - lambdas[i]
        x0 = direction = network(process, x, times[i])[0]
        if i > 0 and i < len(times) - 2:
            r = (lambdas[i] - lambdas[i - 1]) / h
            direction = x0 + (x0 - last) / (2 * r)
        x, last = sigma_next / sigma * x - alpha_next * np.expm1(-h) * direction, x0
    return x


@pytest.mark.parametrize(
    "process", [DDPM(), RectifiedFlow(), EDM()], ids=lambda p: type(p).__name__
)
def test_dpmpp_2m_agrees_with_numpy(toy_denoise, reference, process):
    times = schedule(process, 9, "trailing" if isinstance(process, DDPM) else None)
    expected = dpmpp_2m_numpy(*reference, process, times)
    ours, _ = run(make_solver("dpmpp_2m"), process, toy_denoise(process), times)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("steps", [6, 20])
def test_dpmpp_2m_agrees_with_diffusers(toy_denoise, reference, steps):
    scheduler = diffusers_scheduler("DPMSolverMultistepScheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    times = schedule(DDPM(), steps, "trailing")
    assert scheduler.timesteps.tolist() == times[:-1].tolist()
    expected = follow_diffusers(scheduler, reference[1], DDPM(), times)
    ours, _ = run(make_solver("dpmpp_2m"), DDPM(), toy_denoise(DDPM()), times)
    np.testing.assert_allclose(ours, expected, atol=5e-4)


def gaussian_denoise(process, mean=0.3, std=0.5):
    """The ideal denoiser of normal data."""

    def denoise(x, t, carry):
        alpha, sigma = process.alpha(t), process.sigma(t)
        residual = x - alpha * mean
        variance = alpha**2 * std**2 + sigma**2
        return Prediction(
            mean + alpha * std**2 / variance * residual, sigma / variance * residual
        ), carry

    return denoise


STOCHASTIC_AND_NOT = [
    ("ddim", {}),
    ("ddim", {"eta": 1.0}),
    ("heun", {}),
    ("heun", {"s_churn": 20.0, "s_min": 0.01, "s_max": 50.0}),
    ("dpmpp_2m", {}),
]


@pytest.mark.parametrize(
    ("process", "name", "options"),
    [
        (DDPM(), "ddpm", {}),
        *((p, *solver) for p in (DDPM(), RectifiedFlow(), EDM()) for solver in STOCHASTIC_AND_NOT),
    ],
)
def test_samples_of_normal_data_have_its_moments(process, name, options):
    steps = 40 if name in ("heun", "dpmpp_2m") else 150
    times = schedule(process, steps, "karras" if isinstance(process, DDPM) else None)
    x = np.random.default_rng(0).normal(size=(20_000,)).astype(np.float32)
    samples, _ = run(make_solver(name, **options), process, gaussian_denoise(process), times, x=x)
    assert abs(float(samples.mean()) - 0.3) < 0.015
    assert abs(float(samples.std()) - 0.5) < 0.03


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)]
)
def test_order_of_convergence(name, order):
    # The probability flow of normal data has a closed form; between two times away from the ends.
    process, z = EDM(), np.random.default_rng(0).normal(size=(50,)).astype(np.float32)

    def error(steps):
        times = np.exp(np.linspace(np.log(5), np.log(0.05), steps + 1)).astype(np.float32)
        exact = [jnp.asarray(0.3 + np.sqrt(0.25 + t**2) * z) for t in times[[0, -1]]]
        solver = make_solver(name)
        end, _ = sample(solver, process, gaussian_denoise(process), exact[0], times, KEY)
        return np.abs(end - exact[1]).max()

    ratio = error(16) / error(32)
    assert 2 ** (order - 0.35) < ratio < 2 ** (order + 0.5)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "mean_flow"])
def test_other_times_keys_and_scales_do_not_retrace(toy_denoise, name):
    process, traces = DDPM(), []
    plain = toy_denoise(process, True)

    @jax.jit
    def compiled(x, times, key, scale):
        def denoise(x, t, carry):
            traces.append(t)
            prediction, carry = plain(x, t, carry)
            return Prediction(scale * prediction.x0, prediction.eps), carry

        return sample(make_solver(name), process, denoise, x, times, key)[0]

    first = compiled(NOISE, schedule(process, 5), KEY, 1.0)
    once = len(traces)
    other = compiled(NOISE, schedule(process, 5, "trailing"), jax.random.key(3), 0.5)
    assert len(traces) == once and not np.allclose(first, other)
    assert first.dtype == jnp.float32 and np.isfinite(other).all()


def test_a_key_gives_the_same_bits_and_another_key_others(toy_denoise):
    process, times = DDPM(), schedule(DDPM(), 4)
    draw = jax.jit(
        lambda key: sample(
            make_solver("ddpm"), process, toy_denoise(process), jnp.asarray(NOISE), times, key
        )[0]
    )
    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    assert not np.allclose(draw(KEY), draw(jax.random.key(0)))


@pytest.mark.parametrize("name", ["ddpm", "heun"])
def test_with_a_key_each_an_example_does_not_depend_on_its_batch(toy_denoise, name):
    process, times = DDPM(), schedule(DDPM(), 4)
    solver = make_solver(name, **({"s_churn": 2.0} if name == "heun" else {}))
    denoise, keys, noise = toy_denoise(process), jax.random.split(KEY, 2), jnp.asarray(NOISE)
    both, _ = sample(solver, process, denoise, noise, times, keys)
    alone, _ = sample(solver, process, denoise, noise[1:], times, keys[1:])
    np.testing.assert_allclose(both[1:], alone, atol=1e-4)
    single, _ = sample(solver, process, denoise, noise[1], times, keys[1])  # no batch axis at all
    np.testing.assert_allclose(alone[0], single, atol=1e-4)


def test_what_was_computed_ahead_is_told_at_the_start_of_its_step(toy_denoise):
    times = schedule(EDM(), 3)

    def denoise(x, t, carry, ahead=None):
        prediction, _ = toy_denoise(EDM())(x, t, None)
        at, told = carry
        row = jnp.asarray([t, -1.0 if ahead is None else ahead])
        return prediction, (at + 1, told.at[at].set(row))

    carry = (0, jnp.zeros((6, 2)))
    _, (count, told) = sample(
        make_solver("heun"),
        EDM(),
        denoise,
        jnp.asarray(NOISE),
        times,
        KEY,
        carry,
        ahead=jnp.arange(3.0),
    )
    known = {float(t): i for i, t in enumerate(np.float32(times[:-1]))}
    rows = [(known.get(float(t)), float(ahead)) for t, ahead in told[: int(count)]]
    assert [row for row in rows if row[1] >= 0] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert len(rows) >= 5  # the second evaluations are told nothing


def test_carry_is_threaded_through_every_evaluation(toy_denoise):
    for name, evaluations in (("ddpm", 5), ("ddim", 5), ("euler", 5), ("heun", 9), ("dpmpp_2m", 5)):
        times = schedule(DDPM(), 5)
        _, carry = run(make_solver(name), DDPM(), toy_denoise(DDPM()), times, carry=0)
        assert carry == evaluations == make_solver(name).evaluations(5)


@pytest.mark.parametrize("process", [DDPM(), RectifiedFlow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_clipped_denoised(process, name):
    def denoise(x, t, carry):
        x0 = jnp.full_like(x, 3.0)
        return Prediction(x0, process.convert(x0, "x0", "eps", x, t)), carry

    times = schedule(process, 5)
    ours, _ = run(make_solver(name, clip_denoised=True), process, denoise, times)
    np.testing.assert_allclose(ours, 1.0, atol=1e-6)
    ours, _ = run(make_solver(name), process, denoise, times)
    np.testing.assert_allclose(ours, 3.0, atol=1e-5)


def test_a_schedule_may_stop_early(toy_denoise):
    process, times = EDM(), schedule(EDM(), 6)
    whole, _ = run(make_solver("heun"), process, toy_denoise(process), times)
    half, _ = run(make_solver("heun"), process, toy_denoise(process), times[:4])
    rest, _ = sample(make_solver("heun"), process, toy_denoise(process), half, times[3:], KEY)
    np.testing.assert_allclose(whole, rest, atol=1e-5)


def test_errors_say_what_to_do(toy_denoise):
    process, times, noise = DDPM(), schedule(DDPM(), 4), jnp.asarray(NOISE)
    denoise = toy_denoise(process)
    for build, message in [
        (lambda: make_solver("ddmp"), "Unknown solver 'ddmp': expected one of ddpm, ddim, euler"),
        (
            lambda: make_solver("ddim", churn=1),
            "no option churn: its options are clip_denoised, eta",
        ),
        (lambda: make_solver("ddim", eta=2.0), "eta in [0, 1], got 2.0"),
        (lambda: make_solver("heun", s_min=2.0, s_max=1.0), "s_min=2.0, s_max=1.0"),
        (lambda: make_solver("ddpm", variance="small"), "Unknown variance 'small'"),
        (
            lambda: sample(
                make_solver("ddpm", variance="learned"), process, denoise, noise, times, KEY
            ),
            "use variance='fixed_small'",
        ),
        (
            lambda: sample(make_solver("ddpm"), EDM(), denoise, noise, times[:3], KEY),
            "'ddim' with eta=1 is the same",
        ),
        (
            lambda: sample(make_solver("ddim"), process, denoise, noise, times[::-1], KEY),
            "times that decrease, from noise to data; got [-1.0, 0.0",
        ),
        (
            lambda: sample(make_solver("ddim"), process, denoise, noise, times[:1], KEY),
            "at least two times, as schedule() returns; got shape (1,)",
        ),
        (
            lambda: sample(make_solver("ddim"), EDM(), denoise, noise, times, KEY),
            "EDM's clean time is 0.0; the times end with -1.0",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            build()
        assert message in str(error.value)


def test_consistency_jumps_to_x0_and_renoises_with_the_steps_own_noise(toy_denoise):
    process = EDM()
    denoise = toy_denoise(process)
    x = 80.0 * jnp.asarray(NOISE)
    times = np.array([80.0, 0.8, 0.0], np.float32)
    found, _ = sample(make_solver("consistency"), process, denoise, x, times, KEY)
    x0 = denoise(x, jnp.float32(80.0), None)[0].x0
    noise = jax.random.normal(jax.random.fold_in(KEY, 0), x.shape)
    expected = denoise(x0 + 0.8 * noise, jnp.float32(0.8), None)[0].x0
    np.testing.assert_allclose(found, expected, atol=1e-6)
    one, _ = sample(make_solver("consistency"), process, denoise, x, times[[0, 2]], KEY)
    np.testing.assert_allclose(one, x0, atol=1e-6)


def test_mean_flow_steps_along_the_average_velocity_between_both_ends():
    process = RectifiedFlow()
    x = jnp.asarray(NOISE)

    def denoise(x, t, carry, r):  # u(x, r, t) = t + 2 r, as x0 and eps that give it
        return Prediction(jnp.zeros_like(x), jnp.full_like(x, t + 2 * r)), carry

    times = np.array([1.0, 0.4, 0.0], np.float32)
    found, _ = sample(make_solver("mean_flow"), process, denoise, x, times, KEY)
    expected = x - 0.6 * (1.0 + 0.8) - 0.4 * (0.4 + 0.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_mean_flow_of_another_process_is_refused():
    denoise = lambda x, t, carry, r: (Prediction(x, x), carry)  # noqa: E731
    with pytest.raises(ValueError, match="cannot sample EDM"):
        sample(
            make_solver("mean_flow"), EDM(), denoise, jnp.asarray(NOISE), np.array([1.0, 0]), KEY
        )


@pytest.mark.parametrize(("name", "process"), [("ddpm", DDPM()), ("dpmpp_2m", RectifiedFlow())])
def test_a_warmup_takes_the_first_steps_of_the_same_schedule(name, process):
    """Noise and history of the steps go on where the warm-up ended."""

    def denoise(scale, x, t, carry):
        return process.interpret(jnp.tanh(scale * x), x, t), carry + scale

    def follow(first, then, warmup):
        def call(x, times):
            late, early = (functools.partial(denoise, scale) for scale in (then, first))
            return sample(solver, process, late, x, times, KEY, jnp.float32(0), (early, warmup))

        return jax.jit(call)(NOISE, times)

    solver, times = make_solver(name), schedule(process, 6)
    plain = jax.jit(
        lambda x, times: sample(
            solver, process, functools.partial(denoise, 1.0), x, times, KEY, jnp.float32(0)
        )
    )(NOISE, times)
    for warmup in (2, 6):
        x, count = follow(1.0, 1.0, warmup)
        np.testing.assert_allclose(x, plain[0], atol=1e-6)
        assert count == plain[1] == 6
    x, count = follow(0.5, 1.0, 2)
    assert count == 5 and np.abs(x - plain[0]).max() > 1e-3
