"""Attention over an image whose rows of tokens are split over devices.

The strategies here fit the attention seam (`dit_jax.models.attention`) and are called inside
`jax.shard_map`, with the queries, keys and values of this device's tokens:

- `Synchronous` gathers everyone's fresh keys and values: exact, and every layer waits for it.
- `Displaced` takes the other devices' of the evaluation before (displaced patch parallelism, Li et
  al., "DistriFusion", CVPR 2024, section 4): what it gathers was known before the step began.
- `Naive` exchanges nothing: every device makes an image of its own, the known bad baseline.

Device number i over the axes `axes` holds image tokens i n to (i + 1) n - 1, n the same everywhere;
tokens from number `length` on are padding, and nothing attends to them. In joint attention text
comes first: the call says how many tokens are `replicated`, the same ones on all devices, and the
image's follow.

All strategies take the other `AttentionOptions` too. Positions in the whole sequence (replicated
tokens, then all of the image's) decide what `causal` hides, and which part of a `mask` or `bias`,
given for the whole sequence, belongs to the tokens at hand. A key mask of the replicated tokens
alone moves nothing between devices; one of image tokens is gathered, a byte a token. Where all keys
are replicated (cross-attention to text), there is nothing to exchange: attention is local, and
options are of the tokens at hand.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from dit_jax.models.attention import Attention, LocalAttention
from dit_jax.models.attention_options import PLAIN, AttentionOptions, nonzero, score_weights


@dataclasses.dataclass(frozen=True)
class Patches:
    """Which of an image's tokens a device holds.

    Attributes:
        length: image tokens in all, without padding.
        axes: mesh axes over which they are split, the first the slowest.
        kernel: attention among the keys and values at hand.
    """

    length: int
    axes: tuple[str, ...] = ("ring",)
    kernel: Attention = dataclasses.field(default_factory=LocalAttention)

    def own_tokens(
        self, values: Float[Array | np.ndarray, "length *rest"], count: int
    ) -> Float[Array, "count *rest"]:
        """The rows of `values` (one an image token) of this device's `count` tokens."""
        padding = jax.lax.axis_size(self.axes) * count - values.shape[0]
        padded = jnp.pad(values, ((0, padding), *((0, 0),) * (values.ndim - 1)))
        return jax.lax.dynamic_slice_in_dim(padded, self._start(count), count)

    def _start(self, count: int) -> Array:
        return jax.lax.axis_index(self.axes) * count

    def _has_padding(self, count: int) -> bool:
        return jax.lax.axis_size(self.axes) * count > self.length

    def _gather(self, a: Shaped[Array, "b l *rest"]) -> Shaped[Array, "b all *rest"]:
        """Of the image tokens of all devices, in order, padding included."""
        return jax.lax.all_gather(a, self.axes, axis=1, tiled=True)

    def _join(self, replicated: Array, image: Float[Array, "b all h d"]) -> Array:
        """Replicated tokens and all of the image's, without padding."""
        image = image[:, : self.length]
        return jnp.concatenate([replicated, image], axis=1) if replicated.shape[1] else image

    def _attend(self, q: Array, k: Array, v: Array, options: AttentionOptions) -> Array:
        return self.kernel(q, k, v, None, options)[0]

    def _own_positions(self, count: int, replicated: int) -> Int[Array, " l"]:
        """Where this device's tokens are in the whole sequence."""
        image = replicated + self._start(count) + jnp.arange(count)
        return jnp.concatenate([jnp.arange(replicated), image])

    def _check(self, q: Array, k: Array, options: AttentionOptions) -> None:
        """Refuses tokens and options that do not fit how the image is split."""
        devices, replicated = jax.lax.axis_size(self.axes), options.replicated
        count = k.shape[1] - replicated
        if q.shape[1] != k.shape[1] or count < 1 or devices * count < self.length:
            raise ValueError(
                f"attention over {self.length} image tokens on {devices} devices with {replicated} "
                f"replicated tokens: given {q.shape[1]} queries and {k.shape[1]} keys, expected "
                f"{replicated} + {-(-self.length // devices)} of both (or more, with padding). "
                "Say by AttentionOptions.replicated how many tokens stand before the image's"
            )
        whole, (b, _, h, _) = replicated + self.length, q.shape
        note = " of the whole sequence: devices take what belongs to their tokens"
        dataclasses.replace(options, key_mask=None).check(b, h, whole, whole, note)
        AttentionOptions(options.key_mask, replicated=replicated).check(b, h, *q.shape[1:2] * 2)

    def _whole(self, options: AttentionOptions, count: int) -> AttentionOptions:
        """`options` with the key mask of the whole sequence."""
        mask, replicated = options.key_mask, options.replicated
        if mask is None:
            return options
        image = mask[:, replicated:]
        if image.shape[1]:
            image = self._gather(image)[:, : self.length]
        else:
            image = jnp.ones((mask.shape[0], self.length), bool)
        mask = jnp.concatenate([mask[:, :replicated], image], axis=1)
        return dataclasses.replace(options, key_mask=mask)

    def _for_own_queries(self, options: AttentionOptions, count: int) -> AttentionOptions:
        """Options for this device's queries and the keys of all."""
        if options.is_plain:
            return PLAIN
        queries = self._own_positions(count, options.replicated)
        return self._whole(options, count).at(queries, options.replicated + self.length)


def divide(a: Float[Array, "b l h d"], replicated: int) -> tuple[Array, Array]:
    """Replicated tokens and the image's."""
    return a[:, :replicated], a[:, replicated:]


