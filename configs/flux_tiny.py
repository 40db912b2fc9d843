"""A FLUX of 120,000 parameters on latents and text states computed ahead: to try things on a CPU.

python launch/train.py --config=configs/flux_tiny.py --workdir=runs/flux_tiny \\
    --config.data.latents.path=FOLDER

The records in the folder (docs/data.md) hold latents of 4 channels and, as conditions, `text`
[tokens, 16] and `pooled` [12], with null values of both. All that the published networks have is
there but the guidance embedding, which imitates a teacher that this one has not.
"""

from dit_jax.config import default_config
from dit_jax.models.flux_config import PRESETS


def get_config():
    """Rectified flow with times drawn towards the middle, as FLUX and SD3 are trained."""
    config = default_config()
    config.name = "flux_tiny"
    preset = dict(PRESETS["flux_tiny"])
    shared = {key: preset.pop(key) for key in ("image_size", "in_channels")}
    config.model.update(name="flux", num_classes=0, **shared)
    config.model.flux.update(preset)
    config.process.name = "flow"
    config.process.flow.update(network_convention="flux", time_scale=1000.0)
    config.timesteps.name = "logit_normal"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.ema.decays = (0.99,)
    config.training.num_steps = 1000
    config.training.batch_size = 32
    config.sampling.update(solver="euler", steps=8, guidance_scale=1.0, batch_size=32)
    return config
