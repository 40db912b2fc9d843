"""Training the judge's classifier, deterministic and kept on disk, and asking it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dit_jax.atomic import atomic_file, check_destination
from dit_jax.evaluation.digits.network import (
    ARCHITECTURE,
    ClassifierSettings,
    NetworkDefinition,
    Params,
)
from dit_jax.evaluation.images import AnyArray, check_images, to_float
from dit_jax.evaluation.record import content_hash
from dit_jax.untrusted import parse_json, read_npz

STEPS_PER_CALL = 100
INFERENCE_BATCH = 500
_LOG = logging.getLogger(__name__)


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
    train_accuracy: float = float("nan")
    test_accuracy: float | None = None
    name: str = "small-image-classifier"

    @property
    def dim(self) -> int:
        """Number of features."""
        return self.definition.settings.feature_dim

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over architecture, settings and every weight."""
        return self.definition.fingerprint(self.params)

    def __call__(self, images: AnyArray) -> Float[np.ndarray, "n dim"]:
        """Penultimate activations (after the GELU) of uint8 or [-1, 1] images [n, h, w, c].

        Raises:
            ValueError: The images have another shape than those it was trained on.
        """
        return self._run(images)[0]

    def predict(self, images: AnyArray) -> Int[np.ndarray, " n"]:
        """The most probable class of each image, int32; raises as a call."""
        return self._run(images)[1].argmax(axis=1).astype(np.int32)

    def accuracy(self, images: AnyArray, labels: AnyArray) -> float:
        """Fraction of images whose predicted class is their label."""
        labels = check_labels(labels, len(images), self.definition.num_classes)
        if len(images) == 0:
            raise ValueError("the accuracy on no images is undefined")
        return float((self.predict(images) == labels).mean())

    def _run(self, images: AnyArray) -> tuple[np.ndarray, np.ndarray]:
        images, definition = check_images(images), self.definition
        if images.shape[1:] != definition.image_shape:
            raise ValueError(
                f"this classifier was trained on images of shape {definition.image_shape}, "
                f"got {images.shape[1:]}"
            )
        parts = [[np.zeros((0, n), np.float32) for n in (self.dim, definition.num_classes)]]
        for start in range(0, len(images), INFERENCE_BATCH):
            batch = to_float(images[start : start + INFERENCE_BATCH])
            # One batch shape: one compilation, and an image's features do not depend on the others.
            padding = ((0, INFERENCE_BATCH - len(batch)), (0, 0), (0, 0), (0, 0))
            outputs = _forward(definition, dict(self.params), np.pad(batch, padding))
            parts.append([np.asarray(output)[: len(batch)] for output in outputs])
        features, logits = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(logits)


@partial(jax.jit, static_argnums=0)
def _forward(definition, params, images):
    return definition.apply(params, images)


def train_classifier(
    images: AnyArray,
    labels: AnyArray,
    num_classes: int,
    *,
    seed: int,
    settings: ClassifierSettings | None = None,
    test_images: AnyArray | None = None,
    test_labels: AnyArray | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Classifier:
    """Trains a classifier on the training split, or reads the one trained before on the same data.

    The result is a function of the arguments: the same data, settings and seed on the same kind of
    machine give the same bits. The cache file's name is a hash of data, labels, architecture,
    settings, seed, JAX version and backend, so nothing stale is ever read; a damaged file is
    replaced with a warning.

    Args:
        images: Training images [n, h, w, c], uint8 or floating point in [-1, 1]. Held-out images
            have no place here: a classifier that has seen them flatters every score.
        labels: Integer classes [n].
        num_classes: Number of classes.
        seed: Decides initial weights, order, augmentation and dropout.
        settings: Architecture and hyper-parameters; None picks by the image shape.
        test_images: Held-out images, only to report `test_accuracy`.
        test_labels: Their classes.
        cache_dir: Where trained classifiers are kept; None trains each time and writes nothing.

    Raises:
        ValueError: Images or labels that do not fit each other, or a label out of range.
        FloatingPointError: The loss became NaN or infinite.
        OSError: `cache_dir` cannot be written to; found out before training.
    """
    images = check_images(images, "training images")
    labels = check_labels(labels, len(images), num_classes)
    if len(images) < 2:
        raise ValueError(f"training needs at least 2 images, got {len(images)}")
    if (test_images is None) != (test_labels is None):
        raise ValueError("give test_images and test_labels together, or neither")
    shape = tuple(map(int, images.shape[1:]))
    settings = settings or ClassifierSettings.for_images(shape)
    definition = NetworkDefinition(shape, num_classes, settings)
    params, path = None, None
    if cache_dir is not None:
        path = Path(cache_dir) / f"classifier-{_cache_key(definition, images, labels, seed)}.npz"
        params = _load(path, definition)
    if params is None:
        if path is not None:
            check_destination(path, overwrite=True)
        params = _train(definition, images, labels, seed)
        if path is not None:
            _save(path, definition, params)
    trained = Classifier(definition, params)
    test = None if test_images is None else trained.accuracy(test_images, test_labels)
    return replace(trained, train_accuracy=trained.accuracy(images, labels), test_accuracy=test)


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
    wrong = np.flatnonzero((array < 0) | (array >= num_classes))
    if wrong.size:
        raise ValueError(
            f"label {array[wrong[0]]} of image {wrong[0]} is out of range: "
            f"{num_classes} classes are 0..{num_classes - 1}"
        )
    return array.astype(np.int32)


def _train(
    definition: NetworkDefinition, images: np.ndarray, labels: np.ndarray, seed: int
) -> Params:
    settings = definition.settings
    init_key, order_key, step_key = jax.random.split(jax.random.key(seed), 3)
    state = _initial_state(definition, init_key)
    order = _order(order_key, len(images), settings.steps, settings.batch_size)
    # On the device once, as bytes if they came as bytes; each step gathers its batch.
    device_images, device_labels = jnp.asarray(images), jnp.asarray(labels)
    for start in range(0, settings.steps, STEPS_PER_CALL):
        indices = order[start : start + STEPS_PER_CALL]
        steps = jnp.arange(start, start + len(indices))
        state, losses = _run_steps(
            definition, state, step_key, steps, indices, device_images, device_labels
        )
        loss = float(losses.mean())
        _LOG.info("classifier step %d/%d loss %.4f", start + len(indices), settings.steps, loss)
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the classifier's loss is {loss} by step {start + len(indices)}: the training "
                "images cannot be learned with its settings (learning rate "
                f"{settings.learning_rate}). Score with --reference=IMAGES, or from Python give "
                "`ClassifierSettings` of a lower learning rate or with normalization"
            )
    return {name: np.asarray(value) for name, value in state[0].items()}


