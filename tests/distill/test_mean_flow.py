"""MeanFlow and improved MeanFlow: losses number for number, and what they learn on the bench."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dit_jax.config import ConfigError, default_config, resolve
from dit_jax.data.augmentation import Augmentation
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import EDM, RectifiedFlow
from dit_jax.diffusion.timesteps import LogitNormal, Uniform
from dit_jax.distill import mean_flow
from dit_jax.distill.average_velocity import GuidanceMixing, Regression, TotalDerivative
from dit_jax.distill.student import Student, Teacher
from dit_jax.models import DiTConfig, Network, Request
from tests.distill import mixture as bench
from tests.long import long
from tests.models.conftest import random_like
from tests.references import torch_mean_flow

FLOW = RectifiedFlow(network_convention="flux")
UNIFORM = Uniform(FLOW)
B, INTERVALS = 12, 8


randomised = functools.partial(random_like, scale=0.4)


def create(student=None, **options):
    student = student or bench.mlp_student(FLOW, second_time=True)
    return mean_flow.MeanFlow(student, UNIFORM, UNIFORM, **options)


@pytest.fixture(scope="module")
def mlp():
    """(student network, its parameters, teacher network, its parameters), everything random."""
    network = bench.MlpNetwork(width=24, depth=2, num_classes=5, second_time=True)
    other = dataclasses.replace(network, second_time=False)
    params = randomised(jax.jit(network.init)(jax.random.key(0)), 1)
    return network, params, other, randomised(jax.jit(other.init)(jax.random.key(0)), 2)


@pytest.fixture(scope="module")
def tensors():
    """x0, eps, t, r, labels and which are dropped; the first INTERVALS have r < t."""
    random = np.random.default_rng(0)
    t = random.uniform(0.2, 0.99, B)
    r = np.where(np.arange(B) < INTERVALS, t * random.uniform(0, 0.9, B), t)
    return {
        "x0": random.normal(size=(B, 2)),
        "eps": random.normal(size=(B, 2)),
        "t": t,
        "r": r,
        "label": random.integers(0, 5, B),
        "dropped": np.arange(B) % 4 == 1,
    }


def our_groups(tensors):
    examples = {
        name: jnp.asarray(tensors[name], jnp.float32).reshape(B, 1, 1, 2) for name in ("x0", "eps")
    }
    examples |= {name: jnp.asarray(tensors[name], jnp.float32) for name in ("t", "r")}
    examples["dropped"] = jnp.asarray(tensors["dropped"])
    label = jnp.asarray(tensors["label"], jnp.int32)
    examples["conditions"] = {"label": jnp.where(examples["dropped"], 5, label)}
    examples["dropout_keys"] = jax.random.split(jax.random.key(0), B)
    return {
        "interval": jax.tree.map(lambda a: a[:INTERVALS], examples),
        "instant": jax.tree.map(lambda a: a[INTERVALS:], examples),
    }


GUIDED = {"omega": 0.2, "kappa": 0.92, "interval": (0.0, 0.75)}
CASES = {
    "data": ({}, {}),
    "cifar10": (
        {"power": 0.75, "constant": 1e-3},
        {"regression": Regression("l2", 0.75, 1e-3)},
    ),
    "guided": (GUIDED, {"mixing": GuidanceMixing(**GUIDED)}),
    "omega_alone": ({"omega": 2.0}, {"mixing": GuidanceMixing(2.0)}),
    "improved": ({"improved": True}, {"direction": "network"}),
    "improved_guided": (
        {"improved": True, "kappa": 0.6},
        {"direction": "network", "mixing": GuidanceMixing(1.0, 0.6)},
    ),
    "improved_omega_alone": (
        {"improved": True, "omega": 1.5},
        {"direction": "network", "mixing": GuidanceMixing(1.5)},
    ),
    "opt_grad": (
        {"loss": "opt_grad", "constant": 0.1, "scale_by_dimension": True},
        {"regression": Regression("opt_grad", 1.0, 0.1, True)},
    ),
    "warmup": ({"warmup": 0.3}, {}),
    "teacher": ({"teacher_scale": 2.5}, {}),
    "finite_difference": ({}, {"derivative": TotalDerivative("finite_difference", 3e-3)}),
    "unshared": ({}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_reference(name, mlp, tensors):
    network, params, teacher, teacher_params = mlp
    theirs, options = CASES[name]
    setting = torch_mean_flow.Setting(**theirs)
    denoiser = Denoiser(network, FLOW)
    if name == "teacher":
        setting.teacher = torch_mean_flow.Mlp(teacher_params, 5)
        options = {"teacher": Teacher(Denoiser(teacher, FLOW), 2.5)}
    if name == "unshared":
        options = {"derivative": TotalDerivative(denoiser=denoiser)}

    reference = torch_mean_flow.Mlp(params, 5)
    loss = torch_mean_flow.loss(
        reference, setting, **{k: torch.tensor(v) for k, v in tensors.items()}
    )
    loss.backward()

    student = Student(denoiser, optax.sgd(1.0), label_dropout=0.1)
    method = create(student, interval_share=INTERVALS / B, **options)
    (ours, _), gradients = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(
        params, our_groups(tensors), {"teacher": teacher_params}, theirs.get("warmup", 1.0)
    )
    np.testing.assert_allclose(ours, loss.item(), rtol=2e-5)
    exact = name != "finite_difference"
    for key, wanted in reference.gradients().items():
        layer, _, leaf = key.rpartition("_")
        np.testing.assert_allclose(
            gradients[layer][leaf],
            wanted,
            atol=(2e-5 if exact else 2e-3) * np.abs(wanted).max(),
            err_msg=key,
        )


def tiny_dit(process, **options):
    config = DiTConfig(
        image_size=4, in_channels=3, patch_size=2, hidden_size=16, depth=1, num_heads=2,
        num_classes=3, learn_sigma=False, second_time="t-r", custom_gradients="off",
        dtype="float32", **options,
    )  # fmt: skip
    return Student(Denoiser(Network(config), process), optax.sgd(1.0))


@pytest.mark.parametrize("convention", ["sit", "flux"])
def test_derivative_is_along_the_flow_in_process_time(convention):
    """Through a DiT, whose network time runs the other way with SiT's convention."""
    process = RectifiedFlow(network_convention=convention, time_scale=2.0)
    student = tiny_dit(process)
    params = randomised(jax.jit(student.denoiser.network.init)(jax.random.key(0)), 3, scale=0.15)
    x, direction = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 3))
    t, r = jnp.array([0.9, 0.5, 0.7]), jnp.array([0.1, 0.2, 0.0])
    examples = {"x": x, "t": t, "r": r, "conditions": {"label": jnp.arange(3)}}
    exact = jax.jit(create(student).average_velocity)(params, examples, direction)
    other = create(student, derivative=TotalDerivative("finite_difference", 4e-3))
    close = jax.jit(other.average_velocity)(params, examples, direction)
    np.testing.assert_allclose(exact[0], close[0], atol=1e-6)
    assert np.abs(exact[1]).max() > 0.01
    np.testing.assert_allclose(exact[1], close[1], atol=3e-3 * np.abs(exact[1]).max())
    np.testing.assert_allclose(
        exact[0],
        student.denoiser.velocity(params, Request(x, t, {"label": jnp.arange(3), "r": r})),
        atol=1e-5,
    )


