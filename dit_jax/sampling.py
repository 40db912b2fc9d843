"""Sampling: one compiled program from noise to images, and batches of it.

Labels, times, guidance scale, guidance interval and keys are inputs of the program. What is
compiled in is the solver, the number of steps, and whether there is guidance at all.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import guidance as guidance_lib
from dit_jax.diffusion import samplers


@dataclasses.dataclass(frozen=True)
class Carried:
    """What sampling carries from one evaluation of a network to the next.

    A network's method `carried(batch) -> Carried` is called while the sampler is traced, with the
    number of examples of an evaluation: twice the images where there is guidance.

    Attributes:
        state: before the first evaluation; given to and returned by `apply` as `attention_state`.
            None for none.
        warmup: the network that evaluates the first steps, None for the same one.
        warmup_steps: how many steps of the solver these are.
    """

    state: Any = None
    warmup: Any = None
    warmup_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A solver applied to a denoiser.

    A network that keeps something from one evaluation to the next (one image on many devices keeps
    other devices' keys and values) says so by a method `carried`, see `Carried`.

    Attributes:
        denoiser: network and process.
        solver: one of `diffusion.samplers`.
        guided_channels: 'all', or 'first3' as the original DiT samples.
    """

    denoiser: Denoiser
    solver: samplers.Solver
    guided_channels: str = "all"

    def __call__(
        self,
        params: Any,
        keys: Key[Array, " b"],
        labels: Int[Array | np.ndarray, " b"] | None,
        times: Float[Array | np.ndarray, " n"],
        guidance_scale: float | Float[Array, ""] | Float[Array, " b"] = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Samples one batch.

        Args:
            params: the network's parameters.
            keys: one key an image; an image depends on its own key alone, not on its batch.
            labels: classes, or None for an unconditional network.
            times: the solver's times, from noise to clean (`samplers.schedule`).
            guidance_scale: 1 for no guidance, which costs half as much. A number or one an image.
            guidance_interval: (low, high) in process time outside which there is no guidance.

        Returns:
            float32 images or latents. Not clipped: images may lie outside [-1, 1].

        Raises:
            ValueError: guidance asked of an unconditional network; a label out of range.
        """
        return _sample(
            self,
            *self._inputs(params, keys, labels, times, guidance_scale, guidance_interval),
        )

    def path(
        self,
        params: Any,
        keys: Key[Array, " b"],
        labels: Int[Array | np.ndarray, " b"] | None,
        times: Float[Array | np.ndarray, " n"],
        kept: tuple[int, ...] = (),
        guidance_scale: float | Float[Array, ""] | Float[Array, " b"] = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"], Float[Array, "b k h w c"]]:
        """Samples one batch, and tells the way.

        Args:
            params: as for a call, like all that is not named here.
            keys: see there.
            labels: see there.
            times: see there.
            kept: numbers of the times of which the states are wanted, from 1.
            guidance_scale: see there.
            guidance_interval: see there.

        Returns:
            The standard normal noise it started from, the samples (those of a call), and the states
            in the order of `kept`.

        Raises:
            ValueError: as a call; or there is no such state.
        """
        return _sample_path(
            self,
            tuple(kept),
            *self._inputs(params, keys, labels, times, guidance_scale, guidance_interval),
        )

    def _inputs(self, params, keys, labels, times, guidance_scale, guidance_interval):
        """The compiled functions' arguments, checked."""
        num_classes = self.denoiser.network.num_classes
        guided = not (np.isscalar(guidance_scale) and float(guidance_scale) == 1.0)
        if guided and not num_classes:
            raise ValueError("guidance_scale needs a class-conditional network; use 1.0")
        if labels is not None:
            labels = np.asarray(labels)
            null_class = getattr(self.denoiser.network, "null_class", True)
            outside = labels[(labels < 0) | (labels >= num_classes + null_class)]
            if outside.size:
                none = f", and {num_classes} for no class" if null_class else " and no null class"
                raise ValueError(
                    f"label {outside.flat[0]} is out of range: the network knows 0 to "
                    f"{num_classes - 1}{none}"
                )
        return (
            guided,
            params,
            keys,
            {} if labels is None or not num_classes else {"label": jnp.asarray(labels)},
            jnp.asarray(times, jnp.float32),
            jnp.asarray(guidance_scale, jnp.float32),
            guidance_interval and jnp.asarray(guidance_interval, jnp.float32),
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(sampler, guided, *inputs):
    _, start, carried = _prepare(sampler, guided, *inputs)
    return samplers.sample(sampler.solver, sampler.denoiser.process, *start, **carried)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample_path(sampler, kept, guided, *inputs):
    noise, start, carried = _prepare(sampler, guided, *inputs)
    process = sampler.denoiser.process
    x, path = samplers.sample_path(sampler.solver, process, *start, kept, **carried)
    return noise, x, path


def _prepare(sampler, guided, params, keys, conditions, times, scale, interval):
    """The noise, (denoise, x, times, keys) of the solver, and its carry and warm-up if any."""
    denoiser, process = sampler.denoiser, sampler.denoiser.process
    network = denoiser.network

    def denoise_with(denoiser):
        def raw(x, t, conditions, carry):
            t = jnp.broadcast_to(t, x.shape[:1])
            if carry is None:
                return denoiser.raw(params, x, t, conditions), None
            return denoiser.raw(params, x, t, conditions, attention_state=carry)

        evaluate = raw
        if guided:
            evaluate = guidance_lib.guided(
                raw,
                network.null_conditions,
                scale,
                interval=None if interval is None else (interval[0], interval[1]),
                channels=sampler.guided_channels,
            )

        def denoise(x, t, carry, r=None):
            r = {} if r is None else {"r": jnp.broadcast_to(r, x.shape[:1])}
            out, carry = evaluate(x, t, {**conditions, **r}, carry)
            return process.interpret(out, x, t), carry

        return denoise

    more = {}
    if hasattr(network, "carried"):
        carried = network.carried(keys.shape[0] * (2 if guided else 1))
        more["carry"] = carried.state
        if carried.warmup is not None:
            warmup = dataclasses.replace(denoiser, network=carried.warmup)
            more["warmup"] = (denoise_with(warmup), carried.warmup_steps)
    shape = network.sample_shape
    prior_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    solver_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(prior_keys)
    x = noise * process.start_scale(times[0])
    return noise, (denoise_with(denoiser), x, times, solver_keys), more


def image_keys(seed: int, indices: Int[np.ndarray, " b"]) -> Key[Array, " b"]:
    """The keys of images number `indices` under `seed`: image i depends on seed and i only."""
    root = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(indices, jnp.uint32))


def generate(
    sample: Callable[[Key[Array, " b"], np.ndarray], Array],
    labels: Int[np.ndarray, " n"],
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Iterator[np.ndarray]:
    """Yields images number `start` to n - 1 in batches that fit the memory.

    Every call of `sample` sees the full batch size, the last one filled up, so that one program
    serves them all.

    Args:
        sample: (keys, labels) -> images, for instance a `Sampler` with its other arguments bound.
        labels: class of every image, n in all.
        seed: together with an image's number it determines the image.
        batch_size: images a call.
        start: number of the first image wanted (resuming).
        progress: called with (images done, seconds) after every batch.
    """
    began = time.perf_counter()
    for first in range(start, len(labels), batch_size):
        indices = np.arange(first, first + batch_size)
        kept = min(batch_size, len(labels) - first)
        chosen = labels[np.minimum(indices, len(labels) - 1)]
        images = np.asarray(sample(image_keys(seed, indices), chosen))[:kept]
        if progress:
            progress(first + kept, time.perf_counter() - began)
        yield images
