"""A truncated consistency model on CIFAR-10, unconditional: the second stage (TCM).

python launch/train.py --config=configs/cifar10_edm_tcm.py --workdir=runs/cifar10_tcm \\
    --config.method.tcm.stage1=runs/cifar10_cm

The first stage is a run of configs/cifar10_edm_cm.py. The hyper-parameters are FastGen's, whose
result is an FID of 2.70 with one step (2.46 in the paper, arXiv 2410.14895). 307 million images;
not run here. Two steps: --config.sampling.steps=2 --config.sampling.times='(80.0, 1.0, 0.0)'.
"""

from dit_jax.config import default_config
from dit_jax.configs import cifar10_edm_cm


def get_config():
    """The first stage's experiment, from t = 1 on, with Student-t times and a smaller rate."""
    config = cifar10_edm_cm.get_config()
    first_stage_images = config.training.num_steps * config.training.batch_size
    config.name = "cifar10_edm_tcm"
    config.timesteps = default_config().timesteps
    config.timesteps.name = "log_student_t"
    config.timesteps.log_student_t.mean = 0.0
    config.timesteps.log_student_t.std = 0.2
    config.timesteps.log_student_t.df = 0.01
    config.timesteps.log_student_t.min_time = 1.0
    config.method = default_config().method
    config.method.name = "tcm"
    config.method.tcm.transition = 1.0
    config.method.tcm.boundary_probability = 0.25
    config.method.tcm.boundary_weight = 0.1
    config.method.tcm.images_before = first_stage_images  # the ratio starts at its limit
    config.method.tcm.min_r = 0.002
    config.method.tcm.stage1_weights = "raw"
    config.optimizer.learning_rate = 5e-5
    config.training.batch_size = 1024
    config.training.num_steps = 300_000
    return config