def test_finite_differences_stay_between_r_and_noise():
    """Central, one-sided at the ends, and nothing where there is no room."""
    difference = TotalDerivative("finite_difference", 0.1).finite_difference
    t, r = jnp.array([0.5, 0.95, 0.5, 0.95]), jnp.array([0.0, 0.0, 0.45, 0.9])

    def u(x, t, r):
        return x + jnp.square(t)[:, None, None, None]

    slope = difference(u, jnp.zeros((4, 1, 1, 1)), t, r, jnp.full((4, 1, 1, 1), 2.0))
    expected = [2.0 + 0.4 + 0.6, 2.0 + 0.85 + 0.95, 2.0 + 0.5 + 0.6, 0.0]
    np.testing.assert_allclose(slope.ravel(), expected, atol=1e-5)


def conditional_student(**options):
    return bench.mlp_student(
        FLOW, second_time=True, num_classes=3, width=16, label_dropout=0.25, **options
    )


def test_examples_of_a_batch():
    """The share has r < t exactly; labels are dropped where r = t first."""
    method = create(conditional_student(), interval_share=0.25)
    batch = bench.GaussianMixture().batch(jax.random.key(0), 64)
    groups = jax.jit(method.draw_examples)(batch, jax.random.key(1))
    interval, instant = groups["interval"], groups["instant"]
    assert interval["t"].shape == (16,) and instant["t"].shape == (48,)
    assert (interval["r"] < interval["t"]).all() and (instant["r"] == instant["t"]).all()
    assert 6 < instant["dropped"].sum() < 28 and not interval["dropped"].any()
    assert ((instant["conditions"]["label"] == 3) == instant["dropped"]).all()
    for group, rows in ((interval, slice(0, None, 4)), (instant, slice(1, None, 4))):
        wanted = batch["image"][rows]
        found = group["x0"] if group is interval else group["x0"][::3]
        np.testing.assert_array_equal(found, wanted)
    everything = create(conditional_student(), interval_share=1.0)
    assert "instant" not in everything.draw_examples(batch, jax.random.key(1))


