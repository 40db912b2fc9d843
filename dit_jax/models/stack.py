"""Repeated blocks: one definition, stored stacked, run as a scan or an unrolled loop.

Parameters of the `depth` blocks share one tree whose leaves have a leading layer axis. A scan
compiles one block whatever the depth (accelerators, big models); the unrolled loop lets CPU XLA
schedule across blocks and is markedly faster there, and GPUs read parameters that are taken apart
for it where they are. Rematerialisation is a policy around the block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dit_jax.models.apart import is_apart
from dit_jax.models.linear import converted_to, products_dtypes
from dit_jax.models.recomputation import (
    activations_saveable,
    converted,
    resolve_remat,
    tracing_blocks,
)
from dit_jax.nearest import one_of
from dit_jax.target import target_platform

LAYER_LOOPS = ("auto", "scan", "unroll")


def resolve_layer_loop(layer_loop: str, backend: str | None = None, *, remat: str = "none") -> str:
    """'auto' is 'unroll' on CPUs without rematerialisation, and 'scan' elsewhere.

    In an unrolled loop CPU XLA saves nothing by rematerialisation: it keeps what all blocks need.
    """
    if layer_loop not in LAYER_LOOPS:
        raise ValueError(f"layer_loop={layer_loop!r}: {one_of(layer_loop, LAYER_LOOPS)}")
    if layer_loop != "auto":
        return layer_loop
    on_cpu = (backend or target_platform()) == "cpu"
    return "unroll" if on_cpu and resolve_remat(remat, backend) == "none" else "scan"


def rematerialised(function: Callable, remat: str, *, prevent_cse: bool = True) -> Callable:
    """Wraps a block so that its backward pass recomputes what the policy does not save.

    'none' saves everything, 'activations' the results of matrix products and of attention (only
    what is elementwise or a normalisation is recomputed), 'dots' those of matrix products with
    weights, before the bias is added (attention is recomputed as well), 'block' only the block's
    inputs. 'auto' is one of these by backend (`recomputation.resolve_remat`). Outside a scan
    `prevent_cse` keeps XLA from merging the recomputation with what it was to replace.

    Raises:
        ValueError: an unknown policy.
    """
    remat = resolve_remat(remat)
    if remat == "none":
        return function
    policy = {
        "block": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "activations": activations_saveable,
    }
    return jax.checkpoint(function, policy=policy[remat], prevent_cse=prevent_cse)


def create_stack(make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs):
    """`depth` blocks, each initialised from its own key, as one module with stacked leaves."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def create(rngs):
        return make_block(rngs)

    return create(rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ahead:
    """Per-layer state of which the first layer's is prefetched already, by the call before.

    Before the first layer there is nothing beside which its communication could run; in the call
    before there is the last layer.

    Attributes:
        layers: the state, with a leading layer axis.
        first: what `prefetch` makes of the first layer's.
    """

    layers: Any
    first: Any


def _unstack(tree: Any, depth: int) -> list[Any]:
    """Splits the leading axis; the gradient is one concatenation, not `depth` padded sums."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_apart)
    split = [
        leaf.layers
        if is_apart(leaf)
        else [part[0] for part in jax.lax.split(leaf, (1,) * depth, axis=0)]
        for leaf in leaves
    ]
    return [treedef.unflatten([parts[i] for parts in split]) for i in range(depth)]


def check_capture(capture: tuple[int, ...], depth: int) -> None:
    """Refuses numbers of layers whose activations are wanted, unless they ascend.

    Raises:
        ValueError: they do not, or are none of `depth` layers.
    """
    if list(capture) != sorted(set(capture)) or not all(0 <= i < depth for i in capture):
        raise ValueError(f"features {capture}: expected ascending numbers of 0 to {depth - 1}")


def run_stack(
    blocks: nnx.Module,
    call: Callable[..., tuple[Any, Any]],
    x: Any,
    *args: Any,
    state: Any = None,
    depth: int,
    layer_loop: str = "auto",
    remat: str = "none",
    capture: tuple[int, ...] = (),
    prefetch: Callable[[Any], Any] | None = None,
    prefetch_next: Callable[[Any], Any] | None = None,
    layers: tuple[int, int] | None = None,
    own: Any = None,
) -> tuple[Any, Any, tuple[Any, ...]]:
    """Runs `x, state_l = call(block_l, x, state_l, *args)` through the layers in order.

    Args:
        blocks: the stacked module of `create_stack`, its parameters perhaps `Apart`.
        call: applies one block.
        x: the activations carried from layer to layer.
        *args: inputs every layer shares (conditioning).
        state: per-layer state with a leading layer axis, `Ahead` of such, or None.
        depth: number of layers.
        layer_loop: 'scan', 'unroll' or 'auto'.
        remat: a policy of `rematerialised`.
        capture: numbers of layers whose activations are wanted besides, ascending.
        prefetch: turns a layer's state into what `call` takes in its place; done for layer l + 1
            before layer l is computed, and once for every layer. Needs a state.
        prefetch_next: makes of the first layer's new state `Ahead.first` for the next call; done
            before the last layer is computed. Needed with `Ahead`.
        layers: (first, end) of the layers to run; None for all. Parameters and state are those of
            all, and the state of the others is returned as it was.
        own: inputs of which every layer has its own, leaves with a leading layer axis: what `call`
            takes last. None for none.

    Returns:
        The last activations, the new state (None if none was given, `Ahead` if that was), and the
        activations after the layers of `capture`.

    Raises:
        ValueError: `capture` is not ascending numbers of layers.
    """
    check_capture(capture, depth)
    graph, parameters = nnx.split(blocks)
    dtypes = products_dtypes(blocks)
    if dtypes:  # see `converted`
        stopped = jax.tree.map(jax.lax.stop_gradient, parameters)
        parameters = (stopped, converted_to(parameters, dtypes))
    apart = any(map(is_apart, jax.tree.leaves(parameters, is_leaf=is_apart)))
    scanned = resolve_layer_loop(layer_loop, remat=remat) == "scan" and not apart
    if own is not None:
        parameters = (parameters, own)

    @functools.partial(rematerialised, remat=remat, prevent_cse=not scanned)
    def layer(x, parameters, state, args):
        if own is not None:
            parameters, own_inputs = parameters
            args = (*args, own_inputs)
        if dtypes:
            parameters = jax.tree.map(converted, *parameters)
        with tracing_blocks(resolve_remat(remat), scanned=scanned):
            return call(nnx.merge(graph, parameters), x, state, *args)

    if state is None:
        prefetch = None
    first = state.first if isinstance(state, Ahead) else None
    if first is not None and prefetch_next is None:
        raise ValueError(
            "this state has the first layer's prefetched: pass the attention strategy's "
            "prefetch_next to run_stack beside its prefetch"
        )
    stacked = state.layers if isinstance(state, Ahead) else state
    part = (0, depth) if layers is None else layers
    fetch = None if prefetch is None else _Prefetch(prefetch, first, prefetch_next)
    inputs, captured, following = (parameters, stacked), (), None
    if part != (0, depth):
        if capture:
            raise ValueError(f"features {capture} of a part of the layers: expected none")
        run = _scan_part if scanned else _unroll_part
        x, stacked, following = run(layer, fetch, x, inputs, args, *part)
    elif scanned and fetch is not None:
        run = _scan_prefetched
        x, stacked, captured, following = run(layer, fetch, x, inputs, args, capture, depth)
    elif scanned:
        x, stacked, captured = _scan_segments(layer, x, inputs, args, capture, depth)
    else:
        x, stacked, captured = _unroll(layer, fetch, x, inputs, args, capture, depth)
    if first is None:
        return x, stacked, captured
    if part[0] > 0:
        following = first
    elif following is None:
        following = prefetch_next(_at(stacked, 0))
    return x, Ahead(stacked, following), captured


@dataclasses.dataclass(frozen=True)
class _Prefetch:
    """What turns a layer's state into what its call takes, before its turn.

    Attributes:
        layer: does it for a layer of this call.
        first: of the first layer, if the call before has done it.
        for_next: does it for the first layer of the next call, if that is to find it.
    """

    layer: Callable[[Any], Any]
    first: Any = None
    for_next: Callable[[Any], Any] | None = None

    def start(self, state: Any, index: int) -> Any:
        """What layer `index`, with which a call starts, takes."""
        if index == 0 and self.first is not None:
            return self.first
        return self.layer(_at(state, index))

    def next(self, state: Any) -> Any:
        """What the next call finds; None if it finds nothing."""
        return None if self.first is None else self.for_next(_at(state, 0))


def _unroll(layer, fetch, x, inputs, args, capture, depth):
    """All layers one after the other."""
    parameters, state = inputs
    states, captured = [], []
    own = [None] * depth if state is None else _unstack(state, depth)
    if fetch is not None:
        # All of it is independent of the activations: the compiler may start each one as early as
        # it likes, the first must be there before the first layer.
        own = [fetch.start(state, 0), *(fetch.layer(layer_state) for layer_state in own[1:])]
    for layer_parameters, layer_state in zip(_unstack(parameters, depth), own, strict=True):
        x, layer_state = layer(x, layer_parameters, layer_state, args)
        states.append(layer_state)
        if len(states) - 1 in capture:
            captured.append(x)
    if state is not None:
        state = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *states)
    return x, state, tuple(captured)


def _scan_segments(layer, x, layers, args, capture, depth):
    """One scan if nothing is captured, else one up to each captured layer and one for the rest."""

    def step(x, layer_in):
        return layer(x, *layer_in, args)

    captured, states, start = [], [], 0
    for end in (*(i + 1 for i in capture), depth):
        if end > start:
            # The whole is not sliced: that would copy the parameters.
            whole = start == 0 and end == depth
            segment = layers if whole else jax.tree.map(lambda leaf: leaf[start:end], layers)  # noqa: B023
            x, state = jax.lax.scan(step, x, segment)
            states.append(state)
        if len(captured) < len(capture):
            captured.append(x)
        start = end
    if len(states) > 1:
        states = [jax.tree.map(lambda *leaves: jax.numpy.concatenate(leaves), *states)]
    return x, states[0], tuple(captured)


def _scan_prefetched(layer, fetch, x, layers, args, capture, depth):
    """A scan that carries the next layer's prefetched state, the last layer after it.

    The iteration of layer l prefetches for layer l + 1 from the state the stack was called with,
    which no iteration changes: nothing of it waits for layer l, and layer l does not wait for it.
    The last layer stands outside, as it has nothing to prefetch. Parameters are taken by index from
    the whole: slices of them would be copies. Before it the first layer's new state is prefetched
    for the next call, where that wants it.
    """
    parameters, state = layers

    def step(carry, index):
        x, ready, new_state = carry
        following = fetch.layer(_at(state, index + 1))
        x, layer_state = layer(x, _at(parameters, index), ready, args)
        return (x, following, _put(new_state, layer_state, index)), None

    carry = (x, fetch.start(state, 0), jax.tree.map(jax.numpy.zeros_like, state))
    captured, start = [], 0
    for end in (*(i + 1 for i in capture if i + 1 < depth), depth - 1):
        if end > start:
            carry, _ = jax.lax.scan(step, carry, jax.numpy.arange(start, end))
        captured.append(carry[0])
        start = end
    x, ready, new_state = carry
    following = fetch.next(new_state) if depth > 1 else None
    x, layer_state = layer(x, _at(parameters, depth - 1), ready, args)
    captured[-1] = x
    new_state = _put(new_state, layer_state, depth - 1)
    return x, new_state, tuple(captured[: len(capture)]), following


def _scan_part(layer, fetch, x, layers, args, first, end):
    """Layers `first` to `end` - 1, taken by index from the whole; prefetched as above."""
    parameters, state = layers
    ready = fetch.start(state, first) if fetch else None

    def step(carry, index):
        x, ready, new_state = carry
        following = fetch.layer(_at(state, index + 1)) if fetch else None
        own = ready if fetch else _at(state, index)
        x, layer_state = layer(x, _at(parameters, index), own, args)
        return (x, following, _put(new_state, layer_state, index)), None

    # Of what is prefetched the last layer stands outside: it has nothing to prefetch.
    scanned, following = end - 1 if fetch else end, None
    carry = (x, ready, state)
    if scanned > first:
        carry, _ = jax.lax.scan(step, carry, jax.numpy.arange(first, scanned))
    x, ready, state = carry
    if fetch:
        following = fetch.next(state) if scanned > 0 else None
        x, layer_state = layer(x, _at(parameters, end - 1), ready, args)
        state = _put(state, layer_state, end - 1)
    return x, state, following


def _unroll_part(layer, fetch, x, layers, args, first, end):
    """Layers `first` to `end` - 1 one after the other."""
    parameters, state = layers
    own = [_at(state, index) for index in range(first, end)]
    if fetch:
        own = [fetch.start(state, first), *(fetch.layer(layer_state) for layer_state in own[1:])]
    for index in range(first, end):
        x, layer_state = layer(x, _at(parameters, index), own[index - first], args)
        state = _put(state, layer_state, index)
    return x, state, None


def _at(tree: Any, index: Any) -> Any:
    """The layer number `index` of stacked leaves, or of those `Apart`, where it is no tracer."""

    def at(leaf):
        if is_apart(leaf):
            return leaf.layers[index]
        return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)

    return jax.tree.map(at, tree, is_leaf=is_apart)


def _put(tree: Any, values: Any, index: Any) -> Any:
    """Stacked leaves with another layer number `index`."""
    return jax.tree.map(
        lambda leaf, value: jax.lax.dynamic_update_index_in_dim(leaf, value, index, 0),
        tree,
        values,
    )
