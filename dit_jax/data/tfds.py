"""Image classification data sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from typing import Any

from dit_jax.data.images import (
    DECODE_ERRORS,
    Size,
    as_size,
    decode_image,
    size_text,
    validate_resize,
)
from dit_jax.data.source import DatasetInfo, Example, Source, fingerprint
from dit_jax.nearest import did_you_mean
from dit_jax.options import option


@dataclasses.dataclass(frozen=True)
class TfdsOptions:
    """Keys of config.data.tfds."""

    dataset: str = option(
        "",
        "its name in TFDS, as cifar10",
        expected="NAME of a data set of TensorFlow Datasets, as cifar10",
    )
    data_dir: str = option("", "where TFDS keeps it; empty: TFDS's default")
    resize: str = option("adm", "adm: scale and centre-crop to the model's size | none")


def open_tfds(
    split: str,
    *,
    dataset: str,
    data_dir: str | None = None,
    image_size: Size | None = None,
    channels: int | None = None,
    resize: str = "none",
    image_key: str = "image",
    label_key: str = "label",
) -> TfdsImages:
    """Open a data set that TFDS has prepared on disk in the array_record format.

    Nothing is ever downloaded: for a data set that is not prepared, the error says what to run.

    Args:
        split: A split TFDS knows, slices such as "train[:10%]" included. "test" falls back on
            "validation" in data sets without a test split.
        dataset: Name with optional config and version, as for `tfds.builder`: "cifar10",
            "imagenet2012:5.*.*".
        data_dir: Where TFDS keeps its data sets; default: its own, ~/tensorflow_datasets.
        image_size: Side of the images in pixels, or (height, width). With resize="none": what they
            must have.
        channels: 3 (RGB), 1 (grey), or None for the data set's own.
        resize: "adm" scales and crops to `image_size` as ADM does; "none" needs a data set of
            one size.
        image_key: The feature that is the image.
        label_key: The feature that is the class.

    Raises:
        FileNotFoundError: The data set is not prepared (the message holds the command).
        ValueError: Unknown data set, split or feature; images of mixed or unexpected sizes.
    """
    import tensorflow_datasets as tfds

    builder = _builder(tfds, dataset, data_dir)
    hide_accelerators_from_tensorflow()
    _require_prepared(tfds, builder, dataset, data_dir)
    split = _resolve_split(builder.info.splits, split, dataset)
    image, label = _features(tfds, builder.info.features, dataset, image_key, label_key)
    channels = image.shape[-1] if channels is None else channels
    validate_resize(resize, image_size, channels)
    height, width = _size(image.shape, image_size, resize, dataset)
    # Images stay encoded here and are decoded by this library, so that grey, palette and
    # transparent images come out the same from every source.
    records = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
    hide_accelerators_from_tensorflow()
    details = builder.info.splits[split]
    info = DatasetInfo(
        name=f"tfds/{dataset}",
        split=split,
        image_shape=(height, width, channels),
        num_classes=label.num_classes,
        num_examples=len(records),
        class_names=tuple(label.names),
        fingerprint=fingerprint(
            "tfds",
            builder.info.full_name,
            split,
            len(records),
            [str(instruction) for instruction in details.file_instructions],
            [height, width, channels, resize],
        ),
    )
    return TfdsImages(info, records, resize, image_key, label_key)


class TfdsImages(Source):
    """See `open_tfds`. Images are decoded when read."""

    slow_to_read = True

    def __init__(
        self, info: DatasetInfo, records: Any, resize: str, image_key: str, label_key: str
    ):
        self.info = info
        self._records, self._resize = records, resize
        self._image_key, self._label_key = image_key, label_key

    def __getitem__(self, index: int) -> Example:
        """Return example `index`."""
        record = self._records[index]
        height, width, channels = self.info.image_shape
        try:
            pixels = decode_image(
                record[self._image_key],
                channels=channels,
                resize=self._resize,
                image_size=(height, width),
            )
        except DECODE_ERRORS as error:
            raise ValueError(
                f"{self.describe(index)} cannot be decoded: {error}. Prepare the data set again."
            ) from error
        return {"image": pixels, "label": int(record[self._label_key])}


def hide_accelerators_from_tensorflow() -> None:
    """Keep TensorFlow, if something has imported it, from claiming the accelerators' memory."""
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None or not hasattr(tensorflow, "config"):
        return
    for kind in ("GPU", "TPU"):
        try:
            tensorflow.config.set_visible_devices([], kind)
        except RuntimeError as error:
            raise RuntimeError(
                f"TensorFlow was initialised before this data set was opened and holds {kind} "
                f"memory: open the data set first, or call "
                f"tf.config.set_visible_devices([], {kind!r}) at the start of the program"
            ) from error