def test_r_has_its_own_distribution():
    late = dataclasses.replace(create(), end_timesteps=LogitNormal(FLOW, -6.0, 0.1))
    batch = bench.GaussianMixture().batch(jax.random.key(0), 64)
    groups = late.draw_examples(batch, jax.random.key(1))
    assert (groups["interval"]["r"] < 0.01).all()
    assert groups["instant"]["t"].mean() > 0.3


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_microbatches_change_nothing(share):
    batch = bench.GaussianMixture().batch(jax.random.key(0), 16)
    states = []
    for parts in (1, 2):
        student = conditional_student(num_microbatches=parts, optimizer=optax.sgd(0.1))
        method = create(
            student, interval_share=share, direction="network", mixing=GuidanceMixing(1.2, 0.5)
        )
        state = jax.jit(method.init)(jax.random.key(2))
        states.append(jax.jit(method.update)(state, batch, jax.random.key(3)))
    (one, one_metrics), (two, two_metrics) = states
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(one_metrics["loss"], two_metrics["loss"], rtol=1e-5)


def test_warm_up_follows_the_step():
    method = create(tangent_warmup_steps=4)
    batch = bench.GaussianMixture().batch(jax.random.key(0), 8)
    state, seen = jax.jit(method.init)(jax.random.key(0)), []
    update = jax.jit(method.update)
    for step in range(6):
        state, metrics = update(state, batch, jax.random.key(step))
        seen.append(float(metrics["tangent_warmup"]))
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_passes_are_counted():
    passes = [
        create(interval_share=0.5),
        create(interval_share=0.5, direction="network"),
        create(interval_share=0.5, derivative=TotalDerivative("finite_difference")),
        create(conditional_student(), interval_share=0.5, mixing=GuidanceMixing(2.0)),
        create(conditional_student(), interval_share=0.5, mixing=GuidanceMixing(1.0, 0.5)),
        create(teacher=bench.exact_teacher(FLOW), interval_share=0.5),
    ]
    counts = [m.flops_per_example / m.student.denoiser.network.flops_per_example for m in passes]
    assert counts == [3.5, 4.0, 4.0, 4.5, 5.5, 4.5]
    assert passes[0].frozen_names == () and passes[-1].frozen_names == ("teacher",)


def test_augmentation_reaches_the_network():
    augmentation = Augmentation(probability=0.5, yflip=0.0, rotate_frac=0.0)
    student = tiny_dit(FLOW, augment_dim=augmentation.label_dim)
    method = create(student, augmentation=augmentation, interval_share=0.5)
    image = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    groups = jax.jit(method.draw_examples)(
        {"image": image, "conditions": {"label": jnp.arange(8) % 3}}, jax.random.key(1)
    )
    assert (groups["interval"]["x0"] != image[::2]).any()
    params = randomised(jax.jit(student.denoiser.network.init)(jax.random.key(0)), 3, scale=0.3)
    loss = jax.jit(method.loss)
    told = loss(params, groups)[1]["squared_error"]
    for name in groups:
        told_by = groups[name]["conditions"]
        told_by["augment"] = jnp.zeros_like(told_by["augment"])
    assert abs(told / loss(params, groups)[1]["squared_error"] - 1) > 1e-3


