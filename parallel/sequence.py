"""Exact attention over tokens split over devices: Ulysses, ring, and one inside the other.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509) turns a split of tokens into a split of heads and
back, by an all-to-all before attention and one after. The ring (Liu et al. 2023, arXiv 2310.01889)
sends keys and values round while each device attends to those at hand, and merges the parts. Both
at once (Fang and Zhao 2024, arXiv 2405.07719): Ulysses over one axis, the ring over the other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_jax.models.attention_options import PLAIN, AttentionOptions
from dit_jax.parallel.patch import Patches, all_replicated, divide, finish, merge, partial_attention


def check_heads(num_heads: int, ulysses: int) -> None:
    """Refuses heads that the devices of the Ulysses axis cannot share evenly.

    Raises:
        ValueError: with the degrees that would do.
    """
    if ulysses < 1 or num_heads % ulysses:
        possible = [degree for degree in range(1, num_heads + 1) if num_heads % degree == 0]
        raise ValueError(
            f"the model's {num_heads} attention heads cannot be split over {ulysses} Ulysses "
            f"devices: use one of {', '.join(map(str, possible))} for the Ulysses degree (the ring "
            "takes any number)"
        )


@dataclasses.dataclass(frozen=True)
class UlyssesRing(Patches):
    """Exact attention by all-to-all over `axes[0]` and a ring over `axes[1]`.

    Either may have one device only, and then costs nothing. With a ring the scores of one device's
    tokens to those of another are written out in float32; without one the kernel is free.
    """

    axes: tuple[str, str] = ("ulysses", "ring")

    def __call__(self, q, k, v, state: Any = None, options: AttentionOptions = PLAIN):
        """See `Attention`; `state` is handed back untouched."""
        if all_replicated(k, options):
            return self._attend(q, k, v, options), state
        self._check(q, k, options)
        ulysses, replicated = jax.lax.axis_size(self.axes[0]), options.replicated
        check_heads(q.shape[2], ulysses)
        count, heads = q.shape[1] - replicated, q.shape[2] // ulysses
        whole = self._whole(options, count)
        whole = whole.of_heads(jax.lax.axis_index(self.axes[0]) * heads, heads)
        q, k, v = (self._by_heads(a, replicated) for a in (q, k, v))
        if jax.lax.axis_size(self.axes[1]) == 1:
            (text_k, image_k), (text_v, image_v) = (divide(a, replicated) for a in (k, v))
            length = replicated + self.length
            queries = jnp.arange(q.shape[1]) if self._has_padding(count) else length
            part = PLAIN if options.is_plain else whole.at(queries, length)
            out = self._attend(q, self._join(text_k, image_k), self._join(text_v, image_v), part)
        else:
            out = self._ring(q, k, v, count, whole)
        return self._by_tokens(out, replicated), state

    def _by_heads(self, a: Float[Array, "b l h d"], replicated: int) -> Float[Array, "b all own d"]:
        """This device's heads of the tokens of all devices of the Ulysses axis."""
        axis, devices = self.axes[0], jax.lax.axis_size(self.axes[0])
        if devices == 1:
            return a
        text, image = divide(a, replicated)
        image = jax.lax.all_to_all(image, axis, split_axis=2, concat_axis=1, tiled=True)
        if not replicated:
            return image
        heads = a.shape[2] // devices
        start = jax.lax.axis_index(axis) * heads
        text = jax.lax.dynamic_slice_in_dim(text, start, heads, axis=2)
        return jnp.concatenate([text, image], axis=1)

    def _by_tokens(
        self, a: Float[Array, "b all own d"], replicated: int
    ) -> Float[Array, "b l h d"]:
        """The inverse of `_by_heads`."""
        axis = self.axes[0]
        if jax.lax.axis_size(axis) == 1:
            return a
        text, image = divide(a, replicated)
        image = jax.lax.all_to_all(image, axis, split_axis=1, concat_axis=2, tiled=True)
        if not replicated:
            return image
        text = jax.lax.all_gather(text, axis, axis=2, tiled=True)
        return jnp.concatenate([text, image], axis=1)

    def _ring(
        self, q: Array, k: Array, v: Array, count: int, whole: AttentionOptions
    ) -> Float[Array, "b all own d"]:
        """Attention of these queries to all keys; `whole` are options of the whole sequence."""
        ring, me, replicated = (
            jax.lax.axis_size(self.axes[1]),
            jax.lax.axis_index(self.axes[1]),
            whole.replicated,
        )
        following = [(i, (i + 1) % ring) for i in range(ring)]
        (text_k, k), (text_v, v) = (divide(a, replicated) for a in (k, v))
        text = jnp.arange(replicated)
        queries = jnp.concatenate([text, replicated + self._positions(me, count)])
        total = None
        for hop in range(ring):
            positions = replicated + self._positions((me - hop) % ring, count)
            ahead = (k, v)
            if hop < ring - 1:  # sent on before it is used: transfer and computation may overlap
                ahead = [jax.lax.ppermute(a, self.axes[1], following) for a in (k, v)]
            keys, values = k, v
            if hop == 0 and replicated:
                positions = jnp.concatenate([text, positions])
                keys = jnp.concatenate([text_k, k], axis=1)
                values = jnp.concatenate([text_v, v], axis=1)
            is_padded = self._has_padding(count)
            real = positions < replicated + self.length if is_padded else None
            options = PLAIN if whole.is_plain else whole.at(queries, positions)
            part = partial_attention(q, keys, values, real, options)
            total = part if total is None else merge(total, part)
            k, v = ahead
        return finish(total, q.dtype)

    def _positions(self, source: Array, count: int) -> Int[Array, " keys"]:
        """Where in the image the tokens are that ring device `source` had first."""
        ulysses, ring = (jax.lax.axis_size(axis) for axis in self.axes)
        slabs = jnp.arange(ulysses)[:, None] * ring + source
        return (slabs * count + jnp.arange(count)[None]).reshape(-1)


