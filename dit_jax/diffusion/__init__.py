"""The mathematics of diffusion: processes, training distributions, losses, samplers and guidance.
Knows nothing of networks."""

from dit_jax.diffusion.guidance import guided
from dit_jax.diffusion.losses import P2, MinSNR, NoWeight, denoising_loss
from dit_jax.diffusion.process import DDPM, EDM, Prediction, Process, RectifiedFlow
from dit_jax.diffusion.samplers import SOLVERS, SPACINGS, Solver, make_solver, sample, schedule
from dit_jax.diffusion.speed import SpeeD, SpeeDFirstRelease
from dit_jax.diffusion.timesteps import (
    LogitNormal,
    LogNormal,
    LogStudentT,
    Polynomial,
    TimeDistribution,
    TruncatedLogNormal,
    Uniform,
)

PROCESSES = {"ddpm": DDPM, "flow": RectifiedFlow, "edm": EDM}
"""Processes by name, for configs."""

TIME_DISTRIBUTIONS = {
    "uniform": Uniform,
    "log_normal": LogNormal,
    "logit_normal": LogitNormal,
    "truncated_log_normal": TruncatedLogNormal,
    "log_student_t": LogStudentT,
    "polynomial": Polynomial,
    "speed_first_release": SpeeDFirstRelease,
    "speed": SpeeD,
}
"""Training distributions by name, each built as ``cls(process, **options)``."""

LOSS_WEIGHTS = {"none": NoWeight, "p2": P2, "min_snr": MinSNR}
"""Weightings of the squared error by name, each called as ``weight(process, t)``."""

__all__ = [
    "DDPM",
    "EDM",
    "LOSS_WEIGHTS",
    "P2",
    "PROCESSES",
    "SOLVERS",
    "SPACINGS",
    "TIME_DISTRIBUTIONS",
    "LogNormal",
    "LogStudentT",
    "LogitNormal",
    "MinSNR",
    "NoWeight",
    "Polynomial",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Solver",
    "SpeeD",
    "SpeeDFirstRelease",
    "TimeDistribution",
    "TruncatedLogNormal",
    "Uniform",
    "denoising_loss",
    "guided",
    "make_solver",
    "sample",
    "schedule",
]
