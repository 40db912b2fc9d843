"""The sampler of a configuration, with all that it is bound to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax.config import ConfigError, choose
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion.process import DDPM, Process
from dit_jax.diffusion.samplers import SOLVERS, Solver, make_solver, schedule
from dit_jax.diffusion.schedules import shift_of_tokens
from dit_jax.experiment.network import build_denoiser, unguidable
from dit_jax.models import Network
from dit_jax.models.step_cache import CachedNetwork, StepCache
from dit_jax.nearest import one_of
from dit_jax.programs import Program
from dit_jax.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """A sampler with everything bound but parameters, keys and labels.

    Attributes:
        sampler: the compiled program's static part.
        times: the solver's times.
        guidance_scale: 1 for none.
        guidance_interval: in process time, or None for always.
    """

    sampler: Sampler
    times: Any
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None

    @property
    def network(self) -> Any:
        """The network that is sampled."""
        return self.sampler.denoiser.network

    @property
    def evaluations(self) -> int:
        """Network evaluations an image, the guidance's second one not counted."""
        return self.sampler.solver.evaluations(len(self.times) - 1)

    def bind(self, params: Any, nulls: Mapping[str, Any] | None = None):
        """A function (keys, conditions) -> images; see `Sampler` for the arguments."""
        how = (self.times, self.guidance_scale, self.guidance_interval, nulls)
        return lambda keys, conditions: self.sampler(params, keys, conditions, *how)

    @property
    def has_cache(self) -> bool:
        """Whether a step cache skips blocks."""
        return isinstance(self.network, CachedNetwork)

    def bind_counted(self, params: Any, nulls: Mapping[str, Any] | None = None):
        """A function (keys, conditions) -> images and computed shares; see `Sampler.counted`."""
        how = (self.times, self.guidance_scale, self.guidance_interval, nulls)
        return lambda keys, conditions: self.sampler.counted(params, keys, conditions, *how)

    def program(
        self,
        params: Any,
        seed: int,
        indices: Any,
        conditions: Any,
        nulls: Mapping[str, Any] | None = None,
    ) -> Program:
        """Sampling as one program, keys included.

        Args:
            params: the network's, on the devices.
            seed: of the images.
            indices: their numbers, on the devices that are to make them.
            conditions: of every image: labels, or arrays by name.
            nulls: "no condition" where the network does not know it by itself.
        """
        how = (self.times, self.guidance_scale, self.guidance_interval, nulls)
        return self.sampler.program(params, seed, indices, conditions, *how)


def build_sampling(
    config: ml_collections.ConfigDict, size: tuple[int, int] | None = None
) -> SamplingPlan:
    """The sampler of `config.sampling`.

    Args:
        config: resolved.
        size: (height, width) of the samples, of latents where the model makes those; None for what
            `config.model` says.

    Raises:
        ConfigError: options that do not fit the process or each other.
        ValueError: the network makes no samples of this size.
    """
    if size is not None:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.model.input_size = tuple(size)
    c, denoiser = config.sampling, build_denoiser(config)
    choose(SOLVERS, c.solver, "sampling.solver")
    options = c[c.solver].to_dict() if c.solver in c else {}
    try:
        solver = make_solver(c.solver, **options)
        times = _sampling_times(c, solver, denoiser)
        channels = denoiser.network.sample_shape[-1]
        sample = jax.ShapeDtypeStruct((1, 1, 1, channels), jax.numpy.float32)
        jax.eval_shape(lambda x: solver.init(denoiser.process, x), sample)  # it is checked
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.sampling: {error}") from error
    interval = tuple(c.guidance_interval)
    if c.guidance_channels not in ("all", "first3"):
        raise ConfigError(
            f"config.sampling.guidance_channels={c.guidance_channels!r}: expected 'all' or 'first3'"
        )
    if c.guidance_scale == 1.0 and (interval or c.guidance_channels != "all"):
        raise ConfigError(
            "config.sampling.guidance_interval and guidance_channels would do nothing with "
            "config.sampling.guidance_scale=1.0"
        )
    if c.guidance_scale != 1.0 and (reason := unguidable(config)):
        raise ConfigError(f"config.sampling.guidance_scale={c.guidance_scale} {reason}")
    if solver.second_time and "r" not in denoiser.network.conditions:
        raise ConfigError(
            f"config.sampling.solver={c.solver!r} needs a network of average velocities, which "
            "sees a second time: set config.model.second_time='r' or 't-r', or another solver"
        )
    evaluated = solver.evaluated_times(times)
    if interval and not ((evaluated >= interval[0]) & (evaluated <= interval[1])).any():
        raise ConfigError(
            f"config.sampling.guidance_interval={interval} holds none of the solver's times, which "
            f"go from {times[0]:.4g} to {evaluated[-1]:.4g}: nothing would be guided"
        )
    sampler = Sampler(_cached(config, denoiser, solver, times), solver, c.guidance_channels)
    return SamplingPlan(sampler, times, c.guidance_scale, interval or None)


