"""Networks: (params, request) -> out, features, carry. They know no noise, files or meshes."""

from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dit_jax.models.call import Request, Result
from dit_jax.models.dit import DiT, DiTConfig
from dit_jax.models.edm import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from dit_jax.models.flux import Flux
from dit_jax.models.flux_config import FluxConfig
from dit_jax.models.network import NETWORK_CONFIGS, Network, network_name, register_network

__all__ = [
    "NETWORK_CONFIGS",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "DhariwalUNet",
    "DhariwalUNetConfig",
    "DiT",
    "DiTConfig",
    "Flux",
    "FluxConfig",
    "Network",
    "Request",
    "Result",
    "SongUNet",
    "SongUNetConfig",
    "network_name",
    "register_network",
]
