"""Plain denoising: the Method that trains a diffusion model from data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from dit_jax.data.augmentation import Augmentation
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import losses
from dit_jax.diffusion.timesteps import TimeDistribution
from dit_jax.models.call import Request
from dit_jax.training import ema as ema_lib
from dit_jax.training import remat_choice
from dit_jax.training.learner import Learner
from dit_jax.training.method import (
    Batch,
    Metrics,
    OnePhase,
    TrainState,
    accumulated_gradients,
)


def require_augmentation(network: Any, augmentation: Augmentation | None) -> None:
    """Refuses an augmentation whose labels the network does not take.

    Raises:
        ValueError: with what to set.
    """
    if augmentation is None:
        return
    taken = network.conditions.get("augment")
    known = taken.shape[0] if taken else 0
    if augmentation.label_dim != known:
        raise ValueError(
            f"model.augment_dim={known}, but the augmentation has {augmentation.label_dim} labels: "
            f"set model.augment_dim={augmentation.label_dim}, or augmentation.probability=0 for "
            "none"
        )


@dataclasses.dataclass(frozen=True)
class Denoising(Learner, OnePhase):
    """Regression of the process's target at random times (DDPM, flow matching or EDM).

    Attributes:
        denoiser: the network and its process.
        timesteps: training distribution of t with its own weights (`diffusion.timesteps`).
        weighting: further loss weights (`diffusion.losses`).
        optimizer: an optax transformation.
        averages: EMAs to keep.
        label_dropout: probability of dropping an example's conditions (guidance).
        num_microbatches: gradient accumulation, the batch in so many parts.
        vlb_weight: of the variational term where the variance is learned.
        augmentation: of the images, told to the network by its labels; None for none.
    """

    denoiser: Denoiser
    timesteps: TimeDistribution
    weighting: losses.LossWeight
    optimizer: optax.GradientTransformation
    averages: tuple[ema_lib.EMA, ...] = ()
    label_dropout: float = 0.1
    num_microbatches: int = 1
    vlb_weight: float = 1.0
    augmentation: Augmentation | None = None

    def __post_init__(self):
        super().__post_init__()
        require_augmentation(self.denoiser.network, self.augmentation)

    @property
    def flops_per_example(self) -> float:
        """Forward and backward pass, the backward counted as two forwards."""
        return 3 * self.denoiser.network.flops_per_example

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> TrainState:
        """Fresh parameters (or `params`), their averages and the optimizer's state."""
        params = self.denoiser.network.init(key) if params is None else params
        return TrainState(
            step=jnp.int32(0),
            params=params,
            ema=ema_lib.init(self.averages, params),
            optimizer=self.optimizer.init(params),
        )

    def draw_examples(
        self, batch: Batch, key: Key[Array, ""], frozen: Any = None
    ) -> dict[str, Any]:
        """Times, noise and dropped conditions of a whole batch, before it is split in any way."""
        time_key, noise_key, label_key = jax.random.split(key, 3)
        x0 = batch["image"]
        n = x0.shape[0]
        examples = {
            "x0": x0,
            "t": self.timesteps.sample(time_key, n),
            "eps": jax.random.normal(noise_key, x0.shape, jnp.float32),
        }
        if self.denoiser.network.has_dropout:
            examples["dropout_keys"] = jax.random.split(jax.random.fold_in(key, 3), n)
        conditions = self.draw_conditions(batch, label_key, frozen)
        if self.augmentation is not None:
            keys = jax.random.split(jax.random.fold_in(key, 4), n)
            examples["x0"], conditions["augment"] = self.augmentation(keys, x0)
        examples["conditions"] = conditions
        return examples

    def loss(self, params: Any, examples: dict[str, Any]) -> tuple[Array, Metrics]:
        """Mean loss over examples and its parts."""
        process = self.denoiser.process
        x0, eps, t = examples["x0"], examples["eps"], examples["t"]
        x_t = process.add_noise(x0, eps, t)
        request = Request(x_t, t, examples["conditions"], examples.get("dropout_keys"))
        raw = self.denoiser.raw(params, request).out
        loss, parts = losses.denoising_loss(
            process,
            raw,
            x0,
            eps,
            t,
            x_t,
            weights=self.weighting(process, t) * self.timesteps.weight(t),
            vlb_weight=self.vlb_weight,
        )
        metrics = {name: part.mean() for name, part in {"loss": loss, **parts}.items()}
        return metrics["loss"], metrics

    def objective(self, frozen: Any) -> tuple[Callable, Callable]:
        """(params, examples) -> loss and metrics, and what converts `params` once for all parts.

        Args:
            frozen: as `update`.
        """
        # What only has the face of a `Network` need not know of it.
        return self.loss, getattr(self.denoiser.network, "as_computed", lambda params: params)

    def kept_bytes(
        self, state: TrainState, batch: Batch, key: Key[Array, ""], frozen: Any = None
    ) -> int:
        """Bytes that the backward pass of one microbatch keeps; of arrays or their shapes."""

        def loss(params, examples):
            return self.loss(params, examples)[0]

        def part(leaf):
            size = leaf.shape[0] // self.num_microbatches
            return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)

        examples = jax.tree.map(part, jax.eval_shape(self.draw_examples, batch, key, frozen))
        return remat_choice.kept_bytes(loss, state.params, examples)

    def update(
        self,
        state: TrainState,
        batch: Batch,
        key: Key[Array, ""],
        frozen: Any = None,
        phase: str = "train",
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step on the mean loss of `batch`, then the averages."""
        examples = self.draw_examples(batch, key, frozen)
        loss, as_computed = self.objective(frozen)
        metrics, gradients = accumulated_gradients(
            loss, state.params, examples, self.num_microbatches, as_computed
        )
        metrics["gradient_norm"] = optax.global_norm(gradients)
        return self.apply_gradients(state, gradients), metrics
