"""Rotary position embeddings over any number of axes (RoFormer, arXiv 2104.09864).

Positions are ids, one integer (or real number) an axis: (0, row, column) in FLUX, (time, row,
column) in video. Channels of a head are shared out among the axes; those of an axis are turned by
the angles position x theta^(-2 i / channels), in pairs of neighbouring channels, as in FLUX. Turned
so, the product of a query and a key depends on the difference of their positions. All in float32.

    def of_grid(grid):
        return rotary_table(grid_ids(grid, axes=3), (16, 56, 56))

    table = own_positions(attention, (rows, columns), of_grid)  # of the tokens at hand
    q, k = apply_rotary(q, table), apply_rotary(k, table)
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num


def grid_ids(grid: Sequence[int], axes: int | None = None) -> np.ndarray:
    """Positions of the tokens of a grid, int [tokens, axes], the last axis of the grid fastest.

    Args:
        grid: tokens along each axis, such as (rows, columns) or (frames, rows, columns).
        axes: how many there are in all: those before the grid's are 0; None for the grid's alone.

    Raises:
        ValueError: fewer axes than the grid has.
    """
    axes = len(grid) if axes is None else axes
    if axes < len(grid):
        raise ValueError(f"a grid of {tuple(grid)} has {len(grid)} axes: expected at most {axes}")
    ids = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1)
    return np.pad(ids.reshape(-1, len(grid)), ((0, 0), (axes - len(grid), 0)))


def rotary_table(
    ids: Num[np.ndarray, "tokens axes"], channels: Sequence[int], theta: float = 10_000.0
) -> Float[np.ndarray, "tokens half 2"]:
    """Cosines and sines of every token's angles, float32 [tokens, head_dim / 2, (cos, sin)].

    Args:
        ids: positions. Angles are computed in float64.
        channels: of a head, by axis; their sum is the head's size.
        theta: base of the frequencies.

    Raises:
        ValueError: not one number of channels an axis, or an odd one.
    """
    if len(channels) != ids.shape[1] or any(c < 1 or c % 2 for c in channels):
        raise ValueError(
            f"rotary channels {tuple(channels)} for positions of {ids.shape[1]} axes: expected one "
            "even number an axis"
        )
    frequencies = [theta ** (-np.arange(0, count, 2) / count) for count in channels]
    positions = ids.astype(np.float64)
    angles = np.concatenate(
        [positions[:, i, None] * values[None] for i, values in enumerate(frequencies)], axis=1
    )
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def apply_rotary(
    x: Float[Array, "b l h d"], table: Float[Array | np.ndarray, "l half 2"]
) -> Float[Array, "b l h d"]:
    """Turns each pair of channels (2 i, 2 i + 1) by its token's angle, in float32, in x's dtype.

    Args:
        x: queries or keys.
        table: of `rotary_table`, of these tokens.
    """
    cos, sin = (jnp.asarray(table[..., i])[None, :, None] for i in range(2))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
