"""Grids of images for people to look at: samples beside real images, with titles and labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_jax.atomic import atomic_file
from dit_jax.evaluation.files import to_pil
from dit_jax.evaluation.images import AnyArray, to_uint8
from dit_jax.output_formats import picture_format

# Pixels are what a grid is looked at for: WebP keeps them, JPEG as well as it can.
_SAVING = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
# In pixels of the finished picture.
MARGIN, PANEL_GAP, CELL_GAP = 16, 32, 4
TITLE_SIZE, LABEL_SIZE, CAPTION_SIZE = 18, 16, 12
SMALLEST_COMFORTABLE_SIDE = 48
MOST_COLUMNS = 32  # that classes in turn may make
BACKGROUND, INK, FAINT_INK = (255, 255, 255), (24, 24, 27), (113, 113, 122)


@dataclass(frozen=True)
class Panel:
    """One grid of images within a picture.

    Attributes:
        images: uint8 or [-1, 1] images [n, h, w, c], c = 1, 3 or 4, laid out row by row.
        title: Written above the grid.
        columns: Images a row; by default the smallest number that makes at least as many columns as
            rows.
        row_labels: Written left of the rows, one for each.
        captions: Written under the images, one for each.
    """

    images: AnyArray
    title: str | None = None
    columns: int | None = None
    row_labels: Sequence[str] | None = None
    captions: Sequence[str] | None = None


def labelled_panel(
    images: AnyArray, labels: AnyArray | Sequence[int], title: str | None = None
) -> Panel:
    """A panel whose captions are the images' classes; of classes in turn, each has its columns.

    Args:
        images: as `Panel`'s.
        labels: classes, one an image.
        title: as `Panel`'s.
    """
    labels = np.asarray(labels)
    period = len(np.unique(labels))
    columns = None
    if 0 < period < len(labels) and (labels == np.resize(labels[:period], labels.shape)).all():
        columns = period * max(1, round(len(labels) ** 0.5 / period))
        columns = columns if columns <= MOST_COLUMNS else None
    return Panel(images, title, columns, captions=[str(label) for label in labels])


def save_grid(
    path: str | os.PathLike,
    images: AnyArray,
    columns: int | None = None,
    *,
    upscale: int | None = None,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    rounding: str = "nearest",
    overwrite: bool = False,
) -> Path:
    """Writes one grid of images, atomically; see `Panel` and `save_panels`."""
    panel = Panel(images, title, columns, row_labels, captions)
    return save_panels(path, [panel], upscale=upscale, rounding=rounding, overwrite=overwrite)


def save_panels(
    path: str | os.PathLike,
    panels: Sequence[Panel],
    *,
    upscale: int | None = None,
    rounding: str = "nearest",
    overwrite: bool = False,
) -> Path:
    """Writes panels side by side, e.g. samples and real images, as one picture, atomically.

    Args:
        path: The file to write, of a suffix of `output_formats.PICTURES`.
        panels: From left to right.
        upscale: Whole factor by which pixels are repeated (nearest neighbour, so that a pixel stays
            one). By default each panel's smallest that makes its images comfortable to look at.
        rounding: How floating point becomes bytes, see `to_uint8`.
        overwrite: Replace an existing file instead of refusing.

    Raises:
        ValueError: No images, or labels, captions or columns that do not fit them; a name that is
            no picture's.
        FileExistsError: `path` exists and `overwrite` is False.
    """
    picture_format(path)  # before the work of drawing
    picture = render_panels(panels, upscale=upscale, rounding=rounding)
    return save_picture(path, picture, overwrite=overwrite)


def save_picture(path: str | os.PathLike, picture: Image.Image, *, overwrite: bool = False) -> Path:
    """Writes a picture, as `render_panels` draws it, in the format that its name says, atomically.

    Raises:
        ValueError: The name is no picture's.
        FileExistsError: `path` exists and `overwrite` is False.
    """
    kind = picture_format(path)
    with atomic_file(path, overwrite=overwrite) as file:
        picture.save(file, format=kind, **_SAVING.get(kind, {}))
    return Path(path)


def render_panels(
    panels: Sequence[Panel], *, upscale: int | None = None, rounding: str = "nearest"
) -> Image.Image:
    """Draws panels side by side on white; the arguments are those of `save_panels`."""
    if not panels:
        raise ValueError("no panels to draw")
    if upscale is not None and upscale < 1:
        raise ValueError(f"upscale must be a whole factor of at least 1, got {upscale}")
    layouts = [_Layout.of(panel, upscale, rounding) for panel in panels]
    # Grids start on one line, so a title above any panel makes room above all.
    top = MARGIN + (max(layout.title_height for layout in layouts))
    width = 2 * MARGIN + sum(lay.width for lay in layouts) + PANEL_GAP * (len(layouts) - 1)
    height = top + max(layout.grid_height for layout in layouts) + MARGIN
    picture = Image.new("RGB", (width, height), BACKGROUND)
    left = MARGIN
    for layout in layouts:
        layout.draw(picture, left, top)
        left += layout.width + PANEL_GAP
    return picture


@dataclass(frozen=True)
class _Layout:
    """A panel with every size in pixels decided."""

    panel: Panel
    pixels: np.ndarray
    columns: int
    rows: int
    scale: int
    label_width: int
    caption_height: int
    title_height: int

    @classmethod
    def of(cls, panel: Panel, upscale: int | None, rounding: str) -> _Layout:
        pixels = to_uint8(panel.images, rounding)
        count, height, width, _ = pixels.shape
        if count == 0:
            raise ValueError(f"the panel {panel.title!r} has no images")
        columns = int(np.ceil(np.sqrt(count))) if panel.columns is None else panel.columns
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns}")
        columns = min(columns, count)
        rows = -(-count // columns)
        if panel.row_labels is not None and len(panel.row_labels) != rows:
            raise ValueError(f"{len(panel.row_labels)} row labels for {rows} rows of images")
        if panel.captions is not None and len(panel.captions) != count:
            raise ValueError(f"{len(panel.captions)} captions for {count} images")
        scale = upscale or max(1, -(-SMALLEST_COMFORTABLE_SIDE // min(height, width)))
        labels = [_text_width(label, LABEL_SIZE) for label in panel.row_labels or []]
        return cls(
            panel=panel,
            pixels=pixels,
            columns=columns,
            rows=rows,
            scale=scale,
            label_width=max(labels) + 2 * CELL_GAP if labels else 0,
            caption_height=CAPTION_SIZE + CELL_GAP if panel.captions is not None else 0,
            title_height=TITLE_SIZE + 3 * CELL_GAP if panel.title else 0,
        )

    @property
    def cell_width(self) -> int:
        return self.pixels.shape[2] * self.scale + CELL_GAP

    @property
    def cell_height(self) -> int:
        return self.pixels.shape[1] * self.scale + CELL_GAP + self.caption_height

    @property
    def width(self) -> int:
        grid = self.label_width + self.columns * self.cell_width - CELL_GAP
        title = self.label_width + _text_width(self.panel.title or "", TITLE_SIZE)
        return max(grid, title)

    @property
    def grid_height(self) -> int:
        return self.rows * self.cell_height - CELL_GAP

    def draw(self, picture: Image.Image, left: int, top: int) -> None:
        """Draws the grid with its upper edge at `top`, its title above."""
        pen = ImageDraw.Draw(picture)
        grid_left = left + self.label_width
        if self.panel.title:
            above = (grid_left, top - self.title_height)
            pen.text(above, self.panel.title, fill=INK, font=_font(TITLE_SIZE), anchor="la")
        image_height, image_width = (side * self.scale for side in self.pixels.shape[1:3])
        for row, label in enumerate(self.panel.row_labels or []):
            middle = (grid_left - 2 * CELL_GAP, top + row * self.cell_height + image_height // 2)
            pen.text(middle, label, fill=INK, font=_font(LABEL_SIZE), anchor="rm")
        for index, image in enumerate(self.pixels):
            row, column = divmod(index, self.columns)
            x, y = grid_left + column * self.cell_width, top + row * self.cell_height
            tile = to_pil(image).resize((image_width, image_height), Image.Resampling.NEAREST)
            picture.paste(tile, (x, y), tile if tile.mode == "RGBA" else None)
            if self.panel.captions is not None:
                below = (x + image_width // 2, y + image_height + CELL_GAP // 2)
                text = self.panel.captions[index]
                pen.text(below, text, fill=FAINT_INK, font=_font(CAPTION_SIZE), anchor="mt")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # The font inside Pillow: the picture is the same on every machine.
    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> int:
    return int(np.ceil(_font(size).getlength(text)))
