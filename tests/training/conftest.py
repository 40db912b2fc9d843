import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.data import ArraySource, make_loader
from dit_jax.parallel.mesh import DataParallel, create_mesh
from dit_jax.training.method import OnePhase, TrainState


@dataclasses.dataclass(frozen=True)
class MeanSeeker(OnePhase):
    """A Method of a few numbers: the mean image, found by noisy gradient steps."""

    flops_per_example: float = 100.0

    def init(self, key, params=None, frozen=None):
        mean = jax.random.normal(key, (2, 2))
        return TrainState(jnp.int32(0), {"mean": mean}, {"ema_0.5": {"mean": mean}}, ())

    def update(self, state, batch, key, frozen=None, phase="train"):
        error = state.params["mean"] - batch["image"].mean(axis=(0, 3))
        noise = 0.01 * jax.random.normal(key, error.shape)
        mean = state.params["mean"] - 0.1 * error + noise
        average = 0.5 * (state.ema["ema_0.5"]["mean"] + mean)
        metrics = {"loss": jnp.square(error).mean(), "gradient_norm": jnp.abs(error).max()}
        state = TrainState(state.step + 1, {"mean": mean}, {"ema_0.5": {"mean": average}}, ())
        return state, metrics

    def weights(self, state):
        return {**state.ema, "raw": state.params}


@pytest.fixture(scope="session")
def placement():
    return DataParallel(create_mesh())


@pytest.fixture
def batches():
    """() -> a fresh iterator over shuffled batches of 16 of 40 images 2x2."""
    images = np.random.default_rng(0).integers(0, 256, (40, 2, 2, 1), np.uint8)
    source = ArraySource(images, np.arange(40) % 3, name="grey", split="train", num_classes=3)
    return lambda seed=0: iter(make_loader(source, batch_size=16, seed=seed))
