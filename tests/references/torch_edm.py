"""EDM's U-Nets, preconditionings and sampler in PyTorch, after the paper's appendix and table 1.

Parameters carry the names of the released networks. Images are channels first.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dit_jax.models.edm import SongUNetConfig


class GroupNorm(nn.GroupNorm):
    """32 groups, or fewer with 4 channels each."""

    def __init__(self, channels, eps):
        super().__init__(min(32, channels // 4), channels, eps=eps)


def filtered(x, taps, up=False, down=False, padding=None):
    """Depthwise filtering to twice or half the resolution."""
    if not up and not down:
        return x
    kernel = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    kernel = torch.outer(kernel, kernel).expand(x.shape[1], 1, -1, -1)
    padding = (len(taps) - 1) // 2 if padding is None else padding
    options = {"stride": 2, "padding": padding, "groups": x.shape[1]}
    return F.conv_transpose2d(x, 4 * kernel, **options) if up else F.conv2d(x, kernel, **options)


class Block(nn.Module):
    """The residual block of all three networks."""

    def __init__(self, before, after, config, *, up=False, down=False, attention=False):
        super().__init__()
        self.song = isinstance(config, SongUNetConfig)
        eps = 1e-6 if self.song else 1e-5
        self.taps = config.resample_filter if self.song else (1, 1)
        self.up, self.down = up, down
        self.scale = math.sqrt(0.5) if self.song else 1.0
        self.norm0 = GroupNorm(before, eps)
        self.conv0 = nn.Conv2d(before, after, 3, padding=1)
        self.affine = nn.Linear(
            config.model_channels * config.channel_mult_emb, after * (1 if self.song else 2)
        )
        self.norm1 = GroupNorm(after, eps)
        self.conv1 = nn.Conv2d(after, after, 3, padding=1)
        if before != after or (self.song and (up or down)):
            self.skip = nn.Conv2d(before, after, 1)
        self.heads = 0
        if attention:
            self.heads = 1 if self.song else after // 64
            self.norm2 = GroupNorm(after, eps)
            self.qkv = nn.Conv2d(after, 3 * after, 1)
            self.proj = nn.Conv2d(after, after, 1)

    def forward(self, x, emb):
        def sampled(y):
            return filtered(y, self.taps, self.up, self.down)

        h = self.conv0(sampled(F.silu(self.norm0(x))))
        affine = self.affine(emb)[:, :, None, None]
        if self.song:
            h = self.norm1(h + affine)
        else:
            scale, shift = affine.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        h = self.conv1(F.silu(h))
        shortcut = sampled(x)
        shortcut = self.skip(shortcut) if hasattr(self, "skip") else shortcut
        x = (h + shortcut) * self.scale
        if self.heads:
            b, c, height, width = x.shape
            # Channels of the projection: head, then channel of the head, then q, k or v.
            parts = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, -1)
            q, k, v = parts.permute(3, 0, 1, 4, 2)
            out = F.scaled_dot_product_attention(q, k, v)
            out = self.proj(out.transpose(2, 3).reshape(b, c, height, width))
            x = (x + out) * self.scale
        return x


class Fourier(nn.Module):
    """Random frequencies."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(dim // 2))


