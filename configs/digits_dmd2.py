"""DMD2 of the digits model into one step: about two minutes on two cores of a CPU.

Fréchet distance of one step 1.66, the teacher's 1.38: docs/results, with the command.

python launch/train.py --config=configs/digits.py --workdir=runs/digits
python launch/train.py --config=configs/digits_dmd2.py --workdir=runs/digits_dmd2
"""

from dit_jax.configs import digits


def get_config():
    """The teacher's network, its guidance, and a discriminator on its features."""
    config = digits.get_config()
    config.name = "digits_dmd2"
    config.teacher.path = "runs/digits"
    config.teacher.guidance_scale = 1.5
    config.method.name = "dmd2"
    config.method.label_dropout = 0.0
    config.method.dmd2.student_update_frequency = 3
    config.method.dmd2.fake_score_learning_rate = 6e-4
    config.method.dmd2.discriminator_learning_rate = 6e-4
    config.method.dmd2.gan_weight = 0.01
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 10
    config.optimizer.schedule = "cosine"
    config.ema.decays = (0.99,)
    config.training.num_steps = 1500
    config.training.batch_size = 64
    config.training.preview_every = 500
    config.training.checkpoint_every = 500
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    config.sampling.guidance_scale = 1.0
    return config
