"""Training the small-image classifier: deterministic, cached on disk, one compiled loop."""

from __future__ import annotations

import json
import logging
import os
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from dit_jax.atomic import atomic_file, check_destination
from dit_jax.evaluation.classifier import (
    ARCHITECTURE,
    Classifier,
    ClassifierSettings,
    NetworkDefinition,
    Params,
    check_labels,
    description_of,
    fingerprint_of,
)
from dit_jax.evaluation.images import AnyArray, check_images
from dit_jax.evaluation.record import content_hash
from dit_jax.untrusted import parse_json, read_npz

STEPS_PER_CALL = 100
_LOG = logging.getLogger(__name__)


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
    settings = settings or ClassifierSettings.for_images(images.shape[1:])
    definition = NetworkDefinition(tuple(map(int, images.shape[1:])), num_classes, settings)

    path = None
    params: Params | None = None
    if cache_dir is not None:
        path = Path(cache_dir) / f"classifier-{_cache_key(definition, images, labels, seed)}.npz"
        params = _load(path, definition)
    if params is None:
        if path is not None:
            check_destination(path, overwrite=True)
        params = _train(definition, images, labels, seed)
        if path is not None:
            _save(path, definition, params)
    return _with_accuracies(
        definition,
        params,
        (images, labels),
        None if test_images is None else (test_images, test_labels),
    )


def _with_accuracies(definition, params, train, test) -> Classifier:
    classifier = Classifier(definition, params, train_accuracy=float("nan"))
    return Classifier(
        definition,
        params,
        train_accuracy=classifier.accuracy(*train),
        test_accuracy=None if test is None else classifier.accuracy(*test),
    )


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
        x = augment(augment_key, _on_device_float(images[index]), settings)
        loss, gradients = jax.value_and_grad(loss_of)(params, x, labels[index], dropout_key)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    return jax.lax.scan(update, state, (steps, indices))


def _on_device_float(images: Shaped[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1.0
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)


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
    parts = [description_of(definition), str(seed), jax.__version__, jax.default_backend()]
    encoded = np.frombuffer(json.dumps(parts).encode(), np.uint8)
    return content_hash(images, labels, encoded)[:24]


def _save(path: Path, definition: NetworkDefinition, params: Params) -> None:
    """Parameters under their names and a JSON header, in one file: never half of a pair."""
    header = {"format": ARCHITECTURE, "fingerprint": fingerprint_of(definition, params)}
    encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with atomic_file(path, overwrite=True) as file:
        np.savez(file, header=encoded, **params)


def _load(path: Path, definition: NetworkDefinition) -> Params | None:
    """Parameters from the cache; None where there are none or they are not what was written."""
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        header = parse_json(arrays.pop("header").tobytes(), path)
        if {name: array.shape for name, array in arrays.items()} != definition.shapes():
            raise ValueError("its arrays are not those of this network")
        if header["fingerprint"] != fingerprint_of(definition, arrays):
            raise ValueError("its contents do not match its fingerprint")
    # zipfile, zlib, NumPy and json each raise their own kinds for a damaged file.
    except Exception as error:
        _LOG.warning("%s is damaged (%s); training the classifier anew", path, error)
        return None
    return arrays
