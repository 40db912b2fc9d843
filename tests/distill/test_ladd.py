"""LADD: the losses of its discriminator, what is never computed, the mixture, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.config import ConfigError
from dit_jax.distill.adversarial import discriminator_loss, generator_loss
from dit_jax.distill.ladd import LADD
from dit_jax.distill.student import Teacher
from dit_jax.experiment import build_method, resolve_config
from dit_jax.models import Request
from tests.distill import few_step_bench as few
from tests.distill.test_dmd2 import draw, small_config
from tests.long import only_long

STEPS = 2400


def create(**options):
    denoiser, _ = few.mlp_denoiser()
    parts = few.parts(steps=STEPS, frequency=2, learning_rate=5e-4) | {"teacher": Teacher(denoiser)}
    # The discriminator comes to rest together with the student: else where it stops is chance.
    rate = optax.cosine_decay_schedule(1e-3, STEPS // 2)
    adversary = few.adversary((0, 1, 2), "teacher", learning_rate=rate, beta1=0.5, **options)
    return LADD(**parts, adversary=adversary)


def test_losses_are_of_features_of_renoised_images():
    method = create(r1_weight=3.0, r1_noise=0.1)
    denoiser, params = few.mlp_denoiser()
    heads = method.adversary.discriminator
    trained = {"discriminator": jax.jit(heads.init)(jax.random.key(0))}
    batch = {"image": 0.5 * jax.random.normal(jax.random.key(1), (6, 1, 1, 2))}
    examples = draw(method, batch, jax.random.key(2), "critic")
    x0 = denoiser.x0(params, Request(examples["student_noise"], jnp.ones(6), {}))

    @jax.jit
    def logits(x, eps, t):
        x_t = few.PROCESS.add_noise(x, eps, t)
        maps = denoiser.features(params, Request(x_t, t, {}, features=(0, 1, 2)))
        return heads.apply(trained["discriminator"], maps)

    fake = logits(x0, examples["eps"], examples["t"])
    frozen = {"teacher": params}
    loss, _ = jax.jit(method.student_loss)(params, examples, frozen, trained)
    np.testing.assert_allclose(loss, generator_loss(fake), rtol=1e-5)
    real = logits(batch["image"], examples["eps_real"], examples["t_real"])
    moved = batch["image"] + 0.1 * examples["r1_noise"]
    penalty = jnp.mean((real - logits(moved, examples["eps_real"], examples["t_real"])) ** 2)
    loss, metrics = jax.jit(method.critic_loss)(trained, examples, frozen, params)
    np.testing.assert_allclose(metrics["r1"], penalty, rtol=1e-4)
    np.testing.assert_allclose(loss, discriminator_loss(real, fake) + 3 * penalty, rtol=1e-5)


def test_same_noise_draws_no_other():
    method = create(same_noise=True)
    batch = {"image": jnp.zeros((4, 1, 1, 2))}
    examples = draw(method, batch, jax.random.key(2), "critic")
    assert not {"t_real", "eps_real", "r1_noise"} & set(examples)
    _, params = few.mlp_denoiser()
    trained = {"discriminator": jax.jit(method.adversary.discriminator.init)(jax.random.key(0))}
    loss, _ = jax.jit(method.critic_loss)(trained, examples, {"teacher": params}, params)
    assert jnp.isfinite(loss)


@only_long  # its adversary is that of DMD2 and f-distill, which learn in every run of the tests
def test_learns_the_mixture():
    distance, metrics = few.reached(create(), steps=STEPS, batch_size=256)
    assert distance < 0.105
    assert few.undistilled() > 5 * distance
    assert 0.3 < metrics["critic"]["discriminator_accuracy"] < 0.75


def test_builds_from_a_config():
    changes = {"method.name": "ladd", "method.ladd.feature_indices": (0, 2)}
    config = resolve_config(small_config(**changes))
    method = build_method(config)
    assert isinstance(method, LADD)
    assert set(method.critics) == {"discriminator"}
    assert method.flops_per_example > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.guidance_scale": 2.0}, "guidance_scale"),
        ({"loss.weighting": "min_snr"}, "would do nothing"),
        ({"timesteps.name": "speed"}, "has not"),
        ({"training.batch_size": 2, "training.num_microbatches": 2}, "fewer than 2"),
        ({"method.ladd.r1_weight": -1.0}, "r1_weight=-1.0: expected at least 0"),
        ({"method.dmd2.gan_weight": 0.5}, "would do nothing"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(small_config(**{"method.name": "ladd", **changes}))
