"""A comparison of images for people: one HTML file that needs no other, or one PNG."""

from __future__ import annotations

import base64
import html
import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dit_jax.atomic import atomic_file
from dit_jax.evaluation.comparison import Comparison, amplification, decibels, difference_maps
from dit_jax.evaluation.files import to_pil
from dit_jax.evaluation.grid import save_grid

_COLUMNS = 8
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
  padding: 0 1rem; color: #18181b; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; }
th, td { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top; }
.scores td { border-bottom: 1px solid #e4e4e7; }
.pairs img { width: 100%; min-width: 96px; max-width: 512px; image-rendering: pixelated;
  display: block; border: 1px solid #e4e4e7; }
.pairs td:first-child { white-space: nowrap; color: #71717a; }
code { background: #f4f4f5; padding: 0 .25rem; }
"""


def save_comparison_html(
    path: str | os.PathLike,
    comparison: Comparison,
    *,
    title: str = "Comparison of images",
    overwrite: bool = False,
) -> Path:
    """Writes scores and the kept pairs, A | B | difference, worst first, as one file, atomically.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(_page(comparison, title).encode())
    return Path(path)


def save_comparison_png(
    path: str | os.PathLike, comparison: Comparison, *, count: int = 24, overwrite: bool = False
) -> Path:
    """Writes the `count` worst pairs as a grid: rows of A, of B and of their difference.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    a, b = (images[:count] for images in comparison.pairs)
    factor = amplification(a, b)
    maps = difference_maps(a, b, factor)
    rows, labels, captions = [], [], []
    blank = np.full_like(a[:1], 255)
    numbers = comparison.worst[:count]
    for start in range(0, len(a), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        filling = (_COLUMNS - len(a[part])) if start else 0
        for images in (a, b, maps):
            rows += [images[part], np.repeat(blank, filling, axis=0)]
        labels += ["A", "B", f"difference x{factor}"]
        names = [f"no. {n}" for n in numbers[part]] + [""] * filling
        scores = [_short(value) for value in comparison.psnr[numbers[part]]] + [""] * filling
        captions += [*names, *[""] * len(names), *scores]
    return save_grid(
        path,
        np.concatenate(rows),
        min(_COLUMNS, len(a)),
        title=f"A: {comparison.names[0]}   B: {comparison.names[1]}",
        row_labels=labels,
        captions=captions,
        overwrite=overwrite,
    )


def _short(value: float) -> str:
    return "equal" if np.isinf(value) else f"{value:.1f} dB"


def _page(comparison: Comparison, title: str) -> str:
    a, b = comparison.pairs
    factor = amplification(a, b)
    maps = difference_maps(a, b, factor)
    scores = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>\n"
        for name, value in comparison.summary()
    )
    rows = "".join(
        f"<tr><td>no. {number}<br>{_row_scores(comparison, number)}</td>"
        + "".join(f"<td>{_inline(image)}</td>" for image in images)
        + "</tr>\n"
        for number, *images in zip(comparison.worst.tolist(), a, b, maps, strict=True)
    )
    names = [html.escape(name) for name in comparison.names]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>A: <code>{names[0]}</code><br>B: <code>{names[1]}</code></p>
<table class="scores">
{scores}</table>
<h2>The {len(a)} pairs that differ most, of {comparison.count}</h2>
<p>Worst first. The difference is |A - B|, multiplied by {factor}.</p>
<table class="pairs">
<tr><th></th><th>A</th><th>B</th><th>difference x{factor}</th></tr>
{rows}</table>
</body></html>
"""


def _row_scores(comparison: Comparison, number: int) -> str:
    parts = [decibels(float(comparison.psnr[number]))]
    parts.append(f"largest {comparison.largest[number]}")
    for name, values in (("SSIM", comparison.ssim), ("LPIPS", comparison.lpips)):
        if values is not None:
            parts.append(f"{name} {values[number]:.4f}")
    return "<br>".join(parts)


def _inline(image: UInt8[np.ndarray, "h w c"]) -> str:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'
