"""What goes into a network and what comes out of it: one record each, for every network alike."""

import dataclasses
from typing import Any

import jax

from dit_jax.models.attention import Attention
from dit_jax.models.spatial import Spatial

_STATIC = {"static": True}  # of the program, not an input of it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """One evaluation of a network, or of a denoiser.

    Attributes:
        x: noisy input [b, h, w, c]: the denoiser's own, or preconditioned for the network.
        t: time [b], the process's for a denoiser, the network's for a network.
        conditions: what the network declares (`dit_jax.conditions`), the batch leading.
        dropout_keys: one key an example, so that masks do not depend on the batch; None for no
            dropout.
        features: numbers of the feature maps wanted, ascending (`Network.feature_shapes`).
        carry: what the strategies of the seams left at the evaluation before: other devices' keys
            and values, moments and rows; None for strategies that keep nothing.
        attention: a strategy for the attention seam; None for local attention.
        spatial: how layers see the pixels around one (`models.spatial`); None for the whole image.
        step_cache: when blocks are skipped (`models.step_cache`), whose carry the request then has;
            None for never.
        ahead: what `Network.ahead` made for this evaluation, leaves with the batch leading; None
            where the evaluation computes all of it.
    """

    x: Any  # these are pytrees: what JAX puts into them need not be arrays
    t: Any
    conditions: Any = dataclasses.field(default_factory=dict)
    dropout_keys: Any = None
    features: tuple[int, ...] = dataclasses.field(default=(), metadata=_STATIC)
    carry: Any = None
    attention: Attention | None = dataclasses.field(default=None, metadata=_STATIC)
    spatial: Spatial | None = dataclasses.field(default=None, metadata=_STATIC)
    step_cache: Any = dataclasses.field(default=None, metadata=_STATIC)
    ahead: Any = None

    def replace(self, **changes: Any) -> "Request":
        """The same request with other values."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation gives.

    Attributes:
        out: float32 [b, h, w, c], the raw output.
        features: the feature maps asked for, [b, h', w', c'] each.
        carry: for the next evaluation, None if the request had none.
    """

    out: Any
    features: Any = ()
    carry: Any = None


@dataclasses.dataclass(frozen=True)
class Carried:
    """What sampling carries from one evaluation of a network to the next.

    A network's method `carried(batch, size) -> Carried` is called while the sampler is traced, with
    the number of examples of an evaluation, twice the images where there is guidance, and their
    (height, width).

    Attributes:
        state: before the first evaluation; the carry of its request. None for none.
        warmup: the network that evaluates the first steps, None for the same one.
        warmup_steps: how many steps of the solver these are.
    """

    state: Any = None
    warmup: Any = None
    warmup_steps: int = 0
