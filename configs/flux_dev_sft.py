"""FLUX.1 dev, all parameters trained on: your own pictures with captions, 1024 pixels.

python launch/extract_features.py --data=captioned_folder --path=PICTURES --image_size=1024 \\
    --vae=FLUX.1-dev --text_encoders=FLUX.1-dev --compute_dtype=bfloat16 --out=features
python launch/train.py --config=configs/flux_dev_sft.py --init_from=FLUX.1-dev \\
    --config.data.latents.path=features --config.mesh.fsdp=8

With --config.model.flux.guidance_embedding=False and --init_from=FLUX.1-schnell it is schnell that
is trained. The guidance scale that dev is told while it trains is config.data.guidance.
"""

from dit_jax.configs import flux_dev


def get_config():
    """A low constant rate, times about the middle, a tenth of the captions dropped."""
    config = flux_dev.get_config()
    config.name = "flux_dev_sft"
    config.data.name = "latents"
    config.data.guidance = 1.0
    config.method.label_dropout = 0.1
    config.timesteps.name = "logit_normal"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.gradient_clip_norm = 1.0
    config.ema.decays = (0.999,)
    config.model.remat = "block"
    config.training.batch_size = 32
    config.training.num_steps = 10_000
    config.training.checkpoint_every = 1000
    config.training.preview_every = 0
    return config
