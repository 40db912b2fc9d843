"""Diffusion transformers in JAX: networks, diffusion mathematics, data, training, evaluation."""

__version__ = "0.1.0"
