"""The compiled updates of a run: one program a phase of the method and shape of batches."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.fp8_kernels import check_compiled
from dit_jax.training import remat_choice

STOP = "stop"  # among the metrics of several processes


class Updates:
    """The compiled updates of a method, one program a phase and shape of batches.

    Of several processes any may be told to stop, and all have to at the same step: whether one was
    goes into the update, and comes out among the metrics as what all of them know.
    """

    def __init__(self, methods, shardings, frozen, announce, placement):
        self._methods, self._shardings, self._frozen = methods, shardings, frozen
        self._announce, self._placement = announce, placement
        self._compiled = {}
        self.agree = jax.process_count() > 1

    def compile(self, state, host_batch, key, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Compiles all phases, so that none interrupts the run later.

        Args:
            state: to update.
            host_batch: one batch.
            key: root key.
            sizes: (height, width) of all images to come, where they are of several sizes.

        Raises:
            memory.MemoryNeededError: no method's updates fit.
        """
        batches = {size: _of_size(host_batch, size) for size in sizes} or {None: host_batch}

        def lower_bound(method):
            devices, least = self._placement.num_devices, []
            for batch in batches.values():
                with self._placement.tracing():
                    inputs = state, self._inputs(batch, False)[0], key
                    least.append(remat_choice.least_bytes(method, *inputs, devices, self._frozen))
            return max(least)

        def disagrees(flag):
            return bool(jnp.max(self._placement.put_flag(flag))) if self.agree else flag

        choice = remat_choice.Choice(self._methods, self._announce, disagrees)
        self._method, self._compiled = choice.compiled(
            lambda method: self._compile(method, state, batches, key), lower_bound
        )

    def _compile(self, method, state, batches, key) -> dict[Any, Any]:
        """One method's updates by phase and shapes of the batch; `batches` are by size."""
        compiled = {}
        for phase in method.phases:

            def update(state, batch, key, frozen, stop=None, phase=phase):
                key = jax.random.fold_in(key, state.step)
                state, metrics = method.update(state, batch, key, frozen, phase)
                return state, metrics if stop is None else {**metrics, STOP: jnp.max(stop)}

            jitted = jax.jit(update, donate_argnums=0, out_shardings=(self._shardings, None))
            for size, host_batch in batches.items():
                started = time.perf_counter()
                batch, *flag = self._inputs(host_batch, False)
                with self._placement.tracing():
                    lowered = jitted.lower(state, batch, key, self._frozen, *flag)
                compiled[phase, _shapes(host_batch)] = lowered.compile()
                check_compiled(lowered, compiled[phase, _shapes(host_batch)])
                name = "the update" if len(method.phases) == 1 else f"the {phase} update"
                name += f" of {size[0]}x{size[1]}" if size else ""
                self._announce(f"compiled {name} in {time.perf_counter() - started:.1f} s")
        return compiled

    def _inputs(self, host_batch, stop: bool) -> list:
        batch = self._placement.put_batch(host_batch)
        return [batch, self._placement.put_flag(stop)] if self.agree else [batch]

    def __call__(self, step: int, state, host_batch, key, stop: bool):
        """The update that follows `step` updates."""
        batch, *flag = self._inputs(host_batch, stop)
        compiled = self._compiled.get((self._method.phase(step), _shapes(host_batch)))
        if compiled is None:
            raise ValueError(
                f"the data gave a batch of shapes {_shapes(host_batch)}, which they had not "
                f"announced; there were {sorted({shapes for _, shapes in self._compiled})}"
            )
        return compiled(state, batch, key, self._frozen, *flag)


def _shapes(host_batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(host_batch))


def _of_size(host_batch: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """A batch like another, of images of another (height, width)."""
    image = host_batch["image"]
    empty = np.zeros((image.shape[0], *size, image.shape[-1]), image.dtype)
    return {**host_batch, "image": empty}
