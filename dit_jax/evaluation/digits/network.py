"""The judge's network: convolutions and pooling, a penultimate layer of features, logits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dit_jax.evaluation.images import AnyArray

Params = dict[str, AnyArray]

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


@dataclass(frozen=True)
class NetworkDefinition:
    """All that fixes the network but its parameters; hashable, so static under `jax.jit`."""

    image_shape: tuple[int, int, int]
    num_classes: int
    settings: ClassifierSettings

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters, in the order of the layers.

        Raises:
            ValueError: The images are too small for so many stages of pooling.
        """
        settings, (height, width, channels) = self.settings, self.image_shape
        shrink = 2 ** len(settings.stages)
        if min(height, width) < shrink:
            raise ValueError(
                f"images of {height}x{width} are too small for {len(settings.stages)} stages of "
                f"2x2 pooling; use at most {int(np.log2(min(height, width)))}"
            )
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, inputs: int, outputs: int) -> None:
            shapes[f"{name}.kernel"], shapes[f"{name}.bias"] = (inputs, outputs), (outputs,)

        for i, widths in enumerate(settings.stages):
            for j, out in enumerate(widths):
                linear(f"stages.{i}.{j}.linear", 9 * channels, out)
                if settings.normalize:
                    shapes[f"stages.{i}.{j}.norm.scale"] = (out,)
                    shapes[f"stages.{i}.{j}.norm.bias"] = (out,)
                channels = out
        flat = (height // shrink) * (width // shrink) * channels
        linear("penultimate", flat, settings.feature_dim)
        linear("head", settings.feature_dim, self.num_classes)
        return shapes

    def init(self, key: Array) -> Params:
        """Random parameters by name, float32: He's kernels, LeCun's for the logits."""
        params = {}
        for number, (name, shape) in enumerate(self.shapes().items()):
            if name.endswith("kernel"):
                scale = jax.nn.initializers.lecun_normal() if name == "head.kernel" else _HE
                params[name] = scale(jax.random.fold_in(key, number), shape, jnp.float32)
            else:
                params[name] = jnp.full(shape, name.endswith("scale"), jnp.float32)
        return params

    def apply(
        self, params: Params, x: Float[Array, "b h w c"], dropout_key: Array | None = None
    ) -> tuple[Float[Array, "b feature_dim"], Float[Array, "b num_classes"]]:
        """Features and logits of images in [-1, 1]; with a key, dropout is on."""

        def linear(name: str, x: Array) -> Array:
            return x @ params[f"{name}.kernel"] + params[f"{name}.bias"][None]

        for i, widths in enumerate(self.settings.stages):
            for j in range(len(widths)):
                name, size = f"stages.{i}.{j}", x.shape[:3]
                x = linear(f"{name}.linear", neighbourhoods(x))
                if self.settings.normalize:
                    x = _layer_norm(x, params[f"{name}.norm.scale"], params[f"{name}.norm.bias"])
                x = jax.nn.gelu(x).reshape(*size, -1)
            b, h, w, c = x.shape  # an odd last row or column is dropped
            x = x[:, : h // 2 * 2, : w // 2 * 2]
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
        x = x.reshape(x.shape[0], -1)
        kept = 1.0 - self.settings.dropout
        if dropout_key is not None and kept < 1:
            x = jnp.where(jax.random.bernoulli(dropout_key, kept, x.shape), x / kept, 0.0)
        features = jax.nn.gelu(linear("penultimate", x))
        return features, linear("head", features)

    @property
    def description(self) -> str:
        """The definition as canonical JSON."""
        return json.dumps({"architecture": ARCHITECTURE} | asdict(self), sort_keys=True)

    def fingerprint(self, params: Mapping[str, AnyArray]) -> str:
        """SHA-256 of the network and its weights, in hexadecimal."""
        digest = hashlib.sha256(self.description.encode())
        for name in sorted(params):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(params[name], np.float32).tobytes())
        return digest.hexdigest()


_HE = jax.nn.initializers.he_normal()


def neighbourhoods(x: Float[Array, "b h w c"]) -> Float[Array, "b*h*w 9*c"]:
    """What a 3x3 convolution, zero-padded, sees at every pixel: row, column, then channel.

    One product of matrices with it is the convolution. XLA's own is slow on CPUs inside a compiled
    loop: a training step on 64 images of 8x8 with widths 32 and 64 took 108 ms with it and 8 ms
    like this.
    """
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1).reshape(b * h * w, 9 * c)


def _layer_norm(x: Array, scale: AnyArray, bias: AnyArray) -> Array:
    norm = nnx.LayerNorm(x.shape[-1], rngs=nnx.Rngs(0))
    norm.scale, norm.bias = nnx.Param(scale), nnx.Param(bias)
    return norm(x)
