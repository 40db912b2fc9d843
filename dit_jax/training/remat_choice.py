"""The cheapest rematerialisation with which an update fits its devices: config.model.remat='auto'.

Policies are tried from the one that computes no product twice to the one that keeps least. One
whose kept arrays alone, by shape, are more than a device has is passed over; the next is compiled
and believed if XLA's own account of it fits.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax.quantities import format_bytes
from dit_jax.target import target_platform
from dit_jax.training import memory
from dit_jax.training.method import Method

# From the one that keeps most to the one that keeps least.
POLICIES = ("none", "activations", "dots", "block")
# Those of 'auto'. On accelerators 'none' is behind in time as well: writing and reading what it
# keeps of elementwise work takes longer than computing it again (docs/benchmarks).
AUTOMATIC = POLICIES[1:]


def with_remat(config: ml_collections.ConfigDict, remat: str) -> ml_collections.ConfigDict:
    """The experiment with another config.model.remat."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.remat = remat
    return config


def alternatives(
    config: ml_collections.ConfigDict,
    method: Method,
    build: Callable[[ml_collections.ConfigDict], Method],
    backend: str | None = None,
) -> dict[str, Method]:
    """The experiment's method by policy, in the order they are to be tried.

    One alone where the configuration names it, and on CPUs ('none'), whose memory is the machine's
    and whose fastest layer loop does not go with any other.

    Args:
        config: the experiment.
        method: as configured.
        build: makes it of another configuration.
        backend: for which; None for that of this process.
    """
    remat = config.model.remat
    if remat != "auto":
        return {remat: method}
    if (backend or target_platform()) == "cpu":
        return {"none": method}
    return {policy: build(with_remat(config, policy)) for policy in AUTOMATIC}


def kept_bytes(function: Callable[..., Any], params: Any, *rest: Any) -> int:
    """What the backward pass of `function` keeps of its forward pass, beside its arguments.

    By the shapes that JAX hands from one to the other. XLA may keep less outside of a scan, where
    it is free to compute some of it again.

    Args:
        function: (params, *rest) -> a scalar, differentiated by `params`.
        params: tree of arrays or shapes.
        *rest: of arrays or shapes, too.
    """

    def forward(params, *rest):
        return jax.vjp(lambda p: function(p, *rest), params)

    jaxpr = jax.make_jaxpr(forward)(params, *rest).jaxpr
    given = set(jaxpr.invars) | set(jaxpr.constvars)
    for equation in jaxpr.eqns:  # arguments by another name
        if equation.primitive.name == "stop_gradient" and equation.invars[0] in given:
            given.update(equation.outvars)
    kept = {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)} - given
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


class Choice:
    """Tries policies in turn.

    Args:
        methods: `Method`s by policy, of `alternatives`.
        announce: prints a line.
        disagrees: whether any process says so; all of them have to decide alike.
        limit: bytes of a device's memory, None to ask it.
    """

    def __init__(
        self,
        methods: Mapping[str, Any],
        announce: Callable[[str], None],
        disagrees: Callable[[bool], bool] = bool,
        limit: int | None = None,
    ):
        self.methods = dict(methods)
        self._announce, self._disagrees = announce, disagrees
        self._limit = memory.device_memory() if limit is None else limit

    def compiled(
        self,
        compile_with: Callable[[Any], dict[Any, Any]],
        lower_bound: Callable[[Any], int] = lambda method: 0,
        require_fits: Callable[[Any], None] = memory.require_fits,
    ) -> tuple[Any, dict[Any, Any]]:
        """The first method whose programs fit, and its programs by phase.

        Args:
            compile_with: compiles a method's programs.
            lower_bound: bytes that a method's programs need at least of a device.
            require_fits: refuses a program that does not fit.

        Raises:
            memory.MemoryNeededError: not even the last policy does.
        """
        for number, (policy, method) in enumerate(self.methods.items()):
            last = number == len(self.methods) - 1
            least = 0 if last else lower_bound(method)
            if self._disagrees(bool(self._limit and least > self._limit)):
                self._say(policy, f"needs at least {format_bytes(least)}, more than there is")
                continue
            programs = compile_with(method)
            error = None
            try:
                for program in programs.values():
                    require_fits(program)
            except memory.MemoryNeededError as found:
                error = found
            if last and error:
                raise error
            needed = max(map(memory.bytes_needed, programs.values()))
            if not self._disagrees(error is not None):
                if len(self.methods) > 1:
                    self._say(policy, f"fits: an update needs {format_bytes(needed)}")
                return method, programs
            self._say(policy, f"needs {format_bytes(needed)}, more than there is")
        raise AssertionError("there is no policy to try")

    def _say(self, policy: str, what: str) -> None:
        of = f" (a device has {format_bytes(self._limit)})" if self._limit else ""
        self._announce(f"config.model.remat='auto': {policy!r} {what}{of}")


def least_bytes(
    method: Any, state: Any, batch: Any, key: Any, num_devices: int, frozen: Any = None
) -> int:
    """Bytes of a device that an update needs at least: its state and what is kept for backward.

    As if both were divided over all devices; 0 for a method that does not tell what it keeps.
    `frozen` is what the method reads and never trains, as for its update.
    """
    if not hasattr(method, "kept_bytes"):
        return 0
    held = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return (held + method.kept_bytes(state, batch, key, frozen)) // num_devices
