"""Classifier-free guidance on raw network outputs (Ho & Salimans 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

RawFunction = Callable[[Array, Array, Any, Any], tuple[Array, Any]]
"""``raw(x, t, conditions, carry) -> (raw output, carry)``, t the process's time, a scalar or one
per example."""


def guided(
    raw: RawFunction,
    null_conditions: Any,
    scale: float | Float[Array, "..."],
    *,
    interval: tuple[float | Float[Array, ""], ...] | None = None,
    channels: str = "all",
) -> RawFunction:
    """Wraps a network so that it answers with ``unconditional + scale (conditional -
    unconditional)``.

    Both are evaluated in one batch of twice the size: the conditional examples first, then the
    unconditional ones. Channels that are not guided, among them those of a learned variance, are
    the conditional ones. As raw outputs are linear in x0 and eps, guiding them is guiding either.

    Args:
        raw: The network. Conditions are a pytree of arrays whose first axis is the batch.
        null_conditions: Conditions that stand for "no condition", of the same structure and shapes
            as the conditions, or a function that makes them of the conditions.
        scale: 1 is no guidance. A scalar or one per example; may be traced.
        interval: (low, high) in the process's time, ends included: guide only there (Kynkäänniemi
            et al. 2024); values may be traced. Outside, the conditional output is returned. With a
            scalar t and no carry, the unconditional half is then not evaluated at all. With a carry
            it always is, as a carry of both halves must be kept up to date.
        channels: 'all' guides every channel of the prediction; 'first3' only the first three, as
            the original DiT does (for its four-channel latents), the fourth staying conditional.

    Returns:
        A function like raw. A carry is that of the doubled batch.

    Raises:
        ValueError: If channels is neither 'all' nor 'first3', or a scale or interval is malformed.
    """
    if channels not in ("all", "first3"):
        raise ValueError(f"Unknown guidance channels {channels!r}: expected 'all' or 'first3'.")
    if interval is not None and len(interval) != 2:
        raise ValueError(
            f"A guidance interval is (low, high) in the process's time, got {interval!r}."
        )

    def double(x: Array, t: Array, conditions: Any, carry: Any, scale: Array) -> tuple[Array, Any]:
        null = null_conditions(conditions) if callable(null_conditions) else null_conditions
        doubled = jax.tree.map(
            lambda c, n: jnp.concatenate([c, jnp.asarray(n, c.dtype)]), conditions, null
        )
        times = t if t.ndim == 0 else jnp.concatenate([t, t])
        output, carry = raw(jnp.concatenate([x, x]), times, doubled, carry)
        guided_channels = x.shape[-1] if channels == "all" else min(3, x.shape[-1])
        return combine(*jnp.split(output, 2), scale, guided_channels), carry

    def evaluate(x: Array, t: Array, conditions: Any, carry: Any = None) -> tuple[Array, Any]:
        t, everywhere = jnp.asarray(t, jnp.float32), jnp.asarray(scale, jnp.float32)
        if everywhere.ndim > 1 or (everywhere.ndim == 1 and everywhere.shape != x.shape[:1]):
            raise ValueError(
                f"The guidance scale is a scalar or one per example, shape {x.shape[:1]}; got "
                f"shape {everywhere.shape}."
            )
        if interval is not None and t.ndim == 0 and not jax.tree.leaves(carry):
            return jax.lax.cond(
                _inside(t, interval),
                lambda: double(x, t, conditions, carry, everywhere),
                lambda: raw(x, t, conditions, carry),
            )
        return double(x, t, conditions, carry, strength(everywhere, t, interval))

    return evaluate


def _inside(t: Array, interval: tuple[float | Array, ...]) -> Array:
    return (t >= interval[0]) & (t <= interval[1])


def strength(
    scale: float | Float[Array, "..."],
    t: Float[Array, "..."],
    interval: tuple[float | Float[Array, ""], ...] | None,
) -> Float[Array, "..."]:
    """The scale at times t, a scalar or one per example: 1, no guidance, outside the interval."""
    scale = jnp.asarray(scale, jnp.float32)
    return scale if interval is None else jnp.where(_inside(t, interval), scale, 1.0)


def combine(
    conditional: Float[Array, "b *shape"],
    unconditional: Float[Array, "b *shape"],
    scale: Float[Array, "..."],
    guided_channels: int,
) -> Float[Array, "b *shape"]:
    """``unconditional + scale (conditional - unconditional)`` of raw outputs.

    Args:
        conditional: With the conditions; of it are the channels that are not guided, among them a
            learned variance's.
        unconditional: Without.
        scale: A scalar or one per example.
        guided_channels: How many of the first channels are guided.
    """
    scale = (
        scale.reshape(scale.shape + (1,) * (conditional.ndim - scale.ndim)) if scale.ndim else scale
    )
    head, null = conditional[..., :guided_channels], unconditional[..., :guided_channels]
    # In float32 whatever the network's dtype: a large scale amplifies the rounding of the
    # difference.
    mixed = null.astype(jnp.float32) + scale * (head.astype(jnp.float32) - null.astype(jnp.float32))
    return jnp.concatenate(
        [mixed.astype(conditional.dtype), conditional[..., guided_channels:]], axis=-1
    )
