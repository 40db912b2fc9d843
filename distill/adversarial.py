"""What adversarial methods of distillation share: losses, and an adversary that judges features.

Real and generated data are renoised, shown to a diffusion network, and told apart by its
intermediate features (DMD2, arXiv 2405.14867, section 4.3; LADD, arXiv 2403.12015).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Key

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.timesteps import TimeDistribution
from dit_jax.distill.discriminator import Discriminator
from dit_jax.distill.few_step import FewStepOptions, counted_config
from dit_jax.nearest import one_of
from dit_jax.options import option, schema
from dit_jax.ranges import NOT_NEGATIVE, PERIOD, POSITIVE
from dit_jax.training.method import Metrics


@dataclasses.dataclass(frozen=True)
class AdversarialOptions(FewStepOptions):
    """Keys of the methods with a discriminator."""

    discriminator_learning_rate: float = option(0.0, "0: config.optimizer's", NOT_NEGATIVE)
    feature_indices: tuple[int, ...] = option(
        (), "feature maps it reads; empty: a U-Net's last, a transformer's middle", PERIOD
    )
    same_noise: bool = option(False, "renoise real and generated data alike")
    r1_weight: float = option(0.0, "of the approximate R1 penalty (APT); 0: none", NOT_NEGATIVE)
    r1_noise: float = option(0.1, "its perturbation of data", POSITIVE)


FEATURES_OF = ("teacher", "fake_score")
HEADS_OF = {"tokens": "transformer", "maps": "unet"}
"""The discriminator's heads by what a network's feature maps are."""


def generator_loss(fake_logits: Float[Array, "b heads"]) -> Float[Array, ""]:
    """Non-saturating loss of the generator, mean softplus(-D(fake))."""
    return jnp.mean(jax.nn.softplus(-fake_logits))


def discriminator_loss(
    real_logits: Float[Array, "b heads"], fake_logits: Float[Array, "b heads"]
) -> Float[Array, ""]:
    """Mean softplus(D(fake)) plus mean softplus(-D(real))."""
    return jnp.mean(jax.nn.softplus(fake_logits)) + jnp.mean(jax.nn.softplus(-real_logits))


def approximate_r1(
    real_logits: Float[Array, "b heads"], perturbed_logits: Float[Array, "b heads"]
) -> Float[Array, ""]:
    """Mean (D(x) - D(x + noise))^2 on real data: R1 by finite differences (APT, arXiv 2501.08316,
    section 3.3), which needs no second derivatives."""
    return jnp.mean(jnp.square(real_logits - perturbed_logits))


def saturation_metrics(
    real_logits: Float[Array, "b heads"], fake_logits: Float[Array, "b heads"]
) -> Metrics:
    """How well real and generated data are told apart: an accuracy that stays at 1 means that the
    discriminator has won and its gradients say little."""
    real, fake = jnp.mean(real_logits > 0), jnp.mean(fake_logits < 0)
    return {
        "real_logits": jnp.mean(real_logits),
        "fake_logits": jnp.mean(fake_logits),
        "discriminator_accuracy": 0.5 * (real + fake),
    }


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator on features, and how it is trained.

    Attributes:
        discriminator: its heads.
        indices: numbers of the feature maps they read, ascending.
        optimizer: an optax transformation.
        features_of: 'teacher' or 'fake_score', the network whose features are read.
        same_noise: renoise real data with the time and noise of the generated ones beside them.
        r1_weight: of the approximate R1 penalty; 0 for none.
        r1_noise: standard deviation of its perturbation of data.
    """

    discriminator: Discriminator
    indices: tuple[int, ...]
    optimizer: optax.GradientTransformation
    features_of: str = "teacher"
    same_noise: bool = AdversarialOptions.same_noise
    r1_weight: float = AdversarialOptions.r1_weight
    r1_noise: float = AdversarialOptions.r1_noise

    def __post_init__(self):
        if self.features_of not in FEATURES_OF:
            raise ValueError(
                f"features_of={self.features_of!r}: {one_of(self.features_of, FEATURES_OF)}"
            )
        if self.r1_weight < 0 or not self.r1_noise > 0:
            raise ValueError(
                f"r1_weight={self.r1_weight}, r1_noise={self.r1_noise}: expected 0 or more and "
                "above 0"
            )

    def draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], timesteps: TimeDistribution
    ) -> dict[str, Array]:
        """What is random in judging a batch of real data."""
        time_key, noise_key, r1_key = jax.random.split(key, 3)
        drawn = {}
        if not self.same_noise:
            drawn["t_real"] = timesteps.sample(time_key, shape[0])
            drawn["eps_real"] = jax.random.normal(noise_key, shape, jnp.float32)
        if self.r1_weight:
            drawn["r1_noise"] = jax.random.normal(r1_key, shape, jnp.float32)
        return drawn

    def loss(
        self,
        params: Any,
        fake_features: tuple[Array, ...],
        examples: dict[str, Any],
        process: Process,
        features: Callable[[Array, Array], tuple[Array, ...]],
    ) -> tuple[Array, Metrics]:
        """The discriminator's mean loss over examples and its parts.

        Args:
            params: the discriminator's.
            fake_features: of generated data, renoised.
            examples: of `draw`, with "x0", "t" and "eps".
            process: by which data are renoised.
            features: (x, t) -> feature maps of noisy data.
        """
        x0 = examples["x0"]
        t = examples["t" if self.same_noise else "t_real"]
        eps = examples["eps" if self.same_noise else "eps_real"]
        fake = self.discriminator.apply(params, fake_features)
        real = self.discriminator.apply(params, features(process.add_noise(x0, eps, t), t))
        loss = discriminator_loss(real, fake)
        metrics = {"gan_discriminator": loss, **saturation_metrics(real, fake)}
        if self.r1_weight:
            # Data are perturbed and then renoised as before: x_t moves by alpha(t) times as much.
            moved = x0 + self.r1_noise * examples["r1_noise"]
            moved_features = features(process.add_noise(moved, eps, t), t)
            metrics["r1"] = approximate_r1(real, self.discriminator.apply(params, moved_features))
            loss = loss + self.r1_weight * metrics["r1"]
        return loss, metrics

    @property
    def evaluations(self) -> int:
        """Evaluations of features on real data an example."""
        return 2 if self.r1_weight else 1

    def feature_share(self, count: int) -> float:
        """Share of a network's forward pass up to the last feature map of `count`, roughly: blocks
        cost the same, and an encoder half of its U-Net."""
        share = (self.indices[-1] + 1) / count
        return share if self.discriminator.head == "transformer" else 0.5 * share


