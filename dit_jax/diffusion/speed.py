"""SpeeD: train where the process changes (Wang et al., arXiv 2405.17403), as first released and as
in the paper.

Both versions look at increments along the chain of DDPM: where the noise level sqrt(1 - alpha-bar)
hardly grows any more, x is already noise and little is left to learn. Three parts, each with its
own switch:

* asymmetric: draw times of small increments less often;
* weighted: weight the squared error (only that: the released code leaves the variational term as it
  is);
* dual: draw half the batch (n // 2 + 1) and take mirror images for the rest, t' = M - t where t < M
  and t - M elsewhere, M the index after the first that has converged, so that every batch covers
  the times evenly.

For RectifiedFlow and EDM the same algorithm runs on *process increments* (this project's extension,
not the paper's): a grid of quantiles of a base distribution takes the place of the chain, and
increments of the normalised noise level sigma / sqrt(alpha^2 + sigma^2) along it take the place of
those of sqrt(1 - alpha-bar). A drawn cell of the grid gives a time uniformly within the cell. EDM's
log-normal base converges nowhere, as it already avoids the ends: there only weights and duals act.
"""

import abc
import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dit_jax.diffusion.losses import P2
from dit_jax.diffusion.process import DDPM, Process
from dit_jax.diffusion.timesteps import ContinuousDistribution, default_base
from dit_jax.options import option
from dit_jax.ranges import PERIOD, Range

# An increment counts as converged below this fraction of the average increment 1 / N: 1e-4 for
# DDPM's 1000 steps.
_CONVERGED = 0.1


class Increments(NamedTuple):
    """How the process changes along a grid of N times, float64, by central differences (one-sided
    at the ends)."""

    noise: np.ndarray  # of sigma / sqrt(alpha^2 + sigma^2), DDPM's sqrt(1 - alpha-bar)
    variance: np.ndarray  # of its square, DDPM's 1 - alpha-bar
    # First cell, past the fastest one, whose noise increment counts as converged; N if none is.
    converged: int


@functools.lru_cache(maxsize=32)
def increments(process: Process, base: ContinuousDistribution | None, grid_size: int) -> Increments:
    """Tabulates the increments: along DDPM's indices, or along grid_size quantiles of a base
    distribution."""
    if isinstance(process, DDPM):
        variance = 1.0 - process.tables.alphas_cumprod
    else:
        ratio = (base or default_base(process)).sigma_ratio_quantile(
            (np.arange(grid_size) + 0.5) / grid_size
        )
        variance = ratio**2 / (1.0 + ratio**2)
    noise = np.gradient(np.sqrt(variance))
    slow = noise < _CONVERGED / len(noise)
    slow[: np.argmax(noise)] = False  # log-uniform grids also start slowly
    converged = int(np.argmax(slow)) if slow.any() else len(noise)
    return Increments(noise, np.gradient(variance), converged)


