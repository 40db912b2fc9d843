"""sCM: its view of every process, its loss against a twin, and what an exact teacher teaches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dit_jax.config import ConfigError, default_config
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import DDPM, EDM, RectifiedFlow
from dit_jax.diffusion.timesteps import LogNormal
from dit_jax.distill import scm
from dit_jax.distill.adaptive_weight import AdaptiveWeight, weighted
from dit_jax.distill.scm import SCM, bounded_tangent
from dit_jax.distill.student import Student
from dit_jax.distill.trig_flow import TrigFlow
from tests.distill import mixture as bench
from tests.long import long
from tests.references import torch_scm

PROCESSES = {
    "edm": EDM(),
    "sit": RectifiedFlow("sit"),
    "flux": RectifiedFlow("flux", 1000.0),
    "ddpm": DDPM(),
    "ddpm-x0": DDPM(prediction="x0"),
    "ddpm-velocity": DDPM(prediction="velocity"),
}


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _times(process, n=7):
    inside = jnp.linspace(0.02, 0.98, n)
    return process.clean_time + (process.noise_time - process.clean_time) * inside


@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_is_trig_flow(name):
    process = PROCESSES[name]
    trig, t = TrigFlow(process, 0.7), _times(process)
    x0, eps = _normal(0, 7, 4, 4, 1), _normal(1, 7, 4, 4, 1)
    angle = trig.angle(t)
    cos, sin = trig.cos_sin(t)
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angle), atol=1e-6)

    x = trig.add_noise(x0, eps, t)
    scaled = np.asarray(trig.scale(t))[:, None, None, None] * x
    np.testing.assert_allclose(scaled, process.add_noise(x0, eps, t), rtol=1e-4, atol=1e-5)

    # A perfect network's raw output is read as F, and F gives the data back.
    prediction = process.interpret(process.target(x0, eps, t), scaled, t)
    f = trig.read(prediction, t)
    expected = np.cos(angle)[:, None, None, None] * eps - np.sin(angle)[:, None, None, None] * (
        x0 / 0.7
    )
    np.testing.assert_allclose(f, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(trig.x0(x, f, t), x0, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(trig.velocity(x0, eps, t), 0.7 * expected, rtol=1e-3, atol=1e-3)


def test_edm_networks_output_minus_f():
    process = EDM(0.5)
    t, x, raw = _times(process), _normal(0, 7, 4, 4, 1), _normal(1, 7, 4, 4, 1)
    trig = TrigFlow(process, 0.5)
    scaled = trig.scale(t)[:, None, None, None] * x
    np.testing.assert_allclose(
        trig.read(process.interpret(raw, scaled, t), t), -raw, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["edm", "sit", "ddpm-velocity"])
def test_both_ends_are_finite(name):
    process = PROCESSES[name]
    trig = TrigFlow(process, 0.5)
    t = jnp.array([process.clean_time, process.noise_time])
    x, raw = _normal(0, 2, 4, 4, 1), _normal(1, 2, 4, 4, 1)

    def output(x, t):
        scaled = trig.scale(t)[:, None, None, None] * x
        return trig.read(process.interpret(raw, scaled, t), t)

    f, tangent = jax.jvp(output, (x, t), (x, trig.log_ratio_speed(t)))
    assert np.isfinite(f).all() and np.isfinite(tangent).all()


def test_speed_of_the_log_ratio():
    t = jnp.linspace(0.01, 0.99, 9)
    speed = TrigFlow(RectifiedFlow()).log_ratio_speed
    np.testing.assert_allclose(speed(t), t * (1 - t), rtol=1e-4)
    np.testing.assert_allclose(TrigFlow(EDM()).log_ratio_speed(80 * t), 80 * t, rtol=1e-6)
    index = jnp.array([3.5, 500.5, 998.5])
    log_ratio = DDPM().tables.log_sigma_ratio
    low = np.floor(np.asarray(index)).astype(int)
    expected = 1 / (log_ratio[low + 1] - log_ratio[low])
    np.testing.assert_allclose(TrigFlow(DDPM()).log_ratio_speed(index), expected, rtol=1e-3)


def test_the_weight_learns_the_logarithm_of_the_loss():
    weight, process = AdaptiveWeight(), EDM()
    t = jnp.exp(jnp.linspace(-4.0, 3.0, 64))
    losses = jnp.exp(1.0 - 0.3 * jnp.log(t))
    params = weight.init(jax.random.key(0))
    assert not np.asarray(weight(params, process, t)).any()
    optimizer = optax.adam(0.03)

    def step(carry, _):
        params, state = carry
        gradients = jax.grad(lambda p: weighted(losses, weight(p, process, t)).mean())(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=2000)
    np.testing.assert_allclose(weight(params, process, t), jnp.log(losses), atol=0.05)


def test_bounded_tangents():
    g = 3.0 * _normal(0, 2, 4, 4, 3)
    options = {"kind": "normalize", "constant": 0.1}
    rms = np.sqrt(np.square(np.asarray(g)).mean((1, 2, 3), keepdims=True))
    found = bounded_tangent(g, spatially_invariant=True, **options)
    np.testing.assert_allclose(found, g / (rms + 0.1), rtol=1e-5)
    found = bounded_tangent(g, spatially_invariant=False, **options)
    np.testing.assert_allclose(found, g / (rms * np.sqrt(48) + 0.1), rtol=1e-5)
    clipped = bounded_tangent(g, kind="clip", constant=0.1, spatially_invariant=True)
    np.testing.assert_allclose(clipped, np.clip(g, -1, 1))


# -- the loss against the twin --------------------------------------------------------------------

ANGLES = np.linspace(0.03, 1.53, 8)
FLOWS = {"edm": EDM(), "flow": RectifiedFlow("flux")}


def _method(process, *, teacher=False, microbatches=1, **options):
    student = Student(
        Denoiser(bench.MlpNetwork(width=16, depth=2), process),
        optax.adam(1e-3),
        num_microbatches=microbatches,
    )
    exact = bench.exact_teacher(process) if teacher else None
    return SCM(student, LogNormal(process), teacher=exact, **options)


def _fixed_case(method):
    """Random parameters, also of the weight, and examples at ANGLES."""
    student = jax.jit(method.student.denoiser.network.init)(jax.random.key(0))
    weight = {"kernel": 0.3 * _normal(5, 128), "bias": jnp.asarray(0.2)}
    noise = jax.tree.map(lambda a: 0.1 * _normal(a.size, *a.shape), student)
    ratio = jnp.asarray(0.5 * np.tan(ANGLES), jnp.float32)
    examples = {
        "x0": 0.5 * _normal(1, 8, 1, 1, 2),
        "eps": _normal(2, 8, 1, 1, 2),
        "t": method.student.denoiser.process.time_from_sigma_ratio(ratio),
        "conditions": {},
        "dropout_keys": jax.random.split(jax.random.key(0), 8),
    }
    params = {"student": jax.tree.map(jnp.add, student, noise), "adaptive_weight": weight}
    return params, examples


def _torch(tree, requires_grad=False):
    if isinstance(tree, dict):
        return {name: _torch(value, requires_grad) for name, value in tree.items()}
    return torch.tensor(np.asarray(tree, np.float64), requires_grad=requires_grad)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_loss_and_gradients_equal_the_twin(name, teacher, clip):
    process = FLOWS[name]
    method = _method(process, teacher=teacher, tangent="clip" if clip else "normalize")
    params, examples = _fixed_case(method)
    warmup = jnp.float32(0.6)

    def loss(params):
        return method.loss(params, examples, warmup, {"teacher": {}})[0]

    found, gradients = jax.jit(jax.value_and_grad(loss))(params)

    def teacher_x0(x, ratio):
        points = jnp.asarray(x.numpy(), jnp.float32)[:, None, None]
        exact = bench.GaussianMixture().x0(EDM(), points, jnp.asarray(ratio.numpy(), jnp.float32))
        return torch.tensor(np.asarray(exact, np.float64)[:, 0, 0])

    twin = _torch(params, requires_grad=True)
    expected = torch_scm.scm_loss(
        twin["student"],
        twin["adaptive_weight"],
        _torch(examples["x0"][:, 0, 0]),
        _torch(examples["eps"][:, 0, 0]),
        torch.tensor(ANGLES),
        process=name,
        teacher_x0=teacher_x0 if teacher else None,
        warmup=0.6,
        clip=clip,
    )
    expected.backward()
    np.testing.assert_allclose(found, expected.item(), rtol=1e-4)
    found_leaves = jax.tree.leaves(gradients)
    for a, b in zip(found_leaves, jax.tree.leaves(twin), strict=True):
        scale = np.abs(b.grad.numpy()).max()
        np.testing.assert_allclose(a, b.grad.numpy(), atol=2e-3 * scale)


def test_a_zero_warmup_leaves_no_derivative():
    method = _method(EDM())
    rough = dataclasses.replace(method, derivative="finite_difference", finite_difference_step=0.5)
    params, examples = _fixed_case(method)
    losses = [jax.jit(m.loss) for m in (method, rough)]
    for warmup, same in ((0.0, True), (1.0, False)):
        given = params, examples, jnp.float32(warmup)
        a, b = (loss(*given)[0] for loss in losses)
        assert bool(abs(a - b) < 1e-6 * abs(a)) == same


def test_a_tangent_in_another_precision_has_its_own_pass():
    method = _method(EDM())
    params, examples = _fixed_case(method)
    apart = dataclasses.replace(method, derivative_denoiser=method.student.denoiser)
    one, other = (
        jax.jit(jax.grad(lambda p, m=m: m.loss(p, examples, jnp.float32(1.0))[0]))(params)
        for m in (method, apart)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert apart.flops_per_example > method.flops_per_example


def test_microbatches_and_the_learned_weight():
    batch = bench.GaussianMixture().batch(jax.random.key(3), 32)
    states = []
    for microbatches in (1, 4):
        method = _method(EDM(), teacher=True, microbatches=microbatches, tangent_warmup_steps=2)
        state, update = jax.jit(method.init)(jax.random.key(0)), jax.jit(method.update)
        for step in range(3):
            state, metrics = update(state, batch, jax.random.key(step), {"teacher": {}})
            assert metrics["tangent_warmup"] == min(1.0, step / 2)
            assert all(np.isfinite(value) for value in metrics.values())
        assert int(state.step) == 3
        assert np.abs(state.players["adaptive_weight"].params["kernel"]).max() > 0
        states.append(state)
    for a, b in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_shapes_alone_are_enough_to_set_up():
    method = _method(EDM())
    state = jax.eval_shape(method.init, jax.random.key(0))
    assert set(method.weights(state)) == {"raw"}
    assert method.frozen_names == ()
    assert _method(EDM(), teacher=True).frozen_names == ("teacher",)
    plain = _method(EDM(), adaptive_weighting=False)
    assert jax.eval_shape(plain.init, jax.random.key(0)).players == {}


# -- an exact teacher, and exact data -------------------------------------------------------------

CEILING = 0.1  # of the sliced Wasserstein distance; the undistilled one step's is 0.53


# Data's tangents are noisy, and dividing each by its own size biases their mean, which matters with
# two values an example: a large constant keeps them nearer to proportional.
RECIPES = {
    "teacher": {"learning_rate": 2e-3, "tangent_constant": 0.1},
    "data": {"learning_rate": 1e-3, "tangent_constant": 1.0},
}


@pytest.mark.parametrize(
    ("name", "velocity"),
    [("edm", "teacher"), long("flow", "data"), long("edm", "data"), long("flow", "teacher")],
)
def test_one_step_of_the_student(name, velocity):
    process, steps, recipe = FLOWS[name], 3000, RECIPES[velocity]
    method = SCM(
        bench.mlp_student(process, learning_rate=recipe["learning_rate"], steps=steps),
        LogNormal(process, mean=-0.5, std=1.6),
        teacher=bench.exact_teacher(process) if velocity == "teacher" else None,
        tangent_warmup_steps=steps // 4,
        tangent_constant=recipe["tangent_constant"],
    )
    distances = []
    for seed in range(3):  # one of them may end far away: the median is what holds
        state, _ = bench.train(method, steps=steps, frozen={"teacher": {}}, seed=seed)
        points = bench.sample_points(method.student.denoiser, method.weights(state)["ema_0.99"])
        distances.append(bench.sliced_wasserstein(points, bench.data_points()))
    reached = np.median(distances)
    assert reached < CEILING
    assert bench.undistilled_distance(process) > 5 * reached


# -- configuration --------------------------------------------------------------------------------


def _config(**changes):
    config = default_config()
    config.method.name = "scm"
    config.model.update(image_size=8)
    config.model.dit.update(hidden_size=16, depth=1, num_heads=2, learn_sigma=False)
    config.model.custom_gradients = "off"
    config.process.name = "flow"
    for key, value in changes.items():
        section = config
        *parents, leaf = key.split("__")
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return config


def test_config_builds_both_kinds():
    distilled = scm.build(_config(teacher__guidance_scale=2.0))
    assert distilled.teacher.guidance_scale == 2.0 and distilled.derivative_denoiser is None
    forward = distilled.student.denoiser.network.flops_per_example
    assert distilled.flops_per_example == 6 * forward
    trained = scm.build(
        _config(method__scm__velocity="data", method__scm__derivative_dtype="float32")
    )
    assert trained.teacher is None and trained.frozen_names == ()
    assert trained.derivative_denoiser.network.config.dtype == "float32"
    assert trained.flops_per_example == 5 * forward


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model__custom_gradients": "auto"}, "custom_gradients='off'"),
        ({"model__attention": "cpu"}, "attention"),
        ({"method__scm__velocity": "both"}, "expected one of data, teacher"),
        ({"method__scm__derivative": "exact"}, "expected one of jvp"),
        ({"method__scm__tangent": "none"}, "expected one of normalize"),
        ({"method__scm__derivative_dtype": "float16"}, "expected 'float32'"),
        ({"method__scm__sigma_data": 0.0}, "sigma_data"),
        ({"method__scm__tangent_warmup_steps": -1}, "0 or more"),
        ({"method__scm__finite_difference_step": 0.1}, "would do nothing"),
        (
            {"method__scm__tangent": "clip", "method__scm__tangent_constant": 1.0},
            "would do nothing",
        ),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        scm.build(_config(**changes))


def test_networks_without_forward_mode_take_finite_differences():
    method = scm.build(
        _config(model__custom_gradients="auto", method__scm__derivative="finite_difference")
    )
    params = jax.jit(method.student.denoiser.network.init)(jax.random.key(0))
    examples = jax.jit(method.draw_examples)(
        {"image": _normal(0, 2, 8, 8, 4), "conditions": {"label": jnp.array([1, 2])}},
        jax.random.key(1),
    )
    method = dataclasses.replace(method, teacher=None, adaptive_weighting=False)
    loss, _ = jax.jit(method.loss)({"student": params}, examples, jnp.float32(1.0))
    assert np.isfinite(loss)
