import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.interop.autoencoder_kl import KNOWN
from dit_jax.models import autoencoder_layers
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from tests.compilations import compilations
from tests.long import only_long
from tests.references import diffusers_autoencoder as reference

SD = AutoencoderKLConfig(
    scaling_factor=0.18215, block_out_channels=(32, 64), layers_per_block=1, sample_size=16
)
FLUX = AutoencoderKLConfig(
    scaling_factor=0.3611,
    shift_factor=0.1159,
    latent_channels=16,
    block_out_channels=(8, 16, 32, 32),
    norm_num_groups=4,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


def images(config, height, width, batch=2):
    random = np.random.default_rng(1)
    shape = (batch, height, width, config.in_channels)
    return jnp.asarray(random.uniform(-1, 1, shape), jnp.float32)


@pytest.fixture(scope="module")
def small():
    model = reference.create(SD)
    return model, *reference.ours(SD, model)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        pytest.param(SD, (16, 24), id="SD, not square"),
        pytest.param(FLUX, (64, 40), id="Flux, four levels"),
        pytest.param(
            dataclasses.replace(SD, mid_block_add_attention=False, norm_num_groups=8),
            (8, 8),
            id="no attention",
        ),
        pytest.param(
            dataclasses.replace(SD, in_channels=1, out_channels=2, use_quant_conv=False),
            (6, 10),
            id="other channels, one of two quant convolutions",
        ),
        pytest.param(
            dataclasses.replace(SD, block_out_channels=(32,), layers_per_block=3),
            (5, 7),
            id="one level, odd sides",
        ),
    ],
)
def test_encoding_and_decoding_match_diffusers(config, size):
    model = reference.create(config)
    autoencoder, params = reference.ours(config, model)
    shapes = jax.eval_shape(autoencoder.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    x = images(config, *size)
    mean, logvar = jax.jit(autoencoder.encode)(params, x)
    with torch.no_grad():
        posterior = model.encode(reference.to_torch(x)).latent_dist
        z = 3 * posterior.mean
        decoded = model.decode(z).sample
    assert mean.shape == (2, *autoencoder.latent_shape(*size))
    for found, expected in ((mean, posterior.mean), (logvar, posterior.logvar)):
        expected = reference.to_numpy(expected)
        assert expected.std() > 0.2
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    found = jax.jit(autoencoder.decode)(params, reference.to_numpy(z))
    assert decoded.std() > 0.2
    np.testing.assert_allclose(found, reference.to_numpy(decoded), atol=1e-4, rtol=0)


@only_long
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_full_size_autoencoders_match_diffusers(name, capsys):
    """Of images of side DIT_JAX_VAE_SIDE, by default 64. Prints errors and seconds (see docs)."""
    config = KNOWN[name]
    side = int(os.environ.get("DIT_JAX_VAE_SIDE", "64"))
    model = reference.create(config)
    autoencoder, params = reference.ours(config, model)
    x = images(config, side, side, batch=1)
    encode, decode = jax.jit(autoencoder.encode), jax.jit(autoencoder.decode)
    with torch.no_grad():
        for turn in range(3):  # the first compiles
            times = [time.perf_counter()]
            mean, logvar = jax.block_until_ready(encode(params, x))
            times.append(time.perf_counter())
            decoded = jax.block_until_ready(decode(params, mean))
            times.append(time.perf_counter())
            posterior = model.encode(reference.to_torch(x)).latent_dist
            times.append(time.perf_counter())
            expected = model.decode(reference.to_torch(mean)).sample
            times.append(time.perf_counter())
            with capsys.disabled():
                names = ("encode", "decode", "diffusers encode", "diffusers decode")
                seconds = dict(zip(names, np.diff(times).round(2).tolist(), strict=True))
                print(f"{name} {side}x{side} turn {turn}: {seconds} s")
    pairs = {"mean": (mean, posterior.mean), "logvar": (logvar, posterior.logvar)}
    pairs["decoded"] = (decoded, expected)
    errors = {k: float(np.abs(a - reference.to_numpy(b)).max()) for k, (a, b) in pairs.items()}
    with capsys.disabled():
        print(f"{name} {side}x{side} largest differences: {errors}")
    assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("spread", [1.0, 1e-3])  # the second: where epsilon decides
@pytest.mark.parametrize("offset", [0.0, 30.0])  # far from zero: variance without cancellation
def test_group_norm_matches_pytorch(spread, offset):
    random = np.random.default_rng(0)
    x = (offset + spread * random.normal(size=(2, 6, 5, 12))).astype(np.float32)
    norm = autoencoder_layers.GroupNorm(12, 3)
    scale, bias = random.normal(size=(2, 12)).astype(np.float32)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    expected = torch.nn.functional.group_norm(
        reference.to_torch(x).double(),
        3,
        torch.tensor(scale, dtype=torch.float64),
        torch.tensor(bias, dtype=torch.float64),
        eps=1e-6,
    )
    tolerance = 1e-5 if offset == 0 else 1e-2 if spread < 1 else 1e-4
    np.testing.assert_allclose(
        norm(jnp.asarray(x)), reference.to_numpy(expected), atol=tolerance, rtol=0
    )


def test_bfloat16_computes_norms_in_float32_and_stays_close(small):
    _, autoencoder, params = small
    half = AutoencoderKL(dataclasses.replace(SD, dtype="bfloat16"))
    x = images(SD, 8, 8)
    mean, _ = jax.jit(autoencoder.encode)(params, x)
    found, _ = jax.jit(half.encode)(params, x)
    assert found.dtype == jnp.float32
    error = float(jnp.abs(found - mean).max())
    assert 1e-5 < error < 0.1
    decoded, found = (jax.jit(a.decode)(params, mean) for a in (autoencoder, half))
    assert 1e-5 < float(jnp.abs(found - decoded).mean()) < 0.05


def test_samples_follow_the_posterior(small):
    _, autoencoder, params = small
    x = images(SD, 4, 4)
    mean, logvar = autoencoder.encode(params, x)
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = jax.jit(jax.vmap(lambda key: autoencoder.sample(params, x, key)))(keys)
    eps = (drawn - mean[None]) / jnp.exp(0.5 * logvar)[None]
    assert abs(float(eps.mean())) < 0.02 and abs(float(eps.std()) - 1) < 0.02


def test_latents_are_scaled_and_shifted():
    raw = jax.random.normal(jax.random.key(0), (2, 3, 3, 16))
    autoencoder = AutoencoderKL(FLUX)
    np.testing.assert_allclose(autoencoder.to_latents(raw), (raw - 0.1159) * 0.3611, rtol=1e-5)
    np.testing.assert_allclose(
        autoencoder.from_latents(autoencoder.to_latents(raw)), raw, atol=1e-5
    )


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [
        ((20, 13), 8, 0.25),  # tiles of four shapes, thin ones among them
        ((6, 12), 8, 0.5),
        ((14, 8), 8, 0.25),  # one column
        ((7, 8), 8, 0.25),  # one tile: decoded as it is
        ((8, 6), 4, 0.0),
    ],
)
def test_tiled_decoding_matches_diffusers(small, size, tile, overlap):
    model, autoencoder, params = small
    z = jax.random.normal(jax.random.key(2), (1, *size, 4))
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size = tile, 2 * tile
    model.tile_overlap_factor = overlap
    with torch.no_grad():
        expected = reference.to_numpy(model.decode(reference.to_torch(z)).sample)
    model.disable_tiling()
    found = autoencoder.decode_tiled(params, z, tile=tile, overlap=overlap)
    assert found.shape == (1, 2 * size[0], 2 * size[1], 3)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_tiles_of_one_shape_are_compiled_once(small):
    _, autoencoder, params = small
    z = jnp.zeros((1, 28, 28, 4))
    with compilations("_decode") as compiled:
        for _ in range(2):
            autoencoder.decode_tiled(params, z, tile=10, overlap=0.3)
    # Rows start at 0, 7, 14 (ten latents high) and 21 (seven): 16 tiles of four shapes.
    assert len(compiled) == 4


def test_mistakes_are_refused(small):
    _, autoencoder, params = small
    with pytest.raises(ValueError, match="multiples of 2"):
        autoencoder.encode(params, np.zeros((1, 15, 16, 3), np.float32))
    with pytest.raises(ValueError, match=r"\[batch, height, width, 3\]"):
        autoencoder.encode(params, np.zeros((1, 16, 16, 4), np.float32))
    with pytest.raises(ValueError, match="16 channels: this autoencoder's have 4"):
        autoencoder.decode(params, np.zeros((1, 8, 8, 16), np.float32))
    with pytest.raises(ValueError, match="whole number of latents"):
        autoencoder.decode_tiled(params, np.zeros((1, 8, 8, 4), np.float32), tile=6)
    with pytest.raises(ValueError, match="multiples of 8"):
        AutoencoderKL(FLUX).latent_shape(20, 16)
    for wrong, message in (
        ({"dtype": "float16"}, "exceed float16's range"),
        ({"norm_num_groups": 24}, "norm_num_groups=24 must divide"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"block_out_channels": ()}, "at least one width"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SD, **wrong)
    assert dataclasses.replace(SD, dtype="float16", force_upcast=False).dtype == "float16"
