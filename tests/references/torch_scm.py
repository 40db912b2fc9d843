"""sCM's loss in PyTorch and double precision, written from the paper's algorithm 1.

Lu & Song 2024, arXiv 2410.11081. In the angle itself, with F by the plain formula that divides by a
sine, the tangent by `torch.func.jvp`; the network is the tests' MLP.
"""

import math

import torch


def mlp(params: dict, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`tests.distill.mixture.MlpNetwork` without classes on points [b, 2]."""
    frequencies = 2.0 ** torch.arange(-3, 5, dtype=torch.float64)
    angles = t[:, None] * frequencies
    h = torch.cat([x, torch.sin(angles), torch.cos(angles)], -1)
    for i in range(len(params) - 1):
        layer = params[f"layer{i}"]
        h = torch.nn.functional.silu(h @ layer["kernel"] + layer["bias"])
    return h @ params["last"]["kernel"] + params["last"]["bias"]


def denoised(process: str, params: dict, x: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """x0 from x = x0 + ratio eps by an EDM network or by a rectified flow's velocity."""
    column = ratio[:, None]
    if process == "edm":
        data = 0.5
        total = (column**2 + data**2).sqrt()
        raw = mlp(params, x / total, ratio.log() / 4)
        return data**2 / total**2 * x + column * data / total * raw
    t = column / (1 + column)
    x = (1 - t) * x
    return x - t * mlp(params, x, t[:, 0])


def trig_output(process, params, x, angle, sigma_data):
    """F(x, angle), TrigFlow's x."""
    column = angle[:, None]
    x0 = denoised(process, params, x / column.cos(), sigma_data * angle.tan())
    return (column.cos() * x - x0) / (column.sin() * sigma_data)


def log_variance(weight: dict, ratio: torch.Tensor) -> torch.Tensor:
    """u: a linear map of cosines and sines of log(ratio) / 4, frequencies from 1 to 1e-4."""
    half = weight["kernel"].shape[0] // 2
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(half, dtype=torch.float64) / (half - 1)
    )
    angles = ratio.log()[:, None] / 4 * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1) @ weight["kernel"] + weight["bias"]


def scm_loss(
    params: dict,
    weight: dict,
    x0: torch.Tensor,
    eps: torch.Tensor,
    angle: torch.Tensor,
    *,
    process: str,
    teacher_x0=None,
    sigma_data: float = 0.5,
    warmup: float = 1.0,
    constant: float = 0.1,
    clip: bool = False,
) -> torch.Tensor:
    """The mean loss.

    Args:
        params: of the MLP.
        weight: of u.
        x0: data, [b, 2].
        eps: standard normal noise.
        angle: in (0, pi / 2).
        process: 'edm' or 'flow'.
        teacher_x0: (x = x0 + ratio eps, ratio) -> x0 for sCD; None for sCT.
        sigma_data: TrigFlow's.
        warmup: r.
        constant: c of the normalisation.
        clip: clip the tangent instead.
    """
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    z = sigma_data * eps
    x = cos * x0 + sin * z
    ratio = sigma_data * angle.tan()
    if teacher_x0 is None:
        velocity = cos * z - sin * x0
    else:
        velocity = (cos * x - teacher_x0(x / cos, ratio)) / sin

    def output(x, angle):
        return trig_output(process, params, x, angle, sigma_data)

    f = output(x, angle)
    direction = cos * sin * velocity, (cos * sin)[:, 0]
    slope = torch.func.jvp(output, (x, angle), direction)[1].detach()
    fixed = f.detach()
    g = -(cos**2) * (sigma_data * fixed - velocity)
    g = g - warmup * (cos * sin * x + sigma_data * slope)
    d = x.shape[1]
    normalized = g / (g.norm(dim=1, keepdim=True) / math.sqrt(d) + constant)
    g = g.clamp(-1, 1) if clip else normalized
    squared = (f - fixed - g).square().mean(1)
    u = log_variance(weight, ratio)
    return (squared / (ratio * d * u.exp()) + u).mean()
