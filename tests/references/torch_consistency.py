"""Losses of consistency models in double-precision PyTorch, written from the papers.

Consistency training and distillation with ECT's pairs of times (Geng et al. 2024) and the second
stage of truncated consistency models (Lee et al. 2024), for EDM and rectified flow, with
a small MLP as the network. Gradients are autograd's.
"""

import numpy as np
import torch


def tensors(tree):
    """A nested dict of arrays as double-precision leaves."""
    if isinstance(tree, dict):
        return {name: tensors(value) for name, value in tree.items()}
    return torch.tensor(np.asarray(tree, np.float64))


def mlp(params, x, t, label=None, num_classes=0):
    """The bench's MLP: features of time, then SiLU layers."""
    angles = t[:, None] * 2.0 ** torch.arange(-3, 5, dtype=torch.float64)
    inputs = [x, torch.sin(angles), torch.cos(angles)]
    if num_classes:
        one_hot = torch.nn.functional.one_hot(label, num_classes + 1)[:, :num_classes]
        inputs.append(one_hot.double())
    h = torch.cat(inputs, -1)
    for name in sorted(name for name in params if name.startswith("layer")):
        h = torch.nn.functional.silu(h @ params[name]["kernel"] + params[name]["bias"])
    return h @ params["last"]["kernel"] + params["last"]["bias"]


class Edm:
    """x = x0 + sigma eps with EDM's preconditioning; dx/dsigma = (x - x0) / sigma."""

    sigma_data = 0.5

    def mix(self, x0, eps, t):
        return x0 + t[:, None] * eps

    def x0(self, params, x, t, **options):
        s = t[:, None]
        scale = (s**2 + self.sigma_data**2).sqrt()
        out = mlp(params, x / scale, t.log() / 4, **options)
        return self.sigma_data**2 / scale**2 * x + s * self.sigma_data / scale * out

    def velocity(self, params, x, t, **options):
        return (x - self.x0(params, x, t, **options)) / t[:, None]

    def sigma_ratio(self, t):
        return t


class Flow:
    """x = (1 - t) x0 + t eps; the network says eps - x0."""

    def mix(self, x0, eps, t):
        return (1 - t[:, None]) * x0 + t[:, None] * eps

    def velocity(self, params, x, t, **options):
        return mlp(params, x, t, **options)

    def x0(self, params, x, t, **options):
        return x - t[:, None] * self.velocity(params, x, t, **options)

    def sigma_ratio(self, t):
        return t / (1 - t)


def earlier(t, ratio, min_r=0.0):
    """ECT's r for t."""
    return (t * (1 - (1 - ratio) * (1 + 8 * torch.sigmoid(-t)))).clamp(min=min_r)


def per_example(process, x0_t, x0_r, t, r, distance, c, weighting, sigma_data=0.5):
    """(weighted, unweighted) losses."""
    norm = torch.linalg.vector_norm(x0_t - x0_r, dim=1)
    unweighted = {
        "pseudo_huber": lambda: (norm**2 + c**2).sqrt() - c,
        "l2": lambda: norm,
        "squared_l2": lambda: norm**2,
    }[distance]()
    s = process.sigma_ratio(t)
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    weight = {
        "default": 1 / (t - r),
        "sqrt": (t - r) ** -0.5,
        "sigma_sq": t**-2,
        "c_out": 1 / c_out,
        "c_out_sq": c_out**-2,
        "one": torch.ones_like(t),
    }[weighting]
    return weight * unweighted, unweighted


def consistency(
    process,
    params,
    x0,
    eps,
    t,
    ratio,
    *,
    teacher=None,
    guidance=1.0,
    heun=False,
    label=None,
    num_classes=0,
    criterion=("pseudo_huber", 1e-8, "default"),
    min_r=0.0,
):
    """Mean loss of consistency training, or of distillation where a teacher is given."""
    options = {"label": label, "num_classes": num_classes}
    r = earlier(t, ratio, min_r)
    x_t = process.mix(x0, eps, t)
    if teacher is None:
        x_r = process.mix(x0, eps, r)
    else:

        def slope(x, s):
            with_label = process.velocity(teacher, x, s, **options)
            if guidance == 1.0:
                return with_label
            null = torch.full_like(label, num_classes)
            without = process.velocity(teacher, x, s, label=null, num_classes=num_classes)
            return without + guidance * (with_label - without)

        first = slope(x_t, t)
        x_r = x_t + (r - t)[:, None] * first
        if heun:
            safe = torch.where(r > 0, r, torch.ones_like(r))
            mean = 0.5 * (first + slope(x_r, safe))
            x_r = torch.where((r > 0)[:, None], x_t + (r - t)[:, None] * mean, x_r)
    x0_t = process.x0(params, x_t, t, **options)
    with torch.no_grad():
        safe = torch.where(r > 0, r, torch.ones_like(r))
        x0_r = process.x0(params, x_r, safe, **options)
        x0_r = torch.where((r > 0)[:, None], x0_r, x0)
    return per_example(process, x0_t, x0_r, t, r, *criterion)[0].mean()


def truncated(process, params, stage1, x0, eps, t, boundary, ratio, transition, boundary_weight):
    """The second stage's loss, and its two parts."""
    r = earlier(t, ratio)
    x_t, x_r = process.mix(x0, eps, t), process.mix(x0, eps, r)
    x0_t = process.x0(params, x_t, t)
    with torch.no_grad():
        safe = torch.where(r > 0, r, torch.ones_like(r))
        below, above = process.x0(stage1, x_r, safe), process.x0(params, x_r, safe)
        x0_r = torch.where((r < transition)[:, None], below, above)
        x0_r = torch.where((r > 0)[:, None], x0_r, x0)
    loss = per_example(process, x0_t, x0_r, t, r, "pseudo_huber", 1e-8, "default")[0]
    inner, edge = loss[~boundary].mean(), loss[boundary].mean()
    return inner + boundary_weight * edge, inner, edge


def gradients(loss, params):
    """Gradients of a loss with respect to a nested dict of leaves, as arrays."""
    loss.backward()

    def read(tree):
        if isinstance(tree, dict):
            return {name: read(value) for name, value in tree.items()}
        return tree.grad.numpy()

    return read(params)


def require_grad(tree):
    """The same leaves, differentiable."""
    if isinstance(tree, dict):
        return {name: require_grad(value) for name, value in tree.items()}
    return tree.requires_grad_()
