"""What every diffusion process is: how data become noise, and how a network's output is read.

A process mixes data and standard normal noise, ``x = alpha(t) x0 + sigma(t) eps``. Everything a
network may be trained to predict is one linear combination ``value = p(t) x0 + q(t) eps``, written
here as its *row* ``(p, q)``:

=========  ======================================================================
x0         (1, 0)
eps        (0, 1)
velocity   (a, s), the process's own convention (see the classes)
score      (0, -1 / sigma), the gradient of the log density of x given x0
raw        what the network itself outputs, preconditioning included
=========  ======================================================================

Two rows, that of the value and ``(alpha, sigma)`` of x, are two equations for the two unknowns x0
and eps. One solve is therefore every conversion there is, including EDM's preconditioning, and none
of them divides by a sigma that vanishes.

Processes are frozen and hashable: use them as static arguments or close over them under
``jax.jit``. Times are float32 arrays, a scalar or one per example. Computation and results are
float32 whatever the network's dtype.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dit_jax.nearest import one_of

KINDS: tuple[str, ...] = ("x0", "eps", "velocity", "score")
Kind = str
"""One of `KINDS`."""

Row = tuple[Float[Array, "..."], Float[Array, "..."]]

# Below this, relative to the lengths of the rows, the value says nothing that x does not already
# say (float32 resolution).
_PARALLEL_ROWS = 1e-7
# Smallest sigma^2, and smallest alpha, that are divided by: ratios stay finite (in float32, also
# squared) at both ends of time.
SMALLEST_VARIANCE = 1e-12
SMALLEST_ALPHA = 1e-12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says about a noisy x, in the two quantities everything else follows from.

    Attributes:
        x0: Predicted clean data, shape of x, float32.
        eps: Predicted noise, shape of x, float32; ``alpha x0 + sigma eps`` is x.
        variance_fraction: Learned-range variance, shape of x: where the log variance of a reverse
            step lies between the posterior variance (0) and beta (1) (Improved DDPM, eq. 15). It is
            not clamped. None where the network predicts no variance.
    """

    x0: Float[Array, "b *shape"]
    eps: Float[Array, "b *shape"]
    variance_fraction: Float[Array, "b *shape"] | None = None


def expand(t: Float[Array, "..."], x: Float[Array, "b *shape"]) -> Float[Array, "..."]:
    """Shapes a scalar or per-example quantity so that it broadcasts against x."""
    t = jnp.asarray(t, jnp.float32)
    if t.ndim == 0:
        return t
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"Expected a scalar or one value per example, shape {x.shape[:1]}, beside an array of "
            f"shape {x.shape}; got shape {t.shape}."
        )
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def _divide(numerator: Array, denominator: Array, where: Array, otherwise: Array) -> Array:
    """numerator / denominator where allowed, with finite gradients everywhere."""
    return jnp.where(where, numerator / jnp.where(where, denominator, 1.0), otherwise)


