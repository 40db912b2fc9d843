"""From a configuration to the objects it names: network, process, method, sampler, data."""

import dataclasses
import functools
import math
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax import conditions as conditions_lib
from dit_jax import data as data_lib
from dit_jax.config import AnyConfig, ConfigError, flatten, resolve
from dit_jax.data.augmentation import Augmentation
from dit_jax.data.buckets import parse_buckets
from dit_jax.data.latents import extraction_command
from dit_jax.data.registry import SOURCES
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import LOSS_WEIGHTS, PROCESSES, TIME_DISTRIBUTIONS, TimeDistribution
from dit_jax.diffusion.process import DDPM, Process
from dit_jax.diffusion.samplers import SOLVERS, Solver, make_solver, schedule
from dit_jax.diffusion.schedules import shift_of_tokens
from dit_jax.models import NETWORK_CONFIGS, Network
from dit_jax.models.step_cache import CachedNetwork, StepCache
from dit_jax.named_options import options_named, renamed
from dit_jax.nearest import did_you_mean, one_of
from dit_jax.options import (
    NoOptions,
    facts,
    option,
    options_of,
    register,
    register_section,
    schema,
    unmet_need,
)
from dit_jax.programs import Program
from dit_jax.ranges import SHARE
from dit_jax.sampling import Sampler
from dit_jax.training import ema, optimizer
from dit_jax.training.denoising import Denoising
from dit_jax.training.method import Method


def resolve_config(config: AnyConfig) -> ml_collections.ConfigDict:
    """`config.resolve`, then builds everything that needs no data, so that mistakes stop here.

    Args:
        config: complete or not.

    Raises:
        ConfigError: a value no object accepts, or a combination that cannot work.
    """
    config = resolve(config)
    _check_weights(config)
    try:
        _check_intervals(config)
        build_method(config)
        build_sampling(config)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(_of_keys(str(error), config)) from error
    return config


def effect_error(config: ml_collections.ConfigDict, method: Method) -> str | None:
    """What of a run's configuration would do nothing, and why; None where all has an effect.

    Apart from `resolve_config`, as what earlier runs have recorded is read whatever it says.

    Args:
        config: resolved.
        method: its method.
    """
    known = schema()
    if message := unmet_need(dict(flatten(config)), known):
        return message
    name, teacher = config.method.name, config.teacher
    waiting = (
        ["guidance_scale", "guidance_interval"] if "teacher" not in method.frozen_names else []
    )
    if not (method.frozen_names or teacher.path):
        waiting += ["weights", "initialize_student"]
    for key in waiting:
        if teacher[key] != known[f"teacher.{key}"].default:
            return (
                f"config.teacher.{key}={teacher[key]!r} would do nothing: config.method.name="
                f"{name!r}, as it is configured, asks no teacher. Leave it out, or choose a method "
                "that learns from one"
            )
    if config.model.second_time != "none" and "second_time" not in facts("method", name)["reads"]:
        return (
            f"config.model.second_time={config.model.second_time!r} would do nothing: "
            f"config.method.name={name!r} tells the network of one time. Set 'none', or "
            "config.method.name='mean_flow'"
        )
    return None


def require_augmented(
    config: ml_collections.ConfigDict, info: data_lib.DatasetInfo, initial: bool
) -> None:
    """Refuses parameters for labels of augmentation that a run from scratch would never see.

    Args:
        config: resolved, of a run that is to begin.
        info: of its data, which may bring such labels.
        initial: whether the run starts from a model, whose network it then has to have.

    Raises:
        ConfigError: with what to set.
    """
    dim = config.model.augment_dim
    if dim and not (config.augmentation.probability or "augment" in info.conditions or initial):
        raise ConfigError(
            f"config.model.augment_dim={dim} would do nothing: no image is augmented. Set "
            "config.augmentation.probability, or config.model.augment_dim=0"
        )


def _of_keys(text: str, config: ml_collections.ConfigDict) -> str:
    """An object's error with its options named as keys, where that is clear."""
    if text.startswith("config."):
        return text
    chosen = {f"model.{config.model.name}", f"process.{config.process.name}"}
    chosen |= {f"timesteps.{config.timesteps.name}", f"method.{config.method.name}"}
    paths = [path for path, _ in flatten(config)]
    names = {}
    for path in paths:
        section, _, key = path.rpartition(".")
        if section in chosen or section == "model":
            names.setdefault(key, []).append(f"config.{path}")
    clear = {key: found[0] for key, found in names.items() if len(found) == 1}
    sections = "|".join({path.partition(".")[0] for path in paths})
    text = renamed(text, clear)
    return re.sub(rf"(?<![\w.\-])(?=(?:{sections})\.[a-z_]+)", "config.", text)


