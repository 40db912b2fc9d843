"""A DiT-S/2 on CIFAR-10 pixels, class-conditional rectified flow.

python launch/train.py --config=configs/cifar10_dit.py --workdir=runs/cifar10_dit

Reads TFDS's cifar10 (prepared beforehand; the error says how), or a file of JPEGs a split:
--config.data.name=jpeg_npz --config.data.jpeg_npz.path='data/cifar10_jpeg_{split}.npz'.
Meant for a GPU; no published result to compare with.
"""

from dit_jax.config import default_config
from dit_jax.models.dit import named_size


def get_config():
    """Pixel space, 32 x 32 x 3, logit-normal times, guidance 1.5 at sampling."""
    config = default_config()
    config.name = "cifar10_dit"
    config.model.dit.update(named_size("DiT-S/2"))
    config.model.in_channels = 3
    config.model.num_classes = 10
    config.model.dit.learn_sigma = False
    config.process.name = "flow"
    config.timesteps.name = "logit_normal"
    config.data.name = "tfds"
    config.data.tfds.dataset = "cifar10"
    config.data.tfds.resize = "none"
    config.data.horizontal_flip = True
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.gradient_clip_norm = 1.0
    config.training.num_steps = 200_000
    config.training.preview_every = 10_000
    config.sampling.solver = "heun"
    config.sampling.steps = 25
    config.sampling.guidance_scale = 1.5
    config.sampling.batch_size = 256
    config.evaluation.num_images = 10_000
    return config
