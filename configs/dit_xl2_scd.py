"""sCD of a DiT-XL/2 on 256-pixel ImageNet latents, its guidance included, into one or two steps.

python launch/train.py --config=configs/dit_xl2_scd.py --workdir=runs/dit_xl2_scd \\
    --config.teacher.path=SiT-XL-2-256.pt --config.data.latents.path=/data/imagenet256_latents

The teacher is a SiT-XL/2, DiT-XL/2 trained as a rectified flow: a DDPM that predicts eps divides by
alpha = 0.006 at its noisiest index, and a consistency model of it starts from noise multiplied by
158. No published result for this network; FastGen's recipe on ImageNet at 64 pixels (learning rate
7e-5, log-normal times, derivatives in float32 beside a network in bfloat16) with the latents'
standard deviation. Meant for GPUs; runs over their memory are shortened by config.model.remat and
config.training.num_microbatches. Two steps: --config.sampling.steps=2.
"""

from dit_jax.configs import sit_xl2


def get_config():
    """SiT's network and process; the student sees classes only, the teacher's guidance is 1.5."""
    config = sit_xl2.get_config()
    config.name = "dit_xl2_scd"
    config.model.custom_gradients = "off"
    config.model.attention = "xla"
    config.model.dtype = "bfloat16"
    config.model.remat = "block"
    config.teacher.guidance_scale = 1.5
    config.method.name = "scm"
    config.method.label_dropout = 0.0
    config.method.scm.sigma_data = 1.0
    config.method.scm.derivative_dtype = "float32"
    config.timesteps.name = "log_normal"
    config.timesteps.log_normal.mean = -0.3
    config.timesteps.log_normal.std = 1.6
    config.optimizer.adamw.beta2 = 0.99
    config.optimizer.adamw.epsilon = 1e-11
    config.optimizer.learning_rate = 7e-5
    config.optimizer.gradient_clip_norm = 10.0
    config.ema.decays = (0.9999, 0.99995, 0.9996)
    config.training.num_steps = 100_000
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    return config