def _check_intervals(config: ml_collections.ConfigDict) -> None:
    """Refuses a guidance interval that holds none of the process's times: it would do nothing."""
    process = build_process(config)
    for path in (path for path, known in schema().items() if known.interval):
        *sections, key = path.split(".")
        interval = functools.reduce(lambda values, name: values[name], sections, config)[key]
        if interval and (interval[1] < process.clean_time or interval[0] > process.noise_time):
            raise ConfigError(
                f"config.{path}={tuple(interval)} holds no time of config.process.name="
                f"{config.process.name!r}, whose times go from {process.clean_time:g} to "
                f"{process.noise_time:g}"
            )


def _check_weights(config: ml_collections.ConfigDict) -> None:
    try:
        averages = ema.averages(config.ema.decays, config.ema.power_stds, dtype=config.ema.dtype)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.{error}") from error
    available = ["ema"] * bool(averages) + [average.name for average in averages] + ["raw"]
    if config.sampling.weights not in available:
        raise ConfigError(
            f"config.sampling.weights={config.sampling.weights!r}: expected one of "
            f"{', '.join(available)} (config.ema names the averages that are kept)"
            f"{did_you_mean(config.sampling.weights, available, cutoff=0.7)}"
        )


def _choose(choices: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in choices:
        raise ConfigError(f"config.{key}={name!r}: {one_of(name, choices)}")
    return choices[name]


def network_of(section: Mapping[str, Any]) -> Network:
    """The network of a model section alone, as records hold it."""
    return build_network(resolve({"model": section}))


def build_network(config: ml_collections.ConfigDict) -> Network:
    """The network of `config.model`."""
    fields = config.model.to_dict()
    name = fields.pop("name")
    create = _choose(NETWORK_CONFIGS, name, "model.name")
    own = fields.get(name, {})
    fields.update(own)
    wanted = {field.name for field in dataclasses.fields(create)}
    if "learn_sigma" in wanted and "learn_sigma" not in own:
        # U-Nets of iDDPM's preconditioning have its channels, and leave them unused.
        process = config.process
        fields["learn_sigma"] = (process.name, process.edm.preconditioning) == ("edm", "iddpm")
    network = Network(create(**{key: fields[key] for key in fields if key in wanted}))
    size = tuple(fields["input_size"])
    return network.at_size(size) if size else network


# What of config.model decides neither shapes nor meaning of parameters: how a network is run. The
# image size neither: positions are computed, and a network may go on at another resolution.
_EXECUTION = (
    "image_size",
    "input_size",
    "remat",
    "attention",
    "custom_gradients",
    "dtype",
    "param_dtype",
    "quantization",
)
# What a network may have beyond one whose parameters it starts from: its parameters start fresh,
# and where they make no difference at first.
_ADDITIONS = {"second_time": "none", "augment_dim": 0}
_NOTHING = object()


def architecture(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values of `config.model` that decide shapes and meaning of parameters, by flat key."""
    chosen = config.model.name
    named_by_size = getattr(NETWORK_CONFIGS.get(chosen), "layers_are_named_by_size", False)
    values = {}
    for key, value in config.model.items():
        if isinstance(value, AnyConfig):
            if key == chosen:
                values.update({f"{key}.{name}": v for name, v in value.items()})
        elif key not in _EXECUTION or (key == "image_size" and named_by_size):
            values[key] = tuple(value) if isinstance(value, list) else value
    for key in ("dropout", "layer_loop"):  # of training, and of how a network is run
        values.pop(f"{chosen}.{key}", None)
    return values


def require_same_network(
    found: ml_collections.ConfigDict, wanted: ml_collections.ConfigDict, source: str
) -> None:
    """Refuses parameters of a checkpoint for a configuration whose network is another.

    Args:
        found: the checkpoint's configuration.
        wanted: the experiment's.
        source: the checkpoint, for the error.

    Raises:
        ConfigError: with the values to set.
    """
    found, wanted = architecture(found), architecture(wanted)
    flags = [
        f"  config.model.{key} is {wanted.get(key)!r}, the checkpoint's {found.get(key)!r}: "
        + shlex.quote(f"--config.model.{key}={found.get(key)}")
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key) and found.get(key) != _ADDITIONS.get(key, _NOTHING)
    ]
    if flags:
        raise ConfigError(f"{source} is a checkpoint of another network:\n" + "\n".join(flags))


def require_trainable(config: ml_collections.ConfigDict) -> None:
    """Refuses parameters in less than float32, which small updates would not change.

    Raises:
        ConfigError: with what to set.
    """
    if config.model.param_dtype not in ("auto", "float32"):
        raise ConfigError(
            f"config.model.param_dtype={config.model.param_dtype!r} is for sampling and "
            "evaluation: trained parameters are float32, as small updates vanish in fewer bits. "
            "Set --config.model.param_dtype=auto; what products are computed in is "
            "config.model.dtype"
        )
    if config.model.quantization == "int8":
        raise ConfigError(
            "config.model.quantization='int8' is for sampling and evaluation: rounded weights take "
            "no gradients. Set 'fp8' or 'fp8_rowwise', which train, or 'none'"
        )


def size_setting(config: ml_collections.ConfigDict, size: tuple[int, int]) -> str:
    """The key, with its value, that makes inputs of a (height, width), for hints."""
    height, width = size
    if height == width and not config.model.input_size:
        return f"config.model.image_size={height}"
    return f"config.model.input_size={height},{width}"


def build_process(config: ml_collections.ConfigDict) -> Process:
    """The noising process of `config.process`."""
    process = _choose(PROCESSES, config.process.name, "process.name")
    options = config.process[config.process.name].to_dict()
    if config.process.name == "ddpm":
        options["learned_variance"] = build_network(config).learn_sigma
    return process(**options)


def build_denoiser(config: ml_collections.ConfigDict) -> Denoiser:
    """Network and process."""
    return Denoiser(build_network(config), build_process(config))


def build_optimizer(config: ml_collections.ConfigDict):
    """The optimizer of `config.optimizer` with its schedule."""
    c = config.optimizer
    rate = optimizer.learning_rate_schedule(
        c.learning_rate,
        schedule=c.schedule,
        warmup_steps=c.warmup_steps,
        num_steps=config.training.num_steps,
        final_learning_rate=c.final_learning_rate,
    )
    chosen = _choose(optimizer.OPTIMIZERS, c.name, "optimizer.name")
    return optimizer.create_optimizer(
        chosen(**c[c.name].to_dict()),
        rate,
        weight_decay=c.weight_decay,
        gradient_clip_norm=c.gradient_clip_norm,
    )


def build_timesteps(config: ml_collections.ConfigDict) -> TimeDistribution:
    """The training distribution of times of `config.timesteps`."""
    times = config.timesteps
    distribution = _choose(TIME_DISTRIBUTIONS, times.name, "timesteps.name")
    options = times[times.name].to_dict() if times.name in times else {}
    return distribution(build_process(config), **options)


def build_averages(config: ml_collections.ConfigDict) -> tuple[ema.EMA, ...]:
    """The averages of the parameters of `config.ema`."""
    options = config.ema
    kinds = {"warmup": options.warmup, "dtype": options.dtype}
    return tuple(ema.averages(options.decays, options.power_stds, **kinds))


def build_augmentation(config: ml_collections.ConfigDict) -> Augmentation | None:
    """The augmentation of `config.augmentation`, None with probability 0.

    Raises:
        ConfigError: with probability 0 the other keys would do nothing.
    """
    options = config.augmentation.to_dict()
    if options["probability"]:
        return Augmentation(**options)
    for key, known in options_of(Augmentation).items():
        if options[key] != known.default:
            raise ConfigError(
                f"config.augmentation.{key}={options[key]!r} would do nothing with "
                "config.augmentation.probability=0.0"
            )
    return None


def build_denoising(config: ml_collections.ConfigDict) -> Denoising:
    """The Method 'denoising'."""
    weighting = config.loss.weighting
    weight = _choose(LOSS_WEIGHTS, weighting, "loss.weighting")
    return Denoising(
        denoiser=build_denoiser(config),
        timesteps=build_timesteps(config),
        weighting=weight(**(config.loss[weighting].to_dict() if weighting in config.loss else {})),
        optimizer=build_optimizer(config),
        averages=build_averages(config),
        label_dropout=config.method.label_dropout,
        num_microbatches=config.training.num_microbatches,
        vlb_weight=config.loss.vlb_weight,
        augmentation=build_augmentation(config),
    )


METHODS: dict[str, Callable[..., Method]] = {}
"""Builders of methods by name; see `register_method`."""


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Keys of config.method, whatever the method."""

    label_dropout: float = option(0.1, "share of labels, if any, replaced by the null class", SHARE)


register_section("method", MethodOptions, "name", "denoising")


def register_method(
    name: str,
    build: Callable[..., Method],
    options: type = NoOptions,
    *,
    reads: Collection[str] = ("timesteps",),
    scheduled: bool = False,
) -> None:
    """Makes a method known under `name`.

    Args:
        name: as config.method.name.
        build: a resolved configuration -> the method.
        options: a dataclass whose fields, each made by `options.option`, become
            config.method.<name>.<field>.
        reads: what of the configuration's other sections does something: of 'timesteps', 'loss'
            (the weighting), 'variance' (loss.vlb_weight), 'augmentation' and 'second_time' (of
            model). What is set of the others is refused.
        scheduled: whether the student is trained for the very steps of config.sampling, which then
            decide what is learned.

    Raises:
        ValueError: the name is another method's.
    """
    if METHODS.get(name, build) is not build:
        raise ValueError(f"there is a method {name!r} already")
    register("method", name, options, reads=frozenset(reads), scheduled=scheduled)
    METHODS[name] = build


register_method(
    "denoising",
    build_denoising,
    reads=("timesteps", "loss", "variance", "augmentation"),
)


def build_method(config: ml_collections.ConfigDict) -> Method:
    """The Method of `config.method.name`, one of `METHODS`."""
    return _choose(METHODS, config.method.name, "method.name")(config)


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


def unguidable(config: ml_collections.ConfigDict) -> str:
    """Why a model cannot be guided, after "guidance_scale=...", or "" if it can."""
    network = build_network(config)
    if not network.conditions:
        return "needs a class-conditional model; config.model.num_classes is 0"
    if not conditions_lib.can_guide(network.conditions):
        return (
            "needs a null class, and this model has none (config.model.dit.null_class is False): "
            "it was trained without label dropout. Use guidance_scale=1"
        )
    if not config.method.label_dropout:
        return (
            "needs a model that has also seen images without labels; this one never has "
            "(config.method.label_dropout is 0.0), so its null class means nothing. Use "
            "guidance_scale=1, or train with --config.method.label_dropout=0.1"
        )
    return ""


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
    _choose(SOLVERS, c.solver, "sampling.solver")
    options = c[c.solver].to_dict() if c.solver in c else {}
    try:
        solver = make_solver(c.solver, **options)
        times = _sampling_times(c, solver, denoiser)
        channels = denoiser.network.sample_shape[-1]
        solver.init(denoiser.process, jax.numpy.zeros((1, 1, 1, channels)))  # small: it is checked
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


def _data_names(config: ml_collections.ConfigDict, options: Iterable[str]) -> dict[str, str]:
    """What a source's options, in its errors, are called in the configuration."""
    names = {key: f"config.data.{config.data.name}.{key}" for key in options}
    return names | {
        "image_size": f"config.model.{'input_size' if config.model.input_size else 'image_size'}",
        "channels": "config.model.in_channels",
        "num_classes": "config.model.num_classes",
    }


def _missing_data(config: ml_collections.ConfigDict, key: str) -> str:
    """What to do where an experiment's data were not named."""
    model, name = config.model, config.data.name
    if name != "latents":
        expected = schema()[key.removeprefix("config.")].expected
        return f"{key} is empty: set --{key}={expected}"
    vae = 8 if model.in_channels == 4 else 1  # pixels a latent's side, of Stable Diffusion's
    pixels = tuple(vae * side for side in build_network(config).sample_shape[:2])
    lines = [
        f"{key} is empty. This experiment trains on latents of images, which are made once:",
        f"  {extraction_command(pixels, 'latents')}",
        "(IMAGES: a folder with a subfolder of images for every class.) Then train with",
        f"  --{key}=latents",
    ]
    if model.name == "dit" and config.method.name == "denoising":
        small = {"dit.depth": 2, "dit.hidden_size": 96, "dit.num_heads": 4}
        digits = {"image_size": 8, "in_channels": 1, "num_classes": 10} | small
        flags = [f"--config.model.{name}={value}" for name, value in digits.items()]
        lines += [
            "To try it without ImageNet: a small network on the digits that scikit-learn brings,",
            f"  --config.data.name=digits {' '.join(flags)} --config.training.batch_size=64",
            "or python launch/train.py --config=configs/cifar10_dit.py on CIFAR-10",
        ]
    return "\n".join(lines)


def _require_buckets(
    config: ml_collections.ConfigDict, network: Network, info: data_lib.DatasetInfo
) -> None:
    """Refuses images of sizes that the network does not take."""
    found, multiple = info.image_shape[-1], network.side_multiple
    if found != config.model.in_channels:
        raise ConfigError(f"{info.name} has {found} channels: set config.model.in_channels={found}")
    for bucket in info.buckets:
        if any(side % multiple for side in bucket.size):
            raise ConfigError(
                f"{info.name} has a bucket {bucket} (height x width), but the network of "
                f"config.model.name={config.model.name!r} takes sides that are multiples of "
                f"{multiple}: {_other_buckets(config, info, multiple)}"
            )
        network.at_size(bucket.size)


def _other_buckets(
    config: ml_collections.ConfigDict, info: data_lib.DatasetInfo, multiple: int
) -> str:
    """What to set for buckets whose sides are all multiples of `multiple`."""
    given = config.data.get(config.data.name, {}).get("buckets", "")
    kind, _, number = given.partition(":")
    if not given:
        return "make the data again, in such sizes"
    if kind == "auto":
        text = f"auto:{math.lcm(int(number), multiple)}"
    else:
        sizes = [
            [multiple * max(1, round(side / multiple)) for side in size]
            for size in parse_buckets(given, 0)
        ]
        text = ",".join(dict.fromkeys("{}x{}".format(*size) for size in sizes))
    return f"set --config.data.{config.data.name}.buckets={text}"


def open_data(config: ml_collections.ConfigDict, split: str):
    """The source of `config.data`, checked against `config.model`.

    Raises:
        ConfigError: images or classes are not what the model takes, with the values to set.
    """
    name, model = config.data.name, config.model
    _choose(SOURCES, name, "data.name")
    options = config.data[name].to_dict() if name in config.data else {}
    for key, value in options.items():
        if value == "" and schema()[f"data.{name}.{key}"].expected:
            raise ConfigError(_missing_data(config, f"config.data.{name}.{key}"))
    options = {key: value for key, value in options.items() if value != ""}
    taken = data_lib.options_of(name)
    network = build_network(config)
    wanted = network.sample_shape
    height, width, channels = wanted
    of_model = {"image_size": height if height == width else (height, width), "channels": channels}
    options.update({key: value for key, value in of_model.items() if key in taken})
    if name == "pairs":
        process = config.process[config.process.name].to_dict()
        options.update(process={"name": config.process.name, **process})
        if config.method.name == "kd":
            options.update(times=build_sampling(config).times[:-1].tolist())
    with options_named(_data_names(config, options)):
        source = data_lib.open_source(name, split, **options)
    info = source.info
    if info.buckets:
        _require_buckets(config, network, info)
    elif tuple(info.image_shape) != wanted:
        *size, channels = info.image_shape
        raise ConfigError(
            f"{name} delivers images of {tuple(info.image_shape)}, the model takes {wanted}: set "
            f"{size_setting(config, size)} and config.model.in_channels={channels}"
        )
    missing = [
        key for key, c in network.conditions.items() if c.required and key not in info.conditions
    ]
    unused = [key for key in info.conditions if key not in (*network.conditions, "label")]
    if missing or unused:
        raise ConfigError(
            f"{name} tells of an image {', '.join(info.conditions) or 'nothing'}; the network of "
            f"config.model.name={model.name!r} takes "
            f"{conditions_lib.describe(network.conditions)}: choose data and a network that fit"
        )
    misfits = [
        f"{key} {found.describe()}, the network takes {network.conditions[key].describe()}"
        for key, found in info.declared.items()
        if key in network.conditions and not network.conditions[key].admits(found)
    ]
    if misfits:
        raise ConfigError(
            f"{name} tells of an image {'; '.join(misfits)}: choose data and a network that fit"
        )
    if info.num_classes != model.num_classes and model.num_classes:
        raise ConfigError(
            f"{name} has {info.num_classes} classes, the model {model.num_classes}: set "
            f"config.model.num_classes={info.num_classes}"
        )
    return source
