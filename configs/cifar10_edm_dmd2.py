"""DMD2 of EDM's class-conditional CIFAR-10 model (DDPM++, VP) into one step.

python launch/train.py --config=configs/cifar10_edm_dmd2.py --workdir=runs/cifar10_edm_dmd2 \\
    --config.teacher.path=edm-cifar10-32x32-cond-vp.pkl

FastGen's recipe. Published FID-50K of one step: 2.13 (its table of the paper's), 1.99 (FastGen).
Not reproduced here: that needs GPUs. Meant for several of them, 100K updates of batch 2048.
"""

from dit_jax.config import default_config


def get_config():
    """A discriminator on all three resolutions of the teacher's encoder, AdamW at 1e-4."""
    config = default_config()
    config.name = "cifar10_edm_dmd2"
    config.model.name = "song_unet"
    config.model.image_size = 32
    config.model.in_channels = 3
    config.model.num_classes = 10
    config.model.augment_dim = 9
    config.model.song_unet.dropout = 0.0
    config.process.name = "edm"
    config.timesteps.name = "polynomial"
    config.method.name = "dmd2"
    config.method.label_dropout = 0.0
    config.method.dmd2.fake_score_loss = "x0"
    config.method.dmd2.feature_indices = (0, 1, 2)
    config.data.name = "tfds"
    config.data.tfds.dataset = "cifar10"
    config.data.tfds.resize = "none"
    config.optimizer.weight_decay = 0.01
    config.optimizer.gradient_clip_norm = 10.0
    config.ema.decays = (0.9999, 0.99995, 0.9996)
    config.training.num_steps = 100_000
    config.training.batch_size = 2048
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    config.sampling.batch_size = 256
    config.evaluation.num_images = 50_000
    return config
