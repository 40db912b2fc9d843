"""sCT on CIFAR-10, unconditional: a consistency model of one or two steps from data alone.

python launch/train.py --config=configs/cifar10_edm_sct.py --workdir=runs/cifar10_edm_sct \\
    --init_from=edm_pkl:edm-cifar10-32x32-uncond-vp.pkl

Starts from EDM's released unconditional DDPM++, which is not followed. FastGen's recipe for sCM
(arXiv 2410.11081), whose published FID is 3.23 in one step (the paper's own 2.85). Not reproduced
here: 350,000 updates of 512 images are days of 8 GPUs. Two steps:

    --config.sampling.steps=2 --config.sampling.times='(80.0, 0.821, 0.0)'
"""

from dit_jax.configs import edm_cifar10


def get_config():
    """EDM's network in TrigFlow; noise levels log-normal around exp(-1)."""
    config = edm_cifar10.get_config()
    config.name = "cifar10_edm_sct"
    config.model.num_classes = 0
    config.model.custom_gradients = "off"
    config.model.attention = "xla"
    config.model.dtype = "float32"
    config.model.song_unet.dropout = 0.2
    config.augmentation.probability = 0.0
    config.method.name = "scm"
    config.method.scm.velocity = "data"
    config.timesteps.log_normal.mean = -1.0
    config.timesteps.log_normal.std = 1.4
    config.optimizer.name = "radam"
    config.optimizer.radam.beta2 = 0.99
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 0
    config.ema.decays = (0.9999, 0.99995, 0.9996)
    config.training.num_steps = 350_000
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    return config
