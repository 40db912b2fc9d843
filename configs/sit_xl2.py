"""SiT-XL/2 on 256-pixel ImageNet latents: DiT-XL/2 trained as a rectified flow (arXiv 2401.08740).

python launch/train.py --config=configs/sit_xl2.py --workdir=runs/sit_xl2 \
    --config.data.latents.path=/data/imagenet256_latents

Published FID-50K after 400K steps: 17.2 (Euler-Maruyama, 250 steps); after 7M steps with guidance
1.5: 2.06. Not reproduced here: that needs ImageNet. Sampled here by the ODE with Heun's method.
"""

from dit_jax.config import default_config
from dit_jax.models.dit import named_size


def get_config():
    """The DiT recipe with velocity prediction and uniform times."""
    config = default_config()
    config.name = "sit_xl2"
    config.model.dit.update(named_size("DiT-XL/2"))
    config.process.name = "flow"
    config.data.horizontal_flip = True
    config.training.preview_every = 50_000
    config.sampling.solver = "heun"
    config.sampling.steps = 125
    return config