def feature_indices(
    indices: tuple[int, ...], shapes: tuple[tuple[int, int, int], ...], head: str, key: str
) -> tuple[int, ...]:
    """The feature maps to read; by default a U-Net's last, a transformer's middle one.

    Raises:
        ConfigError: numbers that there are not.
    """
    if not indices:
        return (len(shapes) - 1,) if head == "unet" else (len(shapes) // 2,)
    if sorted(set(indices)) != list(indices) or indices[0] < 0 or indices[-1] >= len(shapes):
        raise ConfigError(
            f"{key}={indices}: expected ascending numbers of 0 to {len(shapes) - 1}; the network "
            f"has {len(shapes)} feature maps, of (height, width, channels) {shapes}"
        )
    return tuple(indices)


def require_statistics(config: ml_collections.ConfigDict) -> None:
    """Refuses parts of a batch in which a discriminator has nothing to compare.

    Raises:
        ConfigError: fewer than two examples, with what to change.
    """
    size, parts = config.training.batch_size, config.training.num_microbatches
    if size // max(1, parts) < 2:
        raise ConfigError(
            f"config.training.batch_size={size} in config.training.num_microbatches={parts} parts "
            "leaves fewer than 2 examples a part for the discriminator's statistics: raise the "
            "first or lower the second"
        )


def build_adversary(config: ml_collections.ConfigDict, features_of: str = "teacher") -> Adversary:
    """The adversary of the chosen method's keys `feature_indices`, `same_noise`, `r1_*` and
    `discriminator_learning_rate`.

    Raises:
        ConfigError: options that do not fit the network or each other.
    """
    name = config.method.name
    options, key = config.method[name], f"config.method.{name}"
    require_statistics(config)
    network = experiment.build_network(config)
    head = HEADS_OF[network.config.feature_kind]
    indices = feature_indices(
        tuple(options.feature_indices), network.feature_shapes, head, f"{key}.feature_indices"
    )
    refuse_changed(config, ("r1_noise",), f"{key}.r1_weight is 0", unless=options.r1_weight != 0.0)
    try:
        return Adversary(
            Discriminator(head, tuple(network.feature_shapes[i] for i in indices)),
            indices,
            experiment.build_optimizer(
                counted_config(config, "critic", options.discriminator_learning_rate)
            ),
            features_of,
            options.same_noise,
            options.r1_weight,
            options.r1_noise,
        )
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def refuse_changed(
    config: ml_collections.ConfigDict, keys: tuple[str, ...], reason: str, *, unless: bool = False
) -> None:
    """Refuses keys of the chosen method that would do nothing, where they are not the defaults.

    Raises:
        ConfigError: naming the key and the reason.
    """
    name = config.method.name
    known = schema()
    for key in () if unless else keys:
        value, default = config.method[name][key], known[f"method.{name}.{key}"].default
        value = tuple(value) if isinstance(value, list) else value
        if value != default:
            raise ConfigError(f"config.method.{name}.{key}={value!r} would do nothing: {reason}")
