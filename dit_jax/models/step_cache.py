"""Step caching: most of a stack of blocks is skipped where its first block says little has changed.

What the blocks after the first add to the activations changes slowly from one evaluation of a
sampler to the next. The first block always runs. Where what it adds is within `threshold` of what
it added when the others ran last, what these added then is added again ("first-block cache", as in
ParaAttention and diffusers), or what it would be by now if it went on changing as before (Taylor's
expansion over evaluations, Liu et al., "TaylorSeer", ICCV 2025).

The decision is taken on the device, inside the sampling scan. An image's own changes decide for it,
so that it does not depend on its batch; the blocks are skipped when all images of the batch skip.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from dit_jax.models import stack
from dit_jax.models.call import Carried, Request, Result
from dit_jax.options import NoOptions, option, register, register_section
from dit_jax.ranges import COUNT, Range

SHARE_INSIDE = Range(0, 1, above=True, below=True)
ORDER = Range(0, 2, whole=True)
LEAST_EVALUATIONS = 8  # with fewer, evaluations differ too much for any to be skipped
DECISION_SCOPE = "step_cache"
"""The name scope in which is decided, by which the decision is found in a compiled program."""

_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Everyone:
    """How devices that each hold a part of the batch or of the tokens decide alike.

    Attributes:
        token_axes: mesh axes over which the tokens are split.
        all_axes: mesh axes over which anything is split.
    """

    token_axes: tuple[str, ...] = ()
    all_axes: tuple[str, ...] = ()

    def mean(self, values: Float[Array, " b"]) -> Float[Array, " b"]:
        """Over the devices that hold tokens of the same examples."""
        return jax.lax.pmean(values, self.token_axes) if self.token_axes else values

    def agree(self, skip: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether all devices skip: those that did not would wait for the others' keys for ever."""
        if not self.all_axes:
            return skip
        return jax.lax.pmin(skip.astype(jnp.int32), self.all_axes) == 1


ALONE = Everyone()


