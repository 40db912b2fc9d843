"""f-distill (forward Kullback-Leibler) of EDM's CIFAR-10 model into one step.

python launch/train.py --config=configs/cifar10_edm_f_distill.py \\
    --workdir=runs/cifar10_edm_f_distill --config.teacher.path=edm-cifar10-32x32-cond-vp.pkl

FastGen's recipe; its published FID-50K of one step: 1.85. Not reproduced here: that needs GPUs.
"""

from dit_jax.config import default_config
from dit_jax.configs import cifar10_edm_dmd2


def get_config():
    """DMD2's recipe, weighted by the density ratio."""
    config = cifar10_edm_dmd2.get_config()
    config.name = "cifar10_edm_f_distill"
    config.method.name = "f_distill"
    config.method.f_distill.update(config.method.dmd2)
    config.method.dmd2.update(default_config().method.dmd2)
    config.method.f_distill.divergence = "kl"
    return config
