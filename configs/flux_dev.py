"""FLUX.1 dev: text to images of 1024 pixels in 28 steps (Black Forest Labs, 2024).

python launch/plan.py --config=configs/flux_dev.py --devices=4 --what=sample \\
    --config.model.param_dtype=bfloat16 --parallel=displaced --patch_devices=4

The network is told T5's states of up to 512 tokens, CLIP's vector, and the guidance scale that it
imitates: one evaluation a step. Times are shifted towards noise by the image's size.
"""

from dit_jax.configs import flux_schnell
from dit_jax.models.flux_config import PRESETS


def get_config():
    """schnell's, with the guidance embedding and times of its own."""
    config = flux_schnell.get_config()
    config.name = "flux_dev"
    config.model.flux.update(text_length=512, **PRESETS["flux_dev"])
    config.sampling.update(steps=28, shift_by_tokens=(256.0, 0.5, 4096.0, 1.15))
    return config
