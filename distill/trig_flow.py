"""TrigFlow: any diffusion process on a quarter circle (Lu & Song 2024, arXiv 2410.11081).

With standard normal eps and an angle from 0 (data) to pi / 2 (noise),

    x = cos(angle) x0 + sin(angle) sigma_data eps,
    dx / d angle = -sin(angle) x0 + cos(angle) sigma_data eps = sigma_data F.

A process reaches the same signal-to-noise ratio at tan(angle) = sigma / (sigma_data alpha), where
its own x is TrigFlow's times a known scale. So every denoiser, whatever it was trained as, has a
TrigFlow output F = cos(angle) eps - sin(angle) x0 / sigma_data, in which nothing is divided by a
sine that vanishes for clean data.

Times are the process's here too: the angle is a name for them. Derivatives along a path are taken
with respect to the logarithm of the noise ratio, d / d log(sigma / alpha) = cos sin d / d angle,
the form in which sCM needs them. It is finite at both ends, where d time / d angle need not be
(EDM's sigma grows like a tangent), and needs no inverse of a trigonometric function.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion.process import Prediction, Process, expand
from dit_jax.models.call import Request


@dataclasses.dataclass(frozen=True)
class TrigFlow:
    """A process seen as TrigFlow.

    Attributes:
        process: the process; its times are used throughout.
        sigma_data: standard deviation of the data.
    """

    process: Process
    sigma_data: float = 0.5

    def __post_init__(self):
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data={self.sigma_data}: expected above 0")

    def angle(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """The angle in [0, pi / 2] with the noise ratio of the process's time t."""
        return jnp.arctan2(self.process.sigma(t), self.sigma_data * self.process.alpha(t))

    def cos_sin(self, t: Float[Array, " b"]) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """Cosine and sine of the angle at the process's time t."""
        length = self.sigma_data * self.scale(t)
        return self.sigma_data * self.process.alpha(t) / length, self.process.sigma(t) / length

    def scale(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """What TrigFlow's x is multiplied by to be the process's: at time t,
        sqrt(alpha^2 + (sigma / sigma_data)^2)."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return jnp.sqrt(alpha**2 + (sigma / self.sigma_data) ** 2)

    def add_noise(
        self, x0: Float[Array, "b *shape"], eps: Float[Array, "b *shape"], t: Float[Array, " b"]
    ) -> Float[Array, "b *shape"]:
        """TrigFlow's noisy x."""
        cos, sin = (expand(part, x0) for part in self.cos_sin(t))
        return cos * x0 + sin * self.sigma_data * eps

    def velocity(
        self, x0: Float[Array, "b *shape"], eps: Float[Array, "b *shape"], t: Float[Array, " b"]
    ) -> Float[Array, "b *shape"]:
        """dx / d angle, which is sigma_data F."""
        cos, sin = (expand(part, x0) for part in self.cos_sin(t))
        return cos * self.sigma_data * eps - sin * x0

    def x0(
        self, x: Float[Array, "b *shape"], f: Float[Array, "b *shape"], t: Float[Array, " b"]
    ) -> Float[Array, "b *shape"]:
        """Clean data from the noisy x and F: cos(angle) x - sin(angle) sigma_data F."""
        cos, sin = (expand(part, x) for part in self.cos_sin(t))
        return cos * x - sin * self.sigma_data * f

    def log_ratio_speed(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """d t / d log(sigma / alpha): sigma for EDM, t (1 - t) for a rectified flow."""
        ratio = self.process.sigma_ratio(t)
        return jax.jvp(self.process.time_from_sigma_ratio, (ratio,), (ratio,))[1]

    def read(self, prediction: Prediction, t: Float[Array, " b"]) -> Float[Array, "b *shape"]:
        """F of a prediction at time t."""
        return self.velocity(prediction.x0, prediction.eps, t) / self.sigma_data

    def output(
        self,
        denoiser: Denoiser,
        params: Any,
        request: Request,
    ) -> Float[Array, "b h w c"]:
        """F of a denoiser; in the request x is TrigFlow's and t the process's."""
        x, t = request.x, request.t
        scaled = expand(self.scale(t), x) * x
        return self.read(denoiser.predict(params, request.replace(x=scaled)), t)
