"""Knowledge distillation of the digits model into one step, from pairs written beforehand.

python launch/train.py --config=configs/digits.py --workdir=runs/digits
python launch/write_pairs.py --workdir=runs/digits --num_pairs=20000 --solver=heun --steps=18 \\
    --out=pairs/digits
python launch/train.py --config=configs/digits_kd.py --workdir=runs/digits_kd

For two steps write the pairs with --path_times 0.5 and train with --config.sampling.steps=2.
"""

from dit_jax.configs import digits


def get_config():
    """The teacher's network and recipe on its pairs; guidance is in the pairs."""
    config = digits.get_config()
    config.name = "digits_kd"
    config.method.name = "kd"
    # A dropped label would teach the null class what guidance made of all the others.
    config.method.label_dropout = 0.0
    config.teacher.path = "runs/digits"
    config.data.name = "pairs"
    config.data.pairs.path = "pairs/digits"
    config.training.num_steps = 4000
    config.training.preview_every = 1000
    config.training.checkpoint_every = 1000
    config.sampling.solver = "consistency"
    config.sampling.steps = 1
    config.sampling.guidance_scale = 1.0
    return config
