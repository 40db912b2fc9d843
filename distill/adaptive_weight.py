"""A learned weight of each noise level: the log variance of its loss (EDM2, arXiv 2312.02696).

With u(t) learned beside the network, a loss becomes exp(-u(t)) loss + u(t). For a given loss that
is least where u is its logarithm, so that every noise level comes to contribute alike.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dit_jax.diffusion.process import Process
from dit_jax.models.layers import timestep_frequencies

# The logarithm of the noise ratio of clean data is taken as that of this one.
_SMALLEST_RATIO = 1e-8


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
    """u(t): one linear map of sinusoidal features of log(sigma / alpha) / 4, EDM's c_noise.

    Attributes:
        channels: of the features, an even number.
    """

    channels: int = 128

    def init(self, key: Key[Array, ""]) -> dict[str, Array]:
        """Zeros, whatever the key: u is 0 at first."""
        return {"kernel": jnp.zeros(self.channels), "bias": jnp.zeros(())}

    def __call__(
        self, params: dict[str, Array], process: Process, t: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """u at the process's times t."""
        ratio = jnp.maximum(process.sigma_ratio(t), _SMALLEST_RATIO)
        features = timestep_frequencies(0.25 * jnp.log(ratio), self.channels, spacing="diffusers")
        return features @ params["kernel"] + params["bias"]


def weighted(loss: Float[Array, " b"], log_variance: Float[Array, " b"]) -> Float[Array, " b"]:
    """exp(-u) loss + u."""
    return jnp.exp(-log_variance) * loss + log_variance
