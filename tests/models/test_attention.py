import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models import Network, Request
from dit_jax.models.attention import (
    LocalAttention,
    cudnn_supports,
    einsum_attention,
    own_tokens,
    resolve_implementation,
)


def random_qkv(length_q=6, length_k=10, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(2, length, 3, 8) for length in (length_q, length_k, length_k)]
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def test_implementations_agree_with_the_definition():
    q, k, v = random_qkv()
    scores = np.einsum("bqhd,bkhd->bhqk", np.float64(q), k) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, v)
    for implementation in ("einsum", "xla", "auto"):
        out, state = LocalAttention(implementation)(q, k, v, "kept")
        np.testing.assert_allclose(out, expected, atol=1e-6)
        assert state == "kept"


def test_gradients_of_implementations_agree():
    def gradients(implementation):
        def loss(q, k, v):
            return jnp.sin(LocalAttention(implementation)(q, k, v)[0]).sum()

        return jax.grad(loss, (0, 1, 2))(*random_qkv())

    for a, b in zip(gradients("einsum"), gradients("xla"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv()
    out = einsum_attention(q * 1000, k * 10, v)
    assert np.isfinite(out).all()


def test_the_kernel_goes_by_backend_dtype_and_head_size():
    assert resolve_implementation("auto", jnp.float32, 64, "cpu") == "einsum"
    assert resolve_implementation("auto", jnp.bfloat16, 72, "gpu") == "cudnn"
    assert resolve_implementation("auto", jnp.float32, 72, "gpu") == "xla"
    assert resolve_implementation("auto", jnp.bfloat16, 72, "tpu") == "xla"
    assert resolve_implementation("xla", jnp.bfloat16, 72, "gpu") == "xla"
    assert not cudnn_supports(jnp.bfloat16, 12) and not cudnn_supports(jnp.bfloat16, 256)
    # With a mask or bias also by the lengths.
    masked = {"scores_shape": (6, 8)}
    assert resolve_implementation("auto", jnp.bfloat16, 72, "gpu", **masked) == "cudnn"
    assert resolve_implementation("auto", jnp.bfloat16, 72, "gpu", scores_shape=(6, 7)) == "xla"
    assert resolve_implementation("auto", jnp.float32, 72, "cpu", **masked) == "einsum"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flash", jnp.float32, 64, "cpu"), "attention='flash': expected one of"),
        (("cudnn", jnp.bfloat16, 64, "cpu"), "needs an NVIDIA GPU; the backend is 'cpu'"),
        (("cudnn", jnp.float32, 64, "gpu"), "given float32 and 64. Use attention='auto'"),
        (("cudnn", jnp.bfloat16, 20, "gpu"), "given bfloat16 and 20"),
    ],
)
def test_errors_never_substitute_silently(arguments, message):
    with pytest.raises(ValueError) as error:
        resolve_implementation(*arguments)
    assert message in str(error.value)


def test_cudnn_with_a_mask_of_odd_length_is_an_error():
    message = r"even numbers of queries and keys; given 6 and 7. Pad them, or use attention='auto'"
    with pytest.raises(ValueError, match=message):
        resolve_implementation("cudnn", jnp.bfloat16, 64, "gpu", scores_shape=(6, 7))


@dataclasses.dataclass(frozen=True)
class WithPrevious:
    """Attends to the keys and values of the call before as well, as displaced patches do."""

    def __call__(self, q, k, v, state=None):
        both_k = jnp.concatenate([state["k"], k], axis=1)
        both_v = jnp.concatenate([state["v"], v], axis=1)
        new = {"k": k, "v": v, "calls": state["calls"] + 1}
        return einsum_attention(q, both_k, both_v), new


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_a_strategy_keeps_state_for_every_layer(small, layer_loop):
    config, params, (x, t, conditions) = small
    network = Network(dataclasses.replace(config, layer_loop=layer_loop))
    kv = jnp.zeros((3, 2, 16, 3, 16))
    state = {"k": kv, "v": kv, "calls": jnp.zeros(3, jnp.int32)}
    strategy = WithPrevious()

    @jax.jit
    def call(state):
        result = network.apply(params, Request(x, t, conditions, attention=strategy, carry=state))
        return result.out, result.carry

    first, state = call(state)
    second, state = call(state)
    np.testing.assert_array_equal(state["calls"], [2, 2, 2])
    assert not np.allclose(first, second)
    assert not np.allclose(state["k"][0], state["k"][1])
    # Every call makes one more layer see its own keys and values twice, which is as seeing them
    # once: after as many calls as layers this is the plain network.
    for _ in range(3):
        plain, state = call(state)
    np.testing.assert_allclose(
        plain, network.apply(params, Request(x, t, conditions)).out, atol=1e-4
    )
    gradient = jax.grad(
        lambda x: (
            network.apply(params, Request(x, t, conditions, attention=strategy, carry=state))
        ).out.sum()
    )(x)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@dataclasses.dataclass(frozen=True)
class SecondRow:
    """Is given the second row of patches alone."""

    length: int = 16

    def own_tokens(self, values, count):
        return values[count : 2 * count]

    def __call__(self, q, k, v, state=None):
        return einsum_attention(q, k, v), state


def test_positions_are_those_of_the_tokens_at_hand(small):
    config, params, (x, t, conditions) = small
    whole = Network(config)
    part = x[:, 2:4]
    second = whole.apply(params, Request(part, t, conditions, attention=SecondRow())).out
    assert second.shape == (2, 2, 8, 8)
    first = whole.apply(params, Request(part, t, conditions)).out
    assert np.abs(np.asarray(second - first)).max() > 1e-2
    # Positions alone tell them apart: the first row's, by the same strategy's rule.
    positions = np.arange(16)[:, None]
    np.testing.assert_array_equal(own_tokens(SecondRow(), positions, 4)[:, 0], [4, 5, 6, 7])
    np.testing.assert_array_equal(own_tokens(LocalAttention(), positions, 16), positions)
