"""Knowledge distillation: the loss against PyTorch, the pairs, and a student that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.config import ConfigError, default_config
from dit_jax.diffusion import DDPM, EDM, RectifiedFlow
from dit_jax.diffusion.samplers import insert_times, make_solver, schedule
from dit_jax.distill.kd import KnowledgeDistillation, build, default_huber_c, distance
from dit_jax.experiment import resolve_config
from dit_jax.sampling import Sampler, image_keys
from tests.distill import mixture as bench
from tests.long import long
from tests.models.conftest import random_params
from tests.references import torch_kd

FLOW = RectifiedFlow(network_convention="flux")


def random_examples(process, n=6):
    random = np.random.default_rng(0)
    points = lambda: random.normal(size=(n, 1, 1, 2)).astype(np.float32)  # noqa: E731
    t = random.uniform(0.1, 0.9, n).astype(np.float32) * process.noise_time
    return {
        "x_t": jnp.asarray(points() * process.noise_time),
        "t": jnp.asarray(t),
        "x0": jnp.asarray(points()),
        "conditions": {"label": jnp.asarray(random.integers(0, 3, n), jnp.int32)},
        "dropout_keys": jax.random.split(jax.random.key(0), n),
    }


@pytest.mark.parametrize("loss", ["mse", "pseudo_huber"])
@pytest.mark.parametrize("process", [EDM(), FLOW], ids=["edm", "flow"])
def test_loss_and_gradients_equal_the_reference(process, loss):
    student = bench.mlp_student(process, num_classes=3, width=16)
    huber_c = 0.03 if loss == "pseudo_huber" else 0.0
    method = KnowledgeDistillation(student, (process.noise_time,), loss, huber_c)
    params, examples = random_params(student.denoiser.network, 1, 0.3), random_examples(process)
    gradients, metrics = jax.jit(jax.grad(method.loss_and_metrics, has_aux=True))(params, examples)

    leaves = jax.tree.map(lambda a: torch.tensor(np.asarray(a), requires_grad=True), params)
    x_t, t, x0 = (torch.tensor(np.asarray(examples[name])) for name in ("x_t", "t", "x0"))
    label = torch.tensor(np.asarray(examples["conditions"]["label"])).long()
    denoise = torch_kd.denoise_edm if process == EDM() else torch_kd.denoise_flow
    answer = denoise(leaves, x_t.reshape(-1, 2), t, label, 3)
    target = x0.reshape(-1, 2)
    expected = (
        torch_kd.half_mean_square(answer, target)
        if loss == "mse"
        else torch_kd.pseudo_huber(answer, target, huber_c)
    )
    expected.backward()
    np.testing.assert_allclose(metrics["loss"], expected.item(), rtol=2e-6)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(leaves), strict=True):
        scale = np.abs(theirs.grad.numpy()).max()
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=2e-6 * scale)


def test_examples_have_the_states_of_their_times():
    student = bench.mlp_student(EDM())
    method = KnowledgeDistillation(student, (80.0, 2.0, 0.5))
    path = jnp.broadcast_to(
        jnp.asarray([80.0, 2.0, 0.5])[None, :, None, None, None], (64, 3, 1, 1, 2)
    )
    batch = {
        "image": jnp.zeros((64, 1, 1, 2)),
        "conditions": {"label": jnp.zeros(64, jnp.int32)},
        "path": path,
    }
    examples = jax.jit(method.draw_examples)(batch, jax.random.key(0))
    np.testing.assert_array_equal(examples["x_t"][:, 0, 0, 0], examples["t"])
    assert set(np.unique(examples["t"])) == {80.0, 2.0, 0.5}


def test_noise_is_scaled_to_the_first_time():
    student = bench.mlp_student(EDM())
    noise = jax.random.normal(jax.random.key(1), (4, 1, 1, 2))
    batch = {"image": jnp.zeros((4, 1, 1, 2)), "noise": noise}
    examples = KnowledgeDistillation(student, (80.0,)).draw_examples(batch, jax.random.key(0))
    np.testing.assert_array_equal(examples["x_t"], 80.0 * noise)
    assert (examples["t"] == 80.0).all()


def test_microbatches_make_the_same_update():
    batch = {
        "image": jax.random.normal(jax.random.key(1), (12, 1, 1, 2)),
        "noise": jax.random.normal(jax.random.key(2), (12, 1, 1, 2)),
        "conditions": {"label": jnp.arange(12, dtype=jnp.int32) % 3},
    }
    metrics = []
    for parts in (1, 3):
        student = bench.mlp_student(FLOW, num_classes=3, label_dropout=0.5, num_microbatches=parts)
        method = KnowledgeDistillation(student, (1.0,))
        state = jax.jit(method.init)(jax.random.key(0))
        metrics.append(jax.jit(method.update)(state, batch, jax.random.key(3))[1])
    for name in metrics[0]:
        if name != "student_std":  # a mean of the parts' own
            np.testing.assert_allclose(metrics[0][name], metrics[1][name], rtol=1e-5, atol=1e-6)


def exact_pairs(process, path_times, count=16384):
    """x0 [n, 1, 1, 2], states [n, k, 1, 1, 2] and their times, of the mixture's exact ODE."""
    sampler = Sampler(bench.exact_teacher(process).denoiser, make_solver("heun"))
    spacing = "trailing" if isinstance(process, DDPM) else None
    times, kept = insert_times(schedule(process, 24, spacing), path_times)
    noise, x0, path = sampler.path({}, image_keys(7, np.arange(count)), None, times, kept)
    start = noise[:, None] * process.start_scale(jnp.float32(times[0]))
    return x0, jnp.concatenate([start, path], axis=1), tuple(map(float, times[[0, *kept]]))


