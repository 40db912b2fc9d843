"""Masks, bias, causal and scale in every kernel, against the definition in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models import cpu_kernels
from dit_jax.models.attention import LocalAttention, einsum_attention
from dit_jax.models.attention_options import PLAIN, AttentionOptions
from dit_jax.parallel.vae import BlockwiseAttention

B, LQ, LK, H, D = 4, 6, 7, 3, 8
random = np.random.default_rng(0)
QKV = [jnp.asarray(random.normal(size=(B, length, H, D)), jnp.float32) for length in (LQ, LK, LK)]
KEY_MASK = jnp.asarray(random.random((B, LK)) < 0.7)
MASK = jnp.asarray(random.random((B, H, LQ, LK)) < 0.7).at[1, :, 2].set(False)
BIAS = jnp.asarray(random.normal(size=(1, H, LQ, LK)), jnp.float32)

OPTIONS = {
    "key mask": AttentionOptions(key_mask=KEY_MASK),
    "replicated": AttentionOptions(key_mask=KEY_MASK[:, :3], replicated=3),
    "no keys": AttentionOptions(key_mask=KEY_MASK.at[2].set(False)),
    "mask": AttentionOptions(mask=MASK),
    "T5": AttentionOptions(key_mask=KEY_MASK, bias=BIAS, scale=1.0),
    "CLIP": AttentionOptions(causal=True),
    "bias of all": AttentionOptions(bias=BIAS[:, :1, :1]),
    "all": AttentionOptions(KEY_MASK, MASK[:, :1], jnp.tile(BIAS, (B, 1, 1, 1)), True, 0.5),
}


def definition(q, k, v, options):
    """The formula, each condition spelled out."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scale = D**-0.5 if options.scale is None else options.scale
    scores = scale * np.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores + (0 if options.bias is None else np.asarray(options.bias, np.float64))
    weights = np.exp(scores)
    if options.key_mask is not None:
        known = options.key_mask.shape[1]
        weights[..., :known] *= np.asarray(options.key_mask)[:, None, None]
    if options.mask is not None:
        weights = weights * np.asarray(options.mask)
    if options.causal:
        weights = weights * (np.arange(LQ)[:, None] >= np.arange(LK))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights / np.where(total == 0, 1, total), v)


@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_agree_with_the_definition_and_each_others_gradients(name, monkeypatch):
    options = OPTIONS[name]
    expected = definition(*QKV, options)
    if name in ("no keys", "mask"):
        assert (np.abs(expected).max(axis=(2, 3)) == 0).any()  # a query that attends to nothing
    cotangent = jnp.asarray(random.normal(size=expected.shape), jnp.float32)

    def pulled_back(kernel):
        def function(q, k, v, bias):
            return kernel(q, k, v, None, dataclasses.replace(options, bias=bias))[0]

        out, pull_back = jax.vjp(function, *QKV, options.bias)
        np.testing.assert_allclose(out, expected, atol=1e-6)
        return [gradient for gradient in pull_back(cotangent) if gradient is not None]

    einsum = pulled_back(LocalAttention("einsum"))
    assert len(einsum) == (3 if options.bias is None else 4)
    assert all(np.isfinite(gradient).all() for gradient in einsum)
    kernels = [LocalAttention("xla"), LocalAttention("cpu"), LocalAttention("auto", True)]
    for kernel in (*kernels, BlockwiseAttention(4 * B * H * LK * 4)):  # blocks of 4 queries
        for found, gradient in zip(pulled_back(kernel), einsum, strict=True):
            np.testing.assert_allclose(found, gradient, atol=1e-5)
    monkeypatch.setattr(cpu_kernels, "_LONGEST_STORED", 4)  # weights computed again
    for found, gradient in zip(pulled_back(LocalAttention("cpu")), einsum, strict=True):
        np.testing.assert_allclose(found, gradient, atol=1e-5)


def test_options_are_a_pytree_that_layers_share():
    """Arrays are inputs of a compiled program, the rest is part of it."""
    options = OPTIONS["all"]
    assert len(jax.tree.leaves(options)) == 3 and jax.tree.leaves(PLAIN) == []
    jitted = jax.jit(einsum_attention)
    np.testing.assert_allclose(jitted(*QKV, options), definition(*QKV, options), atol=1e-6)
    flipped = jax.tree.map(jnp.logical_not, dataclasses.replace(options, bias=None))
    np.testing.assert_allclose(jitted(*QKV, flipped), definition(*QKV, flipped), atol=1e-6)


def test_bfloat16_is_masked_too():
    q, k, v = (a.astype(jnp.bfloat16) for a in QKV)
    for implementation in ("einsum", "xla", "cpu"):
        out, _ = LocalAttention(implementation)(q, k, v, None, OPTIONS["T5"])
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            out.astype(jnp.float32), definition(*QKV, OPTIONS["T5"]), atol=0.05
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_mask": KEY_MASK[:, :5]}, r"key_mask has shape \(4, 5\): expected \[4, 7\]"),
        (
            {"key_mask": KEY_MASK[:, :5], "replicated": 3},
            r"key_mask has shape \(4, 5\): expected \[4, 7\] or \[4, 3\]",
        ),
        ({"key_mask": KEY_MASK.astype(jnp.float32)}, "key_mask is float32: expected bool, True wh"),
        ({"mask": MASK.astype(jnp.int32)}, "mask is int32: expected bool.* scores is the bias"),
        ({"mask": MASK[:, :2]}, r"\(4, 2, 6, 7\): expected \[1 or 4, 1 or 3, 1 or 6, 7\] \(batch"),
        ({"mask": MASK[0]}, r"mask has shape \(3, 6, 7\): expected \[1 or 4"),
        ({"bias": MASK}, "bias is bool: expected floating-point"),
        ({"bias": BIAS[..., :1]}, r"bias has shape \(1, 3, 6, 1\): expected \[1 or 4"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LocalAttention()(*QKV, None, AttentionOptions(**options))
