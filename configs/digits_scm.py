"""The digits model distilled into one step by sCM, its guidance included (sCD).

python launch/train.py --config=configs/digits.py --workdir=runs/digits
python launch/train.py --config=configs/digits_scm.py --workdir=runs/digits_scm
python launch/evaluate.py --workdir=runs/digits_scm

Fréchet distance of one step 1.54, the teacher's 1.38: docs/results, with the command. From data
instead of the teacher (sCT): --config.method.scm.velocity=data --config.teacher.guidance_scale=1.
"""

from dit_jax.configs import digits


def get_config():
    """The teacher's network; TrigFlow with the standard deviation of the digits."""
    config = digits.get_config()
    config.name = "digits_scm"
    config.method.name = "scm"
    config.method.label_dropout = 0.0
    config.method.scm.sigma_data = 0.75
    config.method.scm.tangent_warmup_steps = 100
    # The teacher sees 1000 t: its exact derivative is mostly ripples of the time embedding.
    config.method.scm.derivative = "finite_difference"
    config.method.scm.finite_difference_step = 0.2
    config.teacher.path = "runs/digits"
    config.teacher.guidance_scale = 1.5
    config.timesteps.name = "log_normal"
    config.timesteps.log_normal.mean = 0.0
    config.timesteps.log_normal.std = 1.8
    config.optimizer.name = "radam"
    config.optimizer.radam.beta2 = 0.99
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 0
    config.training.batch_size = 64
    config.training.num_steps = 750
    config.training.preview_every = 250
    config.training.checkpoint_every = 250
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    config.sampling.guidance_scale = 1.0
    return config
