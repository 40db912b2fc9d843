"""A small image classifier, trained here: features and label accuracy for images no Inception fits.

Digits of 8x8, grey 28x28 and CIFAR-sized colour images are too small for Inception-V3's features to
mean much. A convolutional network trained on the training split of the very data set gives features
for the Fréchet distance and tells whether a sample shows the class it was asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_jax.evaluation.images import AnyArray, check_images, to_float

Params = dict[str, AnyArray]

INFERENCE_BATCH = 500
ARCHITECTURE = "conv3x3-gelu-maxpool-dense/1"
"""Part of every fingerprint and cache key; raise the number when the computation changes."""


@dataclass(frozen=True)
class ClassifierSettings:
    """Architecture and training of the classifier; all of it enters the cache key.

    Attributes:
        stages: Widths of the 3x3 convolutions, in stages that each end in a 2x2 max pool.
        feature_dim: Width of the penultimate layer, whose activations are the features.
        normalize: Layer-normalise the channels after each convolution (deeper networks need it).
        dropout: Rate before the penultimate layer, in training only.
        steps: Optimizer updates.
        batch_size: Images an update; at most the number of training images is used.
        learning_rate: Peak of AdamW's; warmed up over 5 % of the steps, then a cosine to 0.
        weight_decay: AdamW's, on the kernels.
        label_smoothing: Probability given to the uniform distribution in the targets.
        max_shift: Each training image is shifted by up to so many pixels, edges repeated.
        horizontal_flip: Mirror half of the training images (wrong for digits and letters).
    """

    stages: tuple[tuple[int, ...], ...] = ((16, 32),)
    feature_dim: int = 64
    normalize: bool = False
    dropout: float = 0.5
    steps: int = 900
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.05
    max_shift: int = 1
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        """Refuses settings that cannot be trained."""
        widths = [width for stage in self.stages for width in stage]
        sizes = [*widths, self.feature_dim, self.steps, self.batch_size]
        if not self.stages or not all(self.stages) or min(sizes) < 1:
            raise ValueError(f"stages, feature_dim, steps and batch_size must be positive: {self}")
        if not 0 <= self.dropout < 1 or not 0 <= self.label_smoothing < 1 or self.max_shift < 0:
            raise ValueError(
                f"dropout and label_smoothing must lie in [0, 1), max_shift be at least 0: {self}"
            )

    @classmethod
    def for_images(cls, image_shape: tuple[int, int, int]) -> ClassifierSettings:
        """Settings that suit images of [height, width, channels]: digits, 28x28 grey or CIFAR."""
        height, width, channels = image_shape
        if min(height, width) < 16:
            return DIGITS
        return GREY_28 if channels == 1 else CIFAR10


DIGITS = ClassifierSettings()
"""8x8 grey: about 99 % on held-out scikit-learn digits after some seconds on two CPU cores."""

GREY_28 = ClassifierSettings(
    stages=((16, 32), (64,)), steps=2000, batch_size=128, learning_rate=2e-3, max_shift=2
)
"""28x28 grey, as MNIST and Fashion-MNIST."""

CIFAR10 = ClassifierSettings(
    stages=((32, 64), (128,), (256,)),
    feature_dim=128,
    normalize=True,
    steps=8000,
    batch_size=128,
    learning_rate=2e-3,
    weight_decay=5e-2,
    dropout=0.3,
    max_shift=4,
    horizontal_flip=True,
)
"""32x32 colour, 20 epochs of 50,000: for an accelerator (about 1 s a step on two CPU cores)."""


class Convolution(nnx.Module):
    """3x3 convolution, stride 1, zero-padded, as one matmul over gathered neighbourhoods.

    XLA's own convolution is slow on CPUs inside a compiled loop: a training step on 64 images of
    8x8 with widths 32 and 64 took 108 ms with it and 8 ms like this.
    """

    def __init__(self, channels: int, width: int, *, normalize: bool, rngs: nnx.Rngs) -> None:
        """Makes the kernel, [9 * channels, width], rows ordered by (row, column, channel)."""
        initializer = nnx.initializers.he_normal()
        self.linear = nnx.Linear(9 * channels, width, kernel_init=initializer, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs) if normalize else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Convolution, normalisation if any, GELU."""
        b, h, w, c = x.shape
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        flat = self.linear(jnp.concatenate(shifted, axis=-1).reshape(b * h * w, 9 * c))
        if self.norm is not None:
            flat = self.norm(flat)
        return nnx.gelu(flat).reshape(b, h, w, -1)


