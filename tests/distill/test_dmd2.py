"""DMD2: losses and gradients against PyTorch, the turns, the mixture, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dit_jax.config import ConfigError, default_config
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import DDPM, EDM, LogNormal, Polynomial
from dit_jax.diffusion.samplers import make_solver
from dit_jax.distill.adversarial import Adversary
from dit_jax.distill.discriminator import Discriminator
from dit_jax.distill.dmd2 import DMD2
from dit_jax.distill.f_distill import FDistill
from dit_jax.distill.few_step import FewSteps
from dit_jax.distill.student import Student, Teacher
from dit_jax.experiment import build_method, resolve_config
from dit_jax.models import Request
from tests.distill import few_step_bench as few
from tests.distill import mixture as bench
from tests.long import long
from tests.models.conftest import perturbed
from tests.references import torch_dmd2

SIGMA_DATA = 0.5


@pytest.fixture(scope="module")
def edm():
    """A method on EDM with three random MLPs and a discriminator of two heads, and a batch."""
    process = EDM(sigma_data=SIGMA_DATA)
    network = bench.MlpNetwork(width=32, depth=3)
    heads = Discriminator("unet", tuple(network.feature_shapes[i] for i in (0, 2)))
    method = DMD2(
        student=Student(Denoiser(network, process), optax.sgd(0.1)),
        teacher=Teacher(Denoiser(network, process)),
        steps=FewSteps(process, make_solver("consistency"), (80.0, 0.0)),
        timesteps=LogNormal(process, mean=-0.5),
        fake_score_optimizer=optax.sgd(0.1),
        adversary=Adversary(heads, (0, 2), optax.sgd(0.1)),
        gan_weight=0.3,
    )
    keys, init = jax.random.split(jax.random.key(0), 6), jax.jit(network.init)
    params = {
        name: perturbed(init(key), key, 0.1)
        for name, key in zip(("student", "teacher", "fake_score"), keys, strict=False)
    }
    params["discriminator"] = perturbed(jax.jit(heads.init)(keys[3]), keys[4], 0.1)
    return method, params, bench.GaussianMixture().batch(keys[5], 8)


def draw(method, batch, key, phase):
    return jax.jit(method.draw_examples, static_argnums=2)(batch, key, phase)


def to_torch(x):
    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))


def torch_players(params):
    numpy = jax.tree.map(np.asarray, params)
    networks = {
        name: torch_dmd2.Mlp(numpy[name], SIGMA_DATA)
        for name in ("student", "teacher", "fake_score")
    }
    heads = [
        torch_dmd2.load_head(
            torch_dmd2.unet_head(1, 32, 8), numpy["discriminator"]["heads"][f"head{i}"]
        )
        for i in (0, 1)
    ]

    def classify(features):
        return torch.cat([head(x) for head, x in zip(heads, features, strict=True)], 1)

    return networks, classify, heads


def assert_gradients_equal(ours, module):
    for name, layer in ours.items():
        for leaf, value in layer.items():
            expected = module.layers[f"{name}_{leaf}"].grad.numpy()
            np.testing.assert_allclose(value, expected, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("divergence", ["", "kl", "js"])
def test_student_loss_and_gradients_equal_the_papers(edm, divergence):
    method, params, batch = edm
    weights = None
    if divergence:  # f-distill: DMD2 with a weight of every example's gradient
        fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
        method = FDistill(**fields, divergence=divergence)

        def weights(logits):
            ratio = logits.mean(1).exp().clamp(0.1, 20.0)
            with torch.enable_grad():
                h = torch_dmd2.divergence_weight(ratio, divergence)
            return (h / h.mean()).float()

    examples = draw(method, batch, jax.random.key(3), "student")
    frozen = {"teacher": params["teacher"]}
    gradients, metrics = jax.jit(jax.grad(method.student_loss, has_aux=True))(
        params["student"], examples, frozen, params
    )

    networks, classify, _ = torch_players(params)
    t, eps = torch.from_numpy(np.array(examples["t"])), to_torch(examples["eps"])
    z = 80.0 * to_torch(examples["student_noise"])
    x0, _ = networks["student"](z, torch.full((8,), 80.0))

    def real(x, t):
        x0, hidden = networks["teacher"](x, t)
        return x0, (hidden[0], hidden[2])

    def fake(x, t):
        return networks["fake_score"](x, t)[0]

    loss, matching, gan = torch_dmd2.student_loss(
        x0, real, fake, classify, t, eps, gan_weight=0.3, weights=weights
    )
    loss.backward()
    found = [metrics[name] for name in ("loss", "vsd", "gan_generator")]
    expected = [value.item() for value in (loss, matching, gan)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert_gradients_equal(gradients, networks["student"])
    if divergence:
        assert metrics["h_max"] > 1.01 > 0.99 > metrics["h_min"]


def test_critic_loss_and_gradients_equal_the_papers(edm):
    method, params, batch = edm
    examples = draw(method, batch, jax.random.key(4), "critic")
    frozen = {"teacher": params["teacher"]}
    trained = {name: params[name] for name in ("fake_score", "discriminator")}
    gradients, metrics = jax.jit(jax.grad(method.critic_loss, has_aux=True))(
        trained, examples, frozen, params["student"]
    )

    networks, classify, heads = torch_players(params)
    t, eps = torch.from_numpy(np.array(examples["t"])), to_torch(examples["eps"])
    t_real, eps_real = (
        torch.from_numpy(np.array(examples["t_real"])),
        to_torch(examples["eps_real"]),
    )
    x0 = networks["student"](80.0 * to_torch(examples["student_noise"]), torch.full((8,), 80.0))[0]
    x0 = x0.detach()
    score = torch_dmd2.denoising_loss(
        x0, lambda x, t: networks["fake_score"](x, t)[0], t, eps, sigma_data=SIGMA_DATA
    )

    def features(x, t):
        hidden = networks["teacher"](x, t)[1]
        return hidden[0], hidden[2]

    real_logits = classify(
        features(torch_dmd2.renoise(to_torch(batch["image"]), eps_real, t_real), t_real)
    )
    fake_logits = classify(features(torch_dmd2.renoise(x0, eps, t), t))
    gan = torch_dmd2.classification_loss(real_logits, fake_logits)
    (score + gan).backward()
    found = [metrics[name] for name in ("loss", "fake_score", "gan_discriminator")]
    np.testing.assert_allclose(found, [(score + gan).item(), score.item(), gan.item()], rtol=1e-4)
    assert_gradients_equal(gradients["fake_score"], networks["fake_score"])
    for i, head in enumerate(heads):
        ours = gradients["discriminator"]["heads"][f"head{i}"]["logit"]["kernel"]
        expected = head[-2].weight.grad.numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-6)


def test_discriminator_on_the_fake_score_trains_it_too(edm):
    """As in the paper's released code: the classification loss reaches the network it reads."""
    method, params, batch = edm
    adversary = dataclasses.replace(method.adversary, features_of="fake_score", r1_weight=2.0)
    trained = {name: params[name] for name in ("fake_score", "discriminator")}

    def gradients(gan_critic_weight):
        other = dataclasses.replace(
            method, adversary=adversary, gan_critic_weight=gan_critic_weight
        )
        examples = draw(other, batch, jax.random.key(4), "critic")
        return jax.jit(jax.grad(other.critic_loss, has_aux=True))(
            trained, examples, {"teacher": params["teacher"]}, params["student"]
        )

    (weak, metrics), (strong, _) = gradients(1e-6), gradients(1.0)
    assert metrics["r1"] > 0
    kernels = [g["fake_score"]["layer0"]["kernel"] for g in (weak, strong)]
    assert jnp.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_teachers_features_and_guidance_in_one_go():
    """The guided prediction is that without features; features are the conditional ones."""
    process = few.PROCESS
    network = bench.MlpNetwork(width=16, num_classes=3)
    params = perturbed(network.init(jax.random.key(0)), jax.random.key(1), 0.1)
    denoiser = Denoiser(network, process)
    teacher = Teacher(denoiser, 2.5, (0.2, 0.6))
    x, t = jax.random.normal(jax.random.key(2), (4, 1, 1, 2)), jnp.array([0.1, 0.3, 0.5, 0.9])
    conditions = {"label": jnp.arange(4) % 3}
    prediction, features = teacher.predict_with_features(
        params, Request(x, t, conditions, features=(1,))
    )
    expected = teacher.predict(params, Request(x, t, conditions))
    np.testing.assert_allclose(prediction.x0, expected.x0, atol=1e-5)
    np.testing.assert_allclose(prediction.eps, expected.eps, atol=1e-5)
    (own,) = denoiser.features(params, Request(x, t, conditions, features=(1,)))
    np.testing.assert_allclose(features[0], own, atol=1e-6)


