"""A consistency model on CIFAR-10, unconditional, by consistency training from EDM (CM / ECT).

python launch/train.py --config=configs/cifar10_edm_cm.py --workdir=runs/cifar10_cm \\
    --config.teacher.path=SRC

SRC is the diffusion model that the student starts from (edm-cifar10-32x32-uncond-vp); nothing else
is asked of it. The hyper-parameters are FastGen's, whose result is an FID of 2.92 with one step
(3.60 in the ECT paper, arXiv 2406.14548). 179 million images; not run here. Two steps:
--config.sampling.steps=2 --config.sampling.times='(80.0, 0.821, 0.0)'.
Distillation instead of training: --config.method.consistency.trajectory=teacher.
"""

from dit_jax.config import default_config


def get_config():
    """EDM's DDPM++ for 32 x 32 x 3 pixels, ratio up to 0.999 in stages of 6.4 million images."""
    config = default_config()
    config.name = "cifar10_edm_cm"
    config.model.name = "song_unet"
    config.model.image_size = 32
    config.model.in_channels = 3
    config.model.num_classes = 0
    config.model.augment_dim = 9  # the teacher's; the student's images are not augmented
    config.model.song_unet.dropout = 0.2
    config.process.name = "edm"
    config.timesteps.name = "truncated_log_normal"
    config.timesteps.truncated_log_normal.mean = -1.1
    config.timesteps.truncated_log_normal.std = 2.0
    config.method.name = "consistency"
    config.method.consistency.images_per_stage = 6_400_000
    config.method.consistency.min_r = 0.002
    config.data.name = "jpeg_npz"
    config.data.jpeg_npz.path = "data/cifar10_jpeg_{split}.npz"
    config.optimizer.name = "radam"
    config.optimizer.learning_rate = 1e-4
    config.ema.decays = (0.9999, 0.99995, 0.9996)
    config.training.batch_size = 512
    config.training.num_steps = 350_000
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    config.sampling.batch_size = 256
    config.evaluation.num_images = 50_000
    return config
