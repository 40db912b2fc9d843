"""A DiT in EDM's preconditioning on CIFAR-10 pixels: edm_cifar10 with a transformer of 33 million.

python launch/train.py --config=configs/edm_dit_cifar10.py --workdir=runs/edm_dit_cifar10

Patches of 2 x 2 pixels, 256 tokens. Same data, noise levels, augmentation and sampler as
configs/edm_cifar10.py, whose U-Net of 56 million has an FID of 1.79; no published result for this.
"""

from dit_jax.config import default_config
from dit_jax.configs import edm_cifar10
from dit_jax.models.dit import named_size


def get_config():
    """DiT-S/2, trained half as long."""
    config = edm_cifar10.get_config()
    config.name = "edm_dit_cifar10"
    config.model.song_unet.dropout = default_config().model.song_unet.dropout  # DiT has none
    config.model.name = "dit"
    config.model.dit.update(named_size("DiT-S/2"))
    config.model.dit.learn_sigma = False
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 5_000
    config.optimizer.gradient_clip_norm = 1.0
    config.training.num_steps = 200_000
    return config
