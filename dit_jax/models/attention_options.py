"""What a call of the attention seam says beside its queries, keys and values.

    softmax(scale q k^T + bias) v, over the keys that `key_mask`, `mask` and `causal` all allow

A query without any allowed key attends to nothing: its output is zero, in every kernel and under
every strategy, and so are its gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite: the difference of two of them is no NaN.
MASKED = -1e30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key_mask", "mask", "bias"],
    meta_fields=["causal", "scale", "replicated"],
)
@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Which keys a query attends to, how scores are made, and how the tokens lie.

    A pytree, so that masks and bias can be inputs that all layers of `stack.run_stack` share. Where
    the image's tokens are split over devices, `key_mask` is of the tokens at hand, and `mask` and
    `bias` are of the whole sequence (replicated tokens, then all of the image's): a device takes
    from them what belongs to its tokens.

    Attributes:
        key_mask: [b, lk], True for keys that there are; or [b, replicated], where all keys of the
            image are there (which costs no communication where they are split).
        mask: [1 | b, 1 | h, 1 | lq, lk], True where a query attends to a key.
        bias: [1 | b, 1 | h, 1 | lq, lk], added to the scaled scores.
        causal: whether query i attends to keys 0 to i only.
        scale: of the scores; None for d^(-1/2).
        replicated: how many of the tokens stand before the image's and are the same ones on all
            devices (the text of joint attention). On one device it makes no difference.
    """

    key_mask: Bool[Array, "b keys"] | None = None
    mask: Bool[Array, "#b #h #q k"] | None = None
    bias: Float[Array, "#b #h #q k"] | None = None
    causal: bool = False
    scale: float | None = None
    replicated: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it is softmax(q k^T / sqrt(d)) v over all keys."""
        arrays = (self.key_mask, self.mask, self.bias)
        return all(a is None for a in arrays) and not self.causal and self.scale is None

    def check(self, b: int, h: int, lq: int, lk: int, where: str = "") -> None:
        """Refuses arrays that do not fit a batch, heads, queries and keys.

        Raises:
            ValueError: what was given and what was expected, with `where` after the latter.
        """
        lengths = dict.fromkeys((lk, self.replicated) if self.replicated else (lk,))
        if self.key_mask is not None:
            fits = self.key_mask.shape in [(b, length) for length in lengths]
            expected = " or ".join(f"[{b}, {length}]" for length in lengths)
            _check_array("key_mask", self.key_mask, jnp.bool_, fits, expected)
        for name, dtype in (("mask", jnp.bool_), ("bias", jnp.floating)):
            array = getattr(self, name)
            if array is None:
                continue
            sizes = ((1, b), (1, h), (1, lq), (lk,))
            fits = array.ndim == 4 and all(map(tuple.__contains__, sizes, array.shape))
            expected = f"[1 or {b}, 1 or {h}, 1 or {lq}, {lk}] (batch, heads, queries, keys){where}"
            _check_array(name, array, dtype, fits, expected)

    def allowed(self, lq: int, lk: int, *, causal: bool | None = None) -> Array | None:
        """Where queries attend to keys, bool [1 | b, 1 | h, 1 | lq, lk]; None for everywhere.

        `causal` stands for the field, if given.
        """
        found = []
        if self.key_mask is not None:
            missing = lk - self.key_mask.shape[1]
            whole = jnp.pad(self.key_mask, ((0, 0), (0, missing)), constant_values=True)
            found.append(whole[:, None, None])
        if self.mask is not None:
            found.append(self.mask)
        if self.causal if causal is None else causal:
            found.append(jnp.tril(jnp.ones((lq, lk), bool))[None, None])
        return functools.reduce(jnp.logical_and, found) if found else None

    def at(
        self, queries: Int[Array, " q"] | int, keys: Int[Array, " k"] | int
    ) -> "AttentionOptions":
        """Of options for a whole sequence, those for the queries and keys at these positions.

        Positions are numbers in the whole sequence, or a number n for the first n. Those beyond its
        end are padding: they are given some token's. `causal` becomes a mask where positions are
        not counted from the start.
        """

        def select(array):
            if array is None:
                return None
            if array.ndim == 4 and array.shape[2] > 1 and not isinstance(queries, int):
                array = jnp.take(array, queries, axis=2, mode="clip")
            return array if isinstance(keys, int) else jnp.take(array, keys, -1, mode="clip")

        key_mask, mask, bias = map(select, (self.key_mask, self.mask, self.bias))
        is_mask = self.causal and not (isinstance(queries, int) and isinstance(keys, int))
        if is_mask:
            rows, columns = (
                jnp.arange(positions) if isinstance(positions, int) else positions
                for positions in (queries, keys)
            )
            before = (rows[:, None] >= columns[None])[None, None]
            mask = before if mask is None else mask & before
        causal = self.causal and not is_mask
        return AttentionOptions(key_mask, mask, bias, causal, self.scale)

    def of_heads(self, start: Array | int, count: int) -> "AttentionOptions":
        """Options for `count` of the heads, from number `start` on."""

        def select(array):
            if array is None or array.shape[1] == 1:
                return array
            return jax.lax.dynamic_slice_in_dim(array, start, count, axis=1)

        return dataclasses.replace(self, mask=select(self.mask), bias=select(self.bias))


PLAIN = AttentionOptions()


def _check_array(name: str, array: Array, dtype: type, fits: bool, expected: str) -> None:
    if not jnp.issubdtype(array.dtype, dtype):
        kind = "bool, True where a key is attended to" if dtype is jnp.bool_ else "floating-point"
        hint = "; what is added to scores is the bias" if dtype is jnp.bool_ else ""
        raise ValueError(f"attention's {name} is {array.dtype}: expected {kind}{hint}")
    if not fits:
        raise ValueError(f"attention's {name} has shape {array.shape}: expected {expected}")


def score_weights(
    q: Float[Array, "b h lq d"],
    k: Float[Array, "b h lk d"],
    allowed: Bool[Array, "#b #h #lq lk"] | None = None,
    bias: Float[Array, "#b #h #lq lk"] | None = None,
) -> tuple[Float[Array, "b h lq lk"], Float[Array, "b h lq 1"]]:
    """Attention's weights before their normalisation, float32, and the largest scores.

    Args:
        q: queries, scaled already.
        k: keys.
        allowed: as of `AttentionOptions.allowed`.
        bias: added to the scores.

    Returns:
        exp(score - largest of the query's), zero where not allowed; the largest score of a query.
        No gradient passes the latter: it cancels when weights are normalised.
    """
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if allowed is not None:
        scores = jnp.where(allowed, scores, MASKED)
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    return (weights if allowed is None else jnp.where(allowed, weights, 0.0)), largest


def nonzero(total: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Sums of weights to divide by: 1 for those of queries that attend to nothing."""
    return jnp.where(total == 0, jnp.ones_like(total), total)
