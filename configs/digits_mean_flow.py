"""MeanFlow of the digits model into one to four steps: about two minutes on two cores of a CPU.

python launch/train.py --config=configs/digits.py --workdir=runs/digits
python launch/train.py --config=configs/digits_mean_flow.py --workdir=runs/digits_mean_flow

The derivative along the flow is a finite difference: the digits network sees 1000 t, and the exact
derivative of such fast time features is mostly noise. More steps at sampling:
--config.sampling.steps=4. Improved MeanFlow: --config.method.mean_flow.direction=network.
"""

from dit_jax.configs import digits


def get_config():
    """The teacher's network with a second time, and the teacher's guided velocity."""
    config = digits.get_config()
    config.name = "digits_mean_flow"
    config.model.second_time = "t-r"
    config.model.custom_gradients = "off"
    config.teacher.path = "runs/digits"
    config.teacher.guidance_scale = 1.5
    config.method.name = "mean_flow"
    config.method.label_dropout = 0.0
    config.method.mean_flow.velocity = "teacher"
    config.method.mean_flow.interval_share = 0.75
    config.method.mean_flow.weight_power = 0.5
    config.method.mean_flow.derivative = "finite_difference"
    config.method.mean_flow.finite_difference_step = 0.05
    config.optimizer.learning_rate = 5e-4
    config.ema.decays = (0.99,)
    config.training.num_steps = 2000
    config.training.batch_size = 64
    config.sampling.solver = "mean_flow"
    config.sampling.steps = 1
    config.sampling.guidance_scale = 1.0
    return config
