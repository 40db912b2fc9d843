"""Truncated consistency models: the loss against PyTorch, its layout, and a student that learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dit_jax.config import ConfigError
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import DDPM, EDM, LogStudentT, RectifiedFlow, TruncatedLogNormal, Uniform
from dit_jax.distill.consistency import Consistency
from dit_jax.distill.consistency_loss import ConsistencyLoss, ECTSchedule, TimePairs
from dit_jax.distill.student import Student
from dit_jax.distill.tcm import TCM, arrange, build
from dit_jax.experiment import resolve_config
from dit_jax.training.method import accumulated_gradients
from tests.distill import mixture as bench
from tests.distill.test_consistency import (
    TWINS,
    assert_same_trees,
    points,
    random_params,
    tiny_config,
)
from tests.references import torch_consistency as reference

FLOW = RectifiedFlow(network_convention="flux")
TRANSITION = {"edm": 1.0, "flow": 0.5}
TIMES = {
    "edm": [1.001, 1.0, 1.3, 4.0, 1.0, 70.0, 2.0, 1.02],
    "flow": [0.501, 0.5, 0.6, 0.95, 0.5, 1.0, 0.7, 0.52],
}
BOUNDARY = np.array([False, True, False, False, True, False, False, False])


def small_method(process=None, num_microbatches=1, transition=1.0, student=None, **options):
    process = process or EDM()
    student = student or bench.mlp_student(process, width=16, depth=2)
    student = dataclasses.replace(
        student, num_microbatches=num_microbatches, optimizer=optax.sgd(0.1)
    )
    timesteps = LogStudentT(process, min_time=transition)
    return TCM(student, timesteps, TimePairs(process), transition=transition, **options)


def loss_and_gradients(method, params, examples, stage1):
    """(metrics, gradients) on a whole batch, in as many parts as the student's."""

    @jax.jit
    def compute(params, examples, stage1):
        return accumulated_gradients(
            lambda params, part: method.loss(params, part, None, {"stage1": stage1}),
            params,
            examples,
            method.student.num_microbatches,
        )

    return compute(params, examples, stage1)


@pytest.mark.parametrize(("num_microbatches", "ratio"), [(1, 0.9), (2, 0.99)])
@pytest.mark.parametrize("name", TWINS)
def test_loss_and_gradients_equal_the_reference(name, num_microbatches, ratio):
    process, twin = TWINS[name]
    method = small_method(process, num_microbatches, TRANSITION[name])
    network = method.student.denoiser.network
    params, stage1 = random_params(network, 1), random_params(network, 2)
    random = np.random.default_rng(3)
    x0, eps = (jnp.asarray(random.normal(size=(8, 1, 1, 2)), jnp.float32) for _ in range(2))
    t = jnp.asarray(TIMES[name], jnp.float32)
    examples = {
        "x0": x0,
        "pair": jax.jit(method.pairs)(t, jnp.float32(1 - ratio)),
        "eps": eps,
        "conditions": {},
        "dropout_keys": jax.random.split(jax.random.key(0), 8),
        "boundary": jnp.asarray(BOUNDARY),
        "share": jnp.where(jnp.asarray(BOUNDARY), 8 / 2, 8 / 6),
    }
    below = np.asarray(examples["pair"].r) < method.transition
    assert below[BOUNDARY].all() and not below.all()
    metrics, gradients = loss_and_gradients(method, params, examples, stage1)

    theirs = reference.require_grad(reference.tensors(params))
    total, inner, edge = reference.truncated(
        twin,
        theirs,
        reference.tensors(stage1),
        points(x0),
        points(eps),
        torch.tensor(np.asarray(t, np.float64)),
        torch.tensor(BOUNDARY),
        ratio,
        method.transition,
        method.boundary_weight,
    )
    np.testing.assert_allclose(metrics["loss"], total.item(), rtol=1e-4)
    np.testing.assert_allclose(metrics["consistency_loss"], inner.item(), rtol=1e-4)
    np.testing.assert_allclose(metrics["boundary_loss"], edge.item(), rtol=1e-4)
    assert_same_trees(gradients, reference.gradients(total, theirs), rtol=1e-3)


