"""FastGen's own classes beside ours: losses and gradients of DMD2, f-distill and LADD.

For whoever has a checkout of NVlabs/FastGen: DIT_JAX_FASTGEN names it.
"""

import copy
import os
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from benchmark_fastgen import make_importable
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import EDM, LogNormal
from dit_jax.diffusion.samplers import make_solver
from dit_jax.distill.adversarial import Adversary
from dit_jax.distill.discriminator import Discriminator
from dit_jax.distill.dmd2 import DMD2
from dit_jax.distill.f_distill import DIVERGENCES, FDistill, RatioHistogram
from dit_jax.distill.few_step import FewSteps
from dit_jax.distill.ladd import LADD
from dit_jax.distill.student import Student, Teacher
from dit_jax.models import Network, SongUNetConfig
from tests.references.torch_edm_params import from_torch

CHECKOUT = Path(os.environ.get("DIT_JAX_FASTGEN", ""))
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "fastgen" / "methods").is_dir(), reason="DIT_JAX_FASTGEN names no checkout"
)
# Features are taken after the fourth block of a resolution: their code knows it by its name.
NETWORK = {"model_channels": 32, "channel_mult": (2, 2, 2), "num_blocks": 4}
FEATURES, CHANNELS, BATCH = (0, 2), 64, 6
GAN_WEIGHT, GUIDANCE = 0.3, 1.7
PROCESS = EDM(sigma_data=0.5)


@pytest.fixture(scope="module")
def theirs():
    """FastGen's student, teacher, fake score and discriminator, every parameter random."""
    make_importable(CHECKOUT)
    from fastgen.networks.discriminators import Discriminator_EDM
    from fastgen.networks.EDM.network import EDMPrecond

    torch.manual_seed(0)
    net = EDMPrecond(
        img_resolution=32,
        img_channels=3,
        label_dim=10,
        model_type="SongUNet",
        dropout=0.0,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in NETWORK.items()},
    )
    players = {"net": net, "teacher": copy.deepcopy(net), "fake_score": copy.deepcopy(net)}
    players["discriminator"] = Discriminator_EDM(set(FEATURES), [32, 16, 8], CHANNELS)
    for module in players.values():
        for name, value in module.named_parameters():
            scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            torch.nn.init.normal_(value, float("norm" in name and "weight" in name), scale)
        module.eval()
    return types.SimpleNamespace(**players)


def model_of(theirs, name, **config):
    """A method's object of theirs, of these networks."""
    from fastgen import methods

    model = getattr(methods, name).__new__(getattr(methods, name))
    torch.nn.Module.__init__(model)
    for player, module in vars(theirs).items():
        setattr(model, player, module)
    model.config = types.SimpleNamespace(
        gan_loss_weight_gen=GAN_WEIGHT,
        guidance_scale=None,
        student_sample_steps=1,
        skip_layers=None,
        fake_score_pred_type="x0",
        gan_use_same_t_noise=True,
        gan_r1_reg_weight=0.0,
        **config,
    )
    return model


def head_params(head: torch.nn.Sequential) -> dict:
    """Ours of one of their heads: convolutions, each but the last with its normalisation."""
    numpy = [
        [np.array(p.detach()) for p in module.parameters()]
        for module in head
        if list(module.parameters())
    ]

    def conv(kernel, bias):
        return {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}

    pairs = zip(numpy[:-1:2], numpy[1:-1:2], strict=True)
    convs = {
        f"conv{i}": {**conv(*both), "norm_scale": norm[0], "norm_bias": norm[1]}
        for i, (both, norm) in enumerate(pairs)
    }
    return {"convs": convs, "logit": conv(*numpy[-1])}


