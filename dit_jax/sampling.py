"""Sampling: one compiled program from noise to images, and batches of it.

Conditions, times, guidance scale, guidance interval and keys are inputs of the program. What is
compiled in is the solver, the number of steps, and whether there is guidance at all.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from dit_jax import conditions as conditions_lib
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import guidance as guidance_lib
from dit_jax.diffusion import samplers
from dit_jax.fp8_kernels import check_compiled
from dit_jax.models.call import Carried as Carried
from dit_jax.models.call import Request
from dit_jax.models.quantization import is_fp8
from dit_jax.models.step_cache import CachedNetwork
from dit_jax.options import option, register_section
from dit_jax.programs import Program
from dit_jax.ranges import COUNT, GUIDANCE, NOT_NEGATIVE, POSITIVE, SOLVER_STEPS, Range
from dit_jax.target import target_platform

_TIMES = Range(0, also=(-1,))  # -1: DDPM's clean data


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Keys of config.sampling, whatever the solver."""

    steps: int = option(250, "of the solver", SOLVER_STEPS)
    times: tuple[float, ...] = option(
        (), "explicit process times from noise to clean, instead of a spacing", _TIMES
    )
    guidance_scale: float = option(1.0, "of classifier-free guidance; 1: none", GUIDANCE)
    guidance_interval: tuple[float, ...] = option(
        (), "(low, high) in process time; empty: always", NOT_NEGATIVE, interval=True
    )
    guidance_channels: str = option("all", "all | first3 (the original DiT's)")
    spacing: str = option("", "of the times (diffusion.schedules); empty: by solver and process")
    shift: float = option(1.0, "of flow's times, above 1 towards noise", POSITIVE)
    shift_by_tokens: tuple[float, ...] = option(
        (),
        "instead of shift, by size: (tokens, log of the shift, more tokens, log of theirs), linear "
        "between and beyond; FLUX.1's (256, 0.5, 4096, 1.15); empty: by shift alone",
    )
    rho: float = option(7.0, "of EDM's times", POSITIVE)
    batch_size: int = option(64, "images sampled at once, over all devices", COUNT)
    weights: str = option("ema", "ema: the first average; or raw, or an average's own name")


