"""MeanFlow's losses in PyTorch and float64, written from the papers' equations.

"Mean Flows for One-step Generative Modeling" (arXiv 2505.13447): the identity (eq. 6), the target
(eqs. 9 and 10), guidance (eq. 19) and the adaptive weight (eq. 22). "Improved Mean Flows" (arXiv
2512.02012): the derivative along the network's own velocity (eqs. 11 and 12). The gradient-explicit
loss is FastGen's.
"""

import dataclasses

import numpy as np
import torch


class Mlp(torch.nn.Module):
    """`tests.distill.mixture.MlpNetwork` with its parameters, on points [b, 2]."""

    def __init__(self, params, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.weights = torch.nn.ParameterDict(
            {
                f"{layer}_{name}": torch.nn.Parameter(torch.tensor(np.asarray(value)).double())
                for layer, leaves in params.items()
                for name, value in leaves.items()
            }
        )
        self.second_time = self.weights["layer0_kernel"].shape[0] == 2 + 16 * 2 + num_classes

    def forward(self, x, t, r, label):
        def features(time):
            angles = time[:, None] * 2.0 ** torch.arange(-3, 5, dtype=time.dtype)
            return torch.cat([angles.sin(), angles.cos()], dim=1)

        known = torch.nn.functional.one_hot(label, self.num_classes + 1)[:, :-1]
        inputs = [x, features(t), *([features(t - r)] if self.second_time else []), known]
        h, layer = torch.cat(inputs, dim=1), 0
        while f"layer{layer}_kernel" in self.weights:
            weight, bias = self.weights[f"layer{layer}_kernel"], self.weights[f"layer{layer}_bias"]
            h, layer = torch.nn.functional.silu(h @ weight + bias), layer + 1
        return h @ self.weights["last_kernel"] + self.weights["last_bias"]

    def gradients(self):
        return {name: weight.grad.numpy() for name, weight in self.weights.items()}


@dataclasses.dataclass
class Setting:
    """What is learned and how; defaults are plain MeanFlow."""

    omega: float = 1.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    improved: bool = False
    loss: str = "l2"
    power: float = 1.0
    constant: float = 0.01
    scale_by_dimension: bool = False
    warmup: float = 1.0
    teacher: Mlp | None = None
    teacher_scale: float = 1.0


def loss(net, setting, x0, eps, t, r, label, dropped):
    """The mean loss; `label` are the classes before dropping. All tensors of float64."""
    s = setting
    x = (1 - t)[:, None] * x0 + t[:, None] * eps
    null = torch.full_like(label, net.num_classes)
    seen = torch.where(dropped, null, label)
    with torch.no_grad():
        if s.teacher is not None:
            with_class, without = (s.teacher(x, t, t, which) for which in (seen, null))
            velocity = without + s.teacher_scale * (with_class - without)
        else:
            inside = (t >= s.interval[0]) & (t <= s.interval[1])
            omega = torch.where(inside, s.omega, 1.0)[:, None]
            kappa = torch.where(inside, s.kappa, 0.0)[:, None]
            guided = omega * (eps - x0) + (1 - omega - kappa) * net(x, t, t, null)
            guided = guided + kappa * net(x, t, t, label)
            velocity = torch.where(dropped[:, None], eps - x0, guided)
        direction = net(x, t, t, seen) if s.improved else velocity
        ends = (torch.ones_like(t), torch.zeros_like(r))
        _, slope = torch.func.jvp(lambda x, t, r: net(x, t, r, seen), (x, t, r), (direction, *ends))
    compound = net(x, t, r, seen) + s.warmup * (t - r)[:, None] * slope
    error = compound - velocity
    if s.loss == "l2":
        squared = error.square().sum(1)
        return (squared / (squared.detach() + s.constant) ** s.power).mean()
    u = compound - s.warmup * (t - r)[:, None] * slope
    step = error.detach() / (x0.shape[1] ** 0.5 if s.scale_by_dimension else 1.0)
    step = step / (step.norm(dim=1, keepdim=True) + s.constant) ** s.power
    return (u - (u.detach() - step)).square().sum(1).mean()