@pytest.mark.parametrize("kind", ["x0", "eps", "velocity"])
def test_other_fake_score_losses(edm, kind):
    """Squared errors of x0, eps and velocity differ by known factors on EDM: sigma and 1."""
    method, _, _ = edm
    method = dataclasses.replace(method, fake_score_loss=kind)
    process = method.student.denoiser.process
    x0, eps, raw = (jax.random.normal(jax.random.key(i), (4, 1, 1, 2)) for i in range(3))
    t = jnp.full(4, 0.7)
    x_t = process.add_noise(x0, eps, t)
    error = process.interpret(raw, x_t, t).x0 - x0
    expected = jnp.mean(error**2) / (1.0 if kind == "x0" else 0.7**2)
    np.testing.assert_allclose(method.denoising_loss(raw, x0, eps, t, x_t), expected, rtol=1e-4)


def test_turns_and_their_states(edm):
    method, params, batch = edm
    assert [method.phase(step) for step in range(6)] == ["student", *["critic"] * 4, "student"]
    frozen = {"teacher": params["teacher"]}
    start = jax.jit(method.init)(jax.random.key(0), params["student"], frozen)
    jax.tree.map(
        np.testing.assert_array_equal, start.players["fake_score"].params, params["teacher"]
    )
    update = jax.jit(method.update, static_argnums=4)
    state, metrics = update(start, batch, jax.random.key(1), frozen, "student")
    assert state.step == 1
    assert {"loss", "vsd", "gan_generator", "student_mean", "gradient_norm"} <= set(metrics)
    jax.tree.map(np.testing.assert_array_equal, state.players, start.players)
    state, metrics = update(state, batch, jax.random.key(2), frozen, "critic")
    assert state.step == 2
    assert {"fake_score_gradient_norm", "discriminator_gradient_norm", "fake_logits"} <= set(
        metrics
    )
    for name, player in state.players.items():
        changed = jax.tree.map(
            lambda a, b: bool(np.any(a != b)), player.params, start.players[name].params
        )
        assert any(jax.tree.leaves(changed)), name
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(start)


