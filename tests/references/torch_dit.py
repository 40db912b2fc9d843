"""A compact PyTorch DiT: the other side of parity tests and of speed comparisons.

Written from the paper "Scalable Diffusion Models with Transformers" (Peebles and Xie, 2023) and,
for the loss, from "Improved Denoising Diffusion Probabilistic Models" (Nichol and Dhariwal, 2021).
Tensors are channels first and modules carry the names under which DiT checkpoints are published, so
that the state dict of either loads into the other. It is plain eager PyTorch: fused attention, no
checkpointing, parameters updated by `torch.optim.AdamW`.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}


def sincos_positions(hidden_size: int, side: int) -> torch.Tensor:
    """Fixed positions [1, side * side, hidden_size], first half by column, second half by row."""
    frequencies = 10000.0 ** (-np.arange(hidden_size // 4) / (hidden_size // 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [np.outer(position, frequencies) for position in (columns, rows)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.tensor(table, dtype=torch.float32)[None]


class PatchEmbedder(nn.Module):
    """Image [b, c, h, w] to tokens [b, l, d], one per patch, row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """Time [b] to [b, d]: cosines and sines, then a two-layer perceptron.

    `frequency_shift` 0 spaces the frequencies as the original does, 1 as diffusers does.
    """

    def __init__(self, hidden_size: int, frequency_shift: float = 0.0, features: int = 256) -> None:
        super().__init__()
        half = features // 2
        exponents = torch.arange(half, dtype=torch.float32) / (half - frequency_shift)
        frequencies = torch.exp(-math.log(10000.0) * exponents)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(t.float(), self.frequencies)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Label [b] to [b, d]; row `num_classes` of the table stands for "no label"."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over [b, l, d] through PyTorch's fused kernel."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, length, d = x.shape
        qkv = self.qkv(x).view(b, length, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(b, length, d))


class FeedForward(nn.Module):
    """Two linear layers around a GELU (tanh approximation)."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.fc1 = nn.Linear(hidden_size, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """Condition [b, d] to `parts` concatenated vectors [b, parts * d] (adaptive layer norm)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))


def layer_norm(hidden_size: int) -> nn.LayerNorm:
    """Layer norm without parameters of its own: scale and shift come from the condition."""
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    """One adaLN-Zero transformer block."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = FeedForward(hidden_size, mlp_ratio)
        self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        parts = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer to the values of one patch."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """Diffusion transformer: x [b, c, h, w], t [b], y [b] to [b, c or 2c, h, w]."""

    def __init__(
        self,
        *,
        depth: int = 12,
        hidden_size: int = 384,
        num_heads: int = 6,
        patch_size: int = 2,
        in_channels: int = 4,
        input_size: int = 32,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        frequency_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size, frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        b, _, height, width = x.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition)
        patches = patches.view(b, rows, columns, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(b, self.out_channels, height, width)

    def guided(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """Classifier-free guidance as in DiT: only the first three output channels are guided.

        x [b, c, h, w] and t [b] are doubled here, the second half without a label; the guided
        channels and the untouched rest of the conditional half are returned, [b, out, h, w].
        """
        null = torch.full_like(y, self.num_classes)
        out = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        conditional, unconditional = out.chunk(2)
        guided = torch.lerp(unconditional[:, :3], conditional[:, :3], guidance_scale)
        return torch.cat([guided, conditional[:, 3:]], dim=1)


@torch.no_grad()
def randomise(model: nn.Module, seed: int, *, frozen: bool = False) -> nn.Module:
    """Draws every trained parameter at random, in place, and returns the model.

    DiT starts with gates and output layer at zero, where any two networks agree. Weights get
    standard deviation 1 / sqrt(inputs), so that signals keep their size; biases and tables 0.2.
    The fixed positions stay, unless `frozen`.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or frozen:
            table = parameter.ndim < 2 or name.endswith(("embedding_table.weight", "pos_embed"))
            scale = 0.2 if table else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


