"""Inception-V3 as FID's feature extractor: TensorFlow's resize, one jitted program, many devices.

The figures of papers come from one TensorFlow graph (2015-12-05), called by the evaluator of
Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis" (ADM), and by earlier
scripts. This is that computation: bytes, resized as TensorFlow 1 did it, (x - 128) / 128, the
network of `inception_layers`, and of its activations the pool features (FID, precision, recall,
KID), the spatial features (sFID) and the logits without bias (Inception Score). The weights come
from `dit_jax.interop.inception`.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Key, Shaped, UInt8

from dit_jax.evaluation.images import AnyArray, to_uint8
from dit_jax.evaluation.inception_layers import IMAGE_SIZE, InceptionV3
from dit_jax.nearest import one_of
from dit_jax.tree_paths import by_path

Params = dict[str, Any]

NAME = "inception-v3-2015-12-05"
PREPROCESSING = "uint8, tf1 bilinear to 299x299, (x - 128) / 128"
"""Part of every fingerprint; to be changed with the computation."""

GREY = ("refuse", "repeat")
"""What can be done with images of one channel."""


class InceptionFeatures(NamedTuple):
    """What the scores need of n images, float32.

    Attributes:
        pool: Mean of the last block over its 8x8 pixels ("pool_3").
        spatial: 7 channels of "mixed_6/conv" on 17x17, flattened as (row, column, channel).
        logits: Of 1008 classes, without the bias, as ADM's Inception Score takes them.
    """

    pool: Float32[AnyArray, "n 2048"]
    spatial: Float32[AnyArray, "n 2023"]
    logits: Float32[AnyArray, "n 1008"]


@dataclass(frozen=True)
class InceptionNetwork:
    """The network as pure functions of nested parameters; holds no arrays."""

    @functools.cached_property
    def _graph(self) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(params=0))))[0]

    def init(self, key: Key[Array, ""]) -> Params:
        """Random float32 parameters, for tests and dry runs; scores need the published ones."""
        network = InceptionV3(rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(network, nnx.Param))

    def apply(self, params: Params, images: UInt8[Array, "n h w 3"]) -> InceptionFeatures:
        """Preprocessing and network; not jitted."""
        pixels = (resize_tf1(images.astype(jnp.float32), IMAGE_SIZE) - 128) / 128
        return InceptionFeatures(*nnx.merge(self._graph, params)(pixels))


@functools.cache
def parameter_shapes() -> Params:
    """Nested `jax.ShapeDtypeStruct`s of the parameters."""
    return jax.eval_shape(InceptionNetwork().init, jax.random.key(0))


def resize_tf1(x: Float32[Array, "n h w c"], size: int) -> Float32[Array, "n {size} {size} c"]:
    """Bilinear interpolation as TensorFlow 1's `resize_bilinear` without aligned corners.

    Output pixel i looks at input coordinate i * (input size / output size): not at the pixels'
    centres, so images shift by up to half a pixel, and without smoothing when they shrink. Other
    resizes can move the FID of the same images by points (Parmar et al. 2022, arXiv 2104.11222).
    """
    return _interpolate(_interpolate(x, 2, size), 1, size)


def _interpolate(x: Array, axis: int, size: int) -> Array:
    length = x.shape[axis]
    # In float32, as TensorFlow computes it: the coordinate's rounding decides the weights.
    position = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
    low = position.astype(np.int32)
    high = np.minimum(low + 1, length - 1)
    shape = [1] * x.ndim
    shape[axis] = size
    fraction = (position - low.astype(np.float32)).reshape(shape)
    first, second = (jnp.take(x, index, axis=axis, mode="clip") for index in (low, high))
    return first + (second - first) * fraction


class InceptionExtractor:
    """A `FeatureExtractor` of pool features, and more by `features` and `stream`.

    Every batch is padded to one size and the padding cut off again, so that images of one height
    and width are served by one compiled program. With a mesh, each of its devices computes its
    share of the batch with its own copy of the weights. On a mesh of several processes every
    process is to pass the same images, and gets all features.

    Attributes:
        name: For records.
        fingerprint: SHA-256 of weights and preprocessing: unless it is equal, `frechet_distance`
            refuses to compare statistics. Batch size and devices do not enter it.
        dim: 2048, of the pool features.
        standard: Whether the weights are the published ones: published reference statistics are of
            theirs alone.
        batch_size: Images a call of the compiled program.
        logits_bias: [1008]; `features(images).logits + logits_bias` are the biased logits.
    """

    name = NAME
    dim = 2048

    def __init__(
        self,
        params: Mapping[str, Any],
        *,
        batch_size: int = 64,
        mesh: Mesh | None = None,
        grey: str = "refuse",
        standard: bool = False,
    ) -> None:
        """Puts the weights on the devices.

        Args:
            params: Nested parameters, from `dit_jax.interop.inception.load_inception`
                (`load_extractor` there makes the whole).
            batch_size: Images computed at once, over all devices; about 10 MiB of memory an image,
                with 200 MiB of weights on every device.
            mesh: Devices to share each batch, over all axes of it; None: the default device.
            grey: What to do with images of one channel: "refuse", or "repeat" it as red, green
                and blue.
            standard: Whether the weights are known, by the hash of their file, to be the published
                ones; only whoever read the file can say.

        Raises:
            ValueError: Parameters that are not this network's, a batch that the devices cannot
                share evenly, an unknown choice for grey images.
        """
        if grey not in GREY:
            raise ValueError(f"grey={grey!r} is unknown; {one_of(grey, GREY)}")
        devices = mesh.size if mesh is not None else 1
        if batch_size < 1 or batch_size % devices:
            raise ValueError(
                f"batch_size={batch_size} cannot be shared by {devices} devices; "
                f"expected a positive multiple of {devices}"
            )
        params = check_params(params)
        self.batch_size, self.mesh, self.grey = batch_size, mesh, grey
        self.standard = standard
        self.fingerprint = fingerprint_of(params)
        self.logits_bias = np.array(params["fc"]["bias"])
        self._params = jax.device_put(params, _sharding(mesh, split=False))
        self._images_sharding = _sharding(mesh, split=True)

    def __call__(self, images: Shaped[AnyArray, "n h w c"]) -> Float32[np.ndarray, "n 2048"]:
        """Pool features: makes this a `FeatureExtractor`. Takes and raises as `features`."""
        return self.features(images).pool

    def features(self, images: Shaped[AnyArray, "n h w c"]) -> InceptionFeatures:
        """All features of n images, in order; n may be 0.

        Args:
            images: uint8, three channels (or one: see `grey`), any height and width. Floating
                point in [-1, 1] is rounded to the nearest byte first: the network is defined on
                bytes.

        Raises:
            ValueError: Not a batch of finite images of such a kind.
        """
        parts = list(self.stream([images]))
        if not parts:
            widths = (self.dim, 2023, len(self.logits_bias))
            return InceptionFeatures(*(np.zeros((0, width), np.float32) for width in widths))
        return InceptionFeatures(*map(np.concatenate, zip(*parts, strict=True)))

    def stream(self, batches: Iterable[Shaped[AnyArray, "_ _ _ _"]]) -> Iterator[InceptionFeatures]:
        """Features of all images of `batches` in order, in parts of at most `batch_size`.

        The batches may be of any sizes; they are cut and joined to full ones, so that at most the
        last is padded (and the last before the height or width changes). Two are in memory: one
        being computed while the next is read.
        """
        running: collections.deque[tuple[int, InceptionFeatures]] = collections.deque()
        for batch in self._full_batches(batches):
            running.append((len(batch), self._dispatch(batch)))
            if len(running) > 1:
                yield _fetch(*running.popleft())
        if running:
            yield _fetch(*running.popleft())

    def _full_batches(self, batches: Iterable[AnyArray]) -> Iterator[np.ndarray]:
        waiting = np.zeros((0, 1, 1, 3), np.uint8)
        for images in batches:
            images = self._colour_bytes(images)
            if images.shape[1:] != waiting.shape[1:]:
                if len(waiting):
                    yield waiting
                waiting = images[:0]
            start = self.batch_size - len(waiting) if len(waiting) else 0
            if start:
                waiting = np.concatenate([waiting, images[:start]])
                if len(waiting) < self.batch_size:
                    continue
                yield waiting
            full = start + max(len(images) - start, 0) // self.batch_size * self.batch_size
            for begin in range(start, full, self.batch_size):
                yield images[begin : begin + self.batch_size]
            # A copy: a view would keep all of the caller's images in memory.
            waiting = images[full:].copy()
        if len(waiting):
            yield waiting

    def _colour_bytes(self, images: AnyArray) -> UInt8[np.ndarray, "n h w 3"]:
        images = to_uint8(images)
        channels = images.shape[-1]
        if channels == 1 and self.grey == "repeat":
            return np.repeat(images, 3, axis=-1)
        if channels != 3:
            hint = '; grey="repeat" would use the one as red, green and blue' * (channels == 1)
            raise ValueError(
                f"Inception-V3 sees images of 3 channels, got {channels} (shape "
                f"{images.shape}){hint}"
            )
        return images

    def _dispatch(self, batch: UInt8[np.ndarray, "n h w 3"]) -> InceptionFeatures:
        padding = ((0, self.batch_size - len(batch)), (0, 0), (0, 0), (0, 0))
        images = jax.device_put(np.pad(batch, padding), self._images_sharding)
        return _forward(self.mesh, self._params, images)


def check_params(params: Mapping[str, Any]) -> Params:
    """Returns the parameters as nested dicts of float32 NumPy arrays after comparing all shapes.

    Raises:
        ValueError: Names or shapes are not Inception-V3's; the first few are listed.
    """
    expected = by_path(parameter_shapes(), ".")
    given = {path: np.asarray(leaf) for path, leaf in by_path(dict(params), ".").items()}
    wrong = [
        f"{path}: got {given[path].shape if path in given else 'nothing'}, expected "
        f"{expected[path].shape if path in expected else 'no such parameter'}"
        for path in sorted(given.keys() | expected.keys())
        if path not in given or path not in expected or given[path].shape != expected[path].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"these are not the parameters of Inception-V3: {'; '.join(wrong[:5])}{more}. Load "
            "them with dit_jax.interop.inception.load_inception"
        )
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(params))


def fingerprint_of(params: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of names, shapes and bytes of the weights and the preprocessing."""
    digest = hashlib.sha256(f"{NAME}; {PREPROCESSING}".encode())
    for path, leaf in sorted(by_path(dict(params), ".").items()):
        array = np.ascontiguousarray(leaf, dtype="<f4")
        digest.update(f"{path}{array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()


def _sharding(mesh: Mesh | None, *, split: bool) -> NamedSharding | None:
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names) if split else PartitionSpec())


@functools.partial(jax.jit, static_argnums=0)
def _forward(mesh: Mesh | None, params: Params, images: UInt8[Array, "n h w 3"]):
    network = InceptionNetwork()
    if mesh is None:
        return network.apply(params, images)
    split = PartitionSpec(mesh.axis_names)
    # Each device runs the whole network on its images: nothing is left for a partitioner to decide.
    shared = jax.shard_map(
        network.apply, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split
    )
    # Gathered, so that each process can read all of it.
    return jax.lax.with_sharding_constraint(
        shared(params, images), NamedSharding(mesh, PartitionSpec())
    )


def _fetch(count: int, features: InceptionFeatures) -> InceptionFeatures:
    return InceptionFeatures(*(np.asarray(array)[:count] for array in features))
