"""MeanFlow from scratch on 256-pixel ImageNet latents with DiT-XL/2 (arXiv 2505.13447, table 2).

python launch/train.py --config=configs/dit_xl2_mean_flow.py --workdir=runs/dit_xl2_mean_flow \
    --config.data.latents.path=/data/imagenet256_latents

FastGen's recipe, whose published FID-50K in one step is 3.19 (the paper's 3.43): guidance of scale
0.2 / (1 - 0.92) = 2.5 up to t = 0.75 is learned, so that one evaluation samples with it. Not
reproduced here: that needs ImageNet. The objective of improved MeanFlow (arXiv 2512.02012):

    --config.method.mean_flow.direction=network --config.method.mean_flow.interval_share=0.5
"""

from dit_jax.config import default_config
from dit_jax.models.dit import named_size


def get_config():
    """A rectified flow whose network sees t and t - r, both unscaled."""
    config = default_config()
    config.name = "dit_xl2_mean_flow"
    config.model.dit.update(named_size("DiT-XL/2"))
    config.model.dit.learn_sigma = False
    config.model.second_time = "t-r"
    config.model.custom_gradients = "off"
    config.process.name = "flow"
    config.process.flow.network_convention = "flux"
    config.timesteps.name = "logit_normal"
    config.timesteps.logit_normal.mean = -0.4
    config.method.name = "mean_flow"
    config.method.mean_flow.guidance_omega = 0.2
    config.method.mean_flow.guidance_kappa = 0.92
    config.method.mean_flow.guidance_interval = (0.0, 0.75)
    config.method.mean_flow.weight_constant = 1.0
    config.method.mean_flow.derivative_dtype = "float32"
    config.data.horizontal_flip = True
    config.optimizer.adamw.beta2 = 0.95
    config.ema.decays = (0.9999, 0.99995, 0.9996)
    config.training.batch_size = 1024
    config.training.num_steps = 1_200_000
    config.training.preview_every = 50_000
    config.sampling.solver = "mean_flow"
    config.sampling.steps = 1
    return config
