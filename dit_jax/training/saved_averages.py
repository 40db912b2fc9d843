"""Averages that were added to a run, left out or stored otherwise since its checkpoint was written.

An average is a function of the parameters alone, so a run can begin to keep one at any step: it
starts as a copy of the parameters, as all do at step 0. One that is no longer kept is dropped.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.quantities import counted


def _has_averages(node: Any) -> bool:
    return dataclasses.is_dataclass(node) and hasattr(node, "params") and hasattr(node, "ema")


def as_saved(target: Any, saved: Any) -> Any:
    """`target` with the averages that a checkpoint has, instead of its own.

    Args:
        target: a state (`params` and `ema` among its fields) of arrays or shapes, or nested dicts
            with states in them.
        saved: what the checkpoint has in their places, as nested dicts.
    """
    if _has_averages(target):
        names = saved.get("ema") or {}
        ema = {name: target.ema.get(name, target.params) for name in names}
        return dataclasses.replace(target, ema=ema)
    if isinstance(target, dict) and isinstance(saved, dict):
        return {name: as_saved(value, saved.get(name, {})) for name, value in target.items()}
    return target


def as_wanted(found: Any, target: Any) -> tuple[Any, list[str]]:
    """What was read as `as_saved(target, ...)`, with the averages of `target`.

    Returns:
        It, and a line about each average that starts or ends here.
    """
    if _has_averages(target):
        added = [name for name in target.ema if name not in found.ema]
        ended = [name for name in found.ema if name not in target.ema]
        ema = {name: found.ema.get(name) for name in target.ema}
        ema.update({name: _copied(found.params, target.ema[name]) for name in added})
        lines = [f"{name} is new: it starts from the parameters" for name in added]
        lines += [f"{name} is no longer kept" for name in ended]
        return dataclasses.replace(found, ema=ema), lines
    if isinstance(target, dict):
        pairs = {name: as_wanted(found[name], value) for name, value in target.items()}
        wanted = {name: value for name, (value, _) in pairs.items()}
        return wanted, [line for _, lines in pairs.values() for line in lines]
    return found, []


def _copied(params: Any, target: Any) -> Any:
    # Copies, each where it belongs: an update gives its state away, no array may be in it twice.
    shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), target)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, target)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.array, tree, dtypes), out_shardings=shardings)
    return copy(params)


def in_wanted_dtypes(found: Any, target: Any) -> tuple[Any, list[str]]:
    """What was read, in the dtypes of `target` (an average, or the optimizer's mean of gradients).

    Returns:
        It, and a line about what is stored otherwise from here on.
    """
    leaves, treedef = jax.tree.flatten(found)
    wanted = jax.tree.leaves(target)
    changed = {}
    for leaf, goal in zip(leaves, wanted, strict=True):
        if leaf.dtype != goal.dtype:
            names = f"{leaf.dtype} in the checkpoint, {goal.dtype} from here on"
            changed[names] = changed.get(names, 0) + 1
    converted = [
        leaf if leaf.dtype == goal.dtype else leaf.astype(goal.dtype)
        for leaf, goal in zip(leaves, wanted, strict=True)
    ]
    lines = [f"{counted(number, 'array')} of {names}" for names, number in changed.items()]
    return treedef.unflatten(converted), lines
