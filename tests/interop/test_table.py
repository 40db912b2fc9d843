"""The mechanism: transforms, the one list of differences, copies, constants."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_jax.interop import transforms
from dit_jax.interop.table import Constant, ParameterReader, Row, Table, export_arrays, export_specs
from dit_jax.interop.tensors import InteropError, TensorSpec

TRANSFORMS = {
    "identity": (transforms.identity(), (6, 4)),
    "linear": (transforms.linear(), (6, 4)),
    "linear_or_pointwise": (transforms.linear_or_pointwise(), (6, 4)),
    "pointwise": (transforms.pointwise_conv(), (6, 4, 1, 1)),
    "conv": (transforms.conv(), (6, 4, 3, 2)),
    "patch": (transforms.patch_conv(2), (6, 4, 2, 2)),
    "swap": (transforms.swap_halves(0), (6, 4)),
    "linear_swapped": (transforms.linear().then(transforms.swap_halves(-1)), (6, 4)),
}


class Tensors:
    """A TensorFile in memory."""

    path, kind = "memory", "safetensors"

    def __init__(self, arrays, **metadata):
        self.arrays, self.metadata = arrays, metadata
        self.specs = {name: TensorSpec(a.shape, a.dtype) for name, a in arrays.items()}

    def read(self, names):
        return iter([self.arrays[name].copy() for name in names])


def write(table, shapes, params, dtype=np.float32):
    """What an export would hold."""
    specs = export_specs(table, shapes, dtype)
    arrays = list(export_arrays(table, shapes, params.__getitem__, dtype))
    assert [a.shape for a in arrays] == [spec.shape for spec in specs.values()]
    return dict(zip(specs, arrays, strict=True))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_and_its_inverse_are_the_identity(name):
    transform, shape = TRANSFORMS[name]
    foreign = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_array_equal(transform.inverse(transform.forward(foreign)), foreign)


def test_a_linear_map_stored_as_convolution_is_read():
    transform = transforms.linear_or_pointwise()
    weight = np.random.default_rng(0).normal(size=(6, 4))
    np.testing.assert_array_equal(transform.forward(weight[:, :, None, None]), weight.T)
    assert transform.accepts((6, 4, 1, 1), (6, 4)) and not transform.accepts((6, 4, 3, 3), (6, 4))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_stacked_and_fused_rows_round_trip_bit_for_bit(depth, width, parts, seed):
    names = tuple(f"layers.{{layer}}.{part}.weight" for part in "qkv"[:parts])
    table = Table("net", (Row("blocks.qkv", names, transforms.linear()),))
    bits = np.random.default_rng(seed).integers(0, 2**32, (depth, 5, width * parts), np.uint32)
    params = {"blocks.qkv": bits.view(np.float32)}
    shapes = {"blocks.qkv": params["blocks.qkv"].shape}
    foreign = write(table, shapes, params)
    assert len(foreign) == depth * parts and foreign["layers.0.q.weight"].shape == (width, 5)
    back = ParameterReader(table, shapes, Tensors(foreign))("blocks.qkv")
    np.testing.assert_array_equal(back.view(np.uint32), bits)


def test_padding_is_written_as_zeros_and_left_out_again():
    table = Table("net", (Row("rows", ("rows",), transforms.padded_rows((0, 1, 5), 6)),))
    params = {"rows": np.arange(6, dtype=np.float32).reshape(3, 2)}
    foreign = write(table, {"rows": (3, 2)}, params)
    np.testing.assert_array_equal(foreign["rows"][[0, 1, 5]], params["rows"])
    assert not foreign["rows"][2:5].any()
    back = ParameterReader(table, {"rows": (3, 2)}, Tensors(foreign))("rows")
    np.testing.assert_array_equal(back, params["rows"])


COPIES = Table("net", (Row("emb", ("block.{layer}.emb",), transforms.linear(), copies=3),))


def test_copies_are_written_everywhere_and_must_agree_when_read():
    params = {"emb": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)}
    foreign = write(COPIES, {"emb": (2, 3)}, params)
    assert len(foreign) == 3
    reader = ParameterReader(COPIES, {"emb": (2, 3)}, Tensors(foreign))
    np.testing.assert_array_equal(reader("emb"), params["emb"])
    foreign["block.2.emb"] = foreign["block.2.emb"] + 1
    with pytest.raises(InteropError, match=r"block\.2\.emb differs from its copy"):
        ParameterReader(COPIES, {"emb": (2, 3)}, Tensors(foreign))("emb")


def test_alternative_names_are_read_and_the_first_is_written():
    table = Table("net", (Row("a", ("new|old",), transforms.identity()),))
    array = np.ones((2,), np.float32)
    assert list(export_specs(table, {"a": (2,)})) == ["new"]
    for name in ("new", "old"):
        reader = ParameterReader(table, {"a": (2,)}, Tensors({name: array}))
        np.testing.assert_array_equal(reader("a"), array)


def test_one_error_lists_all_that_is_wrong():
    table = Table(
        "net",
        (
            Row("blocks.a", ("l.{layer}.a",), transforms.linear()),
            Row("b", ("b.weight",), transforms.identity()),
        ),
        ignored=(r"counters\..*",),
    )
    found = Tensors(
        {
            "l.1.a": np.zeros((9, 9), np.float32),
            "extra": np.zeros(3, np.float32),
            "counters.n": np.zeros((), np.int64),
        }
    )
    with pytest.raises(InteropError) as refusal:
        ParameterReader(table, {"blocks.a": (4, 2, 3), "b": (5,)}, found)
    message = str(refusal.value)
    assert "missing: l.{0,2,3}.a [3, 2] (ours: blocks.a)" in message
    assert "shape: l.1.a is [9, 9], expected [3, 2] (ours: blocks.a [4, 2, 3])" in message
    assert "missing: b.weight [5] (ours: b)" in message
    assert "unexpected: extra [3]" in message
    assert "counters" not in message and "(4 differences)" in message


def test_constants_are_written_and_checked():
    table = Table("net", (), (Constant("positions", lambda: np.arange(4, dtype=np.float32)),))
    foreign = write(table, {}, {})
    np.testing.assert_array_equal(foreign["positions"], np.arange(4))
    ParameterReader(table, {}, Tensors(foreign))
    ParameterReader(table, {}, Tensors({}))
    half = {"positions": np.arange(4).astype(np.float16)}
    ParameterReader(table, {}, Tensors(half))
    with pytest.raises(InteropError, match="positions is fixed in the net"):
        ParameterReader(table, {}, Tensors({"positions": foreign["positions"] * 1.01}))
    with pytest.raises(InteropError, match=r"positions is \[3\]"):
        ParameterReader(table, {}, Tensors({"positions": np.zeros(3, np.float32)}))


def test_integers_are_refused():
    table = Table("net", (Row("a", ("a",), transforms.identity()),))
    reader = ParameterReader(table, {"a": (2,)}, Tensors({"a": np.zeros(2, np.int32)}))
    with pytest.raises(InteropError, match="holds int32, not weights"):
        reader("a")