@dataclasses.dataclass(frozen=True)
class _IncrementDistribution(abc.ABC):
    """What both versions share: drawing cells of a grid, their duals, and turning cells into
    times."""

    weights_loss: ClassVar[bool] = True

    process: Process
    asymmetric: bool = option(
        True, "draw times by their own distribution, converged ones less often, not evenly"
    )
    weighted: bool = True
    dual: bool = option(True, "the second half of a batch at mirrored times")
    base: ContinuousDistribution | None = None
    grid_size: int = 1000

    def __post_init__(self):
        if self.grid_size < 2:
            raise ValueError(f"SpeeD needs grid_size >= 2, got {self.grid_size}.")
        if self.base is not None and isinstance(self.process, DDPM):
            raise ValueError(
                "SpeeD on DDPM draws indices of the chain: base is for RectifiedFlow and EDM, "
                "leave it None."
            )
        if self.base is not None and self.base.process != self.process:
            raise ValueError(
                f"SpeeD's base is about another process: {self.base.process}, not {self.process}."
            )

    @property
    def increments(self) -> Increments:
        """The table that everything follows from."""
        return increments(self.process, self.base, self.grid_size)

    @property
    def meaningful_steps(self) -> int:
        """M of the duals: the index after the first converged one."""
        return self.increments.converged + 1

    @property
    @abc.abstractmethod
    def _asymmetric_odds(self) -> np.ndarray: ...

    def probabilities(self) -> np.ndarray:
        """Probability of each cell in a single draw, float64, before duals."""
        cells = len(self.increments.noise)
        odds = self._asymmetric_odds if self.asymmetric else np.ones(cells)
        return odds / odds.sum()

    def sample_cells(self, key: PRNGKeyArray, n: int) -> Int[Array, " n"]:
        """Draws n cells: n // 2 + 1 at random, then their duals, cut to n; without duals all n at
        random."""
        cumulative = jnp.asarray(np.cumsum(self.probabilities())[:-1], jnp.float32)
        drawn = n // 2 + 1 if self.dual else n
        cells = jnp.searchsorted(
            cumulative, jax.random.uniform(key, (drawn,)), side="right"
        ).astype(jnp.int32)
        if not self.dual:
            return cells
        middle = self.meaningful_steps
        duals = jnp.where(cells < middle, middle - cells, cells - middle)
        # Only where nothing converges can the mirror image of cell 0 fall off the grid.
        return jnp.concatenate([cells, jnp.minimum(duals, len(self.increments.noise) - 1)])[:n]

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        """Draws n times: indices for DDPM, otherwise uniform (in quantiles of the base) within
        drawn cells."""
        if isinstance(self.process, DDPM):
            return self.sample_cells(key, n).astype(jnp.float32)
        cells_key, within_key = jax.random.split(key)
        cells = self.sample_cells(cells_key, n).astype(jnp.float32)
        base = self.base or default_base(self.process)
        return base.quantile((cells + jax.random.uniform(within_key, (n,))) / self.grid_size)

    def cell(self, t: Float[Array, " n"]) -> Int[Array, " n"]:
        """The cell of the grid that a time lies in."""
        if isinstance(self.process, DDPM):
            index = jnp.round(t)
        else:
            index = jnp.floor((self.base or default_base(self.process)).cdf(t) * self.grid_size)
        return jnp.clip(index, 0, len(self.increments.noise) - 1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class SpeeDFirstRelease(_IncrementDistribution):
    """SpeeD as first released: p(t) proportional to tanh(1e6 (increment - 1e-4)) + 1.5, about 5 :
    1, and P2 weights.

    (The constants are those of 1000 steps; for another number they scale with the average
    increment.)

    Attributes:
        process: The process whose times are drawn.
        base: For RectifiedFlow and EDM, the distribution that the grid is laid on; None is uniform
            and log-normal, respectively.
        grid_size: For these, the number of cells.
        p2_k: k of P2.
        p2_gamma: gamma of P2.
    """

    weighted: bool = option(True, "weight the loss by P2's 1 / (1 + snr)")
    p2_k: float = 1.0
    p2_gamma: float = 1.0

    @property
    def _asymmetric_odds(self) -> np.ndarray:
        noise = self.increments.noise
        return np.tanh(1e3 * len(noise) * (noise - _CONVERGED / len(noise))) + 1.5

    def weight(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        """Weights of the squared error of the network's output."""
        if not self.weighted:
            return jnp.ones_like(t, jnp.float32)
        return P2(self.p2_k, self.p2_gamma)(self.process, t)


@dataclasses.dataclass(frozen=True)
class SpeeD(_IncrementDistribution):
    """SpeeD as in the paper: p(t) proportional to k for t < tau and 1 beyond, and change-aware
    weights.

    The weights are (1 - lam) + (2 lam - 1) minmax(increment of 1 - alpha-bar) for t < tau and 1
    beyond.

    Attributes:
        process: The process whose times are drawn.
        base: For RectifiedFlow and EDM, the distribution that the grid is laid on; None is uniform
            and log-normal, respectively.
        grid_size: For these, the number of cells.
    """

    weighted: bool = option(True, "weight the loss by the process's change, below tau")
    k: float = option(5.0, "how much more often times below tau are drawn", Range(1))
    tau: int = option(
        0,
        "index from which the process counts as converged; 0: 0.7 of DDPM's chain (the paper's 700 "
        "of 1000), elsewhere the first converged cell",
        PERIOD,
    )
    lam: float = option(
        0.6, "the paper's lambda: weights below tau lie in [1 - lam, lam]", Range(0.5, 1)
    )

    def __post_init__(self):
        super().__post_init__()
        cells = self.process.num_timesteps if isinstance(self.process, DDPM) else self.grid_size
        if self.k < 1:
            raise ValueError(
                f"SpeeD needs k >= 1 (times below tau are drawn k times as often), got {self.k}."
            )
        if not 0.5 <= self.lam <= 1:
            raise ValueError(f"SpeeD needs lam in [0.5, 1], got {self.lam}.")
        if not 0 <= self.tau <= cells:
            raise ValueError(
                f"SpeeD needs 0 < tau <= {cells}, the number of cells, got {self.tau}."
            )

    @property
    def converged_from(self) -> int:
        """tau, resolved."""
        if self.tau:
            return self.tau
        if isinstance(self.process, DDPM):
            return round(0.7 * self.process.num_timesteps)
        return self.increments.converged

    @property
    def _asymmetric_odds(self) -> np.ndarray:
        return np.where(np.arange(len(self.increments.noise)) < self.converged_from, self.k, 1.0)

    def weights(self) -> np.ndarray:
        """The change-aware weight of each cell, float64."""
        change = self.increments.variance
        change = (change - change.min()) / (change.max() - change.min())
        weights = (1.0 - self.lam) + (2.0 * self.lam - 1.0) * change
        return np.where(np.arange(len(change)) < self.converged_from, weights, 1.0)

    def weight(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        """Weights of the squared error of the network's output."""
        if not self.weighted:
            return jnp.ones_like(t, jnp.float32)
        return jnp.asarray(self.weights(), jnp.float32)[self.cell(t)]
