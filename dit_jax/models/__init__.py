"""Networks: f(x, t, conditions) -> raw output. They know nothing of noise, files or meshes."""

from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dit_jax.models.dit import DiT, DiTConfig
from dit_jax.models.edm import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from dit_jax.models.network import Network

NETWORK_CONFIGS = {
    "dit": DiTConfig,
    "song_unet": SongUNetConfig,
    "dhariwal_unet": DhariwalUNetConfig,
}
"""Architectures by their name in configs."""

__all__ = [
    "NETWORK_CONFIGS",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "DhariwalUNet",
    "DhariwalUNetConfig",
    "DiT",
    "DiTConfig",
    "Network",
    "SongUNet",
    "SongUNetConfig",
]
