"""Sampling: one compiled scan of a solver over a schedule.

``sample`` is pure and jittable: times, key, x and whatever the denoiser closes over are its inputs,
so other values of them (another schedule of as many steps, guidance scale, labels, seed) use the
program compiled before. The solver and the process are static.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import SPACINGS, insert_times, schedule
from dit_jax.diffusion.solvers import SOLVERS, Denoise, Solver, Step
from dit_jax.nearest import one_of

__all__ = [
    "SOLVERS",
    "SPACINGS",
    "Denoise",
    "Solver",
    "insert_times",
    "make_solver",
    "sample",
    "sample_path",
    "schedule",
]


def make_solver(name: str, **options: Any) -> Solver:
    """Builds a solver from its name in `SOLVERS` and its options.

    Raises:
        ValueError: If there is no such solver, or it has no such option.
    """
    if name not in SOLVERS:
        raise ValueError(f"Unknown solver {name!r}: {one_of(name, SOLVERS)}")
    solver = SOLVERS[name]
    fields = [field.name for field in dataclasses.fields(solver)]
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise ValueError(
            f"Solver {name!r} has no option {', '.join(unknown)}: its options are "
            f"{', '.join(fields)}."
        )
    return solver(**options)


def sample(
    solver: Solver,
    process: Process,
    denoise: Denoise,
    x: Float[Array, "b *shape"],
    times: Float[Array | np.ndarray, " steps_plus_1"],
    key: Key[Array, "*keys"],
    carry: Any = None,
    warmup: tuple[Denoise, int] | None = None,
    ahead: Any = None,
) -> tuple[Float[Array, "b *shape"], Any]:
    """Follows a schedule from noise to data.

    Args:
        solver: How to take one step.
        process: The process that x belongs to.
        denoise: ``denoise(x, t, carry) -> (Prediction, carry)``, t a scalar of the process's time.
        x: The state at times[0]: ``process.sample_prior(key, shape)`` to start from noise. State is
            kept in float32.
        times: Decreasing in noise, of ``schedule``. They need not end with clean data: the result
            then is x at the last time.
        key: Randomness of stochastic solvers (typed, of ``jax.random.key``). The noise of step i
            (from 0) is ``normal(fold_in(key, i), x.shape)``. With one key an example, shape [b],
            each example's noise is drawn so from its own key: it does not depend on the batch.
        carry: Anything that denoise passes on from one evaluation to the next.
        warmup: (another denoise, how many steps): it takes the first steps, with the same carry.
        ahead: Leaves with a leading axis of steps, or None: what was computed ahead for evaluations
            at the times at which steps start, which are made by ``denoise(..., ahead=...)``.

    Returns:
        x at the last time, and the carry after the last evaluation.

    Raises:
        ValueError: If times are not one sequence of at least two, or (where their values are known)
            do not decrease in noise; if the solver cannot sample this process.
    """
    x, carry, _ = _follow(solver, process, denoise, x, times, key, carry, (), warmup, ahead)
    return x, carry


def sample_path(
    solver: Solver,
    process: Process,
    denoise: Denoise,
    x: Float[Array, "b *shape"],
    times: Float[Array | np.ndarray, " steps_plus_1"],
    key: Key[Array, "*keys"],
    kept: tuple[int, ...],
    carry: Any = None,
    warmup: tuple[Denoise, int] | None = None,
    ahead: Any = None,
) -> tuple[Float[Array, "b *shape"], Float[Array, "b k *shape"]]:
    """``sample``, and the states it passed through.

    Args:
        solver: As for ``sample``, like all that is not named here.
        process: The process that x belongs to.
        denoise: The network's prediction.
        x: The state at times[0].
        times: Decreasing in noise.
        key: Randomness of stochastic solvers.
        kept: Which states: i is that at times[i], from 1 to the number of steps.
        carry: Anything that denoise passes on.
        warmup: Another denoise, and how many of the first steps it takes.
        ahead: What was computed ahead for every step.

    Returns:
        x at the last time, the same bits as ``sample``'s, and the states in the order of ``kept``.

    Raises:
        ValueError: As ``sample``; or there is no such state.
    """
    steps = times.shape[0] - 1
    if any(not 1 <= index <= steps for index in kept) or len(set(kept)) != len(kept):
        raise ValueError(f"kept={kept}: expected different numbers from 1 to {steps}.")
    x, _, states = _follow(solver, process, denoise, x, times, key, carry, kept, warmup, ahead)
    return x, jnp.moveaxis(states, 0, 1)


def _follow(solver, process, denoise, x, times, key, carry, kept, warmup, ahead):
    _check_times(process, times)
    count = times.shape[0] - 1
    times = jnp.asarray(times, jnp.float32)
    x = jnp.asarray(x, jnp.float32)
    # Only the states asked for take memory: those of other steps go to a row that is not there.
    rows = np.full(count, len(kept), np.int32)
    rows[np.asarray(kept, np.int32) - 1] = np.arange(len(kept))

    def body(denoise: Denoise, state: tuple, inputs: tuple) -> tuple[tuple, None]:
        x, solver_state, carry, states = state
        index, row, t, s, own = inputs
        step = Step(t, s, _fold_in(key, index), count)
        told = denoise if own is None else _told_ahead(denoise, t, own)
        x, solver_state, carry = solver.step(process, told, x, step, solver_state, carry)
        if kept:
            states = states.at[row].set(x, mode="drop")
        return (x, solver_state, carry, states), None

    inputs = (jnp.arange(count), jnp.asarray(rows), times[:-1], times[1:], ahead)
    states = jnp.zeros((len(kept), *x.shape), jnp.float32)
    state = (x, solver.init(process, x), carry, states)
    warmup, warmup_steps = warmup or (denoise, 0)
    if warmup_steps:
        first = jax.tree.map(lambda values: values[:warmup_steps], inputs)
        state, _ = jax.lax.scan(functools.partial(body, warmup), state, first)
    if warmup_steps < count:
        rest = jax.tree.map(lambda values: values[warmup_steps:], inputs)
        state, _ = jax.lax.scan(functools.partial(body, denoise), state, rest)
    x, _, carry, states = state
    return x, carry, states


def _told_ahead(denoise: Denoise, start: Array, ahead: Any) -> Denoise:
    """`denoise`, told what was computed ahead where it is called with `start` itself."""

    def told(x: Array, t: Array, carry: Any, **more: Any) -> Any:
        # Of a traced time it is known that it is this one only if it is the same object.
        return denoise(x, t, carry, **(more | {"ahead": ahead} if t is start else more))

    return told


def _fold_in(key: Key[Array, "*keys"], index: Array) -> Key[Array, "*keys"]:
    if key.ndim == 0:
        return jax.random.fold_in(key, index)
    return jax.vmap(lambda one: jax.random.fold_in(one, index))(key)


def _check_times(process: Process, times: Array | np.ndarray) -> None:
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(
            "Sampling needs a sequence of at least two times, as schedule() returns; got shape "
            f"{times.shape}."
        )
    if isinstance(times, jax.core.Tracer):
        return
    # Every process's own time grows with its noise.
    values = np.asarray(times)
    if not (np.diff(values) < 0).all():
        raise ValueError(
            f"Sampling needs times that decrease, from noise to data; got {values.tolist()}."
        )
    if values[-1] < process.clean_time:
        raise ValueError(
            f"{type(process).__name__}'s clean time is {process.clean_time}; the times end with "
            f"{values[-1]}."
        )