def exchanged_bytes(
    mode: str,
    *,
    depth: int,
    activation_bytes: int,
    devices: int,
    ulysses: int = 1,
) -> float:
    """Bytes that one device receives in one evaluation of a DiT, by the exchange of its layers.

    With A bytes of activations (batch x tokens x width), L layers, N devices:

        displaced, synchronous   2 A L (N - 1) / N         keys and values of all others
        ring                     2 A L (N - 1) / N         the same, in N - 1 hops
        ulysses                  4 A L (N - 1) / N^2       q, k, v and the output, 1 / N of each
        u x r (N = u r)          4 A L (u - 1) / (N u) + 2 A L (r - 1) / N
        tensor                   4 A L (N - 1) / N         two all-reduces a layer, each as a
                                                           reduce-scatter and an all-gather
        naive                    0

    'tensor' is Megatron's count: XLA may add some to divide the fused projection by heads.

    Args:
        mode: one of these; 'ulysses' and 'ring' are u x r with the degree `ulysses`.
        depth: L.
        activation_bytes: A, of the padded number of tokens.
        devices: N.
        ulysses: u; counts for 'ulysses' and 'ring' only.

    Raises:
        ValueError: another mode, or a degree that does not divide the devices.
    """
    share = activation_bytes * depth / devices
    if mode in ("displaced", "synchronous"):
        return 2 * share * (devices - 1)
    if mode == "tensor":
        return 4 * share * (devices - 1)
    if mode == "naive":
        return 0.0
    if mode not in ("ulysses", "ring"):
        raise ValueError(f"mode={mode!r}: there is no formula for it")
    if ulysses < 1 or devices % ulysses:
        raise ValueError(f"ulysses={ulysses} does not divide {devices} devices")
    return 4 * share * (ulysses - 1) / ulysses + 2 * share * (devices // ulysses - 1)
