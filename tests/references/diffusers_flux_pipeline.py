"""A tiny FLUX pipeline of diffusers: every part random, its tokenizers trained on a few sentences.

Run as a script it writes one: python -m tests.references.diffusers_flux_pipeline FOLDER
"""

import sys
import tempfile
from pathlib import Path

import torch

from dit_jax.interop.autoencoder_kl import config_to_diffusers
from dit_jax.models import AutoencoderKLConfig, FluxConfig
from tests.references import diffusers_autoencoder, diffusers_flux, transformers_text
from tests.tokenizers import write_clip, write_t5

VAE = AutoencoderKLConfig(
    scaling_factor=0.3611,
    shift_factor=0.1159,
    latent_channels=4,
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    sample_size=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


def create(*, guidance=True):
    """The pipeline; without `guidance` it is schnell's kind."""
    import diffusers
    import transformers

    depths = {"depth": 1, "single_depth": 1}
    config = FluxConfig.from_name("flux_tiny", guidance_embedding=guidance, **depths)
    with tempfile.TemporaryDirectory() as folder:
        clip_size = write_clip(Path(folder) / "clip")
        t5_size = write_t5(Path(folder) / "t5")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(Path(folder) / "clip")
        tokenizer_2 = transformers.T5TokenizerFast.from_pretrained(Path(folder) / "t5")
    clip = {
        **transformers_text.CLIP,
        "vocab_size": clip_size,
        "hidden_size": config.pooled_dim,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "num_hidden_layers": 2,
    }
    t5 = {**transformers_text.T5, "vocab_size": t5_size, "d_model": config.text_dim}
    t5["num_layers"] = 2
    vae = {k: v for k, v in config_to_diffusers(VAE).items() if not k.startswith("_")}
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=guidance, shift=3.0 if guidance else 1.0
        ),
        vae=diffusers_autoencoder.randomise(diffusers.AutoencoderKL(**vae).eval(), 0),
        text_encoder=transformers_text.randomise(
            transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip, eos_token_id=2))
        ),
        tokenizer=tokenizer,
        text_encoder_2=transformers_text.randomise(
            transformers.T5EncoderModel(transformers.T5Config(**t5))
        ),
        tokenizer_2=tokenizer_2,
        transformer=diffusers_flux.create_model(config),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def packed(noise):
    """Noise [n, h, w, c] as diffusers takes it."""
    channels_first = torch.tensor(noise).permute(0, 3, 1, 2)
    return diffusers_flux._pack(channels_first)


if __name__ == "__main__":
    create().save_pretrained(sys.argv[1])
