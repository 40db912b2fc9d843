import io
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch
from flax import nnx
from PIL import Image

from dit_jax.evaluation import FeatureExtractor, FeatureMismatchError, frechet_distance
from dit_jax.evaluation.frechet import GaussianStatistics
from dit_jax.evaluation.inception import (
    InceptionExtractor,
    InceptionFeatures,
    InceptionNetwork,
    fingerprint_of,
    resize_tf1,
)
from dit_jax.evaluation.inception_layers import Convolution, average_pool, max_pool
from tests.compilations import compilations
from tests.references.torch_inception import params_of, random_inception, resize_like_tf1

CIFAR10 = os.environ.get("DIT_JAX_CIFAR10")
# Images of each half; above 2048 the distance is that of all features, as in a paper.
FID_IMAGES = int(os.environ.get("DIT_JAX_CIFAR10_FID_IMAGES", "64"))
needs_cifar10 = pytest.mark.skipif(not CIFAR10, reason="DIT_JAX_CIFAR10 names no folder")
TINY = (40, 56)


class Shared(NamedTuple):
    network: torch.nn.Module
    extractor: InceptionExtractor
    images: np.ndarray
    features: InceptionFeatures
    expected: list[np.ndarray]


def photographs(count, height=TINY[0], width=TINY[1], seed=0):
    """Pieces of scikit-learn's two sample pictures, bytes, at scales of their own."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(seed)
    pictures = load_sample_images().images
    pieces = []
    for i in range(count):
        picture, step = pictures[i % 2], int(random.integers(1, 7))
        top, left = (
            int(random.integers(0, size - step * piece + 1))
            for size, piece in zip(picture.shape, (height, width), strict=False)
        )
        pieces.append(picture[top::step, left::step][:height, :width])
    return np.stack(pieces)


def cifar10(split, count):
    with np.load(Path(CIFAR10) / f"cifar10_jpeg_{split}.npz") as content:
        jpeg, offsets = content["jpeg"], content["offsets"]
    files = (jpeg[offsets[i] : offsets[i + 1]].tobytes() for i in range(count))
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def to_torch(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def torch_features(network, images, batch=50):
    with torch.no_grad():
        parts = [network(to_torch(images[i : i + batch])) for i in range(0, len(images), batch)]
    return [torch.cat(part).numpy() for part in zip(*parts, strict=True)]


def relative_error(found, expected):
    """Largest deviation in units of the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def shared():
    images = photographs(7)
    network = random_inception(to_torch(images))
    extractor = InceptionExtractor(params_of(network), batch_size=4)
    features, expected = extractor.features(images), torch_features(network, images)
    return Shared(network, extractor, images, features, expected)


def assert_parity(extractor, features, expected):
    pool, spatial, unbiased, logits = expected
    # Were all images mapped to one point, agreement would prove nothing.
    assert pool.std(axis=0).mean() > 0.1
    assert relative_error(features.pool, pool) < 1e-4
    assert relative_error(features.spatial, spatial) < 1e-4
    assert relative_error(features.logits, unbiased) < 1e-4
    assert relative_error(features.logits + extractor.logits_bias, logits) < 1e-4
    assert np.abs(unbiased - logits).max() > 0.1


def test_features_equal_pytorch_on_photographs(shared):
    assert_parity(shared.extractor, shared.features, shared.expected)


@needs_cifar10
def test_features_equal_pytorch_on_cifar10(shared):
    images = cifar10("test", 16)
    expected = torch_features(shared.network, images)
    assert_parity(shared.extractor, shared.extractor.features(images), expected)


@pytest.mark.parametrize("size", [(32, 32), (1, 5), (299, 299), (300, 17), (427, 640)])
def test_resize_is_tensorflows(size):
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype(np.float32)
    found = np.asarray(resize_tf1(jnp.asarray(image), 299))
    rows, columns = (np.arange(299, dtype=np.float32) * np.float32(n / 299) for n in size)
    for y, x in np.random.default_rng(1).integers(0, 299, (200, 2)):
        (top, left), (down, right) = np.divmod([rows[y], columns[x]], 1)
        top, left = int(top), int(left)
        below, beside = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
        upper = image[0, top, left] * (1 - right) + image[0, top, beside] * right
        lower = image[0, below, left] * (1 - right) + image[0, below, beside] * right
        expected = upper * (1 - down) + lower * down
        np.testing.assert_allclose(found[0, y, x], expected, atol=2e-4)
    other = resize_like_tf1(to_torch(image), 299).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, other, atol=2e-4)