class UNet(nn.Module):
    """DDPM++, NCSN++ or ADM by our configuration, with FastGen's second time where it has one."""

    def __init__(self, config):
        super().__init__()
        self.config, self.song = config, isinstance(config, SongUNetConfig)
        self.second = config.second_time != "none"
        emb = config.model_channels * config.channel_mult_emb
        noise = config.model_channels * (config.channel_mult_noise if self.song else 1)
        self.noise, wide = noise, noise * (2 if self.second else 1)
        if self.song and config.embedding_type == "fourier":
            self.map_noise = Fourier(noise)
            if self.second:
                self.r_timestep = Fourier(noise)
        if config.num_classes:
            self.map_label = nn.Linear(
                config.num_classes, wide if self.song else emb, bias=self.song
            )
        if config.augment_dim:
            self.map_augment = nn.Linear(config.augment_dim, wide, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(wide, emb), nn.Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self._encoder(config)
        self._decoder(config)

    def _encoder(self, config):
        def block(before, after, **options):
            return Block(before, after, config, **options)

        kind = config.encoder_type if self.song else "standard"
        width = config.model_channels * (1 if self.song else config.channel_mult[0])
        self.widths, aux = [width], config.in_channels
        for level, multiplier in enumerate(config.channel_mult):
            side = config.image_size >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = nn.Conv2d(config.in_channels, width, 3, padding=1)
            else:
                self.enc[f"{side}x{side}_down"] = block(width, width, down=True)
                self.widths.append(width)
                if kind == "skip":
                    self.enc[f"{side}x{side}_aux_skip"] = nn.Conv2d(aux, width, 1)
                if kind == "residual":
                    self.enc[f"{side}x{side}_aux_residual"] = nn.Conv2d(aux, width, 3)
                    aux = width
            for i in range(config.num_blocks):
                after = config.model_channels * multiplier
                attention = side in config.attn_resolutions
                self.enc[f"{side}x{side}_block{i}"] = block(width, after, attention=attention)
                width = after
                self.widths.append(width)

    def _decoder(self, config):
        widths, width = list(self.widths), self.widths[-1]
        out = config.in_channels * (2 if config.learn_sigma else 1)
        for level in reversed(range(len(config.channel_mult))):
            side = config.image_size >> level
            if level == len(config.channel_mult) - 1:
                self.dec[f"{side}x{side}_in0"] = Block(width, width, config, attention=True)
                self.dec[f"{side}x{side}_in1"] = Block(width, width, config)
            else:
                self.dec[f"{side}x{side}_up"] = Block(width, width, config, up=True)
            for i in range(config.num_blocks + 1):
                after = config.model_channels * config.channel_mult[level]
                attention = side in config.attn_resolutions
                attention &= not self.song or i == config.num_blocks
                self.dec[f"{side}x{side}_block{i}"] = Block(
                    width + widths.pop(), after, config, attention=attention
                )
                width = after
            if self.song and (level == 0 or config.decoder_type == "skip"):
                self.dec[f"{side}x{side}_aux_norm"] = GroupNorm(width, 1e-6)
                self.dec[f"{side}x{side}_aux_conv"] = nn.Conv2d(width, out, 3, padding=1)
        if not self.song:
            self.out_norm = GroupNorm(width, 1e-5)
            self.out_conv = nn.Conv2d(width, out, 3, padding=1)

    def _time(self, t, fourier):
        if fourier is not None:
            angles = t[:, None] * 2 * math.pi * fourier.freqs
        else:
            count = self.noise // 2
            last = count - 1 if self.song else count
            angles = t[:, None] * 10_000 ** (-torch.arange(count, dtype=torch.float32) / last)
        parts = (angles.sin(), angles.cos()) if self.song else (angles.cos(), angles.sin())
        return torch.cat(parts, dim=1)

    def _embedding(self, t, one_hot, augment, r):
        emb = self._time(t, getattr(self, "map_noise", None))
        if self.second:
            emb = torch.cat([emb, self._time(r, getattr(self, "r_timestep", None))], dim=1)
        classes = self.config.num_classes
        if self.song and classes:
            emb = emb + self.map_label(one_hot * math.sqrt(classes))
        if augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if not self.song and classes:
            emb = emb + self.map_label(one_hot)
        return F.silu(emb)

    def forward(self, x, t, one_hot=None, augment=None, r=None):
        """The raw output and the encoder's last output at each resolution."""
        emb = self._embedding(t, one_hot, augment, r)
        taps = self.config.resample_filter if self.song else None
        skips, maps, aux = [], [], x
        for name, module in self.enc.items():
            if name.endswith("aux_skip"):
                aux = filtered(aux, taps, down=True)
                x = skips[-1] = x + module(aux)
            elif name.endswith("aux_residual"):
                pad = 1 + (len(taps) - 1) // 2
                wide = F.conv2d(aux, module.weight, module.bias, padding=pad)
                x = (x + filtered(wide, taps, down=True, padding=0)) / math.sqrt(2)
                skips[-1] = aux = x
            else:
                x = module(x, emb) if isinstance(module, Block) else module(x)
                skips.append(x)
            if name.endswith(f"block{self.config.num_blocks - 1}"):
                maps.append(x)
        aux = normalised = None
        for name, module in self.dec.items():
            if name.endswith("aux_norm"):
                normalised = module(x)
            elif name.endswith("aux_conv"):
                out = module(F.silu(normalised))
                aux = out if aux is None else out + filtered(aux, taps, up=True)
            else:
                if "_block" in name:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, emb)
        return (aux if self.song else self.out_conv(F.silu(self.out_norm(x)))), maps


def randomise(model, seed=0):
    """Every parameter and buffer random, of a size that keeps signals alive."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(value.shape, generator=random)
            if name.endswith("freqs"):
                value.copy_(noise)
            elif value.ndim > 1 and not name.endswith("resample_filter"):
                value.copy_(noise * value[0].numel() ** -0.5)
            elif value.ndim == 1:
                is_scale = "norm" in name and name.endswith("weight")
                value.copy_(0.3 * noise + (1.0 if is_scale else 0.0))
    return model.eval()


def iddpm_levels(steps=1000, c_1=0.001, c_2=0.008):
    """u_0 .. u_M in float64 (EDM, table 1)."""
    levels = [0.0]
    for j in range(steps, 0, -1):
        upper, lower = (math.sin(math.pi / 2 * k / (steps * (1 + c_2))) ** 2 for k in (j, j - 1))
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(lower / upper, c_1) - 1))
    return np.array(levels[::-1])


def coefficients(kind, sigma, sigma_data=0.5):
    """(c_skip, c_out, c_in, c_noise) at float64 noise levels (EDM, table 1)."""
    sigma = np.asarray(sigma, np.float64)
    one = np.ones_like(sigma)
    if kind == "edm":
        norm = np.sqrt(sigma**2 + sigma_data**2)
        return sigma_data**2 / norm**2, sigma * sigma_data / norm, 1 / norm, np.log(sigma) / 4
    if kind == "ve":
        return one, sigma, one, np.log(sigma / 2)
    c_in = 1 / np.sqrt(sigma**2 + 1)
    if kind == "vp":
        t = (np.sqrt(0.01 + 2 * 19.9 * np.log(1 + sigma**2)) - 0.1) / 19.9
        return one, -sigma, c_in, 999 * t
    index = np.abs(sigma[..., None] - iddpm_levels()).argmin(axis=-1)
    return one, -sigma, c_in, 999.0 - index


def sample(denoise, x, sigmas, rounded, noises=(), churn=0.0, s_min=0.0, s_max=np.inf, s_noise=1.0):
    """Algorithm 2 in float64 from x at sigmas[0]; `noises` one a step, `rounded` of sigma_hat."""
    steps = len(sigmas) - 1
    for i in range(steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        gamma = min(churn / steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        raised = rounded(sigma * (1 + gamma))
        if gamma:
            x = x + math.sqrt(max(raised**2 - sigma**2, 0.0)) * s_noise * noises[i]
        slope = (x - denoise(x, raised)) / raised
        moved = x + (following - raised) * slope
        if following > 0:
            second = (moved - denoise(moved, following)) / following
            moved = x + (following - raised) * (slope + second) / 2
        x = moved
    return x
