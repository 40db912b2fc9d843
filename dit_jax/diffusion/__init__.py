"""The mathematics of diffusion: processes, training distributions, losses, samplers and guidance.
Knows nothing of networks."""

from dit_jax.diffusion.guidance import guided
from dit_jax.diffusion.losses import P2, LossOptions, MinSNR, NoWeight, denoising_loss
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
from dit_jax.options import register, register_section

PROCESSES = {"ddpm": DDPM, "flow": RectifiedFlow, "edm": EDM}
"""Processes by name, for configs."""

TIME_DISTRIBUTIONS = {
    "uniform": Uniform,
    "log_normal": LogNormal,
    "logit_normal": LogitNormal,
    "truncated_log_normal": TruncatedLogNormal,
    "log_student_t": LogStudentT,
    "polynomial": Polynomial,
    "speed": SpeeD,
    "speed_first_release": SpeeDFirstRelease,
}
"""Training distributions by name, each built as ``cls(process, **options)``."""

LOSS_WEIGHTS = {"none": NoWeight, "p2": P2, "min_snr": MinSNR}
"""Weightings of the squared error by name, each called as ``weight(process, t)``."""

register_section("process", chosen_by="name", chosen="ddpm")
register_section("timesteps", chosen_by="name", chosen="uniform")
register_section("loss", LossOptions, "weighting", "none")
for _name, _process in PROCESSES.items():
    register("process", _name, _process)
for _name, _distribution in TIME_DISTRIBUTIONS.items():
    register("timesteps", _name, _distribution, weights_loss=_distribution.weights_loss)
for _name, _weight in LOSS_WEIGHTS.items():
    register("loss", _name, _weight)

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
