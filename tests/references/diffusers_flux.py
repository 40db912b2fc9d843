"""diffusers' `FluxTransformer2DModel` with random parameters, called with our inputs."""

import numpy as np
import torch

from dit_jax.interop import flux


def create_model(config, seed=0):
    """Every parameter random, of a size that keeps signals alive."""
    from diffusers import FluxTransformer2DModel

    values = flux.config_to_diffusers(config)
    values.pop("_class_name")
    model = FluxTransformer2DModel(**values).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if "norm_" in name and parameter.ndim == 1 and "linear" not in name:
                parameter.add_(1.0)  # scales of queries and keys
    return model


def evaluate(model, request):
    """Its output for a `Request`, [b, h, w, c]."""
    x = _channels_first(request.x)
    told = {name: torch.tensor(np.array(value)) for name, value in request.conditions.items()}
    height, width = x.shape[2:]
    tokens, positions = _pack(x), _positions(height, width)
    if "reference" in told:
        reference = _channels_first(request.conditions["reference"])
        tokens = torch.cat([tokens, _pack(reference)], dim=1)
        positions = torch.cat([positions, _positions(*reference.shape[2:], image=1)])
    with torch.no_grad():
        out = model(
            hidden_states=tokens,
            encoder_hidden_states=told["text"],
            pooled_projections=told["pooled"],
            timestep=torch.tensor(np.array(request.t)) / 1000,
            img_ids=positions,
            txt_ids=torch.zeros(told["text"].shape[1], 3),
            guidance=told.get("guidance"),
        ).sample
    return _unpack(out[:, : height * width // 4], height, width).permute(0, 2, 3, 1).numpy()


def _channels_first(x):
    return torch.tensor(np.array(x)).permute(0, 3, 1, 2)


def _pack(x):
    """[b, c, h, w] -> [b, h w / 4, 4 c], a token's latents in the order channel, row, column."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // 2, 2, w // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def _unpack(x, h, w):
    b, _, d = x.shape
    x = x.view(b, h // 2, w // 2, d // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, h, w)


def _positions(h, w, image=0):
    row, column = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    return torch.stack([torch.full_like(row, image), row, column], -1).reshape(-1, 3).float()
