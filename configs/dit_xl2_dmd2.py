"""DMD2 of DiT-XL/2 (256-pixel ImageNet latents) into four steps.

python launch/train.py --config=configs/dit_xl2_dmd2.py --workdir=runs/dit_xl2_dmd2 \\
    --config.teacher.path=DiT-XL-2-256x256.pt --config.data.latents.path=/data/imagenet256_latents

The paper's recipe for several steps: inputs by backward simulation, ten updates a round, features
of the fake score. No published result for this network; not run here: that needs GPUs.
"""

from dit_jax.configs import dit_xl2


def get_config():
    """Times 999, 749, 499, 249, guidance 1.5 in the teacher, learning rate 1e-5."""
    config = dit_xl2.get_config()
    config.name = "dit_xl2_dmd2"
    config.method.name = "dmd2"
    config.method.label_dropout = 0.0
    config.method.dmd2.student_update_frequency = 10
    config.method.dmd2.student_input = "simulation"
    config.method.dmd2.features_of = "fake_score"
    config.method.dmd2.gan_weight = 0.003
    config.method.dmd2.gan_critic_weight = 0.01
    config.teacher.guidance_scale = 1.5
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.01
    config.optimizer.gradient_clip_norm = 10.0
    config.optimizer.warmup_steps = 100
    config.training.num_steps = 100_000
    config.sampling.solver = "consistency"
    config.sampling.steps = 4
    config.sampling.times = (999.0, 749.0, 499.0, 249.0, -1.0)
    return config
