"""DiT-XL/2 with SpeeD's sampling and weighting of timesteps (arXiv 2405.17403).

python launch/train.py --config=configs/speed_dit_xl2.py --workdir=runs/speed_dit_xl2 \
    --config.data.latents.path=/data/imagenet256_latents

The paper reports about three times fewer steps to equal FID than uniform times. Not reproduced
here: that needs ImageNet. --config.timesteps.name=speed_first_release is the code's first version;
--config.timesteps.speed.{asymmetric,weighted,dual}=False switches its parts off one by one.
"""

from dit_jax.configs import dit_xl2


def get_config():
    """`dit_xl2` with k = 5, tau = 700, lambda = 0.6 and dual times."""
    config = dit_xl2.get_config()
    config.name = "speed_dit_xl2"
    config.timesteps.name = "speed"
    return config
