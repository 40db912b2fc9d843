"""Two sets of images that should be alike, pair by pair and as sets: scores, and the worst pairs.

For images of the same noise under two ways of sampling (another solver, fewer steps, patches on
several devices), where each image has its counterpart. Both sets are read once, in batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8
from PIL import Image

from dit_jax.evaluation.features import FeatureExtractor
from dit_jax.evaluation.frechet import GaussianStatistics, TooFewSamplesError, frechet_distance
from dit_jax.evaluation.image_streams import FolderImages, ImageSet, NpzImages
from dit_jax.evaluation.similarity import SSIM_WINDOW, PerceptualDistance, psnr, ssim
from dit_jax.output_formats import is_npz

LPIPS_SMALLEST_SIDE = 32
"""Below this AlexNet's poolings leave no pixel."""

AMPLIFICATIONS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Comparison:
    """Scores of n pairs of images, and the pairs that differ most.

    Attributes:
        names: What the two sets are, for people.
        psnr: Decibels of each pair, float64 [n]; infinite where the two are equal.
        largest: Largest absolute difference of a pixel of each pair, int64 [n], of 255.
        ssim: Structural similarity of each pair, or None where left out.
        lpips: Perceptual distance of each pair, or None where left out.
        frechet: Distance between the two sets in the features named, or None where left out.
        features: Name of the features.
        left_out: Score -> why it was not computed.
        worst: Numbers of the pairs of lowest PSNR, worst first.
        pairs: Their images, uint8 [k, h, w, c] of each set.
    """

    names: tuple[str, str]
    psnr: Float64[np.ndarray, " n"]
    largest: Int64[np.ndarray, " n"]
    ssim: Float64[np.ndarray, " n"] | None
    lpips: Float64[np.ndarray, " n"] | None
    frechet: float | None
    features: str
    left_out: dict[str, str]
    worst: Int64[np.ndarray, " k"]
    pairs: tuple[UInt8[np.ndarray, "k h w c"], UInt8[np.ndarray, "k h w c"]] = field(repr=False)

    @property
    def count(self) -> int:
        """Number of pairs."""
        return len(self.psnr)

    @property
    def equal(self) -> int:
        """Number of pairs that are equal, byte for byte."""
        return int(np.isinf(self.psnr).sum())

    @property
    def mean_psnr(self) -> float:
        """Mean over the pairs that differ; infinite if none does."""
        different = self.psnr[np.isfinite(self.psnr)]
        return float(different.mean()) if len(different) else float("inf")

    @property
    def pooled_psnr(self) -> float:
        """Of the mean square error over all pairs, equal ones too; infinite if all are equal."""
        error = np.mean(10.0 ** (-self.psnr / 10.0))
        return float(-10.0 * np.log10(error)) if error > 0 else float("inf")

    def summary(self) -> list[tuple[str, str]]:
        """(score, value) for people; what was left out says why."""
        rows = [
            ("pairs", f"{self.count}, of which {self.equal} equal"),
            ("PSNR, mean of the pairs that differ", decibels(self.mean_psnr)),
            ("PSNR of the mean square error", decibels(self.pooled_psnr)),
            ("PSNR, lowest", decibels(float(self.psnr.min()))),
            ("largest difference of a pixel", f"{self.largest.max()} of 255"),
        ]
        for name, values in (("SSIM", self.ssim), ("LPIPS", self.lpips)):
            if values is not None:
                worst = values.min() if name == "SSIM" else values.max()
                rows.append((name, f"{values.mean():.4f} (worst {worst:.4f})"))
        if self.frechet is not None:
            rows.append((f"Fréchet distance ({self.features})", f"{self.frechet:.4g}"))
        rows += [(name, f"left out: {why}") for name, why in self.left_out.items()]
        return rows

    def record(self) -> dict[str, Any]:
        """All scores for JSON, which has no infinity: a PSNR of null means equal images."""
        per_image = [("psnr", self.psnr), ("largest_difference", self.largest)]
        per_image += [("ssim", self.ssim), ("lpips", self.lpips)]
        return {
            "a": self.names[0],
            "b": self.names[1],
            "num_pairs": self.count,
            "equal_pairs": self.equal,
            "psnr_mean_of_different": _finite(self.mean_psnr),
            "psnr_of_mean_square_error": _finite(self.pooled_psnr),
            "psnr_lowest": _finite(float(self.psnr.min())),
            "largest_difference": int(self.largest.max()),
            "ssim_mean": None if self.ssim is None else float(self.ssim.mean()),
            "lpips_mean": None if self.lpips is None else float(self.lpips.mean()),
            "frechet_distance": self.frechet,
            "features": self.features,
            "left_out": dict(self.left_out),
            "per_image": {
                name: [_finite(value) for value in values.tolist()]
                for name, values in per_image
                if values is not None
            },
        }


