"""Attention over an image whose rows of tokens are split over devices.

The strategies here fit the attention seam (`dit_jax.models.attention`) and are called inside
`jax.shard_map`, with the queries, keys and values of this device's tokens:

- `Synchronous` gathers everyone's fresh keys and values: exact, and every layer waits for it.
- `Displaced` takes the other devices' of the evaluation before (displaced patch parallelism, Li et
  al., "DistriFusion", CVPR 2024, section 4): what it gathers was known before the step began.
- `Naive` exchanges nothing: every device makes an image of its own, the known bad baseline.

Device number i over the axes `axes` holds tokens i n to (i + 1) n - 1, n the same everywhere;
tokens from number `length` on are padding, and nothing attends to them. Blocks of two streams
attend jointly: then the first `replicated` tokens (text) are the same ones on all devices, and the
image's follow.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dit_jax.models.attention import Attention, LocalAttention

# Finite, so that a row without any key stays finite too.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Patches:
    """Which of an image's tokens a device holds.

    Attributes:
        length: image tokens in all, without padding.
        axes: mesh axes over which they are split, the first the slowest.
        replicated: tokens before the image's that all devices have.
        kernel: attention among the keys and values at hand.
    """

    length: int
    axes: tuple[str, ...] = ("ring",)
    replicated: int = 0
    kernel: Attention = dataclasses.field(default_factory=LocalAttention)

    def own_tokens(
        self, values: Float[Array | np.ndarray, "length d"], count: int
    ) -> Float[Array, "count d"]:
        """The rows of `values` (one an image token) of this device's `count` tokens."""
        padding = jax.lax.axis_size(self.axes) * count - values.shape[0]
        padded = jnp.pad(values, ((0, padding), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(padded, self._start(count), count)

    def _start(self, count: int) -> Array:
        return jax.lax.axis_index(self.axes) * count

    def _has_padding(self, count: int) -> bool:
        return jax.lax.axis_size(self.axes) * count > self.length

    def _divide(self, a: Float[Array, "b l h d"]) -> tuple[Array, Array]:
        """Replicated tokens and the image's."""
        return a[:, : self.replicated], a[:, self.replicated :]

    def _gather(self, a: Float[Array, "b l h d"]) -> Float[Array, "b all h d"]:
        """The image tokens of all devices, in order, padding included."""
        return jax.lax.all_gather(a, self.axes, axis=1, tiled=True)

    def _join(self, replicated: Array, image: Float[Array, "b all h d"]) -> Array:
        """Replicated tokens and all of the image's, without padding."""
        image = image[:, : self.length]
        return jnp.concatenate([replicated, image], axis=1) if self.replicated else image


@dataclasses.dataclass(frozen=True)
class Synchronous(Patches):
    """All devices' fresh keys and values: the same attention as on one device.

    Given a state it returns this device's keys and values as the new one: so the warm-up of
    displaced patches leaves what `Displaced` starts from.
    """

    def __call__(self, q, k, v, state: Any = None):
        """See `Attention`; of `state` only whether it is None matters."""
        (text_k, own_k), (text_v, own_v) = self._divide(k), self._divide(v)
        keys = self._join(text_k, self._gather(own_k))
        values = self._join(text_v, self._gather(own_v))
        out, _ = self.kernel(q, keys, values)
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

    def __call__(self, q, k, v, state: Any = None):
        """See `Attention`; `state` is of `prefetch`, what is returned is this device's own."""
        if state is None:
            raise ValueError("Displaced needs a state: start it with Synchronous")
        (text_k, own_k), (text_v, own_v) = self._divide(k), self._divide(v)

        def fresh(stale, own):
            start = self._start(own.shape[1])
            return jax.lax.dynamic_update_slice_in_dim(stale, own, start, axis=1)

        keys = self._join(text_k, fresh(state["k"], own_k))
        values = self._join(text_v, fresh(state["v"], own_v))
        out, _ = self.kernel(q, keys, values)
        return out, {"k": own_k, "v": own_v}


@dataclasses.dataclass(frozen=True)
class Naive(Patches):
    """This device's keys and values alone."""

    def __call__(self, q, k, v, state: Any = None):
        """See `Attention`; `state` is handed back untouched."""
        count = k.shape[1] - self.replicated
        if not self._has_padding(count):
            return self.kernel(q, k, v)[0], state
        real = self._start(count) + jnp.arange(count) < self.length
        real = jnp.concatenate([jnp.ones(self.replicated, bool), real])
        return finish(partial_attention(q, k, v, real), q.dtype), state


def partial_attention(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    real: Bool[Array, " lk"] | None,
) -> tuple[Array, Array, Array]:
    """Attention to some of the keys, not normalised, so that parts can be `merge`d.

    Args:
        q: queries.
        k: some keys.
        v: their values.
        real: which of the keys there are; None for all.

    Returns:
        float32: weighted sum of values [b, h, lq, d], sum of weights and largest score [b, h, lq,
        1]. Weights are relative to the latter: exp(score - largest).
    """
    dtype = q.dtype
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if real is not None:
        scores = jnp.where(real[None, None, None], scores, MASKED)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
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
    """Normalises a `partial_attention`."""
    return jnp.swapaxes((part[0] / part[1]).astype(dtype), 1, 2)
