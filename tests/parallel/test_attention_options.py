"""Masks, bias, causal and scale over tokens that are split: as on one device, or refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.models.attention import LocalAttention, einsum_attention
from dit_jax.models.attention_options import AttentionOptions
from dit_jax.models.rotary import apply_rotary, grid_ids, rotary_table
from dit_jax.parallel import transformer
from dit_jax.parallel.patch import Displaced, Naive, Synchronous
from dit_jax.parallel.sequence import UlyssesRing

AXES = ("ulysses", "ring")
BATCH, TEXT, IMAGE, HEADS, CHANNELS, DEVICES = 2, 5, 14, 4, 8, 4
OWN, WHOLE = 4, TEXT + IMAGE  # 4 tokens a device: two of padding
IMAGE_SPEC = PartitionSpec(None, AXES)

random = np.random.default_rng(0)
QKV = [
    jnp.asarray(random.normal(size=(BATCH, WHOLE, HEADS, CHANNELS)), jnp.float32) for _ in range(3)
]
TEXT_MASK = jnp.arange(TEXT)[None] < jnp.asarray([[3], [TEXT]])
IMAGE_MASK = jnp.asarray(random.random((BATCH, IMAGE)) < 0.7)
# Image token 2 of the first example attends to nothing.
MASK = jnp.asarray(random.random((BATCH, 1, WHOLE, WHOLE)) < 0.7).at[0, :, TEXT + 2].set(False)
BIAS = jnp.asarray(random.normal(size=(1, HEADS, WHOLE, WHOLE)), jnp.float32)


def joint(text, image, **options):
    """Options whose key mask is of text and image; the image's is split as its tokens are."""
    return lambda image_mask: AttentionOptions(
        key_mask=jnp.concatenate([text, image_mask], axis=1), replicated=TEXT, **options
    )


OPTIONS = {
    "plain": lambda _: AttentionOptions(replicated=TEXT),
    "text mask": lambda _: AttentionOptions(key_mask=TEXT_MASK, replicated=TEXT),
    "key mask": joint(TEXT_MASK, IMAGE_MASK),
    "mask": lambda _: AttentionOptions(mask=MASK, replicated=TEXT),
    "bias and scale": lambda _: AttentionOptions(bias=BIAS, scale=1.0, replicated=TEXT),
    "causal": lambda _: AttentionOptions(causal=True, replicated=TEXT),
    "all": joint(TEXT_MASK, IMAGE_MASK, mask=MASK, bias=BIAS, causal=True, scale=0.5),
}


def padded(image):
    spare = OWN * DEVICES - IMAGE
    return jnp.pad(image, ((0, 0), (0, spare), *((0, 0),) * (image.ndim - 2)))


def on_devices(ulysses, ring, call):
    """`call(q, k, v, image_mask)` of each device's tokens: {name: texts of all}, {name: image}."""
    mesh = Mesh(np.asarray(jax.devices()[:DEVICES]).reshape(ulysses, ring), AXES)

    def of_device(qkv_text, qkv_image, image_mask):
        tokens = [jnp.concatenate(pair, 1) for pair in zip(qkv_text, qkv_image, strict=True)]
        outs = call(*tokens, image_mask)
        texts = {name: out[None, :, :TEXT] for name, out in outs.items()}
        return texts, {name: out[:, TEXT:] for name, out in outs.items()}

    mapped = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), IMAGE_SPEC, IMAGE_SPEC),
        out_specs=(PartitionSpec(AXES), IMAGE_SPEC),
        check_vma=False,
    )
    text, image = [a[:, :TEXT] for a in QKV], [padded(a[:, TEXT:]) for a in QKV]
    return jax.jit(mapped)(text, image, padded(IMAGE_MASK))


STRATEGIES = {
    "synchronous": (Synchronous, 1, 4),
    "displaced": (Displaced, 1, 4),
    "ulysses": (UlyssesRing, 4, 1),
    "ring": (UlyssesRing, 1, 4),
    "ulysses x ring": (UlyssesRing, 2, 2),
}


@pytest.mark.parametrize("mode", STRATEGIES)
def test_joint_attention_over_split_tokens_is_that_of_one_device(mode):
    kind, ulysses, ring = STRATEGIES[mode]
    strategy = kind(IMAGE, AXES)

    def call(q, k, v, image_mask):
        # Displaced from these very keys and values: nothing is stale.
        state = {"k": k[:, TEXT:], "v": v[:, TEXT:]}
        state = strategy.prefetch(state) if mode == "displaced" else None
        return {
            name: strategy(q, k, v, state, options(image_mask))[0]
            for name, options in OPTIONS.items()
        }

    texts, images = on_devices(ulysses, ring, call)
    differing = set()
    for name, options in OPTIONS.items():
        expected = np.asarray(einsum_attention(*QKV, options(IMAGE_MASK)))
        image = np.asarray(images[name])
        np.testing.assert_allclose(image[:, :IMAGE], expected[:, TEXT:], atol=1e-5, err_msg=name)
        for text in texts[name]:
            np.testing.assert_allclose(text, expected[:, :TEXT], atol=1e-5, err_msg=name)
        differing.add(float(np.abs(expected[:, TEXT:]).sum()))
        if "mask" in name.split() and "key" not in name and "text" not in name:
            assert np.abs(image[0, 2]).max() == 0  # it attends to nothing
    assert len(differing) == len(OPTIONS)