@pytest.mark.parametrize("process", [EDM(), FLOW, DDPM()], ids=["edm", "flow", "ddpm"])
def test_times_are_the_boundary_or_above(process):
    transition = {EDM: 1.0, RectifiedFlow: 0.4, DDPM: 300.0}[type(process)]
    method = small_method(process, transition=transition, boundary_probability=0.25)
    batch = bench.GaussianMixture().batch(jax.random.key(0), 64)
    examples = jax.jit(method.draw_examples)(batch, jax.random.key(1), jnp.float32(0.02))
    boundary, (t, r, _) = np.asarray(examples["boundary"]), examples["pair"]
    assert boundary.sum() == 16 and (t >= transition).all()
    assert (t[boundary] == transition).all() and (r[boundary] < transition).all()
    share = np.asarray(examples["share"])
    np.testing.assert_allclose(share[boundary], 4.0)
    np.testing.assert_allclose(share.mean(), 2.0, rtol=1e-6)


def test_sorted_examples_lie_in_the_same_parts():
    order = np.asarray(arrange(jnp.arange(48), 3, 2))
    seen = [
        part
        for microbatch in np.moveaxis(order.reshape(-1, 3), 1, 0)
        for part in np.moveaxis(microbatch.reshape(-1, 2), 1, 0)
    ]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(48))


@dataclasses.dataclass(frozen=True)
class Counter(bench.MlpNetwork):
    """Counts evaluations that are made, not those that are compiled."""

    counts: list = dataclasses.field(default_factory=list, compare=False)

    def apply(self, params, request):
        jax.debug.callback(lambda _: self.counts.append(request.x.shape[0]), request.x)
        return super().apply(params, request)


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_at_r_only_one_part_needs_both_networks(num_microbatches):
    counts = []
    denoiser = Denoiser(Counter(width=8, counts=counts), EDM())
    student = Student(denoiser, optax.sgd(0.1))
    method = small_method(student=student, num_microbatches=num_microbatches)
    params = denoiser.network.init(jax.random.key(0))
    batch = bench.GaussianMixture().batch(jax.random.key(0), 32)
    examples = method.draw_examples(batch, jax.random.key(1), jnp.float32(0.03))
    below = int((examples["pair"].r < 1.0).sum())
    assert 8 < below < 32
    for i in range(num_microbatches):
        part = jax.tree.map(lambda leaf: leaf[i::num_microbatches], examples)  # noqa: B023
        method.x0_at_r(params, {"stage1": params}, part["x0"], part)
    jax.effects_barrier()
    assert sum(counts) == (40 if below % 8 else 32)


def test_microbatches_change_nothing():
    batch, key = bench.GaussianMixture().batch(jax.random.key(2), 16), jax.random.key(1)
    stage1 = random_params(small_method().student.denoiser.network, 2)
    results = []
    for num_microbatches in (1, 2, 4):
        method = small_method(num_microbatches=num_microbatches)
        state = jax.jit(method.init)(jax.random.key(0), None, {"stage1": stage1})
        examples = jax.jit(method.draw_examples)(batch, key, jnp.float32(0.5))
        # The layout differs, and with it which image gets which time: compare on equal examples.
        fixed = results[0][0] if results else examples
        metrics, gradients = loss_and_gradients(method, state.params, fixed, stage1)
        results.append((fixed, metrics, gradients))
        np.testing.assert_array_equal(np.sort(examples["pair"].t), np.sort(results[0][0]["pair"].t))
    for _, metrics, gradients in results[1:]:
        assert metrics["loss"] == pytest.approx(float(results[0][1]["loss"]), rel=1e-4)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            gradients,
            results[0][2],
        )


def test_the_first_stage_is_where_the_student_starts():
    method = small_method()
    assert method.frozen_names == ("stage1",)
    stage1 = random_params(method.student.denoiser.network, 2)
    state = jax.jit(method.init)(jax.random.key(0), None, {"stage1": stage1})
    for tree in (state.params, state.ema["ema_0.99"]):
        jax.tree.map(np.testing.assert_array_equal, tree, stage1)
    given = random_params(method.student.denoiser.network, 5)
    state = method.init(jax.random.key(0), given, {"stage1": stage1})
    jax.tree.map(np.testing.assert_array_equal, state.params, given)
    shapes = jax.eval_shape(lambda tree: tree, stage1)
    for frozen in (None, {"stage1": shapes}):
        state = jax.eval_shape(lambda key, f=frozen: method.init(key, None, f), jax.random.key(0))
        assert jax.tree.structure(state.params) == jax.tree.structure(stage1)
        assert set(method.weights(state)) == {"ema_0.99", "raw"}