def ours_of(theirs):
    """All parameters by player."""
    heads = theirs.discriminator.discriminator_heads
    params = {
        "student": from_torch(theirs.net.model.state_dict()),
        "teacher": from_torch(theirs.teacher.model.state_dict()),
        "fake_score": from_torch(theirs.fake_score.model.state_dict()),
        "discriminator": {"heads": {f"head{i}": head_params(h) for i, h in enumerate(heads)}},
    }
    return jax.tree.map(jnp.asarray, params)


def method_of(kind, guidance=1.0, **options):
    """Ours."""
    network = Network(SongUNetConfig(image_size=32, in_channels=3, num_classes=10, **NETWORK))
    denoiser = Denoiser(network, PROCESS)
    shapes = tuple(network.feature_shapes[i] for i in FEATURES)
    adversary = Adversary(
        Discriminator("unet", shapes), FEATURES, optax.identity(), same_noise=True
    )
    if kind is not LADD:
        options |= {"gan_weight": GAN_WEIGHT, "fake_score_loss": "x0"}
    return kind(
        student=Student(denoiser, optax.identity()),
        teacher=Teacher(denoiser, guidance),
        steps=FewSteps(PROCESS, make_solver("consistency"), (80.0, 0.0)),
        timesteps=LogNormal(PROCESS, mean=0.5),
        adversary=adversary,
        **options,
    )


@pytest.fixture(scope="module")
def drawn():
    """A batch and all that is random, for both."""
    keys = jax.random.split(jax.random.key(3), 4)
    shape = (BATCH, 32, 32, 3)
    return {
        "x0": jax.random.uniform(keys[0], shape, minval=-1.0),
        "eps": jax.random.normal(keys[1], shape),
        "student_noise": jax.random.normal(keys[2], shape),
        "t": jnp.exp(jax.random.normal(keys[3], (BATCH,))),
        "conditions": {"label": jnp.arange(BATCH) % 10},
        "dropout_keys": None,
        "critic_dropout_keys": None,
    }


def torch_arguments(drawn):
    """(input_student, t_student, t, eps), real data and one-hot labels, in their form."""

    def image(x):
        return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))

    t = torch.from_numpy(np.array(drawn["t"], np.float64))
    label = torch.from_numpy(np.array(drawn["conditions"]["label"])).long()
    condition = torch.nn.functional.one_hot(label, 10).float()
    student = (80.0 * image(drawn["student_noise"]), torch.full_like(t, 80.0))
    return (*student, t, image(drawn["eps"])), image(drawn["x0"]), condition


def assert_same_gradients(found, module):
    """Ours of every parameter of a network of theirs."""
    state = {name: value.grad for name, value in module.model.named_parameters()}
    unused = [name for name, value in state.items() if value is None]
    assert all("augment" in name or "logvar" in name for name in unused)
    expected = from_torch({name: value for name, value in state.items() if value is not None})
    largest = max(np.abs(value).max() for value in jax.tree.leaves(expected))
    assert largest > 0
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        ours = found
        for key in path:
            ours = ours[key.key]
        np.testing.assert_allclose(ours, value, rtol=2e-3, atol=2e-5 * largest, err_msg=str(path))


def student_step(theirs, drawn, name, method, guidance=None, **config):
    """(their losses, our metrics), the gradients compared."""
    model = model_of(theirs, name, **config)
    model.config.guidance_scale = guidance
    for module in vars(theirs).values():
        module.requires_grad_(module is theirs.net).zero_grad()
    if name == "FdistillModel":
        from fastgen.methods.distribution_matching import f_distill as original

        weights = original.all_f_div_weighting_function
        model.f_div_weighting_function = weights[model.config.f_distill.f_div]
        model.bin_num = 4
        theirs.net.bins = torch.ones(4)
    arguments, real, condition = torch_arguments(drawn)
    more = {} if name == "LADDModel" else {"neg_condition": torch.zeros_like(condition)}
    losses, _ = model._student_update_step(*arguments, {"real": real}, condition, **more)
    losses["total_loss"].backward()
    params = ours_of(theirs)
    if name == "FdistillModel":
        params["ratio"] = {"means": jnp.ones(4)}
    gradients, metrics = jax.jit(jax.grad(method.student_loss, has_aux=True))(
        params["student"], drawn, {"teacher": params["teacher"]}, params
    )
    assert_same_gradients(gradients, theirs.net)
    np.testing.assert_allclose(metrics["loss"], losses["total_loss"].item(), rtol=1e-4)
    return losses, metrics


