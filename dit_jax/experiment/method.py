"""The method of a configuration: what is trained, on what, how."""

import dataclasses
import functools
from collections.abc import Callable, Collection

import ml_collections

from dit_jax.config import ConfigError, choose
from dit_jax.data.augmentation import Augmentation
from dit_jax.diffusion import LOSS_WEIGHTS, TIME_DISTRIBUTIONS, TimeDistribution
from dit_jax.experiment.network import build_denoiser, build_process
from dit_jax.options import NoOptions, facts, option, options_of, register, register_section
from dit_jax.ranges import SHARE
from dit_jax.training import ema, optimizer
from dit_jax.training.denoising import Denoising
from dit_jax.training.lora import LoraDenoising, LoraOptions
from dit_jax.training.method import Method


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
    chosen = choose(optimizer.OPTIMIZERS, c.name, "optimizer.name")
    return optimizer.create_optimizer(
        chosen(**c[c.name].to_dict()),
        rate,
        weight_decay=c.weight_decay,
        gradient_clip_norm=c.gradient_clip_norm,
    )


def build_timesteps(config: ml_collections.ConfigDict) -> TimeDistribution:
    """The training distribution of times of `config.timesteps`."""
    times = config.timesteps
    distribution = choose(TIME_DISTRIBUTIONS, times.name, "timesteps.name")
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
    """The Method 'denoising', with config.lora.rank of a LoRA."""
    weighting = config.loss.weighting
    weight = choose(LOSS_WEIGHTS, weighting, "loss.weighting")
    options = LoraOptions(**config.lora.to_dict())
    kind = functools.partial(LoraDenoising, lora=options) if options.rank else Denoising
    return kind(
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
            (the weighting), 'variance' (loss.vlb_weight), 'augmentation', 'lora' and 'second_time'
            (of model). What is set of the others is refused.
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
    reads=("timesteps", "loss", "variance", "augmentation", "lora"),
)


def build_method(config: ml_collections.ConfigDict) -> Method:
    """The Method of `config.method.name`, one of `METHODS`.

    Raises:
        ConfigError: there is none of this name, or it trains no LoRA and is asked to.
    """
    name = config.method.name
    build = choose(METHODS, name, "method.name")
    if config.lora.rank and "lora" not in facts("method", name)["reads"]:
        able = [known for known in METHODS if "lora" in facts("method", known)["reads"]]
        raise ConfigError(
            f"config.lora.rank={config.lora.rank}: config.method.name={name!r} trains no LoRA; "
            f"set config.lora.rank=0, or one of {', '.join(able)}"
        )
    return build(config)
