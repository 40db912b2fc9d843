"""EDM's class-conditional DDPM++ on CIFAR-10 (arXiv 2206.00364, configuration F with VP's network).

python launch/train.py --config=configs/edm_cifar10.py --workdir=runs/edm_cifar10

The hyper-parameters of the released edm-cifar10-32x32-cond-vp, which has an FID of 1.79 (1.97 for
the unconditional one: --config.model.num_classes=0) with 18 Heun steps, 35 network evaluations.
That is 200 million images, some two days of 8 V100s. Reads a file of JPEGs,
data/cifar10_jpeg_train.npz (see configs/cifar10_dit.py for TFDS). NCSN++ instead of DDPM++:

    --config.model.song_unet.embedding_type=fourier
    --config.model.song_unet.channel_mult_noise=2
    --config.model.song_unet.encoder_type=residual
    --config.model.song_unet.resample_filter='(1, 3, 3, 1)'
"""

from dit_jax.config import default_config

IMAGES = 200_000_000
BATCH = 512
EMA_HALF_LIFE = 500_000  # images


def get_config():
    """Pixel space, 32 x 32 x 3, 10 classes."""
    config = default_config()
    config.name = "edm_cifar10"
    config.model.name = "song_unet"
    config.model.image_size = 32
    config.model.in_channels = 3
    config.model.num_classes = 10
    config.model.augment_dim = 9
    config.model.song_unet.dropout = 0.13
    config.process.name = "edm"
    config.timesteps.name = "log_normal"
    config.method.label_dropout = 0.0
    config.data.name = "jpeg_npz"
    config.data.jpeg_npz.path = "data/cifar10_jpeg_{split}.npz"
    config.augmentation.probability = 0.12
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10_000_000 // BATCH
    # EDM also shortens the half-life to 5 % of the images seen so far, for the first 10 million.
    config.ema.decays = (round(0.5 ** (BATCH / EMA_HALF_LIFE), 8),)
    config.training.batch_size = BATCH
    config.training.num_steps = IMAGES // BATCH
    config.training.preview_every = 10_000
    config.sampling.solver = "heun"
    config.sampling.steps = 18
    config.sampling.batch_size = 256
    config.evaluation.num_images = 50_000
    return config