@pytest.mark.parametrize("guidance", [None, GUIDANCE])
def test_dmd2_student(theirs, drawn, guidance):
    method = method_of(DMD2, guidance or 1.0)
    losses, metrics = student_step(theirs, drawn, "DMD2Model", method, guidance)
    np.testing.assert_allclose(metrics["vsd"], losses["vsd_loss"].item(), rtol=1e-4)
    np.testing.assert_allclose(metrics["gan_generator"], losses["gan_loss_gen"].item(), rtol=1e-4)


# Theirs of 'rkl' raises TypeError: its weight has no batch dimension.
@pytest.mark.parametrize(
    ("divergence", "normalised"),
    [*((name, False) for name in DIVERGENCES if name != "rkl"), ("kl", True)],
)
def test_f_distill_student(theirs, drawn, divergence, normalised):
    options = types.SimpleNamespace(
        f_div=divergence,
        ratio_lower=0.1,
        ratio_upper=20.0,
        ratio_normalization=normalised,
        ratio_ema_rate=0.3,
        bin_num=4,
    )
    histogram = RatioHistogram(PROCESS, bins=4, decay=0.3) if normalised else None
    method = method_of(FDistill, GUIDANCE, divergence=divergence, histogram=histogram)
    losses, metrics = student_step(
        theirs, drawn, "FdistillModel", method, GUIDANCE, f_distill=options
    )
    np.testing.assert_allclose(metrics["vsd"], losses["f_distill_loss"].item(), rtol=1e-4)
    for name in ("min", "max"):
        found = metrics[f"h_{name}"]
        np.testing.assert_allclose(found, losses[f"{name}_h"].item(), rtol=1e-4)
    assert metrics["h_max"] > 1.01 > 0.99 > metrics["h_min"]


def test_ladd_student(theirs, drawn):
    student_step(theirs, drawn, "LADDModel", method_of(LADD))


@pytest.mark.parametrize("kind", [DMD2, LADD])
def test_critics(theirs, drawn, kind):
    name = f"{kind.__name__}Model"
    model, method = model_of(theirs, name), method_of(kind)
    trained = (theirs.discriminator, *([theirs.fake_score] if kind is DMD2 else []))
    for module in vars(theirs).values():
        module.requires_grad_(module in trained).zero_grad()
    arguments, real, condition = torch_arguments(drawn)
    steps = {DMD2: "_fake_score_discriminator_update_step", LADD: "_discriminator_update_step"}
    losses, _ = getattr(model, steps[kind])(*arguments, real, condition=condition)
    losses["total_loss"].backward()
    params = ours_of(theirs)
    gradients, metrics = jax.jit(jax.grad(method.critic_loss, has_aux=True))(
        {name: params[name] for name in method.critics},
        drawn,
        {"teacher": params["teacher"]},
        params["student"],
    )
    np.testing.assert_allclose(metrics["loss"], losses["total_loss"].item(), rtol=1e-4)
    gan = losses["gan_loss_disc"].item()
    np.testing.assert_allclose(metrics["gan_discriminator"], gan, rtol=1e-4)
    if kind is DMD2:
        assert_same_gradients(gradients["fake_score"], theirs.fake_score)
    for i, head in enumerate(theirs.discriminator.discriminator_heads):
        expected = head[-1].weight.grad.numpy().transpose(2, 3, 1, 0)
        found = gradients["discriminator"]["heads"][f"head{i}"]["logit"]["kernel"]
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())
