"""One .npz file a split, holding the concatenated bytes of small images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer, UInt8

from dit_jax.data.images import DECODE_ERRORS, Size, as_size, decode_image, validate_resize
from dit_jax.data.labels import validate_labels
from dit_jax.data.records.header import MAX_CLASSES
from dit_jax.data.source import Batch, DatasetInfo, Example, Source, fingerprint
from dit_jax.options import option
from dit_jax.untrusted import npz_names, read_npz, shown

_KEYS = ("jpeg", "offsets", "labels")


@dataclasses.dataclass(frozen=True)
class JpegNpzOptions:
    """Keys of config.data.jpeg_npz."""

    path: str = option(
        "",
        "with {split} where the split's name stands",
        expected="'data/cifar10_{split}.npz', files of JPEGs, {split} where train or test stands",
    )
    resize: str = option("none", "adm: scale and centre-crop to the model's size | none")


def open_jpeg_npz(
    split: str,
    *,
    path: str,
    image_size: Size | None = None,
    channels: int = 3,
    resize: str = JpegNpzOptions.resize,
    keep_decoded: bool = True,
) -> JpegNpz:
    """Open a .npz file of JPEG images.

    The file holds, for n images of one size: `jpeg`, uint8, the images' files one after the
    other; `offsets`, n + 1 integers: image i is jpeg[offsets[i]:offsets[i + 1]]; `labels`, n
    integers; optionally `class_names`, one string a class (without it, the number of classes is
    the highest label plus one).

    Args:
        split: Replaces "{split}" in `path`.
        path: For example "data/cifar10_jpeg_{split}.npz".
        image_size: Side of the images in pixels, or (height, width), for "adm".
        channels: 3 (RGB) or 1 (grey).
        resize: "adm" scales and crops to `image_size` as ADM does, "none" leaves the images' size.
        keep_decoded: Images are decoded when first read; keep them (n * h * w * c bytes of memory
            when all were read), so that later epochs cost no decoding.

    Raises:
        FileNotFoundError: No such file.
        ValueError: "{split}" is missing, or the file's content contradicts itself.
    """
    validate_resize(resize, image_size, channels)
    if "{split}" not in path:
        raise ValueError(
            f"path {path!r} names one file for every split: write {{split}} where the split's "
            f"name stands, as in 'data/cifar10_jpeg_{{split}}.npz'"
        )
    file = Path(path.replace("{split}", split)).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {file} for split {split!r} (path={path!r})")
    content = read_npz(file, (*_KEYS, "class_names"))
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(
            f"{file} lacks the arrays {missing}; it has "
            f"[{', '.join(shown(name) for name in npz_names(file)[:8])}]. Expected {list(_KEYS)}, "
            "and optionally class_names."
        )
    jpeg, offsets, labels = (content[key] for key in _KEYS)
    class_names = _read_class_names(file, content.get("class_names"))
    _validate_offsets(file, jpeg, offsets, labels, class_names)
    size = as_size(image_size) if resize == "adm" else None
    return JpegNpz(file, split, jpeg, offsets, labels, class_names, channels, keep_decoded, size)


class JpegNpz(Source):
    """See `open_jpeg_npz`."""

    def __init__(
        self,
        file: Path,
        split: str,
        jpeg: UInt8[np.ndarray, " bytes"],
        offsets: Integer[np.ndarray, " n_and_1"],
        labels: Integer[np.ndarray, " n"],
        class_names: tuple[str, ...],
        channels: int,
        keep_decoded: bool,
        size: tuple[int, int] | None = None,
    ):
        self._file, self._jpeg, self._offsets = file, jpeg, offsets
        self._labels, self._channels = labels.astype(np.int32), channels
        num_classes = len(class_names) or int(labels.max()) + 1
        validate_labels(self._labels, num_classes, self.describe)
        self._keep, self._decoded, self._size = keep_decoded, None, size
        shape = self._decode(0).shape
        self.info = DatasetInfo(
            name=f"jpeg_npz/{file.stem}",
            split=split,
            image_shape=shape,
            num_classes=num_classes,
            num_examples=len(labels),
            class_names=class_names,
            fingerprint=fingerprint("jpeg_npz", len(jpeg), offsets, self._labels, shape),
        )

    def __getstate__(self) -> dict:
        """Leave the decoded images behind: a worker decodes its own."""
        return {**self.__dict__, "_decoded": None}

    def __getitem__(self, index: int) -> Example:
        """Return example `index`."""
        return {"image": self._decode(index), "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        """Name an example by file and position."""
        return f"image {index} of {self._file}"

    def _gather(self, indices: Int[np.ndarray, " b"]) -> Batch:
        if not self._keep:
            return super()._gather(indices)
        if self._decoded is None:
            shape = (len(self), *self.info.image_shape)
            # Zero pages take no memory until an image is written to them.
            self._decoded = np.zeros(shape, np.uint8), np.zeros(len(self), bool)
        images, known = self._decoded
        for index in indices[~known[indices]]:
            images[index] = self._decode(int(index))
            known[index] = True  # last: other threads read images only where this is set
        return {"image": images[indices], "label": self._labels[indices]}

    def _decode(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        data = self._jpeg[self._offsets[index] : self._offsets[index + 1]].tobytes()
        try:
            resize = "none" if self._size is None else "adm"
            pixels = decode_image(
                data, channels=self._channels, resize=resize, image_size=self._size
            )
        except DECODE_ERRORS as error:
            raise ValueError(f"{self.describe(index)} cannot be decoded: {error}") from error
        if index and pixels.shape != self.info.image_shape:
            raise ValueError(
                f"images of one .npz must have one size: {self.describe(index)} is "
                f"{pixels.shape[1]}x{pixels.shape[0]}, image 0 is "
                f"{self.info.image_shape[1]}x{self.info.image_shape[0]} (width x height)"
            )
        return pixels


def _read_class_names(file: Path, names: np.ndarray | None) -> tuple[str, ...]:
    if names is None:
        return ()
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise ValueError(f"{file}: class_names must be a list of strings")
    return tuple(map(str, names))


def _validate_offsets(
    file: Path,
    jpeg: np.ndarray,
    offsets: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
) -> None:
    if labels.ndim != 1 or len(labels) == 0 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{file}: labels must be a non-empty vector of integers, not {labels.dtype}"
            f"{list(labels.shape)}"
        )
    if offsets.shape != (len(labels) + 1,) or offsets.dtype.kind not in "iu":
        raise ValueError(
            f"{file}: {len(labels)} labels need {len(labels) + 1} integer offsets, found "
            f"{offsets.dtype}{list(offsets.shape)}"
        )
    if not class_names and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise ValueError(
            f"{file}: labels must lie in 0..{MAX_CLASSES - 1}; they go from {labels.min()} to "
            f"{labels.max()}"
        )
    ordered = jpeg.ndim == 1 and offsets[0] == 0 and bool(np.all(offsets[:-1] < offsets[1:]))
    if jpeg.dtype != np.uint8 or not ordered or offsets[-1] != len(jpeg):
        raise ValueError(
            f"{file}: offsets must rise from 0 to the number of bytes in jpeg ({jpeg.size}, "
            f"{jpeg.dtype}); they go from {offsets[0]} to {offsets[-1]}"
        )
