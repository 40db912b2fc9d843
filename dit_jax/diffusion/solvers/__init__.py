"""Solvers: one step of the way from noise to data, by name."""

from dit_jax.diffusion.solvers.ancestral import DDIM, Ancestral
from dit_jax.diffusion.solvers.few_step import Consistency, MeanFlow
from dit_jax.diffusion.solvers.multistep import DPMSolverPP2M
from dit_jax.diffusion.solvers.runge_kutta import Euler, Heun
from dit_jax.diffusion.solvers.solver import Denoise, Solver, Step
from dit_jax.options import register

__all__ = [
    "DDIM",
    "SOLVERS",
    "Ancestral",
    "Consistency",
    "DPMSolverPP2M",
    "Denoise",
    "Euler",
    "Heun",
    "MeanFlow",
    "Solver",
    "Step",
    "register_solver",
]

SOLVERS: dict[str, type[Solver]] = {
    "ddpm": Ancestral,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": DPMSolverPP2M,
    "consistency": Consistency,
    "mean_flow": MeanFlow,
}
"""Solvers by their name in configs; see `register_solver`."""


def register_solver(name: str, solver: type[Solver]) -> None:
    """Makes a solver known under `name`.

    Args:
        name: as config.sampling.solver.
        solver: its fields made by `options.option` are the keys config.sampling.<name>.*.

    Raises:
        ValueError: the name is another solver's.
    """
    if SOLVERS.get(name, solver) is not solver:
        raise ValueError(f"there is a solver {name!r} already")
    register("sampling", name, solver)
    SOLVERS[name] = solver


for _name, _solver in SOLVERS.items():
    register("sampling", _name, _solver)
