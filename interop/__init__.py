"""PyTorch, diffusers and EDM checkpoints to this library and back."""

from dit_jax import rooms

rooms.require_installed_name(__name__)
