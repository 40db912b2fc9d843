"""DMD2: distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

A student's output x0 is renoised, x_t = alpha x0 + sigma eps, and moved along the difference of two
scores there: the teacher's, of real data, and that of a "fake score", a copy of the teacher trained
along on what the student generates. With D_real and D_fake their predictions of x0,

    gradient = (D_fake - D_real) / (mean |x0 - D_real| + 1e-6),    loss = 1/2 mean gradient^2,

the loss having that gradient over the number of elements as its derivative by x0. A discriminator
on intermediate features adds a GAN loss; every player has an optimizer of its own, and the student
is updated less often than its critics.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Key

from dit_jax import experiment
from dit_jax.config import ConfigError, choose
from dit_jax.diffusion import LOSS_WEIGHTS
from dit_jax.diffusion.losses import LossWeight, NoWeight
from dit_jax.distill.adversarial import (
    AdversarialOptions,
    Adversary,
    build_adversary,
    generator_loss,
    refuse_changed,
)
from dit_jax.distill.few_step import FewStepMethod, build_few_steps, counted_config
from dit_jax.distill.student import build_student, build_teacher, drift_metrics
from dit_jax.models.call import Request
from dit_jax.nearest import one_of
from dit_jax.options import option
from dit_jax.ranges import NOT_NEGATIVE, POSITIVE
from dit_jax.training.learner import nulls_of
from dit_jax.training.method import Batch, Metrics

FAKE_SCORE_LOSSES = ("raw", "x0", "eps", "velocity")


def matching_loss(
    x0: Float[Array, "b h w c"],
    teacher_x0: Float[Array, "b h w c"],
    fake_x0: Float[Array, "b h w c"],
    scale: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """The variational score distillation loss; see the module.

    Args:
        x0: generated data; alone differentiated.
        teacher_x0: the teacher's prediction from them, renoised.
        fake_x0: the fake score's.
        scale: a further weight of every example's gradient (f-distill).
    """
    teacher_x0, fake_x0 = jax.lax.stop_gradient((teacher_x0, fake_x0))
    fixed = jax.lax.stop_gradient(x0)
    weight = 1.0 / (jnp.mean(jnp.abs(fixed - teacher_x0), axis=(1, 2, 3), keepdims=True) + 1e-6)
    if scale is not None:
        weight = weight * jax.lax.stop_gradient(scale)[:, None, None, None]
    target = fixed - (fake_x0 - teacher_x0) * weight
    return 0.5 * jnp.mean(jnp.square(x0 - target))


@dataclasses.dataclass(frozen=True)
class DMD2Options(AdversarialOptions):
    """Keys of config.method.dmd2."""

    fake_score_learning_rate: float = option(0.0, "0: config.optimizer's", NOT_NEGATIVE)
    fake_score_loss: str = option("raw", "raw (the process's own) | x0 | eps | velocity")
    gan_weight: float = option(
        0.001, "of the student's GAN loss; 0: no discriminator", NOT_NEGATIVE
    )
    gan_critic_weight: float = option(
        1.0, "of the discriminator's loss beside the fake score's", POSITIVE
    )
    features_of: str = option(
        "teacher", "teacher | fake_score: whose features the discriminator reads"
    )


@dataclasses.dataclass(frozen=True)
class DMD2(FewStepMethod):
    """The Method 'dmd2'; see also `FewStepMethod`.

    Attributes:
        fake_score_optimizer: an optax transformation.
        fake_score_loss: whose squared error trains the fake score: 'raw', the process's natural
            loss (for EDM its lambda(sigma), as in the paper's code), 'x0' (FastGen for EDM), 'eps'
            or 'velocity'.
        fake_score_weighting: further weights of the squared error of 'raw'.
        adversary: the discriminator; None for distribution matching alone.
        gan_weight: of the student's GAN loss.
        gan_critic_weight: of the discriminator's loss beside the fake score's. It matters where
            both train the same network: with features of the fake score the discriminator's
            gradient trains that too, as in the paper's released code (which weights it 0.01).
    """

    fake_score_optimizer: optax.GradientTransformation = dataclasses.field(
        default_factory=optax.identity
    )
    fake_score_loss: str = DMD2Options.fake_score_loss
    fake_score_weighting: LossWeight = dataclasses.field(default_factory=NoWeight)
    adversary: Adversary | None = None
    gan_weight: float = DMD2Options.gan_weight
    gan_critic_weight: float = DMD2Options.gan_critic_weight

    def __post_init__(self):
        super().__post_init__()
        if self.fake_score_loss not in FAKE_SCORE_LOSSES:
            raise ValueError(
                f"fake_score_loss={self.fake_score_loss!r}: "
                f"{one_of(self.fake_score_loss, FAKE_SCORE_LOSSES)}"
            )
        if (self.gan_weight > 0) != (self.adversary is not None):
            raise ValueError(
                f"gan_weight={self.gan_weight}: expected above 0 with an adversary, 0 without"
            )
        if not self.gan_critic_weight > 0:
            raise ValueError(f"gan_critic_weight={self.gan_critic_weight}: expected above 0")

    @property
    def critics(self) -> dict[str, optax.GradientTransformation]:
        """The fake score and the discriminator, if any."""
        critics = {"fake_score": self.fake_score_optimizer}
        if self.adversary is not None:
            critics["discriminator"] = self.adversary.optimizer
        return critics

    def start_players(self, key: Key[Array, ""], frozen: Any) -> dict[str, Any]:
        """The fake score is the teacher at first."""
        score_key, discriminator_key = jax.random.split(key)
        fake_score = self.student.start(score_key, None if frozen is None else frozen["teacher"])
        # A copy, where nothing else makes one: the state's buffers are given away at every update.
        players = {"fake_score": jax.tree.map(jnp.copy, fake_score)}
        if self.adversary is not None:
            players["discriminator"] = self.adversary.discriminator.init(discriminator_key)
        return players

    def draw_more(self, key: Key[Array, ""], batch: Batch, phase: str) -> dict[str, Any]:
        """In the critics' phase dropout of the fake score, and what the discriminator needs."""
        if phase == "student":
            return {}
        dropout_key, adversary_key = jax.random.split(key)
        shape = batch["image"].shape
        drawn = {"critic_dropout_keys": jax.random.split(dropout_key, shape[0])}
        if self.adversary is not None:
            drawn |= self.adversary.draw(adversary_key, shape, self.timesteps)
        return drawn

    def student_loss(
        self, params: Any, examples: dict[str, Any], frozen: Any, players: dict[str, Any]
    ) -> tuple[Array, Metrics]:
        """Distribution matching plus the weighted GAN loss."""
        x0 = self.generate(params, examples)
        teacher_x0, fake_x0, logits = self.judge(x0, examples, frozen, players)
        scale, metrics = self.scale_of(logits, examples, players)
        matching = matching_loss(x0, teacher_x0, fake_x0, scale)
        metrics = {"vsd": matching, **metrics, **drift_metrics(x0)}
        loss = matching
        if logits is not None:
            metrics["gan_generator"] = generator_loss(logits)
            loss = loss + self.gan_weight * metrics["gan_generator"]
        return loss, {"loss": loss, **metrics}

    def scale_of(
        self,
        logits: Float[Array, "b heads"] | None,
        examples: dict[str, Any],
        players: dict[str, Any],
    ) -> tuple[Float[Array, " b"] | None, Metrics]:
        """A further weight of the examples' gradients; f-distill has one."""
        return None, {}

    def judge(
        self, x0: Array, examples: dict[str, Any], frozen: Any, players: dict[str, Any]
    ) -> tuple[Array, Array, Array | None]:
        """The teacher's and the fake score's x0 of renoised `x0`, and logits if there are any.

        One evaluation of each: that which also gives the features is the one that gradients pass
        through, up to the last feature.
        """
        denoiser, conditions, t = self.student.denoiser, examples["conditions"], examples["t"]
        x_t = denoiser.process.add_noise(x0, examples["eps"], t)
        fixed = jax.lax.stop_gradient(x_t)
        teacher, fake_score = frozen["teacher"], players["fake_score"]
        adversary = self.adversary
        ask, nulls = Request(fixed, t, conditions), nulls_of(frozen)
        if adversary is None:
            real = self.teacher.predict(teacher, ask, nulls)
            return real.x0, denoiser.predict(fake_score, ask).x0, None
        ask_features = ask.replace(x=x_t, features=adversary.indices)
        if adversary.features_of == "teacher":
            real, features = self.teacher.predict_with_features(teacher, ask_features, nulls)
            fake = denoiser.predict(fake_score, ask)
        else:
            real = self.teacher.predict(teacher, ask, nulls)
            fake, features = denoiser.predict_with_features(fake_score, ask_features)
        logits = adversary.discriminator.apply(players["discriminator"], features)
        return real.x0, fake.x0, logits

    def critic_loss(
        self, params: dict[str, Any], examples: dict[str, Any], frozen: Any, student_params: Any
    ) -> tuple[Array, Metrics]:
        """Denoising of generated data plus the weighted loss of the discriminator."""
        denoiser, conditions, t = self.student.denoiser, examples["conditions"], examples["t"]
        x0 = jax.lax.stop_gradient(self.generate(student_params, examples))
        x_t = denoiser.process.add_noise(x0, examples["eps"], t)
        adversary = self.adversary
        own = adversary is not None and adversary.features_of == "fake_score"
        indices = adversary.indices if own else ()
        request = Request(x_t, t, conditions, examples["critic_dropout_keys"], indices)
        result = denoiser.raw(params["fake_score"], request)
        loss = self.denoising_loss(result.out, x0, examples["eps"], t, x_t)
        metrics = {"fake_score": loss, **drift_metrics(x0)}
        if adversary is not None:
            judge, judge_params = self.teacher.denoiser, (frozen or {}).get("teacher")
            if own:
                judge, judge_params = denoiser, params["fake_score"]

            def features_at(x: Array, t: Array) -> tuple[Array, ...]:
                ask = Request(x, t, conditions, features=adversary.indices)
                return judge.features(judge_params, ask)

            features = result.features if own else features_at(x_t, t)
            gan, parts = adversary.loss(
                params["discriminator"], features, examples, denoiser.process, features_at
            )
            loss, metrics = loss + self.gan_critic_weight * gan, {**metrics, **parts}
        return loss, {"loss": loss, **metrics}

    def denoising_loss(
        self, raw: Array, x0: Array, eps: Array, t: Array, x_t: Array
    ) -> Float[Array, ""]:
        """The fake score's mean squared error, of the kind `fake_score_loss`."""
        process = self.student.denoiser.process
        if self.fake_score_loss == "raw":
            weight = self.fake_score_weighting(process, t) * self.timesteps.weight(t)
            error = raw[..., : x0.shape[-1]].astype(jnp.float32) - process.target(x0, eps, t)
        else:
            weight = self.timesteps.weight(t)
            prediction = process.interpret(raw, x_t, t)
            found = {"x0": prediction.x0, "eps": prediction.eps}
            found["velocity"] = process.velocity(prediction.x0, prediction.eps, t)
            wanted = {"x0": x0, "eps": eps, "velocity": process.velocity(x0, eps, t)}
            error = found[self.fake_score_loss] - wanted[self.fake_score_loss]
        return jnp.mean(weight * jnp.mean(jnp.square(error), axis=(1, 2, 3)))

    def flops_of(self, phase: str) -> float:
        """Of the evaluations that `judge` and `critic_loss` need, features a share of one
        (`Adversary.feature_share`); a backward pass counts as two forward ones, one of activations
        alone as one."""
        network = self.student.denoiser.network
        adversary = self.adversary
        share = adversary.feature_share(len(network.feature_shapes)) if adversary else 0.0
        heads = adversary.discriminator.flops_per_example if adversary else 0.0
        simulation = self.steps.simulated_evaluations
        if phase == "student":
            teacher = 1.0 if self.teacher.guidance_scale == 1.0 else 2.0
            passes = simulation + 3.0 + 1.0 + teacher + share
            return passes * network.flops_per_example + 2 * heads
        passes = simulation + 1.0 + 3.0
        if adversary:
            own = adversary.features_of == "fake_score"
            passes += share * (3 * adversary.evaluations if own else 1 + adversary.evaluations)
            heads *= 3 * (1 + adversary.evaluations)
        return passes * network.flops_per_example + heads


def dmd2_parts(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of `DMD2` from a configuration whose method has its keys.

    Raises:
        ConfigError: options that do not fit each other.
    """
    options, key = config.method[config.method.name], f"config.method.{config.method.name}"
    weighting = config.loss.weighting
    weight = choose(LOSS_WEIGHTS, weighting, "loss.weighting")
    if weighting != "none" and options.fake_score_loss != "raw":
        raise ConfigError(
            f"config.loss.weighting={weighting!r} would do nothing: it weights the raw output's "
            f"error, and {key}.fake_score_loss is {options.fake_score_loss!r}. Set that to 'raw'"
        )
    weights = config.loss[weighting].to_dict() if weighting in config.loss else {}
    if options.gan_weight:
        adversary = build_adversary(config, options.features_of)
    else:
        adversary = None
        refuse_changed(
            config,
            (
                "gan_critic_weight",
                "discriminator_learning_rate",
                "features_of",
                "feature_indices",
                "same_noise",
                "r1_weight",
                "r1_noise",
            ),
            f"{key}.gan_weight is 0",
        )
    fake_score = counted_config(config, "critic", options.fake_score_learning_rate)
    return {
        "student": build_student(counted_config(config, "student")),
        "teacher": build_teacher(config),
        "steps": build_few_steps(config),
        "timesteps": experiment.build_timesteps(config),
        "student_update_frequency": options.student_update_frequency,
        "fake_score_optimizer": experiment.build_optimizer(fake_score),
        "fake_score_loss": options.fake_score_loss,
        "fake_score_weighting": weight(**weights),
        "adversary": adversary,
        "gan_weight": options.gan_weight,
        "gan_critic_weight": options.gan_critic_weight,
    }


def build(config: ml_collections.ConfigDict) -> DMD2:
    """The Method 'dmd2' of a configuration.

    Raises:
        ConfigError: options that do not fit each other, before anything is compiled.
    """
    parts = dmd2_parts(config)
    try:
        return DMD2(**parts)
    except ValueError as error:
        raise ConfigError(f"config.method.dmd2: {error}") from error
