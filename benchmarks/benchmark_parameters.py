"""Random parameters for timings of inference, got as those of a checkpoint are: array by array."""

from typing import Any

import jax
import numpy as np

from dit_jax.models import Network


def random(network: Network) -> Any:
    """Normal ones on the device, of unrolled layers each with arrays of its own."""
    shapes = jax.eval_shape(lambda: network.as_sampled(network.init(jax.random.key(0))))
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jax.device_put(0.02 * generator.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, shapes)