def test_pools_equal_pytorch():
    x = np.random.default_rng(0).normal(size=(2, 9, 6, 3)).astype(np.float32) - 2.0
    functional, theirs, x = torch.nn.functional, to_torch(x), jnp.asarray(x)
    pairs = [
        (average_pool(x), functional.avg_pool2d(theirs, 3, 1, 1, count_include_pad=False)),
        (max_pool(x, stride=1), functional.max_pool2d(theirs, 3, 1, 1)),
        (max_pool(x, stride=2), functional.max_pool2d(theirs, 3, 2)),
    ]
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1), atol=1e-6)


def projected_statistics(features, dim, fingerprint="x"):
    """Statistics of all features, or of `dim` random directions where images are few."""
    if dim < features.shape[1]:
        directions = np.random.default_rng(0).normal(size=(features.shape[1], dim))
        features = features @ np.linalg.qr(directions)[0]
    return GaussianStatistics.from_features(features, fingerprint)


def scipy_distance(a, b):
    """The formula as every FID script has it."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return np.sum((a.mean - b.mean) ** 2) + traces - 2 * np.trace(np.real(root))


def assert_equal_distance(ours, theirs, dim):
    found = frechet_distance(*(projected_statistics(features, dim) for features in ours))
    expected = scipy_distance(*(projected_statistics(features, dim) for features in theirs))
    print(f"{dim} features: ours {found:.6f}, PyTorch and SciPy {expected:.6f}")
    assert found > 1e-3
    assert found == pytest.approx(expected, rel=1e-3)


def test_frechet_distances_equal_pytorch_and_scipy(shared):
    # Two crops of pictures, one darkened: sets that differ.
    other = (photographs(7, seed=1) // 2).astype(np.uint8)
    ours = shared.features, shared.extractor.features(other)
    theirs = shared.expected, torch_features(shared.network, other)
    for kind in (0, 1):
        assert_equal_distance([f[kind] for f in ours], [f[kind] for f in theirs], dim=3)


@needs_cifar10
def test_cifar10_fid_equals_pytorch_and_scipy(shared):
    halves = cifar10("train", FID_IMAGES), cifar10("test", FID_IMAGES)
    extractor = InceptionExtractor(params_of(shared.network), batch_size=32)
    ours = [extractor(images) for images in halves]
    theirs = [torch_features(shared.network, images)[0] for images in halves]
    assert_equal_distance(ours, theirs, dim=2048 if FID_IMAGES > 2048 else FID_IMAGES // 8)


def test_eight_devices_equal_one(shared):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    extractor = InceptionExtractor(params_of(shared.network), batch_size=8, mesh=mesh)
    sharded = extractor.features(shared.images)
    for found, expected in zip(sharded, shared.features, strict=True):
        assert relative_error(found, expected) < 1e-5
    # Statistics made on any devices may be compared.
    assert extractor.fingerprint == shared.extractor.fingerprint


def test_stream_joins_batches_of_any_size_and_compiles_once(shared):
    cuts = [0, 1, 1, 3, 6, 7]
    batches = [shared.images[a:b] for a, b in itertools.pairwise(cuts)]
    with compilations("_forward") as compiled:
        parts = list(shared.extractor.stream(batches))
    assert not compiled  # but when the features of the fixture were made
    assert [len(part.pool) for part in parts] == [4, 3]
    for found, expected in zip(zip(*parts, strict=True), shared.features, strict=True):
        np.testing.assert_array_equal(np.concatenate(found), expected)


def test_full_batches_keep_order_and_change_with_the_image_size(shared):
    def numbered(first, last, width=2):
        return np.tile(
            np.arange(first, last, dtype=np.uint8)[:, None, None, None], (1, 1, width, 3)
        )

    batches = [numbered(0, 3), numbered(3, 14), numbered(14, 14), numbered(14, 15)]
    batches += [numbered(15, 24, width=3), numbered(24, 25)]
    made = [batch[:, 0, 0, 0].tolist() for batch in shared.extractor._full_batches(batches)]
    assert [len(numbers) for numbers in made] == [4, 4, 4, 3, 4, 4, 1, 1]
    assert list(itertools.chain(*made)) == list(range(25))


def test_stream_reads_no_further_than_one_batch_ahead(shared):
    read = []

    def batches():
        for start in range(0, 100, 2):
            read.append(start)
            yield shared.images[:2]

    stream = shared.extractor.stream(batches())
    next(stream)
    assert len(read) <= 5


def test_no_images_make_no_features(shared):
    features = shared.extractor.features(shared.images[:0])
    assert [part.shape for part in features] == [(0, 2048), (0, 2023), (0, 1008)]


def test_it_is_a_feature_extractor_of_bytes(shared):
    assert isinstance(shared.extractor, FeatureExtractor)
    signed = shared.images[:4].astype(np.float32) / 127.5 - 1.0
    np.testing.assert_array_equal(shared.extractor(signed), shared.features.pool[:4])


def test_grey_images_repeated_on_request_and_else_refused(shared):
    grey = shared.images[:4, :, :, :1]
    with pytest.raises(ValueError, match=r'3 channels, got 1.*grey="repeat"'):
        shared.extractor(grey)
    repeating = InceptionExtractor(params_of(shared.network), batch_size=4, grey="repeat")
    np.testing.assert_array_equal(repeating(grey), shared.extractor(np.repeat(grey, 3, axis=-1)))


def test_wrong_arguments_refused(shared):
    params = params_of(shared.network)
    mesh = jax.make_mesh((8,), ("data",))
    with pytest.raises(ValueError, match=r"batch_size=12 .* 8 devices"):
        InceptionExtractor(params, batch_size=12, mesh=mesh)
    with pytest.raises(ValueError, match="batch_size=0"):
        InceptionExtractor(params, batch_size=0)
    with pytest.raises(ValueError, match="expected one of refuse, repeat"):
        InceptionExtractor(params, grey="yes")
    with pytest.raises(ValueError, match=r"got 4 \(shape \(1, 8, 8, 4\)\)$"):
        shared.extractor(np.zeros((1, 8, 8, 4), np.uint8))
    with pytest.raises(ValueError, match="got int64"):
        shared.extractor(np.zeros((1, 8, 8, 3), np.int64))
    wrong = params | {"fc": {"kernel": np.zeros((2048, 1000)), "offset": np.zeros(3)}}
    with pytest.raises(ValueError, match=r"fc.bias: got nothing.*fc.kernel: got \(2048, 1000\)"):
        InceptionExtractor(wrong)


def test_fingerprint_is_of_names_shapes_and_values(shared):
    params = params_of(shared.network)
    other = np.array(params["fc"]["bias"])
    other[7] = np.nextafter(other[7], 9.0)
    changed = params | {"fc": params["fc"] | {"bias": other}}
    stem = params["Conv2d_1a_3x3"]
    exchanged = params | {"Conv2d_1a_3x3": stem | {"mean": stem["bias"], "bias": stem["mean"]}}
    reordered = dict(reversed(params.items()))
    fingerprint = shared.extractor.fingerprint
    assert fingerprint_of(reordered) == fingerprint_of(params) == fingerprint
    assert len({fingerprint, fingerprint_of(changed), fingerprint_of(exchanged)}) == 3
    statistics = [
        projected_statistics(shared.features.pool, 5, fingerprint=name)
        for name in (fingerprint, fingerprint_of(changed))
    ]
    with pytest.raises(FeatureMismatchError):
        frechet_distance(*statistics)


def test_products_are_computed_at_full_precision_on_any_backend():
    network = InceptionNetwork()
    params = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    products = [
        equation
        for equation in equations(jax.make_jaxpr(network.apply)(params, images).jaxpr)
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert len(products) == 95
    for equation in products:
        precision = equation.params["precision"]
        assert precision in (jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST,) * 2)
        assert all(operand.aval.dtype == jnp.float32 for operand in equation.invars)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_random_kernels_keep_the_size_of_activations():
    layer = Convolution(64, 96, 3, rngs=nnx.Rngs(params=0))
    kernel = np.asarray(layer.kernel[...])
    assert kernel.shape == (3, 3, 64, 96)
    assert kernel.std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