def all_replicated(k: Array, options: AttentionOptions) -> bool:
    """Whether every device has all keys, so that there is nothing to exchange."""
    return options.replicated > 0 and k.shape[1] == options.replicated


@dataclasses.dataclass(frozen=True)
class Synchronous(Patches):
    """All devices' fresh keys and values: the same attention as on one device.

    Given a state it returns this device's keys and values as the new one: so the warm-up of
    displaced patches leaves what `Displaced` starts from.
    """

    def prefetch_next(self, state: dict[str, Array]) -> dict[str, Array]:
        """All devices' keys and values of one layer, as `Displaced.prefetch`."""
        return {name: self._gather(values) for name, values in state.items()}

    def __call__(self, q, k, v, state: Any = None, options: AttentionOptions = PLAIN):
        """See `Attention`; of `state` only whether it is None matters."""
        if all_replicated(k, options):
            return self._attend(q, k, v, options), state
        self._check(q, k, options)
        (text_k, own_k), (text_v, own_v) = (divide(a, options.replicated) for a in (k, v))
        keys = self._join(text_k, self._gather(own_k))
        values = self._join(text_v, self._gather(own_v))
        out = self._attend(q, keys, values, self._for_own_queries(options, own_k.shape[1]))
        return out, None if state is None else {"k": own_k, "v": own_v}


@dataclasses.dataclass(frozen=True)
class Displaced(Patches):
    """This device's fresh keys and values, and the others' of the evaluation before.

    The state of a layer is this device's own image keys and values of the evaluation before, {'k',
    'v'} [b, l, h, d]; `prefetch` gathers everyone's. Replicated tokens are always fresh. As they
    attend to a mixture that differs from device to device, so do they after the first block, by as
    much as the stale keys and values differ from fresh ones.
    """

    def prefetch(self, state: dict[str, Array]) -> dict[str, Array]:
        """All devices' stale keys and values of one layer: the collectives of this strategy."""
        return {name: self._gather(values) for name, values in state.items()}

    def prefetch_next(self, state: dict[str, Array]) -> dict[str, Array]:
        """The same, for the next evaluation."""
        return self.prefetch(state)

    def __call__(self, q, k, v, state: Any = None, options: AttentionOptions = PLAIN):
        """See `Attention`; `state` is of `prefetch`, what is returned is this device's own."""
        if all_replicated(k, options):
            return self._attend(q, k, v, options), state
        if state is None:
            raise ValueError("Displaced needs a state: start it with Synchronous")
        self._check(q, k, options)
        (text_k, own_k), (text_v, own_v) = (divide(a, options.replicated) for a in (k, v))

        def fresh(stale, own):
            start = self._start(own.shape[1])
            return jax.lax.dynamic_update_slice_in_dim(stale, own, start, axis=1)

        keys = self._join(text_k, fresh(state["k"], own_k))
        values = self._join(text_v, fresh(state["v"], own_v))
        out = self._attend(q, keys, values, self._for_own_queries(options, own_k.shape[1]))
        return out, {"k": own_k, "v": own_v}


@dataclasses.dataclass(frozen=True)
class Naive(Patches):
    """This device's keys and values alone."""

    def __call__(self, q, k, v, state: Any = None, options: AttentionOptions = PLAIN):
        """See `Attention`; `state` is handed back untouched."""
        if all_replicated(k, options):
            return self._attend(q, k, v, options), state
        self._check(q, k, options)
        replicated, key_mask = options.replicated, options.key_mask
        count = k.shape[1] - replicated
        own = self._own_positions(count, replicated)
        if not options.is_plain:
            options = dataclasses.replace(options, key_mask=None).at(own, own)
            options = dataclasses.replace(options, key_mask=key_mask, replicated=replicated)
        if not self._has_padding(count):
            return self._attend(q, k, v, options), state
        real = own < replicated + self.length
        return finish(partial_attention(q, k, v, real, options), q.dtype), state


def partial_attention(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    real: Bool[Array, " lk"] | None,
    options: AttentionOptions = PLAIN,
) -> tuple[Array, Array, Array]:
    """Attention to some of the keys, not normalised, so that parts can be `merge`d.

    Args:
        q: queries.
        k: some keys.
        v: their values.
        real: which of the keys there are; None for all.
        options: of these queries and keys.

    Returns:
        float32: weighted sum of values [b, h, lq, d], sum of weights and largest score [b, h, lq,
        1]. Weights are relative to the latter: exp(score - largest).
    """
    dtype = q.dtype
    allowed = options.allowed(q.shape[1], k.shape[1])
    if real is not None:
        real = real[None, None, None]
        allowed = real if allowed is None else allowed & real
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * scale, k, v))
    weights, largest = score_weights(q, k, allowed, options.bias)
    out = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(dtype), v, preferred_element_type=jnp.float32
    )
    return out, weights.sum(axis=-1, keepdims=True), largest


def merge(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
    """`partial_attention` to the keys of both (online softmax, Milakov and Gimelshein 2018)."""
    largest = jnp.maximum(one[2], other[2])
    scales = [jnp.exp(part[2] - largest) for part in (one, other)]
    out, total = (one[i] * scales[0] + other[i] * scales[1] for i in range(2))
    return out, total, largest


def finish(part: tuple[Array, ...], dtype: Any) -> Float[Array, "b lq h d"]:
    """Normalises a `partial_attention`; zeros for queries without any key."""
    return jnp.swapaxes((part[0] / nonzero(part[1])).astype(dtype), 1, 2)
