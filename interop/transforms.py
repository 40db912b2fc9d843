"""Bijections between a tensor in another library's layout and ours: what rows of a table apply."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A bijection between one foreign tensor and (a layer's part of) one of our parameters.

    Attributes:
        forward: foreign to ours.
        inverse: ours to foreign; with `forward` the identity on ours, bit for bit.
        accepts: whether a foreign tensor of the first shape will do where the second is expected.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    accepts: Callable[[tuple[int, ...], tuple[int, ...]], bool] = lambda found, wanted: (
        found == wanted
    )

    def then(self, other: "Transform") -> "Transform":
        """This transform, then `other` on its result."""
        return Transform(
            lambda a: other.forward(self.forward(a)),
            lambda a: self.inverse(other.inverse(a)),
            self.accepts,
        )


def identity() -> Transform:
    """Biases, embedding tables, scales."""
    return Transform(lambda a: a, lambda a: a)


def linear() -> Transform:
    """PyTorch's weight [out, in] and our kernel [in, out]."""
    return Transform(lambda a: a.T, lambda a: a.T)


def linear_or_pointwise() -> Transform:
    """As `linear`; on import also the same map stored as a 1x1 convolution [out, in, 1, 1]."""
    return Transform(
        lambda a: a.reshape(a.shape[:2]).T,
        lambda a: a.T,
        lambda found, wanted: found in (wanted, (*wanted, 1, 1)),
    )


def pointwise_conv() -> Transform:
    """A 1x1 convolution [out, in, 1, 1] and our kernel [in, out]."""
    return Transform(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])


def conv() -> Transform:
    """A convolution's weight [out, in, rows, columns] and our kernel [rows, columns, in, out]."""
    return Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))


def patch_conv(patch_size: int) -> Transform:
    """A patch embedder's convolution [out, in, p, p] and our kernel [p p in, out].

    Our patches are flattened as (row, column, channel).
    """

    def forward(a):
        return a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0])

    def inverse(a):
        return a.reshape(patch_size, patch_size, -1, a.shape[-1]).transpose(3, 2, 0, 1)

    return Transform(forward, inverse)


def swap_halves(axis: int) -> Transform:
    """Exchanges the two halves of an axis: (shift, scale) and (scale, shift)."""

    def swap(a):
        first, second = np.split(a, 2, axis=axis)
        return np.concatenate([second, first], axis=axis)

    return Transform(swap, swap)


def padded_rows(positions: tuple[int, ...], count: int) -> Transform:
    """A foreign table of `count` rows, of which ours are those at `positions`; the rest are 0."""
    chosen = np.asarray(positions)

    def inverse(a):
        padded = np.zeros((count, *a.shape[1:]), a.dtype)
        padded[chosen] = a
        return padded

    return Transform(lambda a: a[chosen], inverse)
