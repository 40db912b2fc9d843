"""How alike two images are, pair by pair: PSNR, SSIM, and LPIPS through its own library."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from dit_jax.evaluation.images import AnyArray, check_images, to_float

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
_BATCH_BYTES = 1 << 26

LPIPS_BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", "7be5be79"),
    "vgg": ("vgg16-397923af.pth", "397923af"),
}
"""File of torchvision's ImageNet weights under LPIPS, and the first digits of its SHA-256."""


def psnr(a: AnyArray, b: AnyArray) -> Float[np.ndarray, " n"]:
    """Peak signal-to-noise ratio of each pair of images, 10 log10(range^2 / mean square error).

    The range is 255 for uint8, and 2 for floating point in [-1, 1] (which is not clipped here).

    Args:
        a: Images [n, h, w, c].
        b: The images to compare with, of the same shape and kind.

    Returns:
        Decibels, float64 [n]; infinite where two images are equal.

    Raises:
        ValueError: Different shapes, or bytes against floating point.
    """
    a, b, data_range = _checked_pair(a, b, "PSNR")
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(data_range**2 / error)


def mean_psnr(a: AnyArray, b: AnyArray) -> float | None:
    """Mean `psnr` over the pairs that differ, dB; None if all are equal.

    Raises:
        ValueError: as `psnr`.
    """
    values = psnr(a, b)
    differing = values[np.isfinite(values)]
    return float(differing.mean()) if differing.size else None


def ssim(a: AnyArray, b: AnyArray) -> Float64[np.ndarray, " n"]:
    """Structural similarity of each pair of images, Wang et al. 2004 (IEEE TIP 13(4), 600-612).

    As in the paper: an 11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, at every position
    where the window lies inside the image; averaged over positions and channels, in float64. The
    range is that of `psnr`.

    Args:
        a: Images [n, h, w, c], at least 11 pixels each way.
        b: The images to compare with, of the same shape and kind.

    Returns:
        float64 [n], 1 where two images are equal.

    Raises:
        ValueError: Different shapes, bytes against floating point, or too small images.
    """
    a, b, data_range = _checked_pair(a, b, "SSIM")
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got "
            f"{a.shape[1]}x{a.shape[2]}"
        )
    step = max(1, _BATCH_BYTES // (8 * int(np.prod(a.shape[1:]))))
    parts = [
        _ssim(a[i : i + step].astype(np.float64), b[i : i + step].astype(np.float64), data_range)
        for i in range(0, len(a), step)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> Float64[np.ndarray, " n"]:
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    mean_a, mean_b = _window_means(a), _window_means(b)
    var_a = _window_means(a * a) - mean_a**2
    var_b = _window_means(b * b) - mean_b**2
    covariance = _window_means(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return likeness.mean(axis=(1, 2, 3))


def _window_means(images: Float64[np.ndarray, "n h w c"]) -> Float64[np.ndarray, "n h2 w2 c"]:
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()
    height = images.shape[1] - SSIM_WINDOW + 1
    width = images.shape[2] - SSIM_WINDOW + 1
    rows = sum(w * images[:, i : i + height] for i, w in enumerate(weights))
    return sum(w * rows[:, :, i : i + width] for i, w in enumerate(weights))


@dataclass(frozen=True)
class PerceptualDistance:
    """LPIPS, Zhang et al. 2018, arXiv 1801.03924: `distance(a, b)` of pairs of images.

    Attributes:
        name: For records, e.g. "lpips-0.1.4-alex".
        fingerprint: SHA-256 of the backbone's weights file.
        batch_size: Pairs compared at once.
    """

    name: str
    fingerprint: str
    batch_size: int
    _compare: Callable[[np.ndarray, np.ndarray], np.ndarray] = field(repr=False, compare=False)

    def __call__(self, a: AnyArray, b: AnyArray) -> Float64[np.ndarray, " n"]:
        """Distances of uint8 or [-1, 1] RGB images [n, h, w, 3]; 0 for equal ones.

        Raises:
            ValueError: Different shapes or kinds, or images that are not RGB.
        """
        a, b, _ = _checked_pair(a, b, "LPIPS")
        if a.shape[-1] != 3:
            raise ValueError(f"LPIPS compares RGB images, got {a.shape[-1]} channels")
        distances = np.zeros(len(a))
        for start in range(0, len(a), self.batch_size):
            rows = slice(start, start + self.batch_size)
            distances[rows] = self._compare(to_float(a[rows]), to_float(b[rows]))
        return distances


def load_lpips(
    network: str = "alex",
    *,
    weights: str | os.PathLike | None = None,
    batch_size: int = 16,
    allow_other_weights: bool = False,
) -> PerceptualDistance:
    """LPIPS (version 0.1) by the `lpips` library, which holds its linear weights, not the backbone.

    Args:
        network: "alex" or "vgg".
        weights: torchvision's file of backbone weights; None looks into torch's cache. Nothing is
            downloaded.
        batch_size: Pairs compared at once.
        allow_other_weights: Take a file whose hash is not torchvision's.

    Raises:
        ImportError: The library is not installed; the message says what to install.
        FileNotFoundError: The backbone's weights are not there; the message says where from.
        ValueError: An unknown network, or other weights than torchvision's.
    """
    if network not in LPIPS_BACKBONES:
        raise ValueError(f"LPIPS has no network {network!r}: expected 'alex' or 'vgg'")
    try:
        import lpips
        import torch
    except ImportError as error:
        raise ImportError(
            f"LPIPS needs the packages lpips, torch and torchvision ({error}): pip install lpips "
            "torchvision"
        ) from error
    file, prefix = LPIPS_BACKBONES[network]
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights of LPIPS's backbone at {path}: get "
            f"https://download.pytorch.org/models/{file} and put it there, or name it"
        )
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    if not fingerprint.startswith(prefix) and not allow_other_weights:
        raise ValueError(
            f"{path} is not torchvision's {file}: its SHA-256 begins with {fingerprint[:8]}, not "
            f"{prefix}. Distances under other weights compare with nothing published."
        )
    model = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    _load_backbone(model.net, torch.load(path, map_location="cpu", weights_only=True), path)
    model.eval()

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            pair = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (a, b))
            return model(*pair).reshape(-1).double().numpy()

    version = getattr(lpips, "__version__", "0.1")
    return PerceptualDistance(f"lpips-{version}-{network}", fingerprint, batch_size, compare)


def _load_backbone(backbone: Any, weights: dict[str, Any], path: Path) -> None:
    """Fills lpips's slices, 'sliceN.I.weight', from torchvision's 'features.I.weight'."""
    wanted = {key: f"features.{key.split('.', 1)[1]}" for key in backbone.state_dict()}
    missing = sorted(set(wanted.values()) - set(weights))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of LPIPS's weights, such as {missing[0]}")
    backbone.load_state_dict({key: weights[name] for key, name in wanted.items()})


def _checked_pair(a: AnyArray, b: AnyArray, what: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Both images as arrays, and the range of their values."""
    a, b = check_images(a, "first images"), check_images(b, "second images")
    if a.shape != b.shape:
        raise ValueError(f"{what} compares equal shapes, got {a.shape} and {b.shape}")
    if (a.dtype == np.uint8) != (b.dtype == np.uint8):
        raise ValueError(f"{what} compares images of one kind, got {a.dtype} and {b.dtype}")
    return a, b, 255.0 if a.dtype == np.uint8 else 2.0
