"""diffusers' AutoencoderKL with every parameter random, to compare ours with."""

import diffusers
import jax
import numpy as np
import torch

from dit_jax.interop.autoencoder_kl import config_to_diffusers
from dit_jax.interop.autoencoder_tables import diffusers_table
from dit_jax.interop.parameters import abstract_params
from dit_jax.interop.table import load_params
from dit_jax.interop.tensors import TensorFile, TensorSpec
from dit_jax.models.autoencoder_kl import AutoencoderKL


def create(config, seed=0):
    """The model of one of our configurations."""
    values = {k: v for k, v in config_to_diffusers(config).items() if not k.startswith("_")}
    return randomise(diffusers.AutoencoderKL(**values).eval(), seed)


def randomise(model, seed):
    """Draws all parameters, keeping activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(draw * parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * draw)
            else:
                parameter.copy_(0.2 * draw)
    return model


class StateDict(TensorFile):
    """A state dict in memory as a file of tensors."""

    kind, path, metadata = "pt", "a state dict", {}

    def __init__(self, state):
        self.state = {name: value.numpy() for name, value in state.items()}
        self.specs = {name: TensorSpec(a.shape, a.dtype) for name, a in self.state.items()}

    def _read(self, names):
        return (self.state[name].copy() for name in names)


def ours(config, model):
    """(our autoencoder, the model's parameters)."""
    autoencoder = AutoencoderKL(config)
    shapes = abstract_params(autoencoder)
    params = load_params(diffusers_table(config), shapes, StateDict(model.state_dict()))
    return autoencoder, jax.tree.map(jax.numpy.asarray, params)


def to_torch(images):
    """[b, h, w, c] to [b, c, h, w]."""
    return torch.tensor(np.array(images)).permute(0, 3, 1, 2)


def to_numpy(tensor):
    """[b, c, h, w] to [b, h, w, c]."""
    return tensor.permute(0, 2, 3, 1).numpy()
