"""A VAE's decoder over many devices, by rows, decodes what one device does."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dit_jax.launch import loading
from dit_jax.models.attention import einsum_attention
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dit_jax.parallel.mesh import DataParallel, create_mesh
from dit_jax.parallel.vae import BlockwiseAttention, RowDecoder
from tests.models.conftest import random_params

VAE = AutoencoderKL(
    AutoencoderKLConfig(
        scaling_factor=0.18215,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        dtype="float32",
    )
)


@pytest.fixture(scope="module")
def decoded():
    """(parameters, latents of 15 rows, their images on one device)."""
    params = random_params(VAE)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 15, 5, 4)), jnp.float32)
    images = np.asarray(jax.jit(VAE.decode)(params, z))
    assert images.std() > 0.1
    return params, z, images


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_decoding_by_rows_equals_one_device(decoded, devices):
    params, z, expected = decoded
    found = jax.jit(RowDecoder(VAE, devices))(params, z)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_attention_by_blocks_of_queries_is_attention():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 7, 3, 4)) for i in range(3))
    found, _ = BlockwiseAttention(4 * 2 * 3 * 7 * 2)(q, k, v)  # two queries at once
    np.testing.assert_allclose(found, einsum_attention(q, k, v), atol=1e-6)


def test_more_devices_than_rows_are_refused(decoded):
    params, z, _ = decoded
    with pytest.raises(ValueError, match=r"do not go over 8 devices.*Use 5 devices"):
        RowDecoder(VAE, 8)(params, z[:, :5])
    with pytest.raises(ValueError, match="on 9 devices: there are 8"):
        RowDecoder(VAE, 9)


def test_samples_are_decoded_by_rows_where_asked(decoded, monkeypatch):
    params, z, _ = decoded
    monkeypatch.setattr(
        loading,
        "load_autoencoder",
        lambda path, sharding: (VAE, jax.device_put(params, sharding), "hash"),
    )
    config = ml_collections.ConfigDict(
        {"model": {"in_channels": 4}, "autoencoder": {"tile": 0, "batch_size": 2}}
    )
    placement = DataParallel(create_mesh())
    latents = np.asarray(VAE.to_latents(z))
    whole = loading.Decoder(config, Path("vae"), placement)(latents)
    by_rows = loading.Decoder(config, Path("vae"), placement, row_devices=3)(latents)
    np.testing.assert_allclose(by_rows, whole, atol=1e-4, rtol=0)
    config.model.in_channels = 3
    with pytest.raises(ValueError, match="vae_devices=3 would do nothing: there is no VAE"):
        loading.Decoder(config, None, placement, row_devices=3)
    config.autoencoder.tile = 8
    with pytest.raises(ValueError, match=r"vae_devices=3 .*: autoencoder\.tile decodes in tiles"):
        loading.Decoder(config, Path("vae"), placement, row_devices=3)