def test_labels_of_augmentation_without_a_place_are_refused():
    with pytest.raises(ValueError, match=r"set model\.augment_dim=9"):
        create(augmentation=Augmentation(probability=0.1))


def test_starts_as_its_teacher():
    """From parameters without a second time, u(x, r, t) is the teacher's velocity for every r."""
    student = tiny_dit(FLOW)
    teacher = dataclasses.replace(student.denoiser.network.config, second_time="none")
    denoiser = Denoiser(Network(teacher), FLOW)
    params = randomised(jax.jit(denoiser.network.init)(jax.random.key(0)), 4, scale=0.3)
    state = create(student).init(jax.random.key(1), params)
    x, t, r = jax.random.normal(jax.random.key(2), (2, 4, 4, 3)), jnp.full(2, 0.8), jnp.zeros(2)
    label = jnp.arange(2)
    np.testing.assert_allclose(
        student.denoiser.velocity(state.params, Request(x, t, {"label": label, "r": r})),
        denoiser.velocity(params, Request(x, t, {"label": label})),
        atol=1e-6,
    )


# -- what is learned ------------------------------------------------------------------------------

UNDISTILLED = 0.53  # distance of the exact denoiser's one-step samples from the mixture
LEARNED = {  # the method's options, learning rate, ceiling of the distance in 1, 2 and 4 steps
    "teacher": ({"regression": Regression(power=0.5)}, 0.09),
    "data": ({"regression": Regression(power=0.25)}, 0.105),
    "improved": ({"regression": Regression(power=0.25), "direction": "network"}, 0.1),
}


@pytest.mark.parametrize("name", ["teacher", "improved", long("data")])
def test_learns_to_sample_in_few_steps(name):
    options, ceiling = LEARNED[name]
    steps = 2500
    student = bench.mlp_student(FLOW, second_time=True, learning_rate=4e-3, steps=steps, width=96)
    teacher, frozen = None, None
    if name == "teacher":
        teacher, frozen = bench.exact_teacher(FLOW), {"teacher": {}}
    method = create(student, teacher=teacher, interval_share=0.75, **options)
    state, _ = bench.train(method, steps=steps, batch_size=256 if teacher else 512, frozen=frozen)
    params = method.weights(state)["ema_0.99"]
    assert bench.undistilled_distance(FLOW) > UNDISTILLED
    for count in (1, 2, 4):
        points = bench.sample_points(student.denoiser, params, solver="mean_flow", steps=count)
        distance = bench.sliced_wasserstein(points, bench.data_points())
        assert distance < ceiling, f"{count} steps: {distance}"
    assert ceiling < UNDISTILLED / 5


def test_guidance_mixing_learns_the_guided_flow():
    """One guided evaluation goes where the guided flow of the exact denoiser ends.

    Components overlap widely, so that the guided flow stays where there are data to learn from.
    """
    mixture = bench.GaussianMixture(std=0.6)
    scale, steps = 2.0, 2000
    student = bench.mlp_student(
        FLOW,
        second_time=True,
        num_classes=3,
        label_dropout=0.2,
        learning_rate=4e-3,
        steps=steps,
        width=96,
    )
    method = create(
        student,
        interval_share=0.5,
        mixing=GuidanceMixing(omega=1.0, kappa=1 - 1 / scale),
        regression=Regression(power=0.0),
    )
    state, _ = bench.train(method, steps=steps, batch_size=512, mixture=mixture)
    params = method.weights(state)["ema_0.99"]
    reached = bench.sample_points(student.denoiser, params, solver="mean_flow", steps=1)
    exact = bench.exact_teacher(FLOW, mixture, conditional=True).denoiser
    many = {"solver": "heun", "steps": 30}
    guided = bench.sample_points(exact, {}, **many, guidance_scale=scale)
    unguided = bench.sample_points(exact, {}, **many)

    def distance(points):
        """Root mean square, point by point: all start from the same noise."""
        return float(np.sqrt(np.square(points - guided).sum(1).mean()))

    assert distance(reached) < 0.22
    assert distance(unguided) > 0.45
    assert bench.sliced_wasserstein(reached, guided) < 0.1
    assert bench.sliced_wasserstein(unguided, guided) > 0.2


# -- what is refused ------------------------------------------------------------------------------


