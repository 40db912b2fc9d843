"""Denoising losses: a weighted squared error, and the variational term that trains a learned
variance.

The squared error is always that of the network's raw output against ``process.target``, averaged
over an example's elements. For DDPM that is the simple loss, for rectified flow the flow-matching
loss, and for EDM the loss with its own lambda(sigma), whose effective weight on the raw output is
one. Weightings are frozen callables ``(process, t) -> [b]`` which multiply that error.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_jax.diffusion.process import DDPM, Process, expand
from dit_jax.options import option
from dit_jax.ranges import NOT_NEGATIVE, POSITIVE


@runtime_checkable
class LossWeight(Protocol):
    """A weight of the squared error that depends on the time."""

    def __call__(self, process: Process, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """Weights, one per example."""


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What a denoising loss has under any weighting."""

    vlb_weight: float = option(
        1.0, "of the variance term, when the network's learn_sigma is on", NOT_NEGATIVE
    )


@dataclasses.dataclass(frozen=True)
class NoWeight:
    """1: each process's natural loss, for EDM its own lambda(sigma)."""

    def __call__(self, process: Process, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """Ones."""
        return jnp.ones_like(t, jnp.float32)


@dataclasses.dataclass(frozen=True)
class P2:
    """Perception-prioritised weight 1 / (k + snr)^gamma of the raw output's error (Choi et al.
    2022, eq. 8, for eps).
    """

    k: float = option(1.0, "keeps the weight of noise finite", POSITIVE)
    gamma: float = option(1.0, "strength; 0: no weight", NOT_NEGATIVE)

    def __post_init__(self):
        if not self.k > 0 or self.gamma < 0:
            raise ValueError(
                f"P2 needs k > 0 and gamma >= 0, got k={self.k} and gamma={self.gamma}."
            )

    def __call__(self, process: Process, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """Weights, one per example."""
        return (self.k + process.snr(t)) ** -self.gamma


@dataclasses.dataclass(frozen=True)
class MinSNR:
    """min(snr, gamma) on the squared error of x0, whatever the network predicts (Hang et al. 2023,
    eq. 9).

    With ``raw = p x0 + q eps`` an error of x0 is sigma / (p sigma - q alpha) times that of the raw
    output, so the weight of the raw error is min(snr, gamma) sigma^2 / (p sigma - q alpha)^2, which
    is

    * eps: min(snr, gamma) / snr;
    * x0: min(snr, gamma);
    * velocity of DDPM: min(snr, gamma) / (snr + 1); of rectified flow: min(snr, gamma) t^2;
    * EDM: min(snr, gamma) c_out^2.
    """

    gamma: float = option(
        5.0, "the weight of x0's error, snr, is cut off here; the paper's 5", POSITIVE
    )

    def __post_init__(self):
        if not self.gamma > 0:
            raise ValueError(f"MinSNR needs gamma > 0, got {self.gamma}.")

    def __call__(self, process: Process, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """Weights, one per example."""
        p, q = process.raw_row(t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        determinant = p * sigma - q * alpha
        known = determinant != 0
        # min(snr, gamma) sigma^2 = min(alpha^2, gamma sigma^2), which is also exact where snr is
        # not finite.
        weight = (
            jnp.minimum(alpha**2, self.gamma * sigma**2) / jnp.where(known, determinant, 1.0) ** 2
        )
        # Parallel rows: x0 predicted from clean data, where snr exceeds any gamma; or eps of pure
        # noise, where min / snr is 1.
        return jnp.where(known, weight, jnp.where(sigma > 0, 1.0, self.gamma))


def denoising_loss(
    process: Process,
    raw: Float[Array, "b *raw"],
    x0: Float[Array, "b *shape"],
    eps: Float[Array, "b *shape"],
    t: Float[Array, " b"],
    x_t: Float[Array, "b *shape"],
    *,
    weights: Float[Array, " b"] | None = None,
    vlb_weight: float = 1.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Loss of one network evaluation, one value per example.

    Args:
        process: The process that made x_t.
        raw: The network's output about `process.network_inputs(x_t, t)`, any float dtype.
        x0: Clean data.
        eps: The noise in x_t.
        t: Times; where a variance is learned these must be whole indices, as drawn by the
            distributions of DDPM.
        x_t: ``process.add_noise(x0, eps, t)``.
        weights: Weights of the squared error, say ``loss_weight(process, t) *
            distribution.weight(t)``. They never apply to the variational term, as in SpeeD's
            released code. None is no weights.
        vlb_weight: Weight of the variational term (only where a variance is learned). DiT uses 1;
            Improved DDPM's rescaled loss is num_timesteps / 1000.

    Returns:
        The loss, and its parts without weights: "mse", and "vlb" (bits per dimension) where a
        variance is learned.

    Raises:
        ValueError: If the network's output has the wrong number of channels.
    """
    prediction = process.interpret(raw, x_t, t)  # checks the shape, and says what to do
    mean_output = raw[..., : x_t.shape[-1]].astype(jnp.float32)
    mse = _mean(jnp.square(mean_output - process.target(x0, eps, t)))
    parts = {"mse": mse}
    loss = mse if weights is None else jax.lax.stop_gradient(weights) * mse
    if prediction.variance_fraction is not None:
        assert isinstance(process, DDPM), "only DDPM learns a variance"
        # The mean is trained by the squared error alone.
        predicted = jax.lax.stop_gradient(prediction.x0)
        parts["vlb"] = vlb_bits_per_dim(
            process, predicted, prediction.variance_fraction, x0, x_t, t
        )
        loss = loss + vlb_weight * parts["vlb"]
    return loss, parts


def vlb_bits_per_dim(
    process: DDPM,
    predicted_x0: Float[Array, "b *shape"],
    variance_fraction: Float[Array, "b *shape"],
    x0: Float[Array, "b *shape"],
    x_t: Float[Array, "b *shape"],
    t: Float[Array, " b"],
) -> Float[Array, " b"]:
    """One term of the variational bound, in bits per dimension (Improved DDPM, section 2).

    For t > 0 it is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)); for t = 0 the negative log
    likelihood of x0, rounded to 256 levels in [-1, 1], under the last step's normal distribution.
    The variance is that of the full, not a respaced, chain.
    """
    tables, index = process.tables, jnp.round(t).astype(jnp.int32)

    def at(table: np.ndarray) -> Array:
        return expand(jnp.asarray(table, jnp.float32)[index], x0)

    mean_x0, mean_x = at(tables.posterior_mean_x0), at(tables.posterior_mean_x)
    true_log_variance, log_beta = at(tables.posterior_log_variance), at(np.log(tables.betas))
    log_variance = variance_fraction * log_beta + (1.0 - variance_fraction) * true_log_variance

    difference = mean_x0 * (x0 - predicted_x0)  # of the two means, whose parts in x_t cancel
    kl = 0.5 * (
        log_variance
        - true_log_variance
        + jnp.exp(true_log_variance - log_variance)
        + jnp.square(difference) * jnp.exp(-log_variance)
        - 1.0
    )
    mean = mean_x0 * predicted_x0 + mean_x * x_t
    nll = -discretized_normal_log_likelihood(x0, mean, 0.5 * log_variance)
    return jnp.where(index == 0, _mean(nll), _mean(kl)) / math.log(2.0)


def discretized_normal_log_likelihood(
    x: Float[Array, "b *shape"], mean: Float[Array, "b *shape"], log_std: Float[Array, "b *shape"]
) -> Float[Array, "b *shape"]:
    """Log probability of x under a normal distribution integrated over cells of width 2 / 255
    (DDPM, eq. 13).

    The outermost cells reach to infinity. The cumulative distribution is the tanh approximation of
    the released DDPM and DiT code, so that losses agree with theirs.
    """
    centered, inverse_std = x - mean, jnp.exp(-log_std)
    upper = _approximate_normal_cdf(inverse_std * (centered + 1.0 / 255.0))
    lower = _approximate_normal_cdf(inverse_std * (centered - 1.0 / 255.0))
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1.0 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _approximate_normal_cdf(x: Array) -> Array:
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _mean(x: Array) -> Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
