"""Networks: f(x, t, conditions) -> raw output. They know nothing of noise, files or meshes."""

from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dit_jax.models.dit import DiT, DiTConfig
from dit_jax.models.network import Network

__all__ = ["AutoencoderKL", "AutoencoderKLConfig", "DiT", "DiTConfig", "Network"]
