"""A method: denoising whose updates are each a share of what they were."""

import dataclasses

import jax

from dit_jax import experiment
from dit_jax.options import option
from dit_jax.ranges import SHARE


@dataclasses.dataclass(frozen=True)
class ShrunkenOptions:
    factor: float = option(0.5, "share of every update that is made", SHARE)


def build(config):
    denoising = experiment.build_denoising(config)
    optimizer = denoising.optimizer
    factor = config.method.shrunken.factor

    def update(gradients, state, params=None):
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(lambda leaf: factor * leaf, updates), state

    return dataclasses.replace(denoising, optimizer=optimizer._replace(update=update))


def register() -> None:
    experiment.register_method("shrunken", build, ShrunkenOptions, reads=("timesteps", "loss"))
