"""Distillation: methods that turn a many-step teacher into a student of one to four steps.

`METHODS` names them for configs, beside those of `dit_jax.experiment`.
"""

from dit_jax import rooms
from dit_jax.distill import consistency, dmd2, f_distill, kd, ladd, mean_flow, scm, tcm

rooms.require_installed_name(__name__)

METHODS = {
    "kd": kd.build,
    "consistency": consistency.build,
    "tcm": tcm.build,
    "scm": scm.build,
    "mean_flow": mean_flow.build,
    "dmd2": dmd2.build,
    "f_distill": f_distill.build,
    "ladd": ladd.build,
}
