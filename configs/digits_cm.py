"""Consistency distillation of the digits model into one step: the demo's student.

python launch/train.py --config=configs/digits.py --workdir=runs/digits
python launch/train.py --config=configs/digits_cm.py --workdir=runs/digits_cm
python launch/evaluate.py --workdir=runs/digits_cm

ECT's schedule shortened to a minute on two cores of a CPU: eight stages, the ratio up to 0.99. The
Fréchet distances it reaches are in docs/results. From data instead of the teacher (consistency
training): --config.method.consistency.trajectory=data --config.teacher.guidance_scale=1.
"""

from dit_jax.configs import digits


def get_config():
    """The teacher's network, its guidance included."""
    config = digits.get_config()
    config.name = "digits_cm"
    config.teacher.path = "runs/digits"
    config.teacher.guidance_scale = 1.5
    config.method.name = "consistency"
    config.method.label_dropout = 0.0
    config.method.consistency.trajectory = "teacher"
    config.method.consistency.weighting = "c_out"
    config.method.consistency.huber_constant = 0.06
    config.method.consistency.ratio_limit = 0.99
    config.method.consistency.images_per_stage = 12_000
    config.timesteps.name = "log_normal"
    config.timesteps.log_normal.mean = 0.0
    config.timesteps.log_normal.std = 1.8
    config.optimizer.name = "radam"
    config.optimizer.radam.beta2 = 0.99
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 0
    config.training.num_steps = 1500
    config.training.batch_size = 64
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    config.sampling.guidance_scale = 1.0
    return config
