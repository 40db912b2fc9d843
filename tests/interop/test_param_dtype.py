"""Parameters read as they are stored: bfloat16 without a float32 copy, nothing lost by auto."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.interop.export import write_model
from dit_jax.interop.models import open_model
from dit_jax.interop.parameters import flatten
from dit_jax.models import DiTConfig, Network
from tests.interop.test_models import in_memory

CONFIG = DiTConfig(image_size=8, hidden_size=128, depth=12, num_heads=4, num_classes=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model as .safetensors in the original layout, by dtype."""
    folder, (model, _) = tmp_path_factory.mktemp("files"), in_memory(CONFIG)
    for dtype in ("float32", "bfloat16"):
        write_model(model, "dit_pt", folder / f"{dtype}.safetensors", dtype=dtype)
    return folder


def opened(files, dtype):
    return open_model(files / f"{dtype}.safetensors", num_heads=4, num_classes=3)


def test_bfloat16_is_read_as_bfloat16_array_by_array(files):
    model = opened(files, "bfloat16")
    assert model.param_dtype == "bfloat16" and opened(files, "float32").param_dtype == "float32"
    network = Network(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
    shapes = dict(flatten(jax.eval_shape(network.init, jax.random.key(0))))
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
    sizes = {}

    def put(path, array):
        assert (array.shape, array.dtype) == (shapes[path].shape, shapes[path].dtype), path
        sizes[path] = array.nbytes

    tracemalloc.start()
    model.load(put, param_dtype="bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * largest  # in float32 the largest alone would be twice that
    whole = sum(4 * leaf.size for leaf in shapes.values())
    assert sum(sizes.values()) < 0.55 * whole  # time, class and output layers stay float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_in_bfloat16_is_what_a_call_would_convert(files, dtype):
    wide = dict(flatten(opened(files, dtype).load()))
    narrow = dict(flatten(opened(files, dtype).load(param_dtype="bfloat16")))
    assert {array.dtype.name for array in narrow.values()} == {"float32", "bfloat16"}
    for path, array in narrow.items():
        expected = np.asarray(jnp.asarray(wide[path]).astype(array.dtype))
        np.testing.assert_array_equal(array, expected, err_msg=path)
        if dtype == "bfloat16":  # nothing to lose: the file has no more
            np.testing.assert_array_equal(array.astype(np.float32), wide[path], err_msg=path)
