"""EDM's class-conditional ADM on ImageNet at 64 x 64 (arXiv 2206.00364, table 7).

python launch/train.py --config=configs/edm_imagenet64.py --workdir=runs/edm_imagenet64 \
    --config.data.image_folder.path=imagenet

The hyper-parameters of the released edm-imagenet-64x64-cond-adm: an FID of 1.36 (the least of
three times 50,000 samples) with 256 Heun steps, 511 network evaluations, and
--config.sampling.heun.s_churn=40 --config.sampling.heun.s_min=0.05 --config.sampling.heun.s_max=50
--config.sampling.heun.s_noise=1.003. That is 2.5 billion images, about two weeks of 32 A100s. The
folder has one subfolder a class; images are scaled and centre-cropped to 64 pixels.
"""

from dit_jax.config import default_config

IMAGES = 2_500_000_000
BATCH = 4096
EMA_HALF_LIFE = 50_000_000  # images


def get_config():
    """Pixel space, 64 x 64 x 3, 1000 classes; neither augmentation nor mirrored images."""
    config = default_config()
    config.name = "edm_imagenet64"
    config.model.name = "dhariwal_unet"
    config.model.image_size = 64
    config.model.in_channels = 3
    config.model.num_classes = 1000
    config.process.name = "edm"
    config.timesteps.name = "log_normal"
    config.method.label_dropout = 0.0
    config.data.name = "image_folder"
    config.data.num_workers = 16
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000_000 // BATCH
    config.ema.decays = (round(0.5 ** (BATCH / EMA_HALF_LIFE), 8),)
    config.training.batch_size = BATCH
    config.training.num_steps = IMAGES // BATCH
    config.training.preview_every = 10_000
    config.sampling.solver = "heun"
    config.sampling.steps = 256
    config.sampling.batch_size = 256
    config.evaluation.num_images = 50_000
    return config