register_section("sampling", SamplingOptions, "solver", "ddpm")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A solver applied to a denoiser.

    A network that keeps something from one evaluation to the next (one image on many devices keeps
    other devices' keys and values) says so by a method `carried`, see `models.call.Carried`.

    Attributes:
        denoiser: network and process.
        solver: one of `diffusion.samplers`.
        guided_channels: 'all', or 'first3' as the original DiT samples.
        size: (height, width) of the samples; None for the size the network was made for.
    """

    denoiser: Denoiser
    solver: samplers.Solver
    guided_channels: str = "all"
    size: tuple[int, int] | None = None

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one sample."""
        height, width, channels = self.denoiser.network.sample_shape
        return (*(self.size or (height, width)), channels)

    def __call__(
        self,
        params: Any,
        keys: Key[Array, " b"],
        conditions: Mapping[str, Any] | Int[Array | np.ndarray, " b"] | None,
        times: Float[Array | np.ndarray, " n"],
        guidance_scale: float | Float[Array, ""] | Float[Array, " b"] = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        nulls: Mapping[str, Any] | None = None,
        noise: Float[Array | np.ndarray, "b h w c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Samples one batch.

        Args:
            params: the network's parameters.
            keys: one key an image; an image depends on its own key alone, not on its batch.
            conditions: what the network declares, by name, an example each; an array is of labels;
                None for an unconditional network.
            times: the solver's times, from noise to clean (`samplers.schedule`).
            guidance_scale: 1 for no guidance, which costs half as much. A number or one an image.
            guidance_interval: (low, high) in process time outside which there is no guidance.
            nulls: "no condition" where the network does not know it by itself, as the embedding of
                an empty prompt.
            noise: standard normal, to start from instead of the keys' own.

        Returns:
            float32 images or latents. Not clipped: images may lie outside [-1, 1].

        Raises:
            ConditionError: conditions that the network does not take, or lacks; a label out of
                range; guidance of a network that knows no "no condition".
            ValueError: noise of another shape.
        """
        inputs = (params, keys, conditions, times, guidance_scale, guidance_interval, nulls)
        inputs = self._inputs(*inputs)
        if noise is None:
            return self._run(_sample, *inputs)
        shape = (keys.shape[0], *self.sample_shape)
        if noise.shape != shape:
            raise ValueError(f"noise is {list(noise.shape)}, expected {list(shape)}")
        return self._run(_sample, *inputs, _as_input(noise, np.float32))

    def counted(
        self,
        params: Any,
        keys: Key[Array, " b"],
        conditions: Mapping[str, Any] | Int[Array | np.ndarray, " b"] | None,
        times: Float[Array | np.ndarray, " n"],
        guidance_scale: float | Float[Array, ""] | Float[Array, " b"] = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        nulls: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
        """As a call, of a network with a step cache; tells besides how much was computed.

        Returns:
            The samples of a call, and of each the share of evaluations in which all blocks ran.

        Raises:
            ValueError: as a call; or there is no step cache.
        """
        if not isinstance(self.denoiser.network, CachedNetwork):
            raise ValueError("without a step cache all evaluations are computed: nothing to count")
        inputs = (params, keys, conditions, times, guidance_scale, guidance_interval, nulls)
        return self._run(_sample_counted, *self._inputs(*inputs))

    def path(
        self,
        params: Any,
        keys: Key[Array, " b"],
        conditions: Mapping[str, Any] | Int[Array | np.ndarray, " b"] | None,
        times: Float[Array | np.ndarray, " n"],
        kept: tuple[int, ...] = (),
        guidance_scale: float | Float[Array, ""] | Float[Array, " b"] = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        nulls: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"], Float[Array, "b k h w c"]]:
        """Samples one batch, and tells the way.

        Args:
            params: as for a call, like all that is not named here.
            keys: one an image.
            conditions: what the network declares.
            times: the solver's times.
            kept: numbers of the times of which the states are wanted, from 1.
            guidance_scale: 1 for no guidance.
            guidance_interval: (low, high), or None.
            nulls: "no condition" where the network does not know it by itself.

        Returns:
            The standard normal noise it started from, the samples (those of a call), and the states
            in the order of `kept`.

        Raises:
            ValueError: as a call; or there is no such state.
        """
        inputs = (params, keys, conditions, times, guidance_scale, guidance_interval, nulls)
        return self._run(_sample_path, tuple(kept), *self._inputs(*inputs))

    def _run(self, program, *inputs):
        """Runs a compiled program, one of fp8 on a GPU only if all its products are 8-bit ones."""
        quantization = getattr(
            getattr(self.denoiser.network, "config", None), "quantization", "none"
        )
        # Part of a larger program, it is that program whose kernels count.
        part = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs))
        if is_fp8(quantization) and target_platform() == "gpu" and not part:
            _check_kernels(program, self, inputs)
        return program(self, *inputs)

    def program(
        self,
        params: Any,
        seed: int,
        indices: Integer[Array | np.ndarray, " b"],
        conditions: Mapping[str, Any] | Int[Array | np.ndarray, " b"] | None,
        times: Float[Array | np.ndarray, " n"],
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        nulls: Mapping[str, Any] | None = None,
    ) -> Program:
        """The program of the images number `indices` under `seed`.

        The keys (`image_keys`) are made in the program: it is all there is to compile.

        Args:
            params: as for a call, like all that is not named here.
            seed: of 32 bits.
            indices: numbers of images, on the devices that are to make them.
            conditions: what the network declares.
            times: the solver's times.
            guidance_scale: 1 for no guidance.
            guidance_interval: (low, high), or None.
            nulls: "no condition" where the network does not know it by itself.
        """
        guided, params, _, *more = self._inputs(
            params, None, conditions, times, guidance_scale, guidance_interval, nulls
        )
        seed = np.asarray(seed, np.int64).astype(np.int32)
        names = "params seed indices conditions nulls times guidance_scale guidance_interval"
        inputs = dict(zip(names.split(), (params, seed, indices, *more), strict=True))
        function = functools.partial(_sample_by_number, self, guided)
        return Program("sample", function, {"sampler": self, "guided": guided}, inputs)

    def _inputs(self, params, keys, conditions, times, scale, interval, nulls=None):
        """The compiled functions' arguments, checked."""
        declared = self.denoiser.network.conditions
        guided = not (np.isscalar(scale) and float(scale) == 1.0)
        if guided:
            conditions_lib.require_guidance(declared, f"guidance_scale={scale}")
        conditions = conditions_lib.as_conditions(declared, conditions)
        conditions_lib.check(declared, conditions, None if keys is None else keys.shape[0])
        conditions_lib.check_values(declared, conditions)
        return (
            guided,
            params,
            keys,
            {name: _as_input(value) for name, value in conditions.items()},
            conditions_lib.null_values(declared, nulls) if guided else {},
            _as_input(times, np.float32),
            _as_input(scale, np.float32),
            interval and _as_input(interval, np.float32),
        )


def _as_input(value: Any, dtype: Any = None) -> Array | np.ndarray:
    """An input of a program: converted by NumPy, as JAX would compile a program for it."""
    return (jnp if isinstance(value, jax.Array) else np).asarray(value, dtype)


_checked: set[Any] = set()  # programs whose 8-bit products were looked at


def _check_kernels(program, sampler, inputs) -> None:
    """Compiles a program, which it is kept for, and looks at its kernels."""

    def described(value):
        return value if isinstance(value, bool | int) else str(jax.typeof(value))

    described_inputs = jax.tree.map(described, inputs)
    leaves, structure = jax.tree.flatten(described_inputs)
    key = (program, sampler, structure, tuple(leaves))
    if key not in _checked:
        lowered = program.lower(sampler, *inputs)
        check_compiled(lowered, lowered.compile())
        _checked.add(key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(sampler, guided, *inputs):
    _, start, carried = _prepare(sampler, guided, *inputs)
    return samplers.sample(sampler.solver, sampler.denoiser.process, *start, **carried)[0]


def _sample_by_number(sampler, guided, params, seed, indices, *more):
    return _sample(sampler, guided, params, image_keys(seed, indices), *more)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample_counted(sampler, guided, *inputs):
    _, start, carried = _prepare(sampler, guided, *inputs)
    x, carry = samplers.sample(sampler.solver, sampler.denoiser.process, *start, **carried)
    branches = (2 if guided else 1, x.shape[0])  # the conditional examples come first
    counts = (carry.cache.computed, carry.cache.evaluations)
    computed, evaluations = (count.reshape(branches).sum(axis=0) for count in counts)
    return x, computed / evaluations


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample_path(sampler, kept, guided, *inputs):
    noise, start, carried = _prepare(sampler, guided, *inputs)
    process = sampler.denoiser.process
    x, path = samplers.sample_path(sampler.solver, process, *start, kept, **carried)
    return noise, x, path


def _prepare(sampler, guided, params, keys, conditions, nulls, times, scale, interval, noise=None):
    """The noise, (denoise, x, times, keys) of the solver, and its carry and warm-up if any."""
    denoiser, process = sampler.denoiser, sampler.denoiser.process
    network = denoiser.network

    def denoise_with(denoiser):
        def raw(x, t, conditions, carry, ahead=None):
            t = jnp.broadcast_to(t, x.shape[:1])
            result = denoiser.raw(params, Request(x, t, conditions, carry=carry, ahead=ahead))
            return result.out, result.carry

        evaluate = raw
        if guided:
            evaluate = guidance_lib.guided(
                raw,
                lambda conditions: conditions_lib.without(conditions, nulls),
                scale,
                interval=None if interval is None else (interval[0], interval[1]),
                channels=sampler.guided_channels,
            )

        def denoise(x, t, carry, r=None, **ahead):
            r = {} if r is None else {"r": jnp.broadcast_to(r, x.shape[:1])}
            out, carry = evaluate(x, t, {**conditions, **r}, carry, **ahead)
            return process.interpret(out, x, t), carry

        return denoise

    more, shape = {}, sampler.sample_shape
    if hasattr(network, "carried"):
        carried = network.carried(keys.shape[0] * (2 if guided else 1), shape[:2])
        more["carry"] = carried.state
        if carried.warmup is not None:
            warmup = dataclasses.replace(denoiser, network=carried.warmup)
            more["warmup"] = (denoise_with(warmup), carried.warmup_steps)
    if not guided and not sampler.solver.second_time:
        more["ahead"] = denoiser.ahead(params, times[:-1], conditions)
    solver_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    if noise is None:
        prior_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(prior_keys)
    x = noise * process.start_scale(times[0])
    return noise, (denoise_with(denoiser), x, times, solver_keys), more


def image_keys(
    seed: int | Int[Array, ""], indices: Integer[np.ndarray | Array, " b"]
) -> Key[Array, " b"]:
    """The keys of images number `indices` under `seed`: image i depends on seed and i only."""
    root = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(indices, jnp.uint32))


def generate(
    sample: Callable[[Key[Array, " b"], Any], Array],
    conditions: Mapping[str, np.ndarray] | Int[np.ndarray, " n"],
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    progress: Callable[[int, float], None] | None = None,
    keys: Callable[[int, Int[np.ndarray, " b"]], Any] = image_keys,
) -> Iterator[np.ndarray]:
    """Yields images number `start` to n - 1 in batches that fit the memory.

    Every call of `sample` sees the full batch size, the last one filled up, so that one program
    serves them all.

    Args:
        sample: (keys, conditions) -> images, for instance a `Sampler` with its other arguments
            bound.
        conditions: of every image, n in all: arrays by name, or one of labels.
        seed: together with an image's number it determines the image.
        batch_size: images a call.
        start: number of the first image wanted (resuming).
        progress: called with (images done, seconds) after every batch.
        keys: what `sample` takes for keys, of seed and numbers.
    """
    began = time.perf_counter()
    count = len(jax.tree.leaves(conditions)[0])
    for first in range(start, count, batch_size):
        indices = np.arange(first, first + batch_size)
        kept = min(batch_size, count - first)
        places = np.minimum(indices, count - 1)
        chosen = jax.tree.map(lambda values: values[places], conditions)  # noqa: B023
        images = np.asarray(sample(keys(seed, indices), chosen))[:kept]
        if progress:
            progress(first + kept, time.perf_counter() - began)
        yield images
