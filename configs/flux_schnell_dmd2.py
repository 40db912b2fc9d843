"""FLUX.1 dev distilled by DMD2 into four steps, as schnell takes: three networks of 12 billion.

python launch/train.py --config=configs/flux_schnell_dmd2.py --config.teacher.path=FLUX.1-dev \\
    --config.data.latents.path=features --config.mesh.fsdp=-1 --config.mesh.data=1

The student has dev's network and starts from it; it is told the same guidance scale throughout,
config.data.guidance, so that the teacher's guidance is in its weights. With schnell as the teacher,
for fewer steps than its four: --config.model.flux.guidance_embedding=False
--config.data.guidance=1.0 --config.teacher.path=FLUX.1-schnell --config.sampling.steps=1.
The features are those of configs/flux_dev_sft.py. No published result; not trained here.
"""

from dit_jax.configs import flux_dev


def get_config():
    """Distribution matching alone, from noise to the student's own states at each of its steps."""
    config = flux_dev.get_config()
    config.name = "flux_schnell_dmd2"
    config.data.guidance = 3.5
    config.teacher.path = "FLUX.1-dev"
    config.method.name = "dmd2"
    config.method.label_dropout = 0.0
    config.method.dmd2.student_update_frequency = 5
    config.method.dmd2.student_input = "simulation"
    config.method.dmd2.gan_weight = 0.0
    config.timesteps.name = "logit_normal"
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 100
    config.optimizer.gradient_clip_norm = 1.0
    config.ema.decays = (0.99,)
    config.model.remat = "block"
    config.training.batch_size = 64
    config.training.num_steps = 10_000
    config.training.checkpoint_every = 1000
    config.training.preview_every = 0
    config.sampling.steps = 4
    return config