class ConvolutionalClassifier(nnx.Module):
    """Stages of convolutions and max pooling, a penultimate dense layer, and logits."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        settings: ClassifierSettings,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the layers for images of [height, width, channels]."""
        height, width, channels = image_shape
        shrink = 2 ** len(settings.stages)
        if min(height, width) < shrink:
            raise ValueError(
                f"images of {height}x{width} are too small for {len(settings.stages)} stages of "
                f"2x2 pooling; use at most {int(np.log2(min(height, width)))}"
            )
        self.stages = nnx.List()
        for widths in settings.stages:
            stage = nnx.List()
            for out in widths:
                stage.append(Convolution(channels, out, normalize=settings.normalize, rngs=rngs))
                channels = out
            self.stages.append(stage)
        flat = (height // shrink) * (width // shrink) * channels
        self.dropout = nnx.Dropout(settings.dropout)
        initializer = nnx.initializers.he_normal()
        self.penultimate = nnx.Linear(
            flat, settings.feature_dim, kernel_init=initializer, rngs=rngs
        )
        self.head = nnx.Linear(settings.feature_dim, num_classes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], dropout_key: Array | None = None
    ) -> tuple[Float[Array, "b feature_dim"], Float[Array, "b num_classes"]]:
        """Features and logits; with a key, dropout is on."""
        for stage in self.stages:
            for convolution in stage:
                x = convolution(x)
            x = _max_pool(x)
        x = x.reshape(x.shape[0], -1)
        x = self.dropout(x, deterministic=dropout_key is None, rngs=dropout_key)
        features = nnx.gelu(self.penultimate(x))
        return features, self.head(features)


def _max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """2x2 maximum; an odd last row or column is dropped."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


@dataclass(frozen=True)
class NetworkDefinition:
    """All that fixes the network but its parameters; hashable, so static under `jax.jit`."""

    image_shape: tuple[int, int, int]
    num_classes: int
    settings: ClassifierSettings

    def init(self, key: Array) -> Params:
        """Random parameters, as a flat dict from dotted names to float32 arrays."""
        network = self._build(nnx.Rngs(params=key))
        state = nnx.to_flat_state(nnx.state(network, nnx.Param))
        return {".".join(map(str, path)): variable[...] for path, variable in state}

    def apply(
        self, params: Params, x: Float[Array, "b h w c"], dropout_key: Array | None = None
    ) -> tuple[Float[Array, "b feature_dim"], Float[Array, "b num_classes"]]:
        """Features and logits of images in [-1, 1]."""
        graph, state, other = nnx.split(self._abstract, nnx.Param, ...)
        leaves = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
        pure = nnx.from_flat_state(
            [(path, nnx.Param(params[name])) for name, path in leaves.items()]
        )
        return nnx.merge(graph, pure, other)(x, dropout_key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters."""
        state = nnx.to_flat_state(nnx.state(self._abstract, nnx.Param))
        return {".".join(map(str, path)): variable.shape for path, variable in state}

    @cached_property
    def _abstract(self) -> ConvolutionalClassifier:
        return nnx.eval_shape(lambda: self._build(nnx.Rngs(params=0)))

    def _build(self, rngs: nnx.Rngs) -> ConvolutionalClassifier:
        return ConvolutionalClassifier(self.image_shape, self.num_classes, self.settings, rngs=rngs)