class Process(abc.ABC):
    """What every process offers; see the module for the conventions.

    Attributes:
        learned_variance: Whether the last half of the network's output channels is a learned-range
            variance.
    """

    learned_variance: bool = False

    # -- what a process defines -------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def clean_time(self) -> float:
        """The time at which x is clean data: alpha 1, sigma 0."""

    @property
    @abc.abstractmethod
    def noise_time(self) -> float:
        """The time of most noise, at which sampling starts."""

    @property
    @abc.abstractmethod
    def prior_scale(self) -> float:
        """Standard deviation of the normal x that sampling starts from at `noise_time`."""

    @abc.abstractmethod
    def alpha(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Scale of the data in x at time t."""

    @abc.abstractmethod
    def sigma(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Standard deviation of the noise in x at time t."""

    @abc.abstractmethod
    def sigma_ratio(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """sigma / alpha: zero for clean data, growing with the noise, finite (at most 1e12)."""

    @abc.abstractmethod
    def time_from_sigma_ratio(self, ratio: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Inverse of `sigma_ratio`; ratios beyond the process's range give its last time."""

    @abc.abstractmethod
    def velocity_row(self, t: Float[Array, "*s"]) -> Row:
        """Row of this process's velocity."""

    @abc.abstractmethod
    def raw_row(self, t: Float[Array, "*s"]) -> Row:
        """Row of what the network outputs (its first channels, where it also predicts a
        variance)."""

    @abc.abstractmethod
    def network_inputs(
        self, x: Float[Array, "b *shape"], t: Float[Array, "..."]
    ) -> tuple[Float[Array, "b *shape"], Float[Array, " b"]]:
        """The (x, time) pair, with one time per example, that the network is to be given."""

    # -- what follows from it ---------------------------------------------------------------------

    def snr(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Signal-to-noise ratio alpha^2 / sigma^2, at most 1e12 (clean data's is infinite)."""
        variance = self.sigma(t) ** 2
        known = variance > SMALLEST_VARIANCE
        return _divide(self.alpha(t) ** 2, variance, known, jnp.full_like(variance, 1e12))

    def row(self, kind: Kind, t: Float[Array, "*s"]) -> Row:
        """The (p, q) with ``value = p x0 + q eps`` for a kind of prediction.

        Raises:
            ValueError: If the kind is none of x0, eps, velocity and score.
        """
        t = jnp.asarray(t, jnp.float32)
        zero, one = jnp.zeros_like(t), jnp.ones_like(t)
        if kind == "x0":
            return one, zero
        if kind == "eps":
            return zero, one
        if kind == "velocity":
            return self.velocity_row(t)
        if kind == "score":
            # The score of clean data is not defined; a zero row marks it as saying nothing.
            sigma = self.sigma(t)
            return zero, _divide(-one, sigma, sigma > 0, zero)
        raise ValueError(f"Unknown prediction kind {kind!r}: {one_of(kind, KINDS)}.")

    def add_noise(
        self, x0: Float[Array, "b *shape"], eps: Float[Array, "b *shape"], t: Float[Array, "..."]
    ) -> Float[Array, "b *shape"]:
        """x at time t: ``alpha(t) x0 + sigma(t) eps``, float32."""
        return self._combine((self.alpha(t), self.sigma(t)), x0, eps)

    def target(
        self, x0: Float[Array, "b *shape"], eps: Float[Array, "b *shape"], t: Float[Array, "..."]
    ) -> Float[Array, "b *shape"]:
        """What the network's raw output should equal. A squared error against it, unweighted, is
        the process's natural loss: for EDM that is the weight lambda(sigma) on the squared error of
        x0 (EDM, eq. 8)."""
        return self._combine(self.raw_row(jnp.asarray(t, jnp.float32)), x0, eps)

    def velocity(
        self, x0: Float[Array, "b *shape"], eps: Float[Array, "b *shape"], t: Float[Array, "..."]
    ) -> Float[Array, "b *shape"]:
        """The velocity, in this process's convention."""
        return self._combine(self.row("velocity", t), x0, eps)

    def score(
        self, eps: Float[Array, "b *shape"], t: Float[Array, "..."]
    ) -> Float[Array, "b *shape"]:
        """The score -eps / sigma of x; zero for clean data, where it is not defined."""
        return expand(self.row("score", t)[1], eps) * jnp.asarray(eps, jnp.float32)

    def solve(
        self,
        value: Float[Array, "b *shape"],
        row: Row,
        x: Float[Array, "b *shape"],
        t: Float[Array, "..."],
    ) -> tuple[Float[Array, "b *shape"], Float[Array, "b *shape"]]:
        """Finds (x0, eps) from ``value = p x0 + q eps`` and ``x = alpha x0 + sigma eps``.

        Where the two rows are parallel (say x0 of clean data, or eps of pure noise) the value adds
        nothing to x, and the smallest (x0, eps) that explains x is returned: finite, with finite
        gradients.
        """
        value, x = jnp.asarray(value, jnp.float32), jnp.asarray(x, jnp.float32)
        p, q = (expand(part, x) for part in row)
        alpha, sigma = expand(self.alpha(t), x), expand(self.sigma(t), x)
        determinant = p * sigma - q * alpha
        length = alpha**2 + sigma**2
        solvable = determinant**2 > _PARALLEL_ROWS**2 * (p**2 + q**2) * length
        x0 = _divide(sigma * value - q * x, determinant, solvable, alpha * x / length)
        eps = _divide(p * x - alpha * value, determinant, solvable, sigma * x / length)
        return x0, eps

    def convert(
        self,
        value: Float[Array, "b *shape"],
        source: Kind,
        to: Kind,
        x: Float[Array, "b *shape"],
        t: Float[Array, "..."],
    ) -> Float[Array, "b *shape"]:
        """Turns a prediction of one kind into another, given the noisy x it is about."""
        x0, eps = self.solve(value, self.row(source, t), x, t)
        return self._combine(self.row(to, t), x0, eps)

    def interpret(
        self, raw: Float[Array, "b *raw"], x: Float[Array, "b *shape"], t: Float[Array, "..."]
    ) -> Prediction:
        """Reads a network's raw output about x at time t.

        Raises:
            ValueError: If the output has not as many channels as the process expects.
        """
        channels = x.shape[-1] * (2 if self.learned_variance else 1)
        if raw.shape != (*x.shape[:-1], channels):
            wanted = "mean and variance" if self.learned_variance else "a mean only"
            raise ValueError(
                f"{type(self).__name__} with learned_variance={self.learned_variance} reads "
                f"{wanted}, shape {(*x.shape[:-1], channels)}, from the network, which returned "
                f"{raw.shape}. The network's learn_sigma and the process's learned_variance must "
                "agree."
            )
        raw, fraction = raw.astype(jnp.float32), None
        if self.learned_variance:
            raw, variance = jnp.split(raw, 2, axis=-1)
            fraction = (variance + 1) / 2
        x0, eps = self.solve(raw, self.raw_row(jnp.asarray(t, jnp.float32)), x, t)
        return Prediction(x0, eps, fraction)

    def ode_coordinates(
        self, t: Float[Array, "*s"]
    ) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
        """(scale, clock) in which the probability flow is integrated: ``d(x / scale) / d(clock)``
        is `ode_derivative`."""
        return self.alpha(t), self.sigma_ratio(t)

    def ode_derivative(self, prediction: Prediction) -> Float[Array, "b *shape"]:
        """Slope of the probability flow in `ode_coordinates`."""
        return prediction.eps

    def start_scale(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Standard deviation of the x that sampling starts from at time t, near `noise_time`."""
        return jnp.full_like(t, self.prior_scale)

    def sample_prior(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
        """Normal noise of standard deviation `prior_scale`, to start sampling from."""
        return self.prior_scale * jax.random.normal(key, shape, jnp.float32)

    def _combine(self, row: Row, x0: Array, eps: Array) -> Array:
        x0, eps = jnp.asarray(x0, jnp.float32), jnp.asarray(eps, jnp.float32)
        return expand(row[0], x0) * x0 + expand(row[1], x0) * eps

    def _network_time(self, t: Array, x: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