def config(**changes):
    changes = {
        "method__name": "tcm",
        "process__name": "edm",
        "model__dit__learn_sigma": False,
        "timesteps__name": "log_student_t",
        "timesteps__log_student_t__min_time": 1.0,
        **changes,
    }
    return tiny_config(**changes)


def test_trains_a_class_conditional_transformer():
    resolved = resolve_config(config())
    method = build(resolved)
    stage1 = random_params(method.student.denoiser.network, 1)
    frozen = {"stage1": stage1}
    state = jax.jit(method.init)(jax.random.key(0), None, frozen)
    image = jax.random.normal(jax.random.key(1), (8, 4, 4, 2))
    batch = {"image": image, "conditions": {"label": jnp.arange(8) % 3}}
    state, metrics = jax.jit(method.update)(state, batch, jax.random.key(2), frozen)
    assert state.step == 1 and all(np.isfinite(value) for value in metrics.values())
    assert metrics["gradient_norm"] > 0 and metrics["boundary_loss"] > 0
    assert method.flops_per_example == 4 * method.student.denoiser.network.flops_per_example


def test_options_that_cannot_work_are_refused():
    def refused(message, **changes):
        with pytest.raises(ConfigError, match=message):
            resolve_config(config(**changes))

    refused("begin at 0.002, and below the transition", timesteps__log_student_t__min_time=0.0)
    refused("expected a time between clean data", method__tcm__transition=80.0)
    refused("boundary_probability=1.0", method__tcm__boundary_probability=1.0)
    refused("min_r=1.5 is not below the transition", method__tcm__min_r=1.5)
    refused("huber_constant=0.1 would do nothing", method__tcm__distance="l2",
            method__tcm__huber_constant=0.1)  # fmt: skip
    refused("second_time='r' would do nothing", model__second_time="r")
    with pytest.raises(ValueError, match="below the transition"):
        TCM(bench.mlp_student(FLOW), Uniform(FLOW), TimePairs(FLOW), transition=0.5)
    with pytest.raises(ValueError, match="no room for the boundary"):
        batch = bench.GaussianMixture().batch(jax.random.key(0), 1)
        small_method().draw_examples(batch, jax.random.key(0), jnp.float32(0.5))


def test_the_second_stage_improves_one_step_samples():
    process, steps = EDM(), 1000
    criterion = ConsistencyLoss(huber_constant=0.1, weighting="c_out")
    first = Consistency(
        bench.mlp_student(process, steps=steps, learning_rate=2e-3),
        TruncatedLogNormal(process, 0.5, 2.0),
        TimePairs(process),
        ECTSchedule(2.0, 0.9, steps * 256 // 8),
        criterion,
    )
    state, _ = bench.train(first, steps=steps)
    stage1 = state.ema["ema_0.99"]
    second = TCM(
        bench.mlp_student(process, steps=steps, learning_rate=1e-3),
        TruncatedLogNormal(process, 0.5, 2.0, min_time=0.3),
        TimePairs(process),
        ECTSchedule(2.0, 0.98, 1, images_before=100),
        criterion,
        transition=0.3,
    )
    state, metrics = bench.train(second, steps=steps, frozen={"stage1": stage1})
    denoiser, data = first.student.denoiser, bench.data_points()
    before = bench.sliced_wasserstein(bench.sample_points(denoiser, stage1), data)
    samples = bench.sample_points(denoiser, state.ema["ema_0.99"])
    after = bench.sliced_wasserstein(samples, data)
    assert metrics["train"]["ratio"] == pytest.approx(0.98, rel=1e-5)
    assert after < 0.105 and after < 0.9 * before
    assert bench.undistilled_distance(process) > 5 * after
