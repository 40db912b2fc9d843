"""sCD on CIFAR-10, unconditional: EDM's DDPM++ distilled into one or two steps.

python launch/train.py --config=configs/cifar10_edm_scd.py --workdir=runs/cifar10_edm_scd \\
    --config.teacher.path=edm_pkl:edm-cifar10-32x32-uncond-vp.pkl

The student follows the teacher's flow in continuous time. FastGen's recipe for sCM
(arXiv 2410.11081), whose published FID is 3.22 in one step (the paper's own 3.66). Not reproduced
here: 500,000 updates of 512 images are days of 8 GPUs. Two steps:

    --config.sampling.steps=2 --config.sampling.times='(80.0, 0.821, 0.0)'
"""

from dit_jax.configs import cifar10_edm_sct


def get_config():
    """As sCT, with a teacher instead of dropout."""
    config = cifar10_edm_sct.get_config()
    config.name = "cifar10_edm_scd"
    config.method.scm.velocity = "teacher"
    config.model.song_unet.dropout = 0.0
    config.training.num_steps = 500_000
    return config