@dataclasses.dataclass(frozen=True)
class StepCache:
    """When the blocks after the first are skipped.

    Attributes:
        threshold: mean absolute change of what the first block adds, relative to what it added when
            all blocks ran last, below which they are skipped.
        warmup: evaluations at the start in which all blocks run.
        max_reuses: most evaluations in a row that skip them.
        order: 0 adds again what was added; 1 and 2 extrapolate it by so many differences.
        everyone: how several devices decide alike.
    """

    threshold: float = option(
        0.1, "relative change of the first block up to which the others are skipped", SHARE_INSIDE
    )
    warmup: int = option(2, "evaluations at the start in which all blocks run", COUNT)
    max_reuses: int = option(3, "most evaluations in a row that skip blocks", COUNT)
    order: int = option(
        0, "0: blocks add what they added last; 1, 2: extrapolated by so many differences", ORDER
    )
    everyone: Everyone = ALONE

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise ValueError(
                f"threshold={self.threshold}: expected a number between 0 and 1, as 0.1, the "
                "relative change of the first block's output up to which the others are skipped"
            )
        if self.warmup < 1 or self.max_reuses < 1:
            raise ValueError(
                f"warmup={self.warmup}, max_reuses={self.max_reuses}: expected at least 1"
            )
        if self.order not in (0, 1, 2):
            raise ValueError(f"order={self.order}: expected 0 (reuse), 1 or 2 (extrapolation)")
        if self.warmup <= self.order:
            raise ValueError(
                f"warmup={self.warmup}: order={self.order} extrapolates from {self.order + 1} "
                f"evaluations that computed everything; expected at least {self.order + 1}"
            )

    def check(self, evaluations: int, evaluations_per_step: int = 1) -> None:
        """Refuses sampling that would gain nothing.

        Args:
            evaluations: of the network, for one image.
            evaluations_per_step: of the solver.

        Raises:
            ValueError: too few evaluations; extrapolation between evaluations that are not of
                successive times.
        """
        if evaluations < LEAST_EVALUATIONS or evaluations <= self.warmup:
            raise ValueError(
                f"a step cache cannot pay in {evaluations} evaluations, of which the first "
                f"{self.warmup} compute everything: neighbouring evaluations differ too much. "
                f"Expected at least {max(LEAST_EVALUATIONS, self.warmup + 1)}; leave it out"
            )
        if self.order and evaluations_per_step > 1:
            raise ValueError(
                f"order={self.order} extrapolates over evaluations at successive times, and this "
                f"solver makes {evaluations_per_step} a step, some of the same time: use order=0, "
                "or a solver of one evaluation a step"
            )

    def least_computed(self, evaluations: int) -> int:
        """In how many of so many evaluations all blocks run at least."""
        later = max(0, evaluations - self.warmup)
        return min(self.warmup, evaluations) + later // (self.max_reuses + 1)

    def empty(self, zeros: Float[Array, "b l d"]) -> "CacheState":
        """The state before the first evaluation of activations like `zeros`."""
        batch = zeros.shape[:1]
        return CacheState(
            first=zeros,
            rest=(zeros,) * (self.order + 1),
            evaluations=jnp.zeros(batch, jnp.int32),
            computed=jnp.zeros(batch, jnp.int32),
            reuses=jnp.zeros(batch, jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheState:
    """What is carried from one evaluation to the next.

    Attributes:
        first: what the first block added when all blocks ran last [b, l, d].
        rest: what the others added then, and its differences by evaluation up to the order.
        evaluations: how many there were, an example each [b].
        computed: in how many of them all blocks ran [b].
        reuses: how many in a row did not [b].
    """

    first: Any  # a pytree: what JAX puts into it need not be arrays
    rest: tuple[Any, ...]
    evaluations: Any
    computed: Any
    reuses: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedCarry:
    """The carry of a request with a step cache.

    Attributes:
        layers: what strategies of the seams keep, as without a cache.
        cache: the cache's own.
    """

    layers: Any
    cache: CacheState


@dataclasses.dataclass(frozen=True)
class CachedNetwork:
    """A network that is sampled with a step cache, with the face of `Network`.

    Attributes:
        network: a `Network`, or one on many devices.
        cache: when blocks are skipped.
    """

    network: Any
    cache: StepCache

    def __post_init__(self):
        if not hasattr(self.network.config, "stack_shape"):
            raise ValueError(
                f"a step cache skips blocks of a stack, which {self.network.config.title} is not: "
                "leave the cache out, or sample a transformer"
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "network":
            raise AttributeError(name)
        return getattr(self.network, name)

    def apply(self, params: Any, request: Request) -> Result:
        """As the network's own; the request's carry is of `carried`."""
        return self.network.apply(params, request.replace(step_cache=self.cache))

    def carried(self, batch: int, size: tuple[int, int]) -> Carried:
        """An empty cache, beside what the network itself carries."""
        own = self.network.carried(batch, size) if hasattr(self.network, "carried") else Carried()
        state = CachedCarry(own.state, self.cache.empty(self.network.blank_tokens(batch, size)))
        warmup = None if own.warmup is None else CachedNetwork(own.warmup, self.cache)
        return Carried(state, warmup, own.warmup_steps)


def run_stack(request: Request, blocks: Any, call: Callable, x: Array, *args: Any, **options: Any):
    """`stack.run_stack` for a request: with its carry, feature maps and step cache.

    Args:
        request: what is asked for.
        blocks: the stacked module.
        call: applies one block.
        x: the activations.
        *args: inputs every layer shares.
        **options: of `stack.run_stack`; `depth` among them.

    Returns:
        The last activations, the new carry, and the feature maps.

    Raises:
        ValueError: feature maps with a step cache, which skips the blocks they are after.
    """
    if request.step_cache is None:
        more = {"state": request.carry, "capture": request.features}
        return stack.run_stack(blocks, call, x, *args, **more, **options)
    if request.features:
        raise ValueError(f"features {request.features} with a step cache: expected none")
    depth = options["depth"]

    def run(x: Array, state: Any, layers: tuple[int, int]) -> tuple[Array, Any]:
        more = {"state": state, "layers": layers}
        return stack.run_stack(blocks, call, x, *args, **more, **options)[:2]

    x_first, state = run(x, request.carry.layers, (0, 1))
    out, cache_state, state = run_cached(
        request.step_cache,
        request.carry.cache,
        x,
        x_first,
        lambda x, state: run(x, state, (1, depth)),
        state,
    )
    return out, CachedCarry(state, cache_state), ()


def run_cached(
    cache: StepCache,
    state: CacheState,
    x: Float[Array, "b l d"],
    x_first: Float[Array, "b l d"],
    rest: Callable[[Float[Array, "b l d"], Any], tuple[Float[Array, "b l d"], Any]],
    layers: Any = None,
) -> tuple[Float[Array, "b l d"], CacheState, Any]:
    """Runs the blocks after the first, or adds what they would.

    Args:
        cache: when they are skipped.
        state: of the evaluation before.
        x: activations before the first block.
        x_first: after it.
        rest: (activations after the first block, state of the layers) -> both after the last.
        layers: state of the layers, which skipping leaves as it was.

    Returns:
        Activations after the last block, and the new states.
    """
    added = x_first - x
    similar = _similar(cache, state, added)

    def skip() -> tuple[Any, CacheState, Any]:
        return x_first + _expected(state), _skipped(state), layers

    def compute() -> tuple[Any, CacheState, Any]:
        out, new_layers = rest(x_first, layers)
        # An image that would have skipped alone does so in company, too.
        skipped, computed = skip(), (out, _computed(state, added, out - x_first))
        out, new_state = jax.tree.map(
            lambda one, other: jnp.where(_broadcast(similar, one), one, other),
            skipped[:2],
            computed,
        )
        return out, new_state, new_layers

    with jax.named_scope(DECISION_SCOPE):
        return jax.lax.cond(cache.everyone.agree(similar.all()), skip, compute)


def _similar(cache: StepCache, state: CacheState, added: Array) -> Bool[Array, " b"]:
    """Which images skip."""

    def mean(values: Array) -> Array:
        return cache.everyone.mean(jnp.abs(values.astype(jnp.float32)).mean(axis=(1, 2)))

    first = state.first.astype(jnp.float32)
    change = mean(added.astype(jnp.float32) - first) / jnp.maximum(mean(first), _TINY)
    may = (state.evaluations >= cache.warmup) & (state.reuses < cache.max_reuses)
    return may & (change < cache.threshold)


def _expected(state: CacheState) -> Float[Array, "b l d"]:
    """What the blocks after the first would add now: a sum of differences over factorials."""
    elapsed = _broadcast(state.reuses + 1, state.first).astype(jnp.float32)
    total, factor = 0.0, 1.0
    for order, difference in enumerate(state.rest):
        factor = factor * elapsed / order if order else 1.0
        total = total + factor * difference.astype(jnp.float32)
    return total.astype(state.first.dtype)


def _skipped(state: CacheState) -> CacheState:
    return dataclasses.replace(state, evaluations=state.evaluations + 1, reuses=state.reuses + 1)


def _computed(state: CacheState, first: Array, rest: Array) -> CacheState:
    """The state after an evaluation in which all blocks ran."""
    dtype, differences = rest.dtype, [rest.astype(jnp.float32)]
    elapsed = _broadcast(state.reuses + 1, rest).astype(jnp.float32)
    for order, former in enumerate(state.rest[:-1]):
        change = (differences[-1] - former.astype(jnp.float32)) / elapsed
        known = _broadcast(state.computed > order, rest)
        differences.append(jnp.where(known, change, 0.0))
    return CacheState(
        first=first,
        rest=tuple(difference.astype(dtype) for difference in differences),
        evaluations=state.evaluations + 1,
        computed=state.computed + 1,
        reuses=jnp.zeros_like(state.reuses),
    )


def _broadcast(values: Shaped[Array, " b"], like: Array) -> Array:
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


register_section("cache", chosen_by="name", chosen="none")
register("cache", "none", NoOptions)
register("cache", "first_block", StepCache)