def small_config(**changes):
    config = default_config()
    config.update_from_flattened_dict(
        {
            "model.image_size": 4,
            "model.in_channels": 1,
            "model.dit.hidden_size": 16,
            "model.dit.depth": 1,
            "model.dit.num_heads": 2,
            "model.num_classes": 3,
            "model.dit.learn_sigma": False,
            "model.second_time": "t-r",
            "model.custom_gradients": "off",
            "process.name": "flow",
            "method.name": "mean_flow",
            "sampling.solver": "mean_flow",
            "sampling.steps": 1,
            **changes,
        }
    )
    return resolve(config)


def test_builds_from_a_configuration():
    method = mean_flow.build(
        small_config(
            **{
                "timesteps.name": "logit_normal",
                "method.mean_flow.r_distribution": "logit_normal",
                "method.mean_flow.r_mean": -4.0,
                "method.mean_flow.derivative_dtype": "float32",
                "method.mean_flow.guidance_kappa": 0.5,
                "method.mean_flow.guidance_interval": (0.0, 0.75),
                "model.dtype": "bfloat16",
            }
        )
    )
    assert method.end_timesteps == LogitNormal(method.student.denoiser.process, -4.0, 1.0)
    assert method.mixing == GuidanceMixing(1.0, 0.5, (0.0, 0.75))
    assert method.derivative.denoiser.network.config.dtype == "float32"
    assert not method.derivative.shares
    taught = mean_flow.build(
        small_config(**{"method.mean_flow.velocity": "teacher", "teacher.guidance_scale": 2.0})
    )
    assert taught.teacher.guidance_scale == 2.0
    assert "r" not in taught.teacher.denoiser.network.conditions
    assert mean_flow.build(small_config()).derivative.shares


MEAN_FLOW = "method.mean_flow."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.second_time": "none"}, "model.second_time='t-r'"),
        ({"model.custom_gradients": "auto"}, "model.custom_gradients='off'"),
        ({"process.name": "edm"}, "process.name='flow'"),
        ({"sampling.solver": "consistency"}, "set 'mean_flow'"),
        ({MEAN_FLOW + "velocity": "model"}, "velocity='model'"),
        ({MEAN_FLOW + "direction": "both"}, "direction='both'"),
        ({MEAN_FLOW + "interval_share": 0.0}, "interval_share=0.0"),
        ({MEAN_FLOW + "loss": "l1"}, "loss='l1'"),
        ({MEAN_FLOW + "scale_by_dimension": True}, "loss='opt_grad'"),
        ({MEAN_FLOW + "weight_power": -1.0}, "weight_power=-1.0"),
        ({MEAN_FLOW + "guidance_kappa": 1.0}, "guidance_kappa=1.0"),
        ({MEAN_FLOW + "guidance_interval": (0.0, 0.5)}, "guidance_interval would do nothing"),
        ({MEAN_FLOW + "guidance_interval": (0.5,)}, "expected (low, high)"),
        ({MEAN_FLOW + "guidance_omega": 2.0, "method.label_dropout": 0.0}, "label_dropout above 0"),
        (
            {MEAN_FLOW + "guidance_omega": 2.0, MEAN_FLOW + "velocity": "teacher"},
            "set teacher.guidance_scale",
        ),
        ({"teacher.guidance_scale": 2.0}, "velocity='data'"),
        ({MEAN_FLOW + "r_mean": 1.0}, "r_distribution='logit_normal'"),
        ({MEAN_FLOW + "finite_difference_step": 0.1}, "derivative='finite_difference'"),
        ({MEAN_FLOW + "derivative": "complex_step"}, "derivative='complex_step'"),
        ({MEAN_FLOW + "derivative_dtype": "float16"}, "derivative_dtype='float16'"),
        ({MEAN_FLOW + "tangent_warmup_steps": -1}, "tangent_warmup_steps=-1"),
        ({"loss.weighting": "min_snr"}, "loss.weighting='min_snr'"),
    ],
)
def test_refused_configurations(changes, words):
    with pytest.raises((ConfigError, ValueError)) as error:
        mean_flow.build(small_config(**changes))
    assert words in str(error.value)


def test_other_processes_are_refused():
    with pytest.raises(ValueError, match=r"process\.name='flow'"):
        create(bench.mlp_student(EDM(), second_time=True))
