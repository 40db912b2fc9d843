import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.training.optimizer import (
    AdamW,
    Lion,
    create_optimizer,
    fitted_warmup,
    learning_rate_schedule,
)


def run(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def random_problem(steps=4, scale=1.0):
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(3, 5)).astype(np.float32), "b": np.ones(5, np.float32)}
    draw = lambda p: (scale * random.normal(size=p.shape)).astype(np.float32)  # noqa: E731
    return params, [jax.tree.map(draw, params) for _ in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_pytorchs(weight_decay):
    params, gradients = random_problem()
    ours = run(
        create_optimizer(AdamW(0.9, 0.95, 1e-6), lambda count: 0.01, weight_decay=weight_decay),
        params,
        gradients,
    )
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
    optimizer = torch.optim.AdamW(
        theirs.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=weight_decay
    )
    for gradient in gradients:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        optimizer.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.detach().numpy(), atol=1e-6)


def test_lion_is_the_papers():
    # Chen et al. 2023, algorithm 2.
    params, gradients = random_problem()
    optimizer = create_optimizer(Lion(0.9, 0.99), lambda count: 0.01, weight_decay=0.1)
    ours = run(optimizer, params, gradients)
    for name, w in params.items():
        w, momentum = w.astype(np.float64), 0.0
        for gradient in gradients:
            direction = np.sign(0.9 * momentum + 0.1 * gradient[name])
            w = w - 0.01 * (direction + 0.1 * w)
            momentum = 0.99 * momentum + 0.01 * gradient[name]
        np.testing.assert_allclose(ours[name], w, atol=1e-6)


@pytest.mark.parametrize("kind", [AdamW, Lion])
def test_a_bfloat16_mean_of_gradients_changes_little(kind):
    params, gradients = random_problem(steps=20)
    found = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = create_optimizer(kind(mu_dtype=dtype), lambda count: 0.01)
        moments = [leaf.dtype for leaf in jax.tree.leaves(optimizer.init(params)) if leaf.ndim]
        assert moments.count(jnp.dtype(dtype)) >= 2
        found[dtype] = run(optimizer, params, gradients)
    moved = np.abs(found["float32"]["w"] - params["w"]).max()
    assert np.abs(found["bfloat16"]["w"] - found["float32"]["w"]).mean() < 0.02 * moved


def test_clipping_scales_the_whole_gradient():
    params, gradients = random_problem(steps=1, scale=10.0)
    norm = np.sqrt(sum(np.square(g).sum() for g in gradients[0].values()))
    scaled = [jax.tree.map(lambda g: g * (0.5 / norm), gradients[0])]
    adam = AdamW(0.9, 0.99, epsilon=1.0)  # so large that Adam sees the scale
    clipped = create_optimizer(adam, lambda c: 0.1, gradient_clip_norm=0.5)
    plain = create_optimizer(adam, lambda c: 0.1)
    small = [jax.tree.map(lambda g: g * (0.4 / norm), gradients[0])]
    for given, expected in ((gradients, scaled), (small, small)):
        found = run(clipped, params, given)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            found,
            run(plain, params, expected),
        )


def test_schedules():
    constant = learning_rate_schedule(0.1)
    warm = learning_rate_schedule(0.1, warmup_steps=4)
    linear = learning_rate_schedule(
        0.1, schedule="linear", warmup_steps=4, num_steps=14, final_learning_rate=0.02
    )
    cosine = learning_rate_schedule(
        0.1, schedule="cosine", warmup_steps=4, num_steps=14, final_learning_rate=0.02
    )
    values = lambda f: [float(f(i)) for i in range(16)]  # noqa: E731
    np.testing.assert_allclose(values(constant), 0.1)
    ramp = [0.025, 0.05, 0.075, 0.1]
    np.testing.assert_allclose(values(warm), ramp + [0.1] * 12, rtol=1e-6)
    after = np.minimum(np.arange(12), 10) / 10
    np.testing.assert_allclose(values(linear), ramp + list(0.1 - 0.08 * after), rtol=1e-6)
    bell = 0.02 + 0.08 * 0.5 * (1 + np.cos(np.pi * after))
    np.testing.assert_allclose(values(cosine), ramp + list(bell), rtol=1e-6)


def test_a_warm_up_longer_than_the_run_becomes_a_tenth_of_it():
    short = learning_rate_schedule(0.1, schedule="cosine", warmup_steps=100, num_steps=60)
    tenth = learning_rate_schedule(0.1, schedule="cosine", warmup_steps=6, num_steps=60)
    np.testing.assert_array_equal([short(i) for i in range(61)], [tenth(i) for i in range(61)])
    assert fitted_warmup("cosine", 100, 101) == 100 and fitted_warmup("linear", 1, 1) == 0
    assert fitted_warmup("constant", 100, 60) == 100  # it may go on later


@pytest.mark.parametrize("warmup", [1, 2])
def test_a_short_warm_up_ends_at_the_peak(warmup):
    rate = learning_rate_schedule(0.1, warmup_steps=warmup)
    np.testing.assert_allclose([float(rate(i)) for i in (warmup - 1, warmup, 99)], 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learning_rate_schedule(0.1, schedule="step"), "optimizer.schedule='step'"),
        (lambda: learning_rate_schedule(0.0), "optimizer.learning_rate=0.0"),
        (lambda: learning_rate_schedule(0.1, warmup_steps=-1), "optimizer.warmup_steps=-1"),
        (lambda: learning_rate_schedule(float("inf")), "optimizer.learning_rate=inf"),
        (
            lambda: create_optimizer(AdamW(mu_dtype="int8"), lambda count: 0.01),
            "optimizer.adamw.mu_dtype='int8': expected one of float32, bfloat16",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
