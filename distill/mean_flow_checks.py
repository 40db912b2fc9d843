"""What of a configuration does not fit the Method 'mean_flow'."""

import ml_collections

from dit_jax.config import ConfigError
from dit_jax.diffusion.solvers import SOLVERS
from dit_jax.distill.average_velocity import MeanFlowOptions
from dit_jax.distill.student import require_forward_mode
from dit_jax.nearest import one_of


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses what the method's own objects cannot see, or would ignore.

    Raises:
        ConfigError: with what to set.
    """
    c = config.method.mean_flow
    choices = {
        "velocity": ("data", "teacher"),
        "r_distribution": ("same", "uniform", "logit_normal"),
        "derivative_dtype": ("", "float32", "bfloat16"),
    }
    for key, expected in choices.items():
        if c[key] not in expected:
            raise ConfigError(
                f"config.method.mean_flow.{key}={c[key]!r}: {one_of(c[key], expected)}"
            )
    if len(c.guidance_interval) not in (0, 2):
        raise ConfigError(
            f"config.method.mean_flow.guidance_interval={tuple(c.guidance_interval)}: expected "
            "(low, high) or ()"
        )
    _refuse_unused(config)
    solver = SOLVERS.get(config.sampling.solver)
    if solver is None or not solver.follows_velocity:
        others = [name for name, s in SOLVERS.items() if s.follows_velocity and not s.second_time]
        raise ConfigError(
            f"config.sampling.solver={config.sampling.solver!r} cannot sample average velocities: "
            f"set 'mean_flow' ({' and '.join(map(repr, others))} follow the instantaneous "
            "velocity, in many steps)"
        )
    if c.derivative == "jvp":
        require_forward_mode(config, c.derivative_dtype)


def _refuse_unused(config: ml_collections.ConfigDict) -> None:
    c = config.method.mean_flow
    needs = {
        "r_mean": c.r_distribution == "logit_normal" or "r_distribution='logit_normal'",
        "r_std": c.r_distribution == "logit_normal" or "r_distribution='logit_normal'",
        "finite_difference_step": c.derivative == "finite_difference"
        or "derivative='finite_difference'",
    }
    for key, need in needs.items():
        if need is not True and c[key] != getattr(MeanFlowOptions, key):
            raise ConfigError(
                f"config.method.mean_flow.{key} would do nothing: it needs "
                f"config.method.mean_flow.{need}"
            )
    if c.velocity == "data" and config.teacher.guidance_scale != 1.0:
        raise ConfigError(
            "config.teacher.guidance_scale would do nothing with "
            "config.method.mean_flow.velocity='data': set that to 'teacher', or guide by "
            "config.method.mean_flow.guidance_omega and guidance_kappa"
        )
