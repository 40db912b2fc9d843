"""PyTorch, diffusers and EDM checkpoints to this library and back."""