def _cached(
    config: ml_collections.ConfigDict, denoiser: Denoiser, solver: Solver, times: np.ndarray
) -> Denoiser:
    """The denoiser with the step cache of `config.cache`, if there is one."""
    name = config.cache.name
    if name == "none":
        return denoiser
    if name != "first_block":
        raise ConfigError(f"config.cache.name={name!r}: {one_of(name, ('none', 'first_block'))}")
    try:
        cache = StepCache(**config.cache.first_block.to_dict())
        cache.check(solver.evaluations(len(times) - 1), solver.evaluations_per_step)
        network = CachedNetwork(denoiser.network, cache)
    except ValueError as error:
        raise ConfigError(f"config.cache: {error}") from error
    return dataclasses.replace(denoiser, network=network)


def _sampling_times(c: ml_collections.ConfigDict, solver: Solver, denoiser: Denoiser) -> np.ndarray:
    process = denoiser.process
    if not c.times:
        spacing = c.spacing or _default_spacing(solver, process)
        shift = _sampling_shift(c, denoiser.network)
        return schedule(process, c.steps, spacing, shift=shift, rho=c.rho)
    for key, default in (("spacing", ""), ("shift", 1.0), ("shift_by_tokens", ()), ("rho", 7.0)):
        if c[key] != default:
            raise ValueError(f"{key}={c[key]!r} would do nothing beside explicit times")
    times = np.asarray(c.times, np.float32)
    if len(times) != c.steps + 1:
        raise ValueError(
            f"times={tuple(c.times)} are of {len(times) - 1} steps, but steps={c.steps}: give "
            "steps + 1 times, from noise to clean"
        )
    if (np.diff(times) >= 0).any() or times[-1] != process.clean_time:
        raise ValueError(
            f"times={tuple(c.times)}: expected decreasing times that end with the process's clean "
            f"time {process.clean_time}"
        )
    if times[0] > process.noise_time:
        raise ValueError(f"times start at {times[0]}, beyond the noisiest {process.noise_time}")
    return times


def _sampling_shift(c: ml_collections.ConfigDict, network: Network) -> float:
    """How far times are shifted towards noise, of the network's size of input."""
    if not c.shift_by_tokens:
        return c.shift
    points = tuple(c.shift_by_tokens)
    if c.shift != 1.0:
        raise ValueError(f"shift={c.shift!r} would do nothing beside shift_by_tokens={points}")
    if network.num_tokens is None:
        raise ValueError(
            f"shift_by_tokens={points} needs a network of tokens, which {network.config.title} is "
            "not: set shift"
        )
    return shift_of_tokens(network.num_tokens, points)


def _default_spacing(solver: Solver, process: Process) -> str | None:
    # Multistep extrapolation over the long last step of evenly spaced indices misses badly at 20
    # steps and fewer; ending on evenly spaced ones from T - 1 downwards does not.
    return "trailing" if solver.extrapolates and isinstance(process, DDPM) else None