@partial(jax.jit, static_argnums=0)
def _forward(
    definition: NetworkDefinition, params: Params, images: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b feature_dim"], Float[Array, "b num_classes"]]:
    return definition.apply(params, images)


@dataclass(frozen=True)
class Classifier:
    """A trained classifier, and a `FeatureExtractor` through its penultimate layer.

    Attributes:
        definition: The network without its parameters.
        params: Dotted names to float32 arrays.
        train_accuracy: Fraction of the training images classified right, without augmentation.
        test_accuracy: The same on the held-out images given at training, None if there were none.
        name: For records.
    """

    definition: NetworkDefinition
    params: Mapping[str, AnyArray] = field(repr=False)
    train_accuracy: float
    test_accuracy: float | None = None
    name: str = "small-image-classifier"

    @property
    def dim(self) -> int:
        """Number of features."""
        return self.definition.settings.feature_dim

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.definition.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[height, width, channels] of the images it takes."""
        return self.definition.image_shape

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over architecture, settings and every weight."""
        return fingerprint_of(self.definition, self.params)

    def __call__(self, images: AnyArray) -> Float[np.ndarray, "n dim"]:
        """The same as `features`: makes the classifier a `FeatureExtractor`."""
        return self.features(images)

    def features(self, images: AnyArray) -> Float[np.ndarray, "n dim"]:
        """Penultimate activations (after the GELU) of uint8 or [-1, 1] images.

        Raises:
            ValueError: The images have another shape than those it was trained on.
        """
        return self._run(images)[0]

    def logits(self, images: AnyArray) -> Float[np.ndarray, "n num_classes"]:
        """Unnormalised log-probabilities of the classes; raises as `features`."""
        return self._run(images)[1]

    def predict(self, images: AnyArray) -> Int[np.ndarray, " n"]:
        """The most probable class of each image, int32; raises as `features`."""
        return self.logits(images).argmax(axis=1).astype(np.int32)

    def accuracy(self, images: AnyArray, labels: AnyArray) -> float:
        """Fraction of images whose predicted class is their label."""
        images = check_images(images)
        labels = check_labels(labels, len(images), self.num_classes)
        if len(images) == 0:
            raise ValueError("the accuracy on no images is undefined")
        return float((self.predict(images) == labels).mean())

    def _run(self, images: AnyArray) -> tuple[np.ndarray, np.ndarray]:
        images = check_images(images)
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"this classifier was trained on images of shape {self.image_shape}, "
                f"got {images.shape[1:]}"
            )
        parts = []
        for start in range(0, len(images), INFERENCE_BATCH):
            batch = to_float(images[start : start + INFERENCE_BATCH])
            # One batch shape: one compilation, and an image's features do not depend on the others.
            padding = ((0, INFERENCE_BATCH - len(batch)), (0, 0), (0, 0), (0, 0))
            outputs = _forward(self.definition, dict(self.params), np.pad(batch, padding))
            parts.append([np.asarray(output)[: len(batch)] for output in outputs])
        if not parts:
            return np.zeros((0, self.dim), np.float32), np.zeros((0, self.num_classes), np.float32)
        features, logits = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(logits)


def fingerprint_of(definition: NetworkDefinition, params: Mapping[str, AnyArray]) -> str:
    """SHA-256 of a network and its weights, in hexadecimal."""
    digest = hashlib.sha256(description_of(definition).encode())
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(params[name], np.float32).tobytes())
    return digest.hexdigest()


def description_of(definition: NetworkDefinition) -> str:
    """The definition as canonical JSON."""
    return json.dumps({"architecture": ARCHITECTURE} | asdict(definition), sort_keys=True)


def check_labels(labels: AnyArray, count: int, num_classes: int) -> Int[np.ndarray, " n"]:
    """Returns labels as int32 [count] after checking that they are classes.

    Raises:
        ValueError: Not `count` integers, or one outside 0..num_classes - 1 (the first is named).
    """
    array = np.asarray(labels)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"expected {count} integer labels, one an image; got {array.dtype} "
            f"of shape {array.shape}"
        )
    wrong: Iterable[int] = np.flatnonzero((array < 0) | (array >= num_classes))
    for index in wrong:
        raise ValueError(
            f"label {array[index]} of image {index} is out of range: "
            f"{num_classes} classes are 0..{num_classes - 1}"
        )
    return array.astype(np.int32)
