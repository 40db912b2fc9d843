"""DiT-S/2 on 256-pixel ImageNet latents, as in the paper (arXiv 2212.09748).

python launch/train.py --config=configs/dit_s2.py --workdir=runs/dit_s2 \\
    --config.data.latents.path=/data/imagenet256_latents

Published FID-50K after 400K steps (no guidance): 68.4. Not reproduced here: that needs ImageNet.
For 512 pixels: --config.model.image_size=64 and latents of 512-pixel images.
"""

from dit_jax.config import default_config
from dit_jax.models.dit import named_size


def get_config():
    """AdamW at a constant 1e-4 without weight decay, batch 256, EMA 0.9999, 400K steps."""
    config = default_config()
    config.name = "dit_s2"
    config.model.dit.update(named_size("DiT-S/2"))
    config.data.horizontal_flip = True
    config.training.preview_every = 50_000
    return config
