"""Heads against PyTorch, at the sizes of U-Nets and transformers, down to single pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.config import ConfigError
from dit_jax.distill.adversarial import (
    approximate_r1,
    discriminator_loss,
    feature_indices,
    generator_loss,
    saturation_metrics,
)
from dit_jax.distill.discriminator import Discriminator, group_count
from tests.models.conftest import perturbed
from tests.references import torch_dmd2


def torch_head(head, shape):
    side, _, channels = shape
    if head == "unet":
        return torch_dmd2.unet_head(side, channels, group_count(channels))
    return torch_dmd2.transformer_head(channels, group_count(channels // 2))


@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        ("unet", ((32, 32, 64), (16, 16, 64), (8, 8, 80))),
        ("unet", ((2, 2, 24), (1, 1, 128))),
        ("transformer", ((16, 16, 24), (4, 4, 96))),
    ],
)
def test_heads_equal_pytorch(head, shapes):
    discriminator = Discriminator(head, shapes)
    params = perturbed(jax.jit(discriminator.init)(jax.random.key(0)), jax.random.key(1), 0.2)
    keys = jax.random.split(jax.random.key(2), len(shapes))
    features = tuple(
        jax.random.normal(key, (3, *shape)) for key, shape in zip(keys, shapes, strict=True)
    )

    def total(features):
        logits = discriminator.apply(params, features)
        return jnp.sum(jnp.sin(logits)), logits

    gradients, logits = jax.jit(jax.grad(total, has_aux=True))(features)
    numpy = jax.tree.map(np.asarray, params)
    for i, shape in enumerate(shapes):
        module = torch_dmd2.load_head(torch_head(head, shape), numpy["heads"][f"head{i}"])
        # In float64: its float32 variance of few values is badly rounded.
        module, x = module.double(), torch.from_numpy(np.array(features[i], np.float64))
        x = x.permute(0, 3, 1, 2).clone().requires_grad_(True)
        expected = module(x)[:, 0]
        torch.sin(expected).sum().backward()
        np.testing.assert_allclose(logits[:, i], expected.detach().numpy(), rtol=1e-3, atol=1e-3)
        assert x.grad is not None
        expected_gradient = x.grad.numpy().transpose(0, 2, 3, 1)
        # Of groups of four values at one pixel, normalised: float32 rounding is amplified.
        tolerance = 2e-2 * np.abs(expected_gradient).max()
        np.testing.assert_allclose(gradients[i], expected_gradient, rtol=0, atol=tolerance)


def test_initialisation_is_pytorchs():
    params = jax.jit(Discriminator("unet", ((8, 8, 64),)).init)(jax.random.key(0))
    conv = params["heads"]["head0"]["convs"]["conv0"]
    limit = (16 * 64) ** -0.5
    for leaf in (conv["kernel"], conv["bias"]):
        assert limit * 0.9 < np.abs(leaf).max() <= limit


def test_one_token_grids():
    discriminator = Discriminator("transformer", ((1, 1, 32),))
    params = jax.jit(discriminator.init)(jax.random.key(0))
    logits = jax.jit(discriminator.apply)(
        params, (jax.random.normal(jax.random.key(1), (4, 1, 1, 32)),)
    )
    assert logits.shape == (4, 1)
    assert np.std(logits) > 0
    assert discriminator.flops_per_example == 2 * 32 * 16


def test_group_counts():
    assert [group_count(c) for c in (1, 4, 14, 32, 48, 256, 576, 768)] == [
        1,
        1,
        2,
        8,
        24,
        32,
        32,
        32,
    ]


def test_flops_of_dmd2s_classifier():
    """Two 4 x 4 convolutions of 768 channels, at 4 x 4 and at 1 x 1 pixels."""
    expected = 2 * 16 * 768**2 * (16 + 1)
    assert Discriminator("unet", ((8, 8, 768),)).flops_per_example == expected


def test_losses():
    real, fake = jnp.array([[2.0, -1.0], [0.5, 3.0]]), jnp.array([[-2.0, 1.0], [0.5, -3.0]])
    softplus = lambda x: np.log1p(np.exp(np.asarray(x)))  # noqa: E731
    np.testing.assert_allclose(generator_loss(fake), softplus(-fake).mean(), rtol=1e-6)
    expected = softplus(-real).mean() + softplus(fake).mean()
    np.testing.assert_allclose(discriminator_loss(real, fake), expected, rtol=1e-6)
    np.testing.assert_allclose(approximate_r1(real, real + 0.5), 0.25, rtol=1e-6)
    metrics = saturation_metrics(real, fake)
    np.testing.assert_allclose(metrics["discriminator_accuracy"], 0.5 * (0.75 + 0.5))


def test_wrong_heads_are_refused():
    with pytest.raises(ValueError, match="expected one of"):
        Discriminator("mlp", ((8, 8, 4),))
    with pytest.raises(ValueError, match="at least one"):
        Discriminator("unet", ())
    discriminator = Discriminator("unet", ((8, 8, 4),))
    with pytest.raises(ValueError, match="reads maps of"):
        discriminator.apply(discriminator.init(jax.random.key(0)), (jnp.zeros((2, 4, 4, 4)),))


def test_wrong_feature_indices_are_refused():
    shapes = ((32, 32, 256), (16, 16, 256), (8, 8, 256))
    assert feature_indices((), shapes, "unet", "key") == (2,)
    assert feature_indices((), ((4, 4, 96),) * 5, "transformer", "key") == (2,)
    assert feature_indices((0, 2), shapes, "unet", "key") == (0, 2)
    for wrong in ((3,), (-1,), (1, 0), (1, 1)):
        with pytest.raises(ConfigError, match=r"key.*ascending numbers of 0 to 2"):
            feature_indices(wrong, shapes, "unet", "key")
