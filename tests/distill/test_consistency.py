"""Consistency models: losses against PyTorch, times, stages, and students that learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import torch

from dit_jax.config import ConfigError, default_config
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import DDPM, EDM, RectifiedFlow, TruncatedLogNormal, Uniform
from dit_jax.distill.consistency import Consistency, build
from dit_jax.distill.consistency_loss import ConsistencyLoss, ECTSchedule, TimePairs
from dit_jax.distill.student import Student, Teacher
from dit_jax.experiment import resolve_config
from tests.distill import mixture as bench
from tests.long import long
from tests.models.conftest import random_params
from tests.references import torch_consistency as reference

FLOW = RectifiedFlow(network_convention="flux")
TWINS = {"edm": (EDM(), reference.Edm()), "flow": (FLOW, reference.Flow())}
TIMES = {"edm": [0.05, 0.4, 1.1, 2.5, 9.0, 70.0], "flow": [0.04, 0.2, 0.45, 0.7, 0.93, 1.0]}
RATIO = 0.9


def fixed_examples(method, times, num_classes=0, ratio=RATIO):
    random = np.random.default_rng(3)
    t = jnp.asarray(times, jnp.float32)
    label = jnp.asarray(random.integers(0, 3, len(t)), jnp.int32)
    return {
        "x0": jnp.asarray(random.normal(size=(len(t), 1, 1, 2)) * 0.5, jnp.float32),
        "pair": jax.jit(method.pairs)(t, jnp.float32(1 - ratio)),
        "eps": jnp.asarray(random.normal(size=(len(t), 1, 1, 2)), jnp.float32),
        "conditions": {"label": label} if num_classes else {},
        "dropout_keys": jax.random.split(jax.random.key(0), len(t)),
    }


def points(array):
    return torch.tensor(np.asarray(array, np.float64)).reshape(-1, 2)


def assert_same_trees(ours, theirs, rtol=2e-4):
    for path, leaf in jax.tree.leaves_with_path(theirs):
        mine = ours
        for key in path:
            mine = mine[key.key]
        np.testing.assert_allclose(mine, leaf, rtol=rtol, atol=rtol * np.abs(leaf).max())


CASES = {
    "training": {},
    "huber c_out_sq": {"criterion": ("pseudo_huber", 0.06, "c_out_sq")},
    "l2 c_out": {"criterion": ("l2", 1e-8, "c_out")},
    "l2 sigma_sq": {"criterion": ("l2", 1e-8, "sigma_sq")},
    "squared sqrt": {"criterion": ("squared_l2", 1e-8, "sqrt")},
    "squared one": {"criterion": ("squared_l2", 1e-8, "one")},
    "distillation": {"teacher": True},
    "guided": {"teacher": True, "guidance": 1.8},
    "guided heun": {"teacher": True, "guidance": 1.8, "heun": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TWINS)
def test_loss_and_gradients_equal_the_reference(name, case):
    process, twin = TWINS[name]
    options = dict(CASES[case])
    num_classes = 3 if options.get("guidance") else 0
    student = bench.mlp_student(process, num_classes=num_classes, width=16, depth=2)
    params, teacher = (random_params(student.denoiser.network, seed, 0.3) for seed in (1, 2))
    criterion = options.pop("criterion", ("pseudo_huber", 1e-8, "default"))
    method = Consistency(
        student,
        Uniform(process),
        TimePairs(process),
        criterion=ConsistencyLoss(*criterion),
        teacher=Teacher(student.denoiser, options.get("guidance", 1.0))
        if options.pop("teacher", False)
        else None,
        solver="heun" if options.get("heun") else "euler",
    )
    examples = fixed_examples(method, TIMES[name], num_classes)
    if criterion[2].startswith("c_out"):  # flow's sigma / alpha has no end at t = 1
        examples = jax.tree.map(lambda leaf: leaf[:5], examples)
    frozen = {"teacher": teacher}
    (loss, _), gradients = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(
        params, examples, None, frozen
    )

    theirs = reference.require_grad(reference.tensors(params))
    expected = reference.consistency(
        twin,
        theirs,
        points(examples["x0"]),
        points(examples["eps"]),
        torch.tensor(np.asarray(examples["pair"].t, np.float64)),
        RATIO,
        teacher=reference.tensors(teacher) if method.teacher else None,
        label=torch.tensor(np.asarray(examples["conditions"]["label"])).long()
        if num_classes
        else None,
        num_classes=num_classes,
        criterion=criterion,
        **options,
    )
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    assert_same_trees(gradients, reference.gradients(expected, theirs))


def test_r_is_ects_in_each_process():
    decrement = jnp.float32(0.1)

    def mapped(level):
        return np.maximum(level - level * 0.1 * (1 + 8 * scipy.special.expit(-level)), 0)

    t = jnp.array([0.002, 0.3, 1.0, 5.0, 80.0])
    pair = TimePairs(EDM())(t, decrement)
    np.testing.assert_allclose(pair.r, mapped(np.asarray(t)), rtol=1e-5)
    np.testing.assert_allclose(pair.gap, t - mapped(np.asarray(t)), rtol=1e-5)
    np.testing.assert_array_equal(pair.t, t)

    t = jnp.array([0.01, 0.5, 1.0])
    np.testing.assert_allclose(TimePairs(FLOW)(t, decrement).r, mapped(np.asarray(t)), rtol=1e-5)

    process = DDPM()
    t = jnp.array([0.0, 10.0, 500.0, 999.0])
    pair = TimePairs(process)(t, decrement)
    level = np.asarray(process.sigma_ratio(t))
    np.testing.assert_allclose(process.sigma_ratio(pair.r), mapped(level), rtol=1e-4)
    np.testing.assert_allclose(pair.gap, level - mapped(level), rtol=1e-4)


def test_r_is_clean_data_or_min_r_and_never_t():
    whole = jnp.float32(1.0)
    for process, t in ((EDM(), 3.0), (FLOW, 0.7), (DDPM(), 400.0)):
        pair = TimePairs(process)(jnp.array([t]), whole)
        assert pair.r[0] == process.clean_time
    t = jnp.array([0.001, 0.002, 0.0021, 1.0])
    pair = TimePairs(EDM(), min_r=0.002)(t, jnp.float32(0.5))
    np.testing.assert_allclose(pair.r, [0.002] * 4, rtol=1e-6)
    assert (pair.t > pair.r).all() and (pair.gap >= 1e-6).all()
    np.testing.assert_array_equal(pair.t[2:], t[2:])
    pair = TimePairs(FLOW)(jnp.array([0.0, 1.0]), jnp.float32(1e-3))
    assert (pair.t > pair.r).all() and (pair.gap >= 1e-6).all()


def test_quantized_times_are_different_indices():
    process = DDPM()
    t = jnp.array([0.0, 1.0, 3.0, 500.0, 998.0, 999.0])
    pair = TimePairs(process, quantize=True)(t, jnp.float32(1e-5))
    np.testing.assert_array_equal(pair.r, [0, 1, 3, 500, 998, 998])
    np.testing.assert_array_equal(pair.t, [1, 2, 4, 501, 999, 999])
    clean = TimePairs(process, quantize=True)(t[:2], jnp.float32(0.5))
    np.testing.assert_array_equal(clean.r, [-1, -1])
    gap = process.sigma_ratio(pair.t) - process.sigma_ratio(pair.r)
    np.testing.assert_allclose(pair.gap, gap, rtol=1e-6)


def test_stages_follow_the_images_seen():
    schedule = ECTSchedule(growth=2.0, ratio_limit=0.9, images_per_stage=1000)
    ratios = [1 - float(schedule.decrement(jnp.int32(step), 64)) for step in range(80)]
    expected = [min(1 - 0.5 ** (step * 64 // 1000 + 1), 0.9) for step in range(80)]
    np.testing.assert_allclose(ratios, expected, atol=1e-6)
    later = ECTSchedule(2.0, 0.9, 1000, images_before=2500)
    assert later.decrement(jnp.int32(0), 64) == pytest.approx(0.125)
    assert later.decrement(jnp.int32(8), 64) == pytest.approx(0.1)
    # Far beyond what fits in an int32 of images.
    long = ECTSchedule(2.0, 0.999, 10**9)
    assert long.decrement(jnp.int32(2_000_000), 4096) == pytest.approx(0.5**9)
    assert ECTSchedule(ratio_limit=0.0).decrement(jnp.int32(5), 8) == 1.0


def small_method(process=None, **options):
    process = process or EDM()
    student = bench.mlp_student(process, num_classes=3, width=16, label_dropout=0.3)
    student = dataclasses.replace(
        student, num_microbatches=options.pop("num_microbatches", 1), optimizer=optax.sgd(0.1)
    )
    return Consistency(student, TruncatedLogNormal(process), TimePairs(process), **options)


def test_microbatches_change_nothing():
    batch = bench.GaussianMixture().batch(jax.random.key(2), 8)
    key = jax.random.key(1)
    results = []
    for num_microbatches in (1, 4):
        method = small_method(num_microbatches=num_microbatches)
        state = jax.jit(method.init)(jax.random.key(0))
        results.append(jax.jit(method.update)(state, batch, key))
    (whole, metrics), (parts, part_metrics) = results
    assert metrics["gradient_norm"] == pytest.approx(float(part_metrics["gradient_norm"]), rel=1e-4)
    for name in ("loss", "unweighted_loss", "ratio", "student_mean"):
        assert part_metrics[name] == pytest.approx(float(metrics[name]), rel=1e-4, abs=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        whole.params,
        parts.params,
    )


def test_the_ratio_is_part_of_the_state():
    method = small_method(schedule=ECTSchedule(2.0, 0.999, images_per_stage=16))
    update = jax.jit(method.update)
    batch = bench.GaussianMixture().batch(jax.random.key(2), 8)
    state, ratios = jax.jit(method.init)(jax.random.key(0)), []
    for step in range(5):
        state, metrics = update(state, batch, jax.random.key(step))
        ratios.append(float(metrics["ratio"]))
    np.testing.assert_allclose(ratios, [0.5, 0.5, 0.75, 0.75, 0.875], rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Recorder(bench.MlpNetwork):
    """Notes the dropout keys of every call."""

    calls: list = dataclasses.field(default_factory=list, compare=False)

    def apply(self, params, request):
        self.calls.append(request.dropout_keys)
        return super().apply(params, request)


def test_both_evaluations_share_a_dropout_mask_and_the_teacher_has_none():
    calls = []
    denoiser = Denoiser(Recorder(width=8, calls=calls), EDM())
    method = Consistency(
        Student(denoiser, optax.sgd(0.1)),
        TruncatedLogNormal(EDM()),
        TimePairs(EDM()),
        teacher=Teacher(denoiser),
    )
    params = denoiser.network.init(jax.random.key(0))
    examples = fixed_examples(method, TIMES["edm"])
    method.loss(params, examples, None, {"teacher": params})
    teacher, *student = calls
    assert teacher is None and len(student) == 2
    assert student[0] is student[1] and student[0].shape == (6,)


def test_an_average_can_be_the_target():
    method = dataclasses.replace(small_method(), target="ema_0.99")
    state = jax.jit(method.init)(jax.random.key(0))
    other = jax.tree.map(lambda leaf: leaf + 0.1, state.params)
    state = dataclasses.replace(state, ema={"ema_0.99": other})
    batch, key = bench.GaussianMixture().batch(jax.random.key(2), 8), jax.random.key(1)
    _, metrics = jax.jit(method.update)(state, batch, key)
    examples = jax.jit(method.draw_examples)(batch, key, jnp.float32(0.5))
    loss = jax.jit(method.loss)
    assert metrics["loss"] == pytest.approx(float(loss(state.params, examples, other)[0]))
    assert metrics["loss"] != pytest.approx(float(loss(state.params, examples)[0]))


def tiny_config(**changes):
    config = default_config()
    config.model.update(image_size=4, in_channels=2, num_classes=3)
    config.model.dit.update(hidden_size=16, depth=1, num_heads=2)
    config.method.name = "consistency"
    config.sampling.solver, config.sampling.steps = "consistency", 1
    for path, value in changes.items():
        config.update_from_flattened_dict({path.replace("__", "."): value})
    return config


@pytest.mark.parametrize("process", ["ddpm", "flow", "edm"])
def test_trains_a_class_conditional_transformer_in_every_process(process):
    changes = {"process__name": process, "timesteps__name": "truncated_log_normal"}
    changes["model__dit__learn_sigma"] = process == "ddpm"
    if process == "ddpm":
        changes["method__consistency__quantize"] = True
    changes["method__consistency__trajectory"] = "teacher"
    changes["teacher__guidance_scale"] = 2.0
    config = resolve_config(tiny_config(**changes))
    method = build(config)
    assert method.frozen_names == ("teacher",)
    shape = jax.eval_shape(method.init, jax.random.key(0))
    assert set(method.weights(shape)) == {"ema_0.9999", "raw"}
    params = random_params(method.student.denoiser.network, 1, 0.3)
    state = jax.jit(method.init)(jax.random.key(0), params)
    image = jax.random.normal(jax.random.key(1), (4, 4, 4, 2))
    batch = {"image": image, "conditions": {"label": jnp.arange(4) % 3}}
    after, metrics = jax.jit(method.update)(
        state,
        batch,
        jax.random.key(2),
        {"teacher": random_params(method.student.denoiser.network, 2, 0.3)},
    )
    assert after.step == 1 and all(np.isfinite(value) for value in metrics.values())
    assert metrics["gradient_norm"] > 0
    assert {"loss", "unweighted_loss", "ratio", "student_mean", "student_std"} <= set(metrics)
    forward = method.student.denoiser.network.flops_per_example
    assert method.flops_per_example == 6 * forward  # 3 + 1, and a guided Euler step


def test_options_that_cannot_work_are_refused():
    def refused(message, error=ConfigError, **changes):
        with pytest.raises(error, match=message):
            resolve_config(tiny_config(**changes))

    refused("expected 'data'", method__consistency__trajectory="ode")
    refused("would do nothing: it is of trajectory", method__consistency__solver="heun")
    refused("expected one of euler, heun", method__consistency__solver="rk4",
            method__consistency__trajectory="teacher")  # fmt: skip
    refused("expected one of student, ema_0.9999", method__consistency__target="ema_0.5")
    refused("growth=1.0: expected above 1", method__consistency__growth=1.0)
    refused("ratio_limit=1.0", method__consistency__ratio_limit=1.0)
    refused("images_per_stage=0", method__consistency__images_per_stage=0)
    refused("only ddpm", process__name="flow", model__dit__learn_sigma=False,
            method__consistency__quantize=True)  # fmt: skip
    refused("expected one of pseudo_huber", method__consistency__distance="l1")
    refused("expected one of default", method__consistency__weighting="snr")
    refused("huber_constant=0.03 would do nothing", method__consistency__distance="l2",
            method__consistency__huber_constant=0.03)  # fmt: skip
    refused("distance='l2' is without", method__consistency__huber_constant=0.0)
    refused("second_time='r' would do nothing", model__second_time="r")


def learned(process, timesteps, teacher, steps=2000, **criterion):
    student = bench.mlp_student(process, steps=steps, learning_rate=2e-3)
    method = Consistency(
        student,
        timesteps,
        TimePairs(process),
        ECTSchedule(2.0, 0.98, steps * 256 // 12),
        ConsistencyLoss(**criterion),
        teacher=bench.exact_teacher(process) if teacher else None,
    )
    state, metrics = bench.train(method, steps=steps, frozen={"teacher": {}} if teacher else None)
    samples = bench.sample_points(student.denoiser, state.ema["ema_0.99"])
    return bench.sliced_wasserstein(samples, bench.data_points()), metrics["train"]


@pytest.mark.parametrize("teacher", [long(False), True])
def test_one_step_samples_of_edm(teacher):
    criterion = (
        {"huber_constant": 0.01} if teacher else {"huber_constant": 0.1, "weighting": "c_out"}
    )
    distance, metrics = learned(EDM(), TruncatedLogNormal(EDM(), 0.5, 2.0), teacher, **criterion)
    assert distance < (0.08 if teacher else 0.1)
    assert bench.undistilled_distance(EDM()) > 5 * distance
    assert metrics["ratio"] == pytest.approx(0.98, rel=1e-5)


@pytest.mark.parametrize("teacher", [False, long(True)])
def test_one_step_samples_of_flow(teacher):
    criterion = (
        {"huber_constant": 0.01} if teacher else {"huber_constant": 0.1, "weighting": "c_out"}
    )
    distance, _ = learned(
        FLOW, Uniform(FLOW), teacher, steps=2000 if teacher else 3000, **criterion
    )
    assert distance < (0.08 if teacher else 0.1)
    assert bench.undistilled_distance(FLOW) > 5 * distance