CASES = {
    "edm": (EDM(), (), 0.05),
    "edm_two_steps": (EDM(), (0.8,), 0.06),
    "flow": (FLOW, (), 0.05),
    "ddpm_two_steps": (DDPM(prediction="velocity"), (500.0,), 0.08),
}


@pytest.mark.parametrize("case", ["edm_two_steps", "flow", long("edm"), long("ddpm_two_steps")])
def test_student_of_the_exact_teacher(case):
    """One or two steps from the exact ODE's pairs; undistilled, one step is 0.53 away."""
    process, path_times, ceiling = CASES[case]
    x0, states, times = exact_pairs(process, path_times)
    scale = 0.01 if isinstance(process, DDPM) else 1.0
    steps = 1200
    student = bench.mlp_student(process, steps=steps, learning_rate=3e-3, time_scale=scale)
    method = KnowledgeDistillation(student, times)

    def batch(key):
        chosen = jax.random.randint(key, (256,), 0, x0.shape[0])
        return {"image": x0[chosen], "path": states[chosen]}

    state, _ = bench.train(method, steps=steps, batch=batch)
    points = bench.sample_points(
        student.denoiser, method.weights(state)["ema_0.99"], times=(*times, process.clean_time)
    )
    reached = bench.sliced_wasserstein(points, bench.data_points())
    assert reached < ceiling
    assert bench.undistilled_distance(process) > 5 * reached


def kd_config(**changes):
    config = default_config()
    config.method.name = "kd"
    config.data.name = "pairs"
    config.process.name = "flow"
    config.model.update(image_size=8, in_channels=1)
    config.model.dit.update(hidden_size=32, depth=1, num_heads=2)
    config.model.dit.learn_sigma = False
    config.sampling.update(solver="consistency", steps=2)
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    return resolve_config(config)


def test_built_from_a_configuration():
    method = build(kd_config())
    assert method.times == (1.0, 0.5) and method.loss == "mse" and method.frozen_names == ()
    assert build(kd_config(**{"sampling.times": (1.0, 0.25, 0.0)})).times == (1.0, 0.25)
    method = build(kd_config(**{"method.kd.loss": "pseudo_huber", "teacher.path": "runs/x"}))
    assert method.huber_c == pytest.approx(0.00054 * 8) == default_huber_c((8, 8, 1))
    assert method.frozen_names == ("teacher",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.name": "digits"}, "learns from pairs"),
        ({"sampling.solver": "heun"}, "'euler' or 'consistency'"),
        ({"method.kd.huber_c": 0.1}, "would do nothing"),
        ({"method.kd.loss": "l1"}, "expected one of mse, pseudo_huber"),
        ({"teacher.guidance_scale": 2.0}, "the pairs were made with"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        kd_config(**changes)


def test_batches_of_other_data_are_refused():
    method = KnowledgeDistillation(bench.mlp_student(EDM()), (80.0, 1.0))
    image = jnp.zeros((2, 1, 1, 2))
    with pytest.raises(ValueError, match=r"config.data.name='pairs'"):
        method.draw_examples({"image": image}, jax.random.key(0))
    with pytest.raises(ValueError, match=r"1 states an example, the student 2 steps"):
        method.draw_examples({"image": image, "noise": image}, jax.random.key(0))


def test_distance_of_equal_images_is_zero():
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    for loss, c in (("mse", 0.0), ("pseudo_huber", 0.1)):
        np.testing.assert_allclose(distance(x, x, loss, c), np.zeros(3), atol=1e-7)
