"""Non-leaking augmentation of training images on the device (Karras et al. 2022, appendix F.2).

Every transformation is told to the network by labels, which are zero for an image left alone, so
that a network sampled with zeros does not produce transformed images (Karras et al. 2020, after
StyleGAN2-ADA's pipeline). An image's transformations depend on its own key alone.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dit_jax.options import option, register_section
from dit_jax.ranges import NOT_NEGATIVE, SHARE

# The symlet of 6 vanishing moments, the filter in which images are resampled.
_SYM6 = np.array(
    [
        0.015404109327027373,
        0.0034907120842174702,
        -0.11799011114819057,
        -0.048311742585633,
        0.4910559419267466,
        0.787641141030194,
        0.3379294217276218,
        -0.07263752278646252,
        -0.021060292512300564,
        0.04472490177066578,
        0.0017677118642428036,
        -0.007800708325034148,
    ]
)
_EDGE = 3  # pixels around the image that the downsampling filter needs

# Transformations in the order in which they are made and labelled: labels, and the names of the
# random numbers each is drawn as.
_LABELS = {
    "xflip": 1,
    "yflip": 1,
    "rotate_int": 2,
    "translate_int": 2,
    "scale": 1,
    "rotate_frac": 2,
    "aniso": 2,
    "translate_frac": 2,
    "brightness": 1,
    "contrast": 1,
    "lumaflip": 1,
    "hue": 2,
    "saturation": 1,
}
_GEOMETRIC = ("scale", "rotate_frac", "aniso", "translate_frac")
_COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")

Draws = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Which transformations there are and how strong they are.

    The multipliers say how much more often than `probability` a transformation is made; 0 takes it
    and its labels out. The defaults are EDM's for CIFAR-10 and FFHQ, of 9 labels, made at
    probability 0.12 there.
    """

    probability: float = option(0.0, "of each transformation, times its multiplier; 0: none", SHARE)
    xflip: float = option(
        1e8,
        "multiplier of mirroring left to right, in half of the cases; 1e8: a fair coin",
        NOT_NEGATIVE,
    )
    yflip: float = option(
        1.0, "multiplier of mirroring top to bottom, in half of the cases", NOT_NEGATIVE
    )
    rotate_int: float = option(
        0.0, "multiplier of a rotation by 0, 90, 180 or 270 degrees", NOT_NEGATIVE
    )
    translate_int: float = option(0.0, "multiplier of a translation by whole pixels", NOT_NEGATIVE)
    scale: float = option(1.0, "multiplier of isotropic scaling", NOT_NEGATIVE)
    rotate_frac: float = option(1.0, "multiplier of a rotation by any angle", NOT_NEGATIVE)
    aniso: float = option(1.0, "multiplier of anisotropic scaling", NOT_NEGATIVE)
    translate_frac: float = option(1.0, "multiplier of a translation by any length", NOT_NEGATIVE)
    brightness: float = option(0.0, "multiplier of a shift of all channels", NOT_NEGATIVE)
    contrast: float = option(0.0, "multiplier of a scaling of all channels", NOT_NEGATIVE)
    lumaflip: float = option(
        0.0, "multiplier of inverting luma, in half of the cases", NOT_NEGATIVE
    )
    hue: float = option(0.0, "multiplier of a rotation of hue", NOT_NEGATIVE)
    saturation: float = option(0.0, "multiplier of a scaling of saturation", NOT_NEGATIVE)
    translate_int_max: float = option(
        0.125, "largest whole translation, as a share of the side", NOT_NEGATIVE
    )
    scale_std: float = option(0.2, "standard deviation of log2 of the scale", NOT_NEGATIVE)
    rotate_frac_max: float = option(1.0, "largest angle, as a share of 180 degrees", NOT_NEGATIVE)
    aniso_std: float = option(0.2, "standard deviation of log2 of the anisotropy", NOT_NEGATIVE)
    aniso_rotate_prob: float = option(0.5, "probability that its axes are rotated", SHARE)
    translate_frac_std: float = option(
        0.125, "standard deviation of the translation, as a share of the side", NOT_NEGATIVE
    )
    brightness_std: float = option(
        0.2, "standard deviation of the shift, in the image's units", NOT_NEGATIVE
    )
    contrast_std: float = option(0.5, "standard deviation of log2 of the contrast", NOT_NEGATIVE)
    hue_max: float = option(1.0, "largest rotation of hue, as a share of 180 degrees", NOT_NEGATIVE)
    saturation_std: float = option(
        1.0, "standard deviation of log2 of the saturation", NOT_NEGATIVE
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_probability = field.name in ("probability", "aniso_rotate_prob")
            if value < 0 or (is_probability and value > 1):
                expected = "0 to 1" if is_probability else "0 or more"
                raise ValueError(f"augmentation.{field.name}={value}: expected {expected}")
        if not self.enabled:
            raise ValueError("augmentation: every multiplier is 0; set probability=0 for none")

    @property
    def enabled(self) -> tuple[str, ...]:
        """The transformations with a multiplier, in order."""
        return tuple(name for name in _LABELS if getattr(self, name) > 0)

    @property
    def label_dim(self) -> int:
        """Number of labels, the network's `augment_dim`."""
        return sum(_LABELS[name] for name in self.enabled)

    def __call__(
        self, keys: Key[Array, " b"], images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b d"]]:
        """The transformed images and their labels.

        Args:
            keys: one an image.
            images: of 1 or 3 channels, where colours are transformed.

        Raises:
            ValueError: images these transformations cannot be made of.
        """
        return jax.vmap(lambda key, image: self.apply(self.draw(key), image))(keys, images)

    def draw(self, key: Key[Array, ""]) -> dict[str, Array]:
        """One image's random numbers by transformation, zero where it is not made."""
        return {
            name: self._draw(name, jax.random.fold_in(key, i))
            for i, name in enumerate(_LABELS)
            if name in self.enabled
        }

    def _draw(self, name: str, key: Key[Array, ""]) -> Array:
        number_key, made_key, extra_key = jax.random.split(key, 3)
        made = jax.random.uniform(made_key) < getattr(self, name) * self.probability
        if name in ("xflip", "yflip", "lumaflip", "rotate_int"):
            choices = 4 if name == "rotate_int" else 2
            drawn = jax.random.randint(number_key, (), 0, choices).astype(jnp.float32)
        elif name == "translate_int":
            drawn = jax.random.uniform(number_key, (2,), minval=-1.0, maxval=1.0)
        elif name in ("rotate_frac", "hue"):
            largest = math.pi * (self.rotate_frac_max if name == "rotate_frac" else self.hue_max)
            drawn = jax.random.uniform(number_key, minval=-largest, maxval=largest)
        elif name == "translate_frac":
            drawn = jax.random.normal(number_key, (2,))
        else:
            drawn = jax.random.normal(number_key)
        drawn = jnp.where(made, drawn, jnp.zeros_like(drawn))
        if name != "aniso":
            return drawn
        angle_key, rotated_key = jax.random.split(extra_key)
        angle = jax.random.uniform(angle_key, minval=-math.pi, maxval=math.pi)
        rotated = jax.random.uniform(rotated_key) < self.aniso_rotate_prob
        return jnp.stack([drawn, jnp.where(rotated, angle, 0.0)])

    def apply(
        self, draws: Draws, image: Float[Array, "h w c"]
    ) -> tuple[Float[Array, "h w c"], Float[Array, " d"]]:
        """One image transformed by given random numbers (of `draw`), and its labels."""
        self._require_fitting(image)
        image, labels = self._moved_pixels(draws, image)
        if any(name in self.enabled for name in _GEOMETRIC):
            inverse, more = self._inverse_map(draws, image.shape)
            image = _warp(image, inverse)
            labels += more
        if any(name in self.enabled for name in _COLOR):
            matrix, more = self._color_matrix(draws)
            image = _recolored(image, matrix)
            labels += more
        return image, jnp.stack([jnp.asarray(label, jnp.float32) for label in labels])

    def _require_fitting(self, image: Array) -> None:
        height, width, channels = image.shape
        if "rotate_int" in self.enabled and height != width:
            raise ValueError(f"augmentation.rotate_int needs square images, not {image.shape}")
        if any(name in self.enabled for name in _COLOR) and channels not in (1, 3):
            raise ValueError(
                f"augmentation of colours needs images of 1 or 3 channels, not {channels}: set "
                "brightness, contrast, lumaflip, hue and saturation to 0"
            )

    def _moved_pixels(self, draws: Draws, image: Array) -> tuple[Array, list[Array]]:
        labels: list[Array] = []
        height, width, _ = image.shape
        if "xflip" in self.enabled:
            w = draws["xflip"]
            image = jnp.where(w == 1, image[:, ::-1], image)
            labels += [w]
        if "yflip" in self.enabled:
            w = draws["yflip"]
            image = jnp.where(w == 1, image[::-1], image)
            labels += [w]
        if "rotate_int" in self.enabled:
            w = draws["rotate_int"]
            columns, rows = (w == 1) | (w == 2), (w == 2) | (w == 3)
            image = jnp.where(columns, image[:, ::-1], image)
            image = jnp.where(rows, image[::-1], image)
            image = jnp.where((w == 1) | (w == 3), image.swapaxes(0, 1), image)
            labels += [columns, rows]
        if "translate_int" in self.enabled:
            ranges = jnp.array([width, height]) * self.translate_int_max
            moved = jnp.round(draws["translate_int"] * ranges)
            image = image[:, _mirrored(jnp.arange(width) - moved[0].astype(jnp.int32), width)]
            image = image[_mirrored(jnp.arange(height) + moved[1].astype(jnp.int32), height)]
            labels += [*(moved / ranges)]
        return image, labels

    def _inverse_map(self, draws: Draws, shape: tuple[int, ...]) -> tuple[Array, list[Array]]:
        """The matrix from a result's pixel, (x, y, 1) from the centre, to the image's."""
        inverse, labels = jnp.eye(3), []

        def then(matrix: Array) -> Array:
            return _matmul(inverse, matrix)

        if "scale" in self.enabled:
            w = draws["scale"]
            s = jnp.exp2(w * self.scale_std)
            inverse = then(_scaling(1 / s, 1 / s))
            labels += [w]
        if "rotate_frac" in self.enabled:
            w = draws["rotate_frac"]
            inverse = then(_rotation(w))
            labels += [jnp.cos(w) - 1, jnp.sin(w)]
        if "aniso" in self.enabled:
            w, angle = draws["aniso"]
            s = jnp.exp2(w * self.aniso_std)
            inverse = then(_rotation(-angle))
            inverse = then(_scaling(1 / s, s))
            inverse = then(_rotation(angle))
            labels += [w * jnp.cos(angle), w * jnp.sin(angle)]
        if "translate_frac" in self.enabled:
            w = draws["translate_frac"]
            x, y = (-w[i] * shape[1 - i] * self.translate_frac_std for i in (0, 1))
            inverse = then(jnp.eye(3).at[:2, 2].set(jnp.stack([x, y])))
            labels += [w[0], w[1]]
        return inverse, labels

    def _color_matrix(self, draws: Draws) -> tuple[Array, list[Array]]:
        """The 4 x 4 matrix of an affine map of (r, g, b, 1)."""
        matrix, labels = jnp.eye(4), []
        axis = np.array([1, 1, 1, 0]) / math.sqrt(3)
        luma = jnp.asarray(np.outer(axis, axis), jnp.float32)
        if "brightness" in self.enabled:
            w = draws["brightness"]
            shift = jnp.eye(4).at[:3, 3].set(w * self.brightness_std)
            matrix = _matmul(shift, matrix)
            labels += [w]
        if "contrast" in self.enabled:
            w = draws["contrast"]
            c = jnp.exp2(w * self.contrast_std)
            matrix = _matmul(jnp.diag(jnp.stack([c, c, c, jnp.ones_like(c)])), matrix)
            labels += [w]
        if "lumaflip" in self.enabled:
            w = draws["lumaflip"]
            matrix = _matmul(jnp.eye(4) - 2 * luma * w, matrix)
            labels += [w]
        if "hue" in self.enabled:
            w = draws["hue"]
            matrix = _matmul(_hue_rotation(w), matrix)
            labels += [jnp.cos(w) - 1, jnp.sin(w)]
        if "saturation" in self.enabled:
            w = draws["saturation"]
            saturation = luma + (jnp.eye(4) - luma) * jnp.exp2(w * self.saturation_std)
            matrix = _matmul(saturation, matrix)
            labels += [w]
        return matrix, labels


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _mirrored(index: Array, size: int) -> Array:
    """Indices beyond the ends reflected there, without repeating the end."""
    period = max(2 * size - 2, 1)
    return size - 1 - jnp.abs(size - 1 - index % period)


def _scaling(x: Array, y: Array) -> Array:
    return jnp.diag(jnp.stack([x, y, jnp.ones_like(x)]))


def _rotation(angle: Array) -> Array:
    c, s, zero, one = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle), jnp.ones_like(angle)
    return jnp.stack([c, -s, zero, s, c, zero, zero, zero, one]).reshape(3, 3)


def _hue_rotation(angle: Array) -> Array:
    """The rotation of (r, g, b) about the grey axis (Rodrigues)."""
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    grey = np.full((3, 3), 1 / 3)
    cross, grey = jnp.asarray(cross, jnp.float32), jnp.asarray(grey, jnp.float32)
    rotation = jnp.cos(angle) * (jnp.eye(3) - grey) + jnp.sin(angle) * cross + grey
    return jnp.eye(4).at[:3, :3].set(rotation)


def _recolored(image: Array, matrix: Array) -> Array:
    if image.shape[-1] == 3:
        return _matmul(image, matrix[:3, :3].T) + matrix[:3, 3][None, None]
    row = matrix[:3].mean(axis=0)
    return image * row[:3].sum() + row[3]


@functools.lru_cache(maxsize=8)
def _upsampling(size: int) -> np.ndarray:
    """[2 (3 size - 2), size]: reflects pixels at both ends, then doubles the resolution."""
    margin = size - 1
    rows = np.pad(np.eye(size), ((0, 0), (margin, margin)), mode="reflect")
    spaced = np.zeros((size, 2 * rows.shape[1] - 1))
    spaced[:, ::2] = rows
    spaced = np.pad(spaced, ((0, 0), (6, 6)))
    # A true convolution: np.convolve flips the filter, as the upsampling half of the pair must.
    return np.stack([np.convolve(row, _SYM6, "valid") for row in spaced], axis=1).astype("f")


@functools.lru_cache(maxsize=8)
def _downsampling(size: int) -> np.ndarray:
    """[size, 2 (size + 6)]: halves the resolution and crops the edges."""
    length = 2 * (size + 2 * _EDGE)
    rows = np.pad(np.eye(length), ((0, 0), (5, 5)))
    half = np.stack([np.correlate(row, _SYM6, "valid")[::2] for row in rows], axis=1)
    return half[_EDGE:-_EDGE].astype("f")


def _warp(image: Array, inverse: Array) -> Array:
    """The image resampled at `inverse` of every pixel, at twice the resolution between filters.

    The original reflects the image at its borders as far as a batch needs; here that is always as
    far as one reflection goes, which makes an image's result independent of its batch.
    """
    height, width, _ = image.shape
    exact = {"precision": jax.lax.Precision.HIGHEST}
    up = jnp.einsum("yh,xw,hwc->yxc", _upsampling(height), _upsampling(width), image, **exact)
    # Half pixels of the fine grids, whose samples lie 1/2 off the coarse ones'.
    rows, columns = (2 * (side + 2 * _EDGE) for side in (height, width))
    y, x = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    x, y = ((x + 0.5 - columns / 2) + 0.5) / 2, ((y + 0.5 - rows / 2) + 0.5) / 2
    points = jnp.stack([x, y, jnp.ones_like(x)]).reshape(3, -1)
    x, y, _ = 2 * _matmul(inverse, points) - 0.5
    found = _bilinear(up, y + up.shape[0] / 2 - 0.5, x + up.shape[1] / 2 - 0.5)
    found = found.reshape(rows, columns, -1)
    down = _downsampling(height), _downsampling(width)
    return jnp.einsum("hy,wx,yxc->hwc", *down, found, **exact)


def _bilinear(image: Array, y: Array, x: Array) -> Array:
    """Values at real-valued positions [n], zero beyond the borders."""
    top, left = jnp.floor(y), jnp.floor(x)
    total = jnp.zeros((y.shape[0], image.shape[-1]))
    for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, column_weight in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < image.shape[0]) & (column >= 0) & (column < image.shape[1])
            index = (
                jnp.clip(row, 0, image.shape[0] - 1).astype(jnp.int32),
                jnp.clip(column, 0, image.shape[1] - 1).astype(jnp.int32),
            )
            weight = jnp.where(inside, row_weight * column_weight, 0.0)
            total = total + weight[:, None] * image[index]
    return total


register_section("augmentation", Augmentation)
