"""MeanFlow from scratch on CIFAR-10 with EDM's DDPM++, unconditional (arXiv 2505.13447, table 3).

python launch/train.py --config=configs/cifar10_edm_mean_flow.py --workdir=runs/cifar10_mean_flow

FastGen's recipe, whose published FID in one step is 2.82 (the paper's 2.92). Not reproduced here:
that is a million updates of 1024 images. The network sees t and r themselves, without EDM's
preconditioning. Reads a file of JPEGs, data/cifar10_jpeg_train.npz (see configs/cifar10_dit.py for
TFDS). Two steps: --config.sampling.steps=2 at sampling.
"""

from dit_jax.config import default_config

BATCH = 1024
EPOCH = 50_000


def get_config():
    """Pixel space, 32 x 32 x 3, no classes."""
    config = default_config()
    config.name = "cifar10_edm_mean_flow"
    config.model.name = "song_unet"
    config.model.image_size = 32
    config.model.in_channels = 3
    config.model.num_classes = 0
    config.model.augment_dim = 6
    config.model.second_time = "r"
    config.model.custom_gradients = "off"
    config.model.dtype = "float32"
    config.model.song_unet.dropout = 0.2
    config.process.name = "flow"
    config.process.flow.network_convention = "flux"
    config.timesteps.name = "logit_normal"
    config.timesteps.logit_normal.mean = -0.6
    config.timesteps.logit_normal.std = 1.6
    config.method.name = "mean_flow"
    config.method.mean_flow.interval_share = 0.75
    config.method.mean_flow.r_distribution = "logit_normal"
    config.method.mean_flow.r_mean = -4.0
    config.method.mean_flow.r_std = 1.6
    config.method.mean_flow.weight_power = 0.75
    config.method.mean_flow.weight_constant = 1e-3
    config.data.name = "jpeg_npz"
    config.data.jpeg_npz.path = "data/cifar10_jpeg_{split}.npz"
    config.data.horizontal_flip = True
    config.augmentation.probability = 0.12
    config.augmentation.yflip = 0.0
    config.augmentation.rotate_frac = 0.0
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 200 * EPOCH // BATCH
    config.ema.decays = (0.9999, 0.99995, 0.9996)
    config.training.batch_size = BATCH
    config.training.num_steps = 1_000_000
    config.training.preview_every = 10_000
    config.sampling.solver = "mean_flow"
    config.sampling.steps = 1
    config.sampling.batch_size = 256
    config.evaluation.num_images = 50_000
    return config
