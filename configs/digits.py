"""A small class-conditional DiT on scikit-learn's 8x8 digits: the demo, a few minutes on a CPU.

python launch/train.py --config=configs/digits.py --workdir=runs/digits
"""

from dit_jax.config import default_config


def get_config():
    """Rectified flow in pixel space, width 96, depth 4."""
    config = default_config()
    config.name = "digits"
    config.data.name = "digits"
    config.model.image_size = 8
    config.model.in_channels = 1
    config.model.dit.patch_size = 2
    config.model.dit.hidden_size = 96
    config.model.dit.depth = 4
    config.model.dit.num_heads = 4
    config.model.num_classes = 10
    config.model.dit.learn_sigma = False
    # The conventions of diffusers, so that what is trained can be exported to it exactly.
    config.model.dit.time_frequency_spacing = "diffusers"
    config.process.name = "flow"
    config.process.flow.network_convention = "flux"
    config.process.flow.time_scale = 1000.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.gradient_clip_norm = 1.0
    config.optimizer.schedule = "cosine"
    config.ema.decays = (0.995,)
    config.training.num_steps = 1500
    config.training.batch_size = 128
    config.training.preview_every = 500
    config.training.checkpoint_every = 500
    config.sampling.solver = "heun"
    config.sampling.steps = 25
    config.sampling.guidance_scale = 1.5
    config.sampling.batch_size = 256
    return config
