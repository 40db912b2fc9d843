"""Consistency distillation of configs/cifar10_dit.py into one step.

python launch/train.py --config=configs/cifar10_dit.py --workdir=runs/cifar10_dit
python launch/train.py --config=configs/cifar10_dit_cm.py --workdir=runs/cifar10_dit_cm

ECT's schedule (arXiv 2406.14548) in eight stages of 100,000 images. Meant for a GPU; not run to the
end, and no published result to compare with.
"""

from dit_jax.configs import cifar10_dit, digits_cm


def get_config():
    """The method of `digits_cm`, the network and data of `cifar10_dit`."""
    config, method = cifar10_dit.get_config(), digits_cm.get_config()
    config.name = "cifar10_dit_cm"
    for section in ("teacher", "method", "timesteps", "optimizer"):
        config[section] = method[section]
    config.teacher.path = "runs/cifar10_dit"
    config.method.consistency.images_per_stage = 100_000
    config.optimizer.learning_rate = 1e-4
    config.training.num_steps = 8_000
    config.training.batch_size = 128
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    config.sampling.guidance_scale = 1.0
    return config
