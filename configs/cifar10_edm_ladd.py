"""LADD of EDM's CIFAR-10 model into one step.

python launch/train.py --config=configs/cifar10_edm_ladd.py --workdir=runs/cifar10_edm_ladd \\
    --config.teacher.path=edm-cifar10-32x32-cond-vp.pkl

No published result to compare with: FastGen has the method but no figures for CIFAR-10.
"""

from dit_jax.config import default_config
from dit_jax.configs import cifar10_edm_dmd2


def get_config():
    """DMD2's recipe without scores; approximate R1, and times as in EDM's training."""
    config = cifar10_edm_dmd2.get_config()
    config.name = "cifar10_edm_ladd"
    config.method.dmd2.update(default_config().method.dmd2)
    config.method.name = "ladd"
    config.method.ladd.feature_indices = (0, 1, 2)
    config.method.ladd.r1_weight = 100.0
    config.timesteps.name = "log_normal"
    return config
