"""Distillation: methods that turn a many-step teacher into a student of one to four steps.

Importing it makes them known to `dit_jax.experiment`.
"""

from dit_jax import rooms
from dit_jax.distill import consistency, dmd2, f_distill, kd, ladd, mean_flow, scm, tcm
from dit_jax.experiment import register_method

rooms.require_installed_name(__name__)

__all__ = ["consistency", "dmd2", "f_distill", "kd", "ladd", "mean_flow", "scm", "tcm"]

register_method("kd", kd.build, kd.KDOptions, reads=(), scheduled=True)
register_method("consistency", consistency.build, consistency.ConsistencyOptions)
register_method("tcm", tcm.build, tcm.TCMOptions)
register_method("scm", scm.build, scm.SCMOptions)
register_method(
    "mean_flow",
    mean_flow.build,
    mean_flow.MeanFlowOptions,
    reads=("timesteps", "augmentation", "second_time"),
)
# Their fake score is a denoiser, and has its loss.
for _name, _module, _options in (
    ("dmd2", dmd2, dmd2.DMD2Options),
    ("f_distill", f_distill, f_distill.FDistillOptions),
):
    register_method(_name, _module.build, _options, reads=("timesteps", "loss"), scheduled=True)
register_method("ladd", ladd.build, ladd.LADDOptions, scheduled=True)
