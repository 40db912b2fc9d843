"""DiT of 7.0 billion parameters on 256-pixel ImageNet latents: the paper's network, made larger.

python launch/plan.py --config=configs/dit_7b.py --devices=256 --hbm_gib=80

python launch/train.py --config=configs/dit_7b.py --workdir=runs/dit_7b \\
    --config.data.latents.path=/data/imagenet256_latents

A block has 18 width^2 weights (4 of attention, 8 of the MLP, 6 of the modulation): 23 blocks of
width 4096 are 6.95e9, all together 7.00e9. The width is a multiple of 256, so that a state divides
over as many devices; heads are of 128 channels, cuDNN's largest. Parameters, their average and both
moments of AdamW are 112 GB in float32. No published result for this size; not trained here: what it
takes is in docs/planning.md.
"""

from dit_jax.config import default_config


def get_config():
    """Width 4096, depth 23, states divided over all devices, blocks recomputed in the backward."""
    config = default_config()
    config.name = "dit_7b"
    config.model.dit.update(hidden_size=4096, depth=23, num_heads=32, patch_size=2)
    config.model.remat = "block"
    config.data.horizontal_flip = True
    config.training.batch_size = 1024
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
