"""Truncated consistency models (Lee et al. 2024, arXiv 2410.14895): a second stage for noise alone.

A first-stage consistency model spends much of its capacity on nearly clean data. The second stage
is trained only for t from a transition time t' on; below t' the first stage, frozen, says what x0
is. Examples at t = t' itself, the boundary, tie the two together and keep the student from
collapsing to a constant.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, Key

from dit_jax import experiment
from dit_jax.diffusion.conversions import expand
from dit_jax.distill.consistency import Consistency, build_criterion, require_one_time
from dit_jax.distill.consistency_loss import ECTSchedule, StageOptions, TimePair, TimePairs
from dit_jax.distill.student import DistillState, build_student, drift_metrics
from dit_jax.models.call import Request
from dit_jax.options import option, same_option
from dit_jax.ranges import NOT_NEGATIVE, PERIOD, SHARE
from dit_jax.training.method import Batch, Metrics

# Parts into which the evaluations at r are split, counted over all microbatches: all but one need
# only one of the two networks.
_PARTS = 4


def arrange(order: Any, num_microbatches: int, parts: int) -> Any:
    """Lays out sorted examples so that consecutive ones fall into the same part.

    Microbatch i is every `num_microbatches`-th example (`accumulated_gradients`), and part j of it
    again every `parts`-th, so that each part covers all devices.
    """
    return order.reshape(num_microbatches, parts, -1).transpose(2, 1, 0).reshape(-1)


@dataclasses.dataclass(frozen=True)
class TCMOptions(StageOptions):
    """Keys of config.method.tcm, the second stage; its times are those of config.timesteps."""

    stage1: str = option("", "the first stage, a consistency model: [KIND:]SRC")
    stage1_weights: str = option("ema", "ema: the first average; or raw, or an average's name")
    transition: float = option(1.0, "time from which the student takes over", NOT_NEGATIVE)
    boundary_probability: float = option(0.25, "share of examples at the transition", SHARE)
    boundary_weight: float = option(0.1, "of their loss", NOT_NEGATIVE)
    images_per_stage: int = same_option(StageOptions, "images_per_stage", 1_000_000)
    images_before: int = option(
        0, "that count as seen, so that the ratio goes on from there", PERIOD
    )


@dataclasses.dataclass(frozen=True)
class TCM(Consistency):
    """The second stage of a truncated consistency model.

    The frozen parameters "stage1" are the first stage's; the student starts from them. At r every
    example is evaluated by one of the two networks, a part of the batch by both, which
    `flops_per_example` does not count.

    Attributes:
        transition: t', in process time.
        boundary_probability: share of a batch that is at t = t'.
        boundary_weight: of the boundary's mean loss beside that of the others.
    """

    transition: float = TCMOptions.transition
    boundary_probability: float = TCMOptions.boundary_probability
    boundary_weight: float = TCMOptions.boundary_weight

    def __post_init__(self):
        super().__post_init__()
        process = self.student.denoiser.process
        if not process.clean_time < self.transition < process.noise_time:
            raise ValueError(
                f"transition={self.transition}: expected a time between clean data's, "
                f"{process.clean_time}, and the noisiest, {process.noise_time}"
            )
        if not 0 <= self.boundary_probability < 1:
            raise ValueError(
                f"boundary_probability={self.boundary_probability}: expected from 0 to below 1"
            )
        low = getattr(self.timesteps, "bounds", (process.clean_time, None))[0]
        if low < self.transition:
            raise ValueError(
                f"the times that config.timesteps draws begin at {low}, and below the transition "
                f"at {self.transition} there is nothing to train: set config.timesteps.name="
                f"'log_student_t' (or 'truncated_log_normal') and its min_time={self.transition}"
            )
        first = self.pairs(jnp.array([self.transition]), jnp.float32(1.0))
        if not first.r[0] < self.transition:
            raise ValueError(
                f"min_r={self.pairs.min_r} is not below the transition at {self.transition}"
            )

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The first stage."""
        return ("stage1",)

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> DistillState:
        """The student from `params`, else the first stage's, else (shapes only) fresh."""
        stage1 = (frozen or {}).get("stage1")
        known = not any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(stage1))
        if params is None and stage1 is not None and known:
            # Copied: the state's buffers are given away at every update, the frozen ones stay.
            params = jax.tree.map(jnp.copy, stage1)
        return self.student.create_state(key, params)

    def draw_examples(
        self,
        batch: Batch,
        key: Key[Array, ""],
        decrement: Float[Array, ""],
        frozen: Any = None,
    ) -> dict[str, Any]:
        """As consistency training, with the boundary's share of the times at the transition.

        Times are drawn independently of the images, so which image gets which is free: they are
        laid out such that those with r below the transition lie in the same parts of the batch.
        """
        examples = super().draw_examples(batch, key, decrement, frozen)
        t = examples["pair"].t
        n = t.shape[0]
        count = self._boundary_count(n)
        boundary = jnp.arange(n) < count
        t = jnp.where(boundary, jnp.float32(self.transition), t)
        pair = self.pairs(t, decrement)
        order = jnp.argsort(pair.r >= self.transition)
        parts = self._parts(n // self.student.num_microbatches)
        order = arrange(order, self.student.num_microbatches, parts)
        examples["pair"] = TimePair(*(part[order] for part in pair))
        examples["boundary"] = boundary[order]
        # The mean over a batch of these times the losses is the sum of both groups' means.
        examples["share"] = jnp.where(boundary[order], n / max(count, 1), n / (n - count))
        return examples

    def _boundary_count(self, n: int) -> int:
        if not self.boundary_probability:
            return 0
        if n < 2:
            raise ValueError(f"a batch of {n} has no room for the boundary: expected at least 2")
        return min(max(int(n * self.boundary_probability), 1), n - 1)

    def _parts(self, n: int) -> int:
        wanted = max(_PARTS // self.student.num_microbatches, 1)
        return max(parts for parts in range(1, wanted + 1) if n % parts == 0)

    def x0_at_r(
        self, params: Any, frozen: Any, x_r: Float[Array, "b h w c"], examples: dict[str, Any]
    ) -> Float[Array, "b h w c"]:
        """x0 at time r, by the first stage below the transition and by the student from it on.

        Part after part, and in each only the networks that some example needs: with times laid
        out by `draw_examples`, all parts but one need a single evaluation.
        """
        x0 = self.student.denoiser.x0
        parts = self._parts(x_r.shape[0])

        def split(leaf):
            return jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)

        def evaluate(part):
            x, r, conditions, keys = part
            request = Request(x, r, conditions, keys)
            below = r < self.transition

            def by(network, needed):
                return jax.lax.cond(
                    needed,
                    lambda: x0(network, request),
                    lambda: jnp.zeros_like(x),
                )

            first, second = by(frozen["stage1"], below.any()), by(params, ~below.all())
            return jnp.where(expand(r, x) < self.transition, first, second)

        inputs = (x_r, examples["pair"].r, examples["conditions"], examples["dropout_keys"])
        outputs = jax.lax.map(evaluate, jax.tree.map(split, inputs))
        return jnp.moveaxis(outputs, 0, 1).reshape(x_r.shape)

    def loss(
        self, params: Any, examples: dict[str, Any], target: Any = None, frozen: Any = None
    ) -> tuple[Array, Metrics]:
        """Mean loss of the examples above the transition plus the boundary's, weighted."""
        target = params if target is None else target
        x0_t, x0_r = self.predictions(params, target, frozen, examples)
        loss, unweighted = self.losses(x0_t, x0_r, examples["pair"])
        boundary = examples["boundary"]
        metrics = {
            "consistency_loss": _mean(loss * examples["share"], ~boundary),
            "boundary_loss": _mean(loss * examples["share"], boundary),
            "unweighted_loss": _mean(unweighted * examples["share"], ~boundary),
        }
        total = metrics["consistency_loss"] + self.boundary_weight * metrics["boundary_loss"]
        return total, {"loss": total, **metrics, **drift_metrics(x0_t)}


def _mean(values: Float[Array, " b"], where: Bool[Array, " b"]) -> Float[Array, ""]:
    return jnp.where(where, values, 0.0).mean()


def build(config: ml_collections.ConfigDict) -> TCM:
    """The Method 'tcm'.

    Raises:
        ConfigError: options that would do nothing.
    """
    require_one_time(config)
    options = config.method.tcm
    student = build_student(config)
    return TCM(
        student=student,
        timesteps=experiment.build_timesteps(config),
        pairs=TimePairs(student.denoiser.process, options.min_r),
        schedule=ECTSchedule(
            options.growth,
            options.ratio_limit,
            options.images_per_stage,
            options.images_before,
        ),
        criterion=build_criterion(config),
        transition=options.transition,
        boundary_probability=options.boundary_probability,
        boundary_weight=options.boundary_weight,
    )
