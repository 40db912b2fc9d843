import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.configs import edm_cifar10, edm_dit_cifar10, edm_imagenet64
from dit_jax.experiment import build_method, build_sampling, resolve_config
from dit_jax.models import Request


def small():
    """configs/edm_cifar10.py with the smallest network."""
    config = edm_cifar10.get_config()
    config.model.image_size = 4
    config.model.song_unet.update(
        model_channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=()
    )
    return config


@pytest.mark.parametrize(
    ("module", "kimg_half_life", "labels", "evaluations"),
    [
        (edm_cifar10, 500, 9, 35),
        (edm_dit_cifar10, 500, 9, 35),
        (edm_imagenet64, 50_000, None, 511),
    ],
    ids=["cifar10", "dit", "imagenet64"],
)
def test_configurations_have_the_published_hyper_parameters(
    module, kimg_half_life, labels, evaluations
):
    config = resolve_config(module.get_config())
    method = build_method(config)
    steps = 1000 * kimg_half_life / config.training.batch_size
    (average,) = method.averages
    assert average.decay**steps == pytest.approx(0.5, rel=1e-3)
    assert (method.augmentation and method.augmentation.label_dim) == labels
    assert build_sampling(config).evaluations == evaluations


def test_images_are_augmented_and_the_network_is_told():
    method = build_method(resolve_config(small()))
    batch = {"image": jax.random.uniform(jax.random.key(0), (64, 4, 4, 3)) * 2 - 1}
    batch["conditions"] = {"label": jnp.zeros(64, jnp.int32)}
    examples = jax.jit(method.draw_examples)(batch, jax.random.key(1))
    augment = examples["conditions"]["augment"]
    assert augment.shape == (64, 9)
    assert 0.3 < float(augment[:, 0].mean()) < 0.7  # mirrored or not
    assert len(np.unique(jax.random.key_data(examples["dropout_keys"]), axis=0)) == 64
    assert not np.allclose(examples["x0"], batch["image"], atol=0.1)
    np.testing.assert_array_equal(examples["conditions"]["label"], 0)  # no label dropout

    params = method.denoiser.network.init(jax.random.key(2))
    gradients, metrics = jax.jit(jax.grad(method.loss, has_aux=True))(params, examples)
    assert np.isfinite(metrics["loss"])
    assert float(jnp.abs(gradients["map_augment"]["kernel"]).max()) > 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.augment_dim", 8, r"augmentation has 9 labels: set config\.model\.augment_dim=9"),
        ("augmentation.hue", 1.0, "augmentation has 11 labels"),
        ("augmentation.probability", 0.0, None),
        ("model.song_unet.dropout", 1.0, "dropout=1.0"),
        ("process.edm.vp_beta_d", 10.0, "would do nothing with preconditioning 'edm'"),
    ],
)
def test_mistakes_are_refused(key, value, message):
    config = small()
    config.update_from_flattened_dict({key: value})
    if message is None:
        assert build_method(resolve_config(config)).augmentation is None
        config.augmentation.scale_std = 0.5
        message = "augmentation.scale_std=0.5 would do nothing"
    with pytest.raises(ConfigError, match=message):
        resolve_config(config)


def test_iddpm_preconditioning_has_variance_channels():
    config = small()
    config.process.edm.preconditioning = "iddpm"
    config.process.edm.sigma_min = 0.0065
    denoiser = build_method(resolve_config(config)).denoiser
    assert denoiser.network.config.out_channels == 6
    shapes = jax.eval_shape(denoiser.network.init, jax.random.key(0))
    x = jnp.zeros((2, 4, 4, 3))
    request = Request(x, jnp.ones(2), {"label": jnp.zeros(2, jnp.int32)})
    out = jax.eval_shape(lambda p: denoiser.x0(p, request), shapes)
    assert out.shape == x.shape
