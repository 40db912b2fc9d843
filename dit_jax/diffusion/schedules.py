"""Sampling schedules: at which times a solver stops. Computed on the host; the times are inputs of
the compiled sampler."""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dit_jax.diffusion.process import DDPM, EDM, Process, RectifiedFlow
from dit_jax.nearest import one_of

SPACINGS: dict[type[Process], tuple[str, ...]] = {
    DDPM: ("iddpm", "ddim", "leading", "trailing", "linspace", "karras"),
    RectifiedFlow: ("uniform",),
    EDM: ("karras",),
}


def schedule(
    process: Process,
    steps: int,
    spacing: str | None = None,
    *,
    shift: float = 1.0,
    rho: float = 7.0,
    offset: int = 0,
) -> np.ndarray:
    """The times that a solver of so many steps visits, from most noise to clean data.

    Spacings of DDPM (the first is the default; all but karras give whole indices, then -1):
        iddpm: evenly from 0 to T - 1, both included, rounded as Improved DDPM and DiT do ("250" of
            1000).
        ddim: 0, k, 2k, ... for a whole k; only for numbers of steps that some k gives.
        leading: 0, k, 2k, ... with k = T // steps, plus `offset` (diffusers' default; Stable
            Diffusion uses offset 1).
        trailing: T - 1 and down by T / steps, rounded.
        linspace: evenly from 0 to T - 1, rounded to even.
        karras: as for EDM, between the sigma / alpha of indices 0 and T - 1; real-valued indices.
    Spacing of RectifiedFlow:
        uniform: evenly from 1 to 0, then shifted to t' = shift t / (1 + (shift - 1) t) (SD3, eq.
            23).
    Spacing of EDM:
        karras: sigma^(1 / rho) evenly from sigma_max to sigma_min, then 0 (EDM, eq. 5); for iDDPM's
            preconditioning each rounded to the nearest noise level of its table.

    Args:
        process: The process whose times these are.
        steps: Number of solver steps.
        spacing: One of the above; None is the process's first.
        shift: RectifiedFlow only; above 1 spends more steps on noise.
        rho: karras only.
        offset: leading only.

    Returns:
        float32 [steps + 1], the last entry the process's clean time.

    Raises:
        ValueError: If the steps do not fit the process, or the spacing is not one of its spacings.
    """
    allowed = SPACINGS[type(process)]
    spacing = allowed[0] if spacing is None else spacing
    if spacing not in allowed:
        raise ValueError(
            f"{type(process).__name__} has no spacing {spacing!r}: {one_of(spacing, allowed)}"
        )
    if steps < 1:
        raise ValueError(f"A schedule needs at least one step, got steps={steps}.")
    for name, value, default, used in (
        ("shift", shift, 1.0, spacing == "uniform"),
        ("rho", rho, 7.0, spacing == "karras"),
        ("offset", offset, 0, spacing == "leading"),
    ):
        if value != default and not used:
            raise ValueError(
                f"{name}={value} has no meaning for {type(process).__name__}'s spacing {spacing!r}."
            )
    if shift <= 0 or rho <= 0:
        raise ValueError(
            f"A schedule needs shift > 0 and rho > 0, got shift={shift} and rho={rho}."
        )

    if spacing == "uniform":
        t = np.linspace(1.0, 0.0, steps + 1)[:-1]
        times = shift * t / (1.0 + (shift - 1.0) * t)
    elif isinstance(process, EDM):
        sigmas = _karras(process.sigma_min, process.sigma_max, steps, rho)
        times = np.asarray(process.time_from_sigma_ratio(jnp.asarray(sigmas, jnp.float32)))
    elif spacing == "karras":
        log_ratio = process.tables.log_sigma_ratio
        ratios = _karras(math.exp(log_ratio[0]), math.exp(log_ratio[-1]), steps, rho)
        times = np.interp(np.log(ratios), log_ratio, np.arange(process.num_timesteps))
    else:
        times = _ddpm_indices(process.num_timesteps, steps, spacing, offset)[::-1]
    return np.append(times, process.clean_time).astype(np.float32)