class DDPMTraining:
    """Training as DiT does it: eps-MSE plus variational bound for the variance, AdamW, EMA.

    Args:
        model: network with twice as many output as input channels, or as many (then MSE alone).
        learning_rate: of AdamW without weight decay.
        ema_decay: per-step decay of the averaged copy `ema`.
        label_dropout: probability with which a label becomes the null class.
        fused: use PyTorch's fused AdamW kernel rather than its default.
    """

    def __init__(
        self,
        model: DiT,
        *,
        learning_rate: float = 1e-4,
        ema_decay: float = 0.9999,
        label_dropout: float = 0.1,
        fused: bool | None = None,
    ) -> None:
        self.model = model
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.ema_decay = ema_decay
        self.label_dropout = label_dropout
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=fused)
        betas = np.linspace(1e-4, 0.02, 1000)
        bar = np.cumprod(1 - betas)
        previous = np.append(1.0, bar[:-1])
        variance = betas * (1 - previous) / (1 - bar)
        variance[0] = variance[1]  # the posterior at index 0 has none, its logarithm is needed
        table = {
            "alpha": np.sqrt(bar),
            "sigma": np.sqrt(1 - bar),
            "log_beta": np.log(betas),
            "log_variance": np.log(variance),
            "mean_x0": betas * np.sqrt(previous) / (1 - bar),
            "mean_xt": np.sqrt(1 - betas) * (1 - previous) / (1 - bar),
        }
        device = next(model.parameters()).device
        self.table = {
            k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in table.items()
        }

    def loss(
        self, x0: torch.Tensor, y: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        """Loss [b] of clean images x0 with labels y, noised by eps at the integer times t."""
        at = {k: v[t].view(-1, 1, 1, 1) for k, v in self.table.items()}
        xt = at["alpha"] * x0 + at["sigma"] * eps
        out = self.model(xt, t, y).float()  # under autocast it is bfloat16
        if not self.model.learn_sigma:
            return (out - eps).square().mean(dim=(1, 2, 3))
        eps_hat, v = out.chunk(2, dim=1)
        mse = (eps_hat - eps).square().mean(dim=(1, 2, 3))
        # The bound trains the variance alone: the mean is held fixed in it.
        x0_hat = (xt - at["sigma"] * eps_hat.detach()) / at["alpha"]
        mean_hat = at["mean_x0"] * x0_hat + at["mean_xt"] * xt
        mean = at["mean_x0"] * x0 + at["mean_xt"] * xt
        log_variance_hat = torch.lerp(at["log_variance"], at["log_beta"], (v + 1) / 2)
        gap = at["log_variance"] - log_variance_hat
        distance = (mean - mean_hat).square() * torch.exp(-log_variance_hat)
        kl = 0.5 * (gap.exp() - 1 - gap + distance)
        nll = -discretised_log_likelihood(x0, mean_hat, 0.5 * log_variance_hat)
        bound = torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl)
        return mse + bound.mean(dim=(1, 2, 3)) / math.log(2.0)

    def step(
        self,
        x0: torch.Tensor,
        y: torch.Tensor,
        t: torch.Tensor | None = None,
        eps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One update; draws time, noise and label dropout unless given. Returns the mean loss."""
        if t is None:
            t = torch.randint(len(self.table["alpha"]), (len(x0),), device=x0.device)
            y = torch.where(
                torch.rand(len(y), device=y.device) < self.label_dropout, self.model.num_classes, y
            )
        if eps is None:
            eps = torch.randn_like(x0)
        loss = self.loss(x0, y, t, eps).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(
                self.ema.parameters(), self.model.parameters(), strict=True
            ):
                average.mul_(self.ema_decay).add_(parameter, alpha=1 - self.ema_decay)
        return loss.detach()


def discretised_log_likelihood(
    x: torch.Tensor, mean: torch.Tensor, log_sigma: torch.Tensor
) -> torch.Tensor:
    """Log-probability of the 8-bit level of x in [-1, 1] under a Gaussian, per value.

    Uses the tanh approximation of the normal distribution function; the first and last level
    extend to infinity.
    """

    def cdf(z: torch.Tensor) -> torch.Tensor:
        return 0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))

    half_level = 1 / 255
    below = cdf((x - half_level - mean) * torch.exp(-log_sigma))
    above = cdf((x + half_level - mean) * torch.exp(-log_sigma))
    below = torch.where(x < -0.999, 0.0, below)
    above = torch.where(x > 0.999, 1.0, above)
    return torch.log((above - below).clamp(min=1e-12))