def decibels(value: float) -> str:
    """A PSNR for people."""
    return "infinite (equal)" if np.isinf(value) else f"{value:.2f} dB"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def open_images(path: str | os.PathLike) -> ImageSet:
    """A folder of images, grey if the first is, or an ADM .npz.

    Raises:
        FileNotFoundError: There is nothing of that name, or no image in the folder.
        ValueError: Neither a folder nor a readable .npz of images.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no images {path}: give a folder of images or an .npz")
    if path.is_dir():
        images = FolderImages(path)
        with Image.open(images.first_file) as first:
            grey = first.mode in ("1", "L", "I", "I;16")
        return FolderImages(path, channels=1) if grey else images
    if not is_npz(path):
        raise ValueError(f"{path}: expected a folder of images or an .npz, as sample.py writes")
    return NpzImages(path)


def compare_images(
    a: ImageSet,
    b: ImageSet,
    *,
    names: tuple[str, str] | None = None,
    extractor: FeatureExtractor | None = None,
    perceptual: PerceptualDistance | None = None,
    left_out: dict[str, str] | None = None,
    allow_singular: bool = False,
    kept: int = 32,
    batch_size: int = 256,
) -> Comparison:
    """Compares image i of one set with image i of the other, for every i, and the sets.

    Args:
        a: Images.
        b: As many of the same size.
        names: What to call them; by default as they describe themselves.
        extractor: Makes the features of the Fréchet distance.
        perceptual: LPIPS.
        left_out: Why there is no `extractor` ("Fréchet distance") or no `perceptual` ("LPIPS").
        allow_singular: Compute the Fréchet distance of fewer images than features.
        kept: How many of the worst pairs to keep the images of.
        batch_size: Pairs read at once.

    Raises:
        ValueError: No images, or other numbers or sizes of images in the one than in the other.
    """
    names = names or (a.description, b.description)
    require_same_count(a, b, names)
    reasons = dict(left_out or {})
    statistics = None
    if extractor is not None:
        statistics = [GaussianStatistics(extractor.dim, extractor.fingerprint) for _ in range(2)]
    scores: dict[str, list[np.ndarray]] = {"psnr": [], "largest": [], "ssim": [], "lpips": []}
    worst = _WorstPairs(kept)
    for first, second in _paired(a, b, names, batch_size):
        scores["psnr"].append(psnr(first, second))
        difference = np.abs(first.astype(np.int16) - second)
        scores["largest"].append(difference.max(axis=(1, 2, 3)).astype(np.int64))
        if min(first.shape[1:3]) >= SSIM_WINDOW:
            scores["ssim"].append(ssim(first, second))
        else:
            reasons["SSIM"] = f"needs images of {SSIM_WINDOW} pixels or more each way"
        if perceptual is not None and min(first.shape[1:3]) >= LPIPS_SMALLEST_SIDE:
            scores["lpips"].append(perceptual(*map(_three_channels, (first, second))))
        elif perceptual is not None:
            reasons["LPIPS"] = f"needs images of {LPIPS_SMALLEST_SIDE} pixels or more each way"
        if statistics:
            for part, images in zip(statistics, (first, second), strict=True):
                part.update(extractor(images))
        worst.add(scores["psnr"][-1], first, second)
    frechet = None
    if statistics:
        try:
            frechet = frechet_distance(*statistics, allow_singular=allow_singular)
        except TooFewSamplesError:
            reasons["Fréchet distance"] = (
                f"{a.count} images are too few for {extractor.dim} features ({extractor.name})"
            )
    values = {name: np.concatenate(parts) if parts else None for name, parts in scores.items()}
    return Comparison(
        names=names,
        **values,
        frechet=frechet,
        features=extractor.name if extractor else "",
        left_out=reasons,
        worst=worst.numbers,
        pairs=worst.images,
    )


def require_same_count(a: ImageSet, b: ImageSet, names: tuple[str, str]) -> None:
    """Refuses sets that do not pair.

    Raises:
        ValueError: No images, or other numbers of them.
    """
    if a.count != b.count:
        raise ValueError(
            f"{names[0]} has {a.count} images and {names[1]} has {b.count}: images are compared in "
            "pairs, by their order; give sets of equally many"
        )
    if not a.count:
        raise ValueError(f"{names[0]} and {names[1]} have no images")


def _paired(
    a: ImageSet, b: ImageSet, names: tuple[str, str], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first, second in zip(a.batches(batch_size), b.batches(batch_size), strict=True):
        if first.shape != second.shape:
            sizes = [f"{s[2]}x{s[1]} with {s[3]} channels" for s in (first.shape, second.shape)]
            raise ValueError(
                f"images of different sizes: {names[0]} are {sizes[0]}, {names[1]} are {sizes[1]}"
            )
        yield first, second


class _WorstPairs:
    """The pairs of lowest PSNR among those added, first come first where equal."""

    def __init__(self, kept: int):
        self._kept, self._seen = kept, 0
        self._held: list[tuple[float, int, np.ndarray, np.ndarray]] = []

    def add(self, scores: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        for i in np.argsort(scores, kind="stable")[: self._kept]:
            self._held.append((float(scores[i]), self._seen + int(i), a[i], b[i]))
        self._seen += len(scores)
        self._held = sorted(self._held, key=lambda pair: pair[:2])[: self._kept]

    @property
    def numbers(self) -> np.ndarray:
        return np.array([number for _, number, _, _ in self._held], np.int64)

    @property
    def images(self) -> tuple[np.ndarray, np.ndarray]:
        a, b = (np.stack([pair[i] for pair in self._held]) for i in (2, 3))
        return a, b


def _three_channels(images: np.ndarray) -> np.ndarray:
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def amplification(a: UInt8[np.ndarray, "k h w c"], b: UInt8[np.ndarray, "k h w c"]) -> int:
    """The largest factor of `AMPLIFICATIONS` under which no difference leaves 0..255."""
    largest = int(np.abs(a.astype(np.int16) - b).max(initial=1))
    return max(factor for factor in AMPLIFICATIONS if factor * max(largest, 1) <= 255)


def difference_maps(
    a: UInt8[np.ndarray, "k h w c"], b: UInt8[np.ndarray, "k h w c"], factor: int
) -> UInt8[np.ndarray, "k h w c"]:
    """factor |a - b|, clipped to 255: black where the images are equal."""
    difference = np.abs(a.astype(np.int32) - b)
    return np.minimum(factor * difference, 255).astype(np.uint8)