def insert_times(
    times: Float[np.ndarray, " n"], wanted: Sequence[float]
) -> tuple[Float[np.ndarray, " m"], tuple[int, ...]]:
    """A schedule that also stops at `wanted` times.

    Args:
        times: Of `schedule`.
        wanted: Further times, or some of these (equal up to 1e-4 relative), in any order.

    Returns:
        The times with those that they lacked, and where the wanted ones stand among them, from
        noise to clean.

    Raises:
        ValueError: If a wanted time does not lie between the first and the last.
    """
    times = np.asarray(times, np.float32)
    for time in wanted:
        if not times[-1] < time < times[0]:
            raise ValueError(
                f"time {time:g} does not lie between {times[0]:g}, where the schedule begins, and "
                f"{times[-1]:g}, where it ends."
            )
        if not np.isclose(times, time, rtol=1e-4, atol=1e-6).any():
            times = np.sort(np.append(times, np.float32(time)))[::-1]
    places = {int(np.argmin(np.abs(times - time))) for time in wanted}
    return times, tuple(sorted(places))


def _karras(smallest: float, largest: float, steps: int, rho: float) -> np.ndarray:
    fraction = np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    return (high + fraction * (low - high)) ** rho


def _ddpm_indices(total: int, steps: int, spacing: str, offset: int) -> np.ndarray:
    """Ascending indices of the full chain that a respaced one keeps."""
    if steps > total:
        raise ValueError(
            f"DDPM was built with {total} timesteps, and a schedule cannot visit {steps} of them: "
            f"use steps <= {total}."
        )
    if spacing in ("iddpm", "linspace") and steps == 1:
        raise ValueError(
            f"Spacing {spacing!r} with one step would visit only index 0, where there is no noise: "
            "use 'trailing'."
        )
    if spacing == "iddpm":
        stride = (total - 1) / (steps - 1)
        # Accumulated, not multiplied, so that ties round as in the original.
        return np.array(
            [
                round(position)
                for position in itertools.accumulate([stride] * (steps - 1), initial=0.0)
            ]
        )
    if spacing == "ddim":
        counts = {len(range(0, total, stride)): stride for stride in range(total, 0, -1)}
        if steps not in counts:
            nearest = sorted(sorted(counts, key=lambda count: abs(count - steps))[:2])
            raise ValueError(
                f"Spacing 'ddim' has no whole stride that visits {steps} of {total} timesteps: the "
                f"nearest that fit are {' and '.join(map(str, nearest))} steps; or use another "
                "spacing."
            )
        return np.arange(0, total, counts[steps])
    if spacing == "leading":
        indices = np.arange(steps) * (total // steps) + offset
        if offset < 0 or indices[-1] >= total:
            raise ValueError(
                f"offset={offset} moves indices out of 0..{total - 1} for {steps} steps: use a "
                "smaller offset."
            )
        return indices
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps))[:steps][::-1] - 1
    return np.round(np.linspace(0, total - 1, steps))


def shift_of_tokens(tokens: int, points: tuple[float, ...]) -> float:
    """RectifiedFlow's shift for inputs of so many tokens, the exponential of a straight line.

    More tokens tell more of an image through the same noise, so that larger images need more of it:
    Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206), section 5.3.2; FLUX.1's
    line is (256, 0.5, 4096, 1.15).

    Args:
        tokens: Of the image.
        points: (tokens, log shift, other tokens, their log shift).

    Raises:
        ValueError: The points are no two points of a line, or the shift is no finite number.
    """
    if len(points) != 4 or points[0] == points[2]:
        raise ValueError(
            f"shift_by_tokens={points}: expected (tokens, log of the shift, other tokens, log of "
            "their shift), such as (256, 0.5, 4096, 1.15)"
        )
    first, low, second, high = points
    log_shift = low + (tokens - first) * (high - low) / (second - first)
    if not abs(log_shift) < 700:
        raise ValueError(
            f"inputs of {tokens:,} tokens: the shift of times, exp({log_shift:.4g}), is out of "
            "range. Choose smaller images"
        )
    return math.exp(log_shift)
