"""A LoRA of FLUX.1 dev on your own pictures with captions: the 12 billion stay as they are.

python launch/extract_features.py --data=captioned_folder --path=PICTURES --image_size=1024 \\
    --vae=FLUX.1-dev --text_encoders=FLUX.1-dev --compute_dtype=bfloat16 --out=features
python launch/train.py --config=configs/flux_dev_lora.py --workdir=runs/style \\
    --config.lora.base=FLUX.1-dev --config.data.latents.path=features
python launch/convert.py --to=lora runs/style style.safetensors

What it writes loads by diffusers' FluxPipeline.load_lora_weights and by launch/sample.py --lora.
"""

from dit_jax.configs import flux_dev_sft


def get_config():
    """Rank 16 in all blocks, the base in bfloat16, a rate that factors take."""
    config = flux_dev_sft.get_config()
    config.name = "flux_dev_lora"
    config.model.param_dtype = "bfloat16"
    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.lora.layers = r"(double|single)_blocks\..*(qkv|proj|fc1|fc2|linear1|linear2)"
    config.optimizer.learning_rate = 1e-4
    config.training.batch_size = 4
    config.training.num_steps = 2000
    config.training.checkpoint_every = 500
    return config
