"""Ulysses and ring on their own: two streams, degrees, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dit_jax.models.attention import einsum_attention
from dit_jax.models.attention_options import AttentionOptions
from dit_jax.parallel.patch import Displaced, Synchronous, finish, merge, partial_attention
from dit_jax.parallel.sequence import UlyssesRing, check_heads, exchanged_bytes

AXES = ("ulysses", "ring")
TEXT, IMAGE, HEADS, CHANNELS = 5, 22, 4, 8
WIDTH = HEADS * CHANNELS


def two_stream_params(seed=0):
    """Two blocks of two streams: projections of text and image, shared attention."""
    random = np.random.default_rng(seed)

    def draw(rows, columns):
        return jnp.asarray(random.normal(size=(2, rows, columns)) * rows**-0.5, jnp.float32)

    return {
        stream: {
            "qkv": draw(WIDTH, 3 * WIDTH),
            "proj": draw(WIDTH, WIDTH),
            "mlp": draw(WIDTH, WIDTH),
        }
        for stream in ("text", "image")
    }


def two_stream(params, text, text_mask, image, attention, states=None):
    """A joint text and image transformer as FLUX and SD3 have it, at its smallest."""
    new_states = []
    options = AttentionOptions(key_mask=text_mask, replicated=text.shape[1])
    for layer in range(2):
        parts = []
        for stream, tokens in (("text", text), ("image", image)):
            qkv = tokens @ params[stream]["qkv"][layer]
            parts.append(qkv.reshape(*tokens.shape[:2], 3, HEADS, CHANNELS))
        qkv = jnp.concatenate(parts, axis=1)
        state = None if states is None else states[layer]
        out, state = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], state, options)
        new_states.append(state)
        out = out.reshape(*out.shape[:2], WIDTH)
        outs = out[:, : text.shape[1]], out[:, text.shape[1] :]
        for stream, part in zip(("text", "image"), outs, strict=True):
            tokens = (text if stream == "text" else image) + part @ params[stream]["proj"][layer]
            tokens = tokens + jax.nn.silu(tokens) @ params[stream]["mlp"][layer]
            text, image = (tokens, image) if stream == "text" else (text, tokens)
    return text, image, new_states


def local(q, k, v, state, options):
    return einsum_attention(q, k, v, options), state


@pytest.fixture(scope="module")
def streams():
    random = np.random.default_rng(1)
    text, image = (
        jnp.asarray(random.normal(size=(2, n, WIDTH)), jnp.float32) for n in (TEXT, IMAGE)
    )
    params = two_stream_params()
    mask = jnp.arange(TEXT)[None] < jnp.asarray([[3], [TEXT]])
    expected = two_stream(params, text, mask, image, local)[:2]
    unmasked = two_stream(params, text, None, image, local)[1]
    assert np.abs(np.asarray(unmasked - expected[1]))[0].max() > 0.1
    return params, text, mask, image, expected


@pytest.mark.parametrize(
    ("name", "ulysses", "ring"),
    [
        ("synchronous", 1, 4),
        ("displaced", 1, 4),
        ("ulysses", 2, 1),
        ("ulysses", 1, 3),
        ("ulysses", 2, 4),
    ],
)
def test_two_streams_attend_jointly_as_on_one_device(streams, name, ulysses, ring):
    params, text, mask, image, expected = streams
    devices = ulysses * ring
    mesh = Mesh(np.asarray(jax.devices()[:devices]).reshape(ulysses, ring), AXES)
    own = -(-IMAGE // devices)
    padded = jnp.pad(image, ((0, 0), (0, own * devices - IMAGE), (0, 0)))
    kinds = {"synchronous": Synchronous, "displaced": Synchronous, "ulysses": UlyssesRing}
    attention = kinds[name](IMAGE, axes=AXES)
    displaced = Displaced(IMAGE, axes=AXES)

    def evaluate(params, text, mask, image):
        if name == "displaced":  # the state of these very inputs: then nothing is stale
            *_, states = two_stream(params, text, mask, image, attention, [{}, {}])
            states = [displaced.prefetch(state) for state in states]
            text, image, _ = two_stream(params, text, mask, image, displaced, states)
        else:
            text, image, _ = two_stream(params, text, mask, image, attention)
        return text[None], image

    image_spec = PartitionSpec(None, AXES)
    texts, images = jax.jit(
        jax.shard_map(
            evaluate,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(), image_spec),
            out_specs=(PartitionSpec(AXES), image_spec),
            check_vma=False,
        )
    )(params, text, mask, padded)
    np.testing.assert_allclose(images[:, :IMAGE], expected[1], atol=1e-4)
    for of_device in texts:
        np.testing.assert_allclose(of_device, expected[0], atol=1e-4)


def test_parts_of_attention_merge_and_large_scores_do_not_overflow():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, n, 3, 8)), jnp.float32) for n in (4, 10, 10))
    q = q * 100
    first = partial_attention(q, k[:, :4], v[:, :4], None)
    nothing = partial_attention(q, k[:, :3], v[:, :3], jnp.zeros(3, bool))
    rest = partial_attention(q, k[:, 4:], v[:, 4:], jnp.arange(6) < 5)
    merged = finish(merge(merge(nothing, first), rest), q.dtype)
    np.testing.assert_allclose(merged, einsum_attention(q, k[:, :9], v[:, :9]), atol=1e-5)


def test_heads_that_cannot_be_split_are_refused():
    check_heads(6, 3)
    with pytest.raises(ValueError, match=r"6 attention heads .* 4 Ulysses devices: use one of 1,"):
        check_heads(6, 4)


def test_bytes_by_hand_and_unknown_modes_are_refused():
    def count(mode, devices, **options):
        return exchanged_bytes(mode, depth=2, activation_bytes=960, devices=devices, **options)

    assert count("displaced", 4) == count("synchronous", 4) == 2 * 2 * 960 * 3 / 4
    assert count("ring", 4) == count("displaced", 4) and count("naive", 4) == 0
    assert count("ulysses", 4, ulysses=4) == 4 * 2 * 240 * 3 / 4
    # Two by two: all-to-alls between pairs, and one hop of keys and values.
    assert count("ulysses", 4, ulysses=2) == 4 * 2 * 240 / 2 + 2 * 2 * 240
    assert count("tensor", 4) == 2 * count("displaced", 4)
    with pytest.raises(ValueError, match="ulysses=3 does not divide 4"):
        count("ring", 4, ulysses=3)
    with pytest.raises(ValueError, match="mode='pipeline'"):
        count("pipeline", 4)


def test_displaced_without_a_state_is_refused():
    q = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="start it with Synchronous"):
        Displaced(4)(q, q, q)
