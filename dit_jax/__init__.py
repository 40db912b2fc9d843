"""Diffusion transformers in JAX: networks, diffusion mathematics, data, training, evaluation."""

from dit_jax import rooms

__version__ = "0.1.0"

rooms.find_in_checkout()
