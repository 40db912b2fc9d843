"""The losses of DMD2, f-distill and LADD written from the papers' equations, in PyTorch.

Images are [b, c, h, w]. Networks are given as functions of (x, t); everything random is given.
"""

import torch
import torch.nn.functional as F
from torch import nn


def renoise(x0, eps, t):
    """EDM: x0 + t eps."""
    return x0 + t.view(-1, 1, 1, 1) * eps


def matching_gradient(x0, real_x0, fake_x0):
    """Gradient of the reverse KL by generated data up to a constant (DMD2, equations 2 and 8)."""
    difference = (x0 - real_x0).abs().flatten(1).mean(1)
    return (fake_x0 - real_x0) / (difference + 1e-6).view(-1, 1, 1, 1)


def student_loss(x0, real, fake, classify, t, eps, *, gan_weight, weights=None):
    """Loss of a student whose matching part has `matching_gradient` as its derivative by x0.

    Args:
        x0: what it generated, with gradients.
        real: (x, t) -> (x0, features) of the teacher.
        fake: (x, t) -> x0 of the fake score.
        classify: features -> logits [b, heads].
        t: times of renoising.
        eps: its noise.
        gan_weight: of the GAN loss.
        weights: logits -> a weight of every example's gradient (f-distill).
    """
    x_t = renoise(x0, eps, t)
    real_x0, features = real(x_t, t)
    logits = classify(features)
    with torch.no_grad():
        gradient = matching_gradient(x0, real_x0, fake(x_t, t))
        if weights is not None:
            gradient = gradient * weights(logits).view(-1, 1, 1, 1)
        target = x0 - gradient
    matching = 0.5 * F.mse_loss(x0, target)
    gan = torch.log1p(torch.exp(-logits)).mean()
    return matching + gan_weight * gan, matching, gan


def denoising_loss(x0, fake, t, eps, *, sigma_data):
    """EDM's loss of generated data: the squared error of x0 by lambda(sigma) (EDM, table 1)."""
    weight = (t**2 + sigma_data**2) / (t * sigma_data) ** 2
    error = fake(renoise(x0, eps, t), t) - x0
    return (weight.view(-1, 1, 1, 1) * error**2).mean()


def classification_loss(real_logits, fake_logits):
    """Binary cross entropy of real against generated data (DMD2, equation 4)."""
    real, fake = torch.sigmoid(real_logits), torch.sigmoid(fake_logits)
    return -torch.log(real).mean() - torch.log(1 - fake).mean()


DIVERGENCES = {
    "rkl": lambda r: -torch.log(r),
    "kl": lambda r: r * torch.log(r),
    "js": lambda r: r * torch.log(r) - (r + 1) * torch.log((r + 1) / 2),
    "sf": lambda r: (r + 1) * torch.log((r + 1) / (2 * r)),
    "neyman": lambda r: 1 / r - 1,
    "sh": lambda r: 1 - torch.sqrt(r),
    "jf": lambda r: (r - 1) * torch.log(r),
}
"""f(r) of the divergences (f-distill, table 1)."""


def divergence_weight(ratio, divergence):
    """h(r) = f''(r) r^2, by automatic differentiation of f, float64."""
    r = ratio.double().clone().requires_grad_(True)
    (first,) = torch.autograd.grad(DIVERGENCES[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    return (second * r**2).detach()


def unet_head(side, channels, groups):
    """DMD2's classifier of a bottleneck (released code), halving larger maps first."""
    layers = []
    while side > 4:
        layers += [
            nn.Conv2d(channels, channels, 4, 2, 1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
        ]
        side //= 2
    layers += [nn.Conv2d(channels, channels, side), nn.GroupNorm(groups, channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.Flatten())


def transformer_head(channels, groups):
    """A strided convolution, a logit a position, their mean."""
    return nn.Sequential(
        nn.Conv2d(channels, channels // 2, 4, 2, 1),
        nn.GroupNorm(groups, channels // 2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels // 2, 1, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def load_head(head, params):
    """Puts a head's parameters, as nested dicts of arrays, into its PyTorch module."""
    convs = params.get("convs", {"conv0": params.get("conv")})
    ours = [convs[f"conv{i}"] for i in range(len(convs))] + [params["logit"]]
    modules = [module for module in head if isinstance(module, nn.Conv2d)]
    norms = [module for module in head if isinstance(module, nn.GroupNorm)]

    def copy(target, value):
        target.data.copy_(torch.from_numpy(value.copy()))

    for module, layer in zip(modules, ours, strict=True):
        copy(module.weight, layer["kernel"].transpose(3, 2, 0, 1))
        copy(module.bias, layer["bias"])
    for module, layer in zip(norms, ours[:-1], strict=True):
        copy(module.weight, layer["norm_scale"])
        copy(module.bias, layer["norm_bias"])
    return head


class Mlp(nn.Module):
    """The twin of `tests.distill.mixture.MlpNetwork` behind EDM's preconditioning."""

    def __init__(self, params, sigma_data):
        super().__init__()
        self.sigma_data = sigma_data
        self.layers = nn.ParameterDict(
            {
                f"{name}_{leaf}": nn.Parameter(torch.from_numpy(value.copy()))
                for name, layer in params.items()
                for leaf, value in layer.items()
            }
        )

    def forward(self, x, t):
        """(x0 [b, 2, 1, 1], hidden features [b, width, 1, 1] of every layer)."""
        s, t = self.sigma_data, t[:, None]
        points = x[:, :, 0, 0]
        angles = torch.log(t) / 4 * 2.0 ** torch.arange(-3, 5)
        c_in = (s**2 + t**2) ** -0.5
        h, hidden = torch.cat([c_in * points, torch.sin(angles), torch.cos(angles)], -1), []
        for i in range((len(self.layers) - 2) // 2):
            h = F.silu(h @ self.layers[f"layer{i}_kernel"] + self.layers[f"layer{i}_bias"])
            hidden.append(h[:, :, None, None])
        raw = h @ self.layers["last_kernel"] + self.layers["last_bias"]
        x0 = s**2 / (t**2 + s**2) * points + t * s * c_in * raw
        return x0[:, :, None, None], hidden