def _order(key: Array, count: int, steps: int, batch_size: int) -> Int[Array, "steps batch"]:
    """Indices of each step's batch: whole permutations of the data one after another."""
    batch_size = min(batch_size, count)
    epochs = -(-steps * batch_size // count)
    permute = jax.jit(partial(jax.random.permutation, x=count))
    permutations = [permute(jax.random.fold_in(key, epoch)) for epoch in range(epochs)]
    return jnp.concatenate(permutations)[: steps * batch_size].reshape(steps, batch_size)


@cache
def _optimizer(settings: ClassifierSettings) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=max(1, settings.steps // 20),
        decay_steps=max(2, settings.steps),
    )

    def kernels(params: Params) -> dict[str, bool]:
        return {name: name.endswith("kernel") for name in params}

    return optax.adamw(schedule, weight_decay=settings.weight_decay, mask=kernels)


@partial(jax.jit, static_argnums=0)
def _initial_state(definition: NetworkDefinition, key: Array) -> tuple[Params, optax.OptState]:
    params = definition.init(key)
    return params, _optimizer(definition.settings).init(params)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _run_steps(definition, state, key, steps, indices, images, labels):
    """A scan of updates; `steps` numbers them, which is all their randomness depends on."""
    settings = definition.settings
    optimizer = _optimizer(settings)

    def loss_of(params, x, y, dropout_key):
        _, logits = definition.apply(params, x, dropout_key)
        targets = jax.nn.one_hot(y, definition.num_classes)
        targets = optax.smooth_labels(targets, settings.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def update(state, inputs):
        params, optimizer_state = state
        step, index = inputs
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
        x = images[index].astype(jnp.float32)
        x = x / 127.5 - 1.0 if images.dtype == jnp.uint8 else jnp.clip(x, -1.0, 1.0)
        x = augment(augment_key, x, settings)
        loss, gradients = jax.value_and_grad(loss_of)(params, x, labels[index], dropout_key)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    return jax.lax.scan(update, state, (steps, indices))


def augment(
    key: Array, images: Float[Array, "b h w c"], settings: ClassifierSettings
) -> Float[Array, "b h w c"]:
    """Shifts each image by up to `max_shift` pixels both ways, edges repeated, and mirrors half."""
    b, h, w, c = images.shape
    shift_key, flip_key = jax.random.split(key)
    if settings.max_shift:
        pad = (settings.max_shift, settings.max_shift)
        padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)), mode="edge")
        corners = jax.random.randint(shift_key, (b, 2), 0, 2 * settings.max_shift + 1)
        images = jax.vmap(
            lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, c))
        )(padded, corners)
    if settings.horizontal_flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (b, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def _cache_key(
    definition: NetworkDefinition, images: np.ndarray, labels: np.ndarray, seed: int
) -> str:
    parts = [definition.description, str(seed), jax.__version__, jax.default_backend()]
    return content_hash(images, labels, _json_bytes(parts))[:24]


def _json_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _save(path: Path, definition: NetworkDefinition, params: Params) -> None:
    """Parameters under their names and a JSON header, in one file: never half of a pair."""
    header = {"format": ARCHITECTURE, "fingerprint": definition.fingerprint(params)}
    with atomic_file(path, overwrite=True) as file:
        np.savez(file, header=_json_bytes(header), **params)


def _load(path: Path, definition: NetworkDefinition) -> Params | None:
    """Parameters from the cache; None where there are none or they are not what was written."""
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        header = parse_json(arrays.pop("header").tobytes(), path)
        if {name: array.shape for name, array in arrays.items()} != definition.shapes():
            raise ValueError("its arrays are not those of this network")
        if header["fingerprint"] != definition.fingerprint(arrays):
            raise ValueError("its contents do not match its fingerprint")
    # zipfile, zlib, NumPy and json each raise their own kinds for a damaged file.
    except Exception as error:
        _LOG.warning("%s is damaged (%s); training the classifier anew", path, error)
        return None
    return arrays
