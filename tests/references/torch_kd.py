"""Knowledge distillation in PyTorch: the loss as published, and a small network for it."""

import torch


def mlp(params, x, t, label, num_classes):
    """`tests.distill.mixture.MlpNetwork` without a second time, on points [n, 2]."""
    angles = t[:, None] * 2.0 ** torch.arange(-3, 5)
    hidden = torch.cat([x, torch.sin(angles), torch.cos(angles)], -1)
    if num_classes:
        hidden = torch.cat([hidden, torch.nn.functional.one_hot(label, num_classes)], -1)
    for i in range(len(params) - 1):
        layer = params[f"layer{i}"]
        hidden = torch.nn.functional.silu(hidden @ layer["kernel"] + layer["bias"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


def denoise_edm(params, x, sigma, label, num_classes, sigma_data=0.5):
    """D(x; sigma) of EDM, eq. 7 and table 1."""
    total = sigma**2 + sigma_data**2
    skip, out = sigma_data**2 / total, sigma * sigma_data / total.sqrt()
    scaled = x / total.sqrt()[:, None]
    answer = mlp(params, scaled, sigma.log() / 4, label, num_classes)
    return skip[:, None] * x + out[:, None] * answer


def denoise_flow(params, x, t, label, num_classes):
    """x0 of a network of velocities eps - x0."""
    return x - t[:, None] * mlp(params, x, t, label, num_classes)


def half_mean_square(student, teacher):
    """The loss of FastGen's KD."""
    return 0.5 * torch.nn.functional.mse_loss(student, teacher)


def pseudo_huber(student, teacher, c):
    """The metric of improved consistency training, eq. 7, mean over examples."""
    return ((student - teacher).pow(2).sum(-1) + c**2).sqrt().sub(c).mean()