def test_heads_split_by_the_partitioner_take_the_options_of_one_device():
    mesh = Mesh(np.asarray(jax.devices()[:DEVICES]), ("tensor",))
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    strategy = transformer._SplitHeads(heads, LocalAttention())
    found = {name: options(IMAGE_MASK) for name, options in OPTIONS.items()}
    call = jax.jit(lambda qkv: {name: strategy(*qkv, None, o)[0] for name, o in found.items()})
    for name, out in call(QKV).items():
        assert out.sharding.is_equivalent_to(heads, out.ndim)
        np.testing.assert_allclose(out, einsum_attention(*QKV, found[name]), atol=1e-5)


def test_naive_hides_the_other_devices_tokens_and_keeps_the_options():
    strategy = Naive(IMAGE, AXES)
    _, images = on_devices(
        1,
        4,
        lambda q, k, v, image_mask: {
            name: strategy(q, k, v, None, options(image_mask))[0]
            for name, options in OPTIONS.items()
        },
    )
    device = np.concatenate([np.full(TEXT, -1), np.arange(IMAGE) // OWN])
    own = (device[:, None] == device[None]) | (device[None] == -1)
    for name, options in OPTIONS.items():
        options = options(IMAGE_MASK)
        mask = own[None, None] if options.mask is None else options.mask & own[None, None]
        options = dataclasses.replace(options, mask=jnp.asarray(mask))
        expected = einsum_attention(*QKV, options)[:, TEXT:]
        np.testing.assert_allclose(images[name][:, :IMAGE], expected, atol=1e-5, err_msg=name)


def test_rotary_tables_are_those_of_the_tokens_at_hand():
    strategy = UlyssesRing(IMAGE, AXES)
    tables = [
        rotary_table(grid_ids(grid, axes=3), (2, 2, 4)) for grid in ((TEXT,), (2, IMAGE // 2))
    ]

    def call(q, k, v, _):
        own = jnp.concatenate([tables[0], strategy.own_tokens(tables[1], OWN)])
        return {"": apply_rotary(q, own)}

    _, images = on_devices(2, 2, call)
    expected = apply_rotary(QKV[0], np.concatenate(tables))[:, TEXT:]
    np.testing.assert_allclose(images[""][:, :IMAGE], expected, atol=1e-6)


def test_keys_that_all_devices_have_need_no_exchange():
    """Cross-attention to text: the key mask is the text's, and no strategy sends anything."""
    options = AttentionOptions(key_mask=TEXT_MASK, replicated=TEXT)
    q, (k, v) = QKV[0][:, TEXT:], (a[:, :TEXT] for a in QKV[1:])
    expected = einsum_attention(q, k, v, options)
    mesh = Mesh(np.asarray(jax.devices()[:DEVICES]).reshape(1, DEVICES), AXES)
    strategies = [kind(IMAGE, AXES) for kind in (Synchronous, Displaced, Naive, UlyssesRing)]

    def of_device(q):
        return [strategy(q, k, v, None, options)[0] for strategy in strategies]

    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=IMAGE_SPEC, out_specs=IMAGE_SPEC)
    compiled = jax.jit(mapped).lower(padded(q)).compile()
    for out in compiled(padded(q)):
        np.testing.assert_allclose(out[:, :IMAGE], expected, atol=1e-5)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "permute("))


@pytest.mark.parametrize("kind", [Synchronous, Displaced, Naive, UlyssesRing])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        # The network's own tokens only, where a part of the whole has to be found.
        (
            AttentionOptions(bias=jnp.zeros((1, 1, TEXT + OWN, TEXT + OWN)), replicated=TEXT),
            r"bias has shape \(1, 1, 9, 9\): expected .*19, 19\] .* of the whole sequence",
        ),
        # Text that is not said to be text: each device would take it for part of the image.
        (
            AttentionOptions(key_mask=jnp.ones((BATCH, TEXT), bool)),
            r"key_mask has shape \(2, 5\): expected \[2, 9\]",
        ),
        (
            AttentionOptions(replicated=TEXT + OWN - 1),
            r"with 8 replicated tokens: given 9 queries and 9 keys, expected 8 \+ 4 of both",
        ),
    ],
)
def test_options_that_do_not_fit_split_tokens_are_refused(kind, options, message):
    state = None
    if kind is Displaced:
        state = {name: jnp.zeros((BATCH, OWN * DEVICES, HEADS, CHANNELS)) for name in "kv"}
    with pytest.raises(ValueError, match=message):
        on_devices(1, 4, lambda q, k, v, _: {"": kind(IMAGE, AXES)(q, k, v, state, options)[0]})
