"""Rotary embeddings and q/k normalisation as FLUX has them in diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.models.layers import RMSNorm
from dit_jax.models.rotary import apply_rotary, grid_ids, rotary_table

CHANNELS = (16, 56, 56)  # of FLUX
HEAD = sum(CHANNELS)
TEXT, ROWS, COLUMNS = 3, 5, 7


def random_tokens(seed, length=TEXT + ROWS * COLUMNS, d=HEAD):
    return np.random.default_rng(seed).normal(size=(2, length, 2, d)).astype(np.float32)


def test_normalised_and_turned_queries_are_those_of_diffusers_flux():
    import torch
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm as TorchNorm
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = np.concatenate([np.zeros((TEXT, 3), int), grid_ids((ROWS, COLUMNS), axes=3)])
    assert ids.shape == (TEXT + ROWS * COLUMNS, 3) and tuple(ids[TEXT + COLUMNS + 2]) == (0, 1, 2)
    table = rotary_table(ids, CHANNELS)
    cos, sin = FluxPosEmbed(theta=10_000, axes_dim=list(CHANNELS))(torch.from_numpy(ids))
    for ours, theirs in ((table[..., 0], cos), (table[..., 1], sin)):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(np.repeat(ours, 2, axis=1), theirs.numpy(), atol=1e-7)

    q, scale = 10 * random_tokens(0), np.random.default_rng(1).normal(size=HEAD)
    theirs = TorchNorm(HEAD, eps=1e-6)
    theirs.weight.data = torch.from_numpy(scale.astype(np.float32))
    ours = RMSNorm(HEAD)
    ours.scale = nnx.Param(jnp.asarray(scale, jnp.float32))
    with torch.no_grad():
        expected = apply_rotary_emb(theirs(torch.from_numpy(q)), (cos, sin), sequence_dim=1)
    found = jax.jit(lambda q: apply_rotary(ours(q), table))(q)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)
    half = apply_rotary(ours(jnp.asarray(q, jnp.bfloat16)), table)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected.numpy(), atol=0.1, rtol=0.02)


def test_products_depend_on_the_difference_of_positions():
    q, k = (jnp.asarray(random_tokens(seed, 6, 12)) for seed in (0, 1))
    ids = grid_ids((1, 2, 3))

    def scores(shift):
        table = rotary_table(ids + np.asarray(shift), (4, 2, 6))
        return jnp.einsum("bqhd,bkhd->bhqk", *(apply_rotary(a, table) for a in (q, k)))

    first = scores((0, 0, 0))
    np.testing.assert_allclose(scores((7, 3, 1)), first, atol=1e-4)
    assert np.abs(first - jnp.einsum("bqhd,bkhd->bhqk", q, k)).max() > 0.1


def test_axes_and_channels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rotary channels \(16, 56\) for positions of 3 axes"):
        rotary_table(grid_ids((2, 2), axes=3), (16, 56))
    with pytest.raises(ValueError, match=r"channels \(3,\) .* one even number an axis"):
        rotary_table(grid_ids((2,)), (3,))
    with pytest.raises(ValueError, match=r"grid of \(2, 3\) has 2 axes: expected at most 1"):
        grid_ids((2, 3), axes=1)
