"""FLUX.1 schnell: text to images of 1024 pixels in 4 steps (Black Forest Labs, 2024).

python launch/plan.py --config=configs/flux_schnell.py --devices=1 --what=sample \\
    --config.model.param_dtype=bfloat16

The network is told T5's states of up to 256 tokens and CLIP's vector; it was distilled, so that
there is neither guidance nor a shift of times. Published parameters are bfloat16.
"""

from dit_jax.config import default_config
from dit_jax.models.flux_config import PRESETS


def get_config():
    """The published network, sampled one image at a time."""
    config = default_config()
    config.name = "flux_schnell"
    config.model.update(name="flux", image_size=128, in_channels=16, num_classes=0)
    config.model.flux.update(PRESETS["flux_schnell"])
    config.process.name = "flow"
    config.process.flow.update(network_convention="flux", time_scale=1000.0)
    config.method.label_dropout = 0.0
    config.sampling.update(solver="euler", steps=4, batch_size=1, guidance_scale=1.0)
    return config