def test_microbatches_change_nothing(edm):
    method, params, batch = edm
    frozen = {"teacher": params["teacher"]}
    split = dataclasses.replace(
        method, student=dataclasses.replace(method.student, num_microbatches=4)
    )
    state = jax.jit(method.init)(jax.random.key(0), params["student"], frozen)
    update, update_in_parts = (jax.jit(m.update, static_argnums=4) for m in (method, split))
    for phase in method.phases:
        whole, _ = update(state, batch, jax.random.key(1), frozen, phase)
        parts, _ = update_in_parts(state, batch, jax.random.key(1), frozen, phase)
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_polynomial_times_are_edms_levels():
    times = Polynomial(EDM())
    ramp = np.linspace(0, 1, 1000)
    expected = (0.002 ** (1 / 7) + ramp * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    np.testing.assert_allclose(times.levels, expected, rtol=1e-9)
    drawn = np.asarray(times.sample(jax.random.key(0), 20_000))
    np.testing.assert_allclose([drawn.min(), drawn.max()], expected[[2, 998]], rtol=1e-4)
    assert abs(np.median(drawn) / expected[500] - 1) < 0.1


def test_simulated_inputs_are_the_samplers(edm):
    """What a step starts from is what the sampler passes on to it."""
    process = few.PROCESS
    denoiser, params = few.mlp_denoiser()
    for solver in ("euler", "consistency"):
        steps = few.few_steps((1.0, 0.6, 0.3, 0.0), solver, "simulation")
        drawn = steps.draw(jax.random.key(0), (4, 1, 1, 2))
        predict = lambda x, t: denoiser.predict(params, Request(x, t, {}))  # noqa: E731
        for step in range(3):
            examples = {**drawn, "student_step": jnp.full(4, step)}
            x, t = steps.start(predict, examples)
            expected = drawn["student_noise"]
            for i in range(step):
                time, following = jnp.full(4, steps.times[i]), steps.times[i + 1]
                prediction = predict(expected, time)
                keys = [jax.random.fold_in(key, i) for key in drawn["solver_keys"]]
                fresh = jnp.stack([jax.random.normal(key, (1, 1, 2)) for key in keys])
                eps = prediction.eps if solver == "euler" else fresh
                expected = process.add_noise(prediction.x0, eps, jnp.full(4, following))
            np.testing.assert_allclose(x, expected, atol=1e-5)
            np.testing.assert_allclose(t, steps.times[step])


SCHEDULES = {
    "one step": {},
    "data, 2 steps": {"times": (1.0, 0.3, 0.0), "inputs": "data"},
    "simulation, 2 steps": {"times": (1.0, 0.3, 0.0), "inputs": "simulation"},
    # Fresh noise lets go of what an earlier step did wrong; Euler's steps keep it.
    "simulation, 2 Euler steps": {
        "times": (1.0, 0.2, 0.0),
        "inputs": "simulation",
        "solver": "euler",
    },
}


@pytest.mark.parametrize(
    "name",
    [
        "simulation, 2 steps",
        long("one step"),
        long("data, 2 steps"),
        long("simulation, 2 Euler steps"),
    ],
)
def test_learns_the_mixture(name):
    steps, rate = (3000, 1e-3) if "2 steps" in name else (2500, 2e-3)
    method = DMD2(
        **few.parts(steps=steps, learning_rate=rate, **SCHEDULES[name]),
        fake_score_optimizer=optax.adam(2e-3),
        gan_weight=0.0,
    )
    distance, _ = few.reached(method, steps=steps)
    assert distance < 0.105
    assert few.undistilled() > 5 * distance


def test_learns_the_mixture_with_a_discriminator():
    method = DMD2(
        **few.parts(steps=2000),
        fake_score_optimizer=optax.adam(2e-3),
        adversary=few.adversary(),
        gan_weight=0.001,
    )
    distance, metrics = few.reached(method, steps=2000, batch_size=128)
    assert distance < 0.105
    assert few.undistilled() > 5 * distance
    assert 0.3 < metrics["critic"]["discriminator_accuracy"] < 0.7


def small_config(**changes):
    config = default_config()
    config.model.update(image_size=8, in_channels=1, num_classes=3)
    config.model.dit.update(hidden_size=16, depth=3, num_heads=2)
    config.model.dit.learn_sigma = False
    config.process.name = "flow"
    config.method.name = "dmd2"
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    config.training.batch_size = 8
    config.update_from_flattened_dict(changes)
    return config


def test_builds_from_a_config():
    changes = {"method.dmd2.feature_indices": (0, 2), "teacher.guidance_scale": 2.0}
    config = resolve_config(small_config(**changes))
    method = build_method(config)
    assert isinstance(method, DMD2)
    assert method.adversary.indices == (0, 2)
    assert method.teacher.guidance_scale == 2.0
    forward = method.student.denoiser.network.flops_per_example
    heads = method.adversary.discriminator.flops_per_example
    np.testing.assert_allclose(method.flops_of("student"), (3 + 1 + 2 + 1) * forward + 2 * heads)
    np.testing.assert_allclose(method.flops_of("critic"), (1 + 3 + 2) * forward + 6 * heads)


REFUSED = {
    "batch too small": ({"training.batch_size": 8, "training.num_microbatches": 8}, "num_microb"),
    "steps against times": (
        {"sampling.times": (1.0, 0.5, 0.0), "sampling.steps": 3},
        r"times=.*2 steps, but steps=3",
    ),
    "solver": ({"sampling.solver": "heun"}, "consistency"),
    "features": ({"method.dmd2.feature_indices": (3,)}, "ascending numbers of 0 to 2"),
    "frequency": ({"method.dmd2.student_update_frequency": 1}, "expected 2 or more"),
    "idle discriminator": (
        {"method.dmd2.gan_weight": 0.0, "method.dmd2.same_noise": True},
        "gan_weight is 0",
    ),
    "idle noise": ({"method.dmd2.r1_noise": 0.2}, "r1_weight is 0"),
    "idle simulation": ({"method.dmd2.student_input": "simulation"}, "would do nothing"),
    "unknown input": (
        {"method.dmd2.student_input": "noise", "sampling.steps": 2},
        "data, simulation",
    ),
    "unknown loss": ({"method.dmd2.fake_score_loss": "l1"}, "raw, x0, eps, velocity"),
    "unknown features": ({"method.dmd2.features_of": "student"}, "teacher"),
    "idle weighting": (
        {"method.dmd2.fake_score_loss": "x0", "loss.weighting": "min_snr"},
        "would do nothing",
    ),
    "second time": ({"model.second_time": "r"}, "second_time"),
    "polynomial of flow": ({"timesteps.name": "polynomial"}, "Polynomial is of EDM"),
    "other method's key": ({"method.ladd.r1_weight": 1.0}, "would do nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_config_errors(name):
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        resolve_config(small_config(**changes))


def test_schedule_errors():
    with pytest.raises(ValueError, match="end before clean data"):
        FewSteps(DDPM(), make_solver("euler"), (999.0, 499.0))
