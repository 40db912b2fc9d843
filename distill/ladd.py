"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015).

The student learns from a discriminator alone, which tells its output from data by what the frozen
teacher's features show of both, renoised. The teacher is never asked for a prediction.
"""

import dataclasses
from typing import Any

import jax
import ml_collections
import optax
from jaxtyping import Array, Key

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.distill.adversarial import (
    AdversarialOptions,
    Adversary,
    build_adversary,
    generator_loss,
)
from dit_jax.distill.few_step import FewStepMethod, build_few_steps, counted_config
from dit_jax.distill.student import build_student, build_teacher, drift_metrics
from dit_jax.models.call import Request
from dit_jax.training.method import Batch, Metrics


@dataclasses.dataclass(frozen=True)
class LADDOptions(AdversarialOptions):
    """Keys of config.method.ladd."""


@dataclasses.dataclass(frozen=True)
class LADD(FewStepMethod):
    """The Method 'ladd'; see also `FewStepMethod`.

    Attributes:
        adversary: the discriminator, on the teacher's features.
    """

    adversary: Adversary | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.adversary is None or self.adversary.features_of != "teacher":
            raise ValueError("LADD needs an adversary on the teacher's features")

    @property
    def critics(self) -> dict[str, optax.GradientTransformation]:
        """The discriminator."""
        return {"discriminator": self._adversary.optimizer}

    @property
    def _adversary(self) -> Adversary:
        assert self.adversary is not None
        return self.adversary

    def start_players(self, key: Key[Array, ""], frozen: Any) -> dict[str, Any]:
        """A fresh discriminator."""
        return {"discriminator": self._adversary.discriminator.init(key)}

    def draw_more(self, key: Key[Array, ""], batch: Batch, phase: str) -> dict[str, Any]:
        """In the critic's phase times and noise of the real data."""
        if phase == "student":
            return {}
        return self._adversary.draw(key, batch["image"].shape, self.timesteps)

    def _features(self, frozen, conditions):
        def features(x: Array, t: Array) -> tuple[Array, ...]:
            request = Request(x, t, conditions, features=self._adversary.indices)
            return self.teacher.denoiser.features(frozen["teacher"], request)

        return features

    def student_loss(
        self, params: Any, examples: dict[str, Any], frozen: Any, players: dict[str, Any]
    ) -> tuple[Array, Metrics]:
        """The GAN loss of generated data, renoised."""
        x0, t = self.generate(params, examples), examples["t"]
        x_t = self.teacher.denoiser.process.add_noise(x0, examples["eps"], t)
        features = self._features(frozen, examples["conditions"])(x_t, t)
        logits = self._adversary.discriminator.apply(players["discriminator"], features)
        loss = generator_loss(logits)
        return loss, {"loss": loss, "gan_generator": loss, **drift_metrics(x0)}

    def critic_loss(
        self, params: dict[str, Any], examples: dict[str, Any], frozen: Any, student_params: Any
    ) -> tuple[Array, Metrics]:
        """The discriminator's loss on data and on what the student makes."""
        process, t = self.teacher.denoiser.process, examples["t"]
        x0 = jax.lax.stop_gradient(self.generate(student_params, examples))
        features = self._features(frozen, examples["conditions"])
        fake_features = features(process.add_noise(x0, examples["eps"], t), t)
        loss, metrics = self._adversary.loss(
            params["discriminator"], fake_features, examples, process, features
        )
        return loss, {"loss": loss, **metrics, **drift_metrics(x0)}

    def flops_of(self, phase: str) -> float:
        """As DMD2's, without predictions of teacher and fake score."""
        network, adversary = self.teacher.denoiser.network, self._adversary
        share = adversary.feature_share(len(network.feature_shapes))
        heads = adversary.discriminator.flops_per_example
        passes = self.steps.simulated_evaluations
        if phase == "student":
            return (passes + 3.0 + 2 * share) * network.flops_per_example + 2 * heads
        passes += 1.0 + share * (1 + adversary.evaluations)
        return passes * network.flops_per_example + 3 * (1 + adversary.evaluations) * heads


def build(config: ml_collections.ConfigDict) -> LADD:
    """The Method 'ladd' of a configuration.

    Raises:
        ConfigError: options that do not fit each other, before anything is compiled.
    """
    if config.teacher.guidance_scale != 1.0:
        raise ConfigError(
            f"config.teacher.guidance_scale={config.teacher.guidance_scale} would do nothing: "
            "config.method.name='ladd' reads the teacher's features, not its predictions"
        )
    try:
        return LADD(
            student=build_student(counted_config(config, "student")),
            teacher=build_teacher(config),
            steps=build_few_steps(config),
            timesteps=experiment.build_timesteps(config),
            student_update_frequency=config.method.ladd.student_update_frequency,
            adversary=build_adversary(config),
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.method.ladd: {error}") from error
