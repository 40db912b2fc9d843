"""Training of a LoRA: plain denoising of thin factors beside a frozen network.

States, averages, the optimizer and checkpoints hold the factors alone; the network is read from
where it is, as a teacher is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dit_jax.models import lora
from dit_jax.options import option, register_section
from dit_jax.ranges import NOT_NEGATIVE, PERIOD
from dit_jax.training import ema as ema_lib
from dit_jax.training.denoising import Denoising
from dit_jax.training.method import Batch, TrainState

BASE = "base"


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Keys of config.lora."""

    rank: int = option(0, "of the factors that alone are trained; 0: all parameters are", PERIOD)
    alpha: float = option(
        0.0, "the change is times alpha / rank; 0: times 1", NOT_NEGATIVE, needs="rank"
    )
    layers: str = option(
        "attention", "attention | all | a regular expression of layers' whole paths", needs="rank"
    )
    base: str = option("", "[KIND:]SOURCE of the network, which stays as it is", needs="rank")
    weights: str = option("ema", "of a run that is the base: raw | ema | an average", needs="rank")

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied by."""
        return self.alpha / self.rank if self.alpha else 1.0


register_section("lora", LoraOptions)


@dataclasses.dataclass(frozen=True)
class LoraDenoising(Denoising):
    """Denoising by a frozen network with trained factors.

    Attributes:
        lora: which factors.
    """

    lora: LoraOptions = LoraOptions()

    def __post_init__(self):
        super().__post_init__()
        if self.lora.rank < 1:
            raise ValueError(f"lora.rank={self.lora.rank}: expected at least 1")
        lora.choose_layers(self.denoiser.network, self.lora.layers)

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The network."""
        return (BASE,)

    @property
    def flops_per_example(self) -> float:
        """Forward and backward pass: no gradients of the network's parameters are computed."""
        return 2 * self.denoiser.network.flops_per_example

    def init(self, key: Key[Array, ""], params: Any = None, frozen: Any = None) -> TrainState:
        """Fresh factors, which change nothing yet.

        Raises:
            ValueError: parameters to start from.
        """
        if params is not None:
            raise ValueError("a LoRA starts from fresh factors: the network is config.lora.base")
        network, options = self.denoiser.network, self.lora
        layers = lora.choose_layers(network, options.layers)
        factors = lora.init(network, key, options.rank, layers)
        return TrainState(
            step=jnp.int32(0),
            params=factors,
            ema=ema_lib.init(self.averages, factors),
            optimizer=self.optimizer.init(factors),
        )

    def sampled(self, factors: Any, frozen: Any) -> Any:
        """Parameters to sample with, of one of `weights`."""
        return lora.combine(frozen[BASE], factors, self.lora.scale)

    def objective(self, frozen: Any) -> tuple[Callable, Callable]:
        """As of denoising; only the factors are differentiated."""

        def loss(factors, examples):
            return self.loss(self.sampled(factors, frozen), examples)

        return loss, lambda factors: factors

    def kept_bytes(
        self, state: TrainState, batch: Batch, key: Key[Array, ""], frozen: Any = None
    ) -> int:
        """As of denoising, of whose gradients these are a part."""
        base = jax.eval_shape(self.denoiser.network.init, key)
        params = lora.combine(base, state.params)
        whole = dataclasses.replace(state, params=params)
        return super().kept_bytes(whole, batch, key, frozen)