def _builder(tfds: Any, dataset: str, data_dir: str | None) -> Any:
    try:
        return tfds.builder(dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        name = dataset.split("/")[0].split(":")[0]
        known = tfds.list_builders(with_community_datasets=False)
        if name in known:
            raise ValueError(f"TFDS has no data set {dataset!r}: {_first_line(error)}") from error
        hint = did_you_mean(name, known) or "; see `tfds.list_builders()`"
        raise ValueError(
            f"TFDS knows no data set {dataset!r} and none of that name is prepared in "
            f"{data_dir or 'its default folder'}{hint}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _require_prepared(tfds: Any, builder: Any, dataset: str, data_dir: str | None) -> None:
    where = "" if data_dir is None else f", data_dir={json.dumps(str(data_dir))}"
    code = (
        f"import tensorflow_datasets as tfds; tfds.builder({json.dumps(dataset)}{where}, "
        'file_format="array_record").download_and_prepare()'
    )
    command = f"python -c {shlex.quote(code)}"
    if not builder.info.splits:
        raise FileNotFoundError(
            f"TFDS data set {dataset!r} is not prepared in {builder.data_dir}. Run:\n  {command}"
        )
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = builder.info.file_format.value
        raise FileNotFoundError(
            f"TFDS data set {dataset!r} is prepared in {builder.data_dir} as {found}, which has "
            f"no random access. Prepare it as array_record: move that folder away (or give "
            f"another data_dir) and run:\n  {command}"
        )


def _resolve_split(splits: Any, split: str, dataset: str) -> str:
    if split == "test" and "test" not in splits and "validation" in splits:
        return "validation"
    try:
        count = splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"TFDS data set {dataset!r} has no split {split!r}; it has {sorted(splits)}"
        ) from error
    if not count:
        raise ValueError(f"split {split!r} of TFDS data set {dataset!r} is empty")
    return split


def _features(tfds: Any, features: Any, dataset: str, image_key: str, label_key: str) -> Any:
    for argument, key, kind in (
        ("image_key", image_key, tfds.features.Image),
        ("label_key", label_key, tfds.features.ClassLabel),
    ):
        if key not in features or not isinstance(features[key], kind):
            suitable = [name for name, value in features.items() if isinstance(value, kind)]
            raise ValueError(
                f"TFDS data set {dataset!r} has no {kind.__name__} feature {key!r}; set "
                f"{argument} to one of {suitable}"
                if suitable
                else f"TFDS data set {dataset!r} is no image classification data set: it has no "
                f"{kind.__name__} feature"
            )
    return features[image_key], features[label_key]


def _size(
    shape: tuple[int | None, ...], image_size: Size | None, resize: str, dataset: str
) -> tuple[int, int]:
    """Return the (height, width) of the images after resizing."""
    if resize == "adm":
        return as_size(image_size)
    height, width = shape[:2]
    if height is None or width is None:
        raise ValueError(
            f"TFDS data set {dataset!r} has images of mixed sizes: set resize='adm' and "
            f"image_size to scale and crop them to one size"
        )
    if image_size is not None and (height, width) != as_size(image_size):
        raise ValueError(
            f"the images of TFDS data set {dataset!r} are {width}x{height} (width x height), not "
            f"image_size={size_text(image_size)}. Correct image_size, or set resize='adm' to scale "
            f"and crop them."
        )
    return height, width
