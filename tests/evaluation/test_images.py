import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dit_jax.evaluation import ROUNDING_RULES, to_float, to_uint8

ALL_BYTES = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


@pytest.mark.parametrize("rounding", ROUNDING_RULES)
def test_every_byte_survives_the_round_trip(rounding):
    np.testing.assert_array_equal(to_uint8(to_float(ALL_BYTES), rounding), ALL_BYTES)
    np.testing.assert_array_equal(to_uint8(ALL_BYTES, rounding), ALL_BYTES)


@given(
    npst.arrays(np.float32, (1, 3, 3, 1), elements=st.floats(-2, 2, width=32)),
)
@settings(max_examples=60, deadline=None)
def test_rules_follow_their_formulas_and_differ_on_ties_alone(x):
    exact = np.clip(127.5 * (x.astype(np.float64) + 1), 0, 255)
    nearest = to_uint8(x, "nearest").astype(np.float64)
    assert (np.abs(nearest - exact) <= 0.5 + 1e-4).all()
    # The line of DiT's sampling script, in float32 as it runs there.
    np.testing.assert_array_equal(
        to_uint8(x, "truncate"), np.clip(np.float32(127.5) * x + 128, 0, 255).astype(np.uint8)
    )
    apart = nearest != to_uint8(x, "truncate")
    np.testing.assert_allclose(np.abs(exact - np.floor(exact) - 0.5)[apart], 0, atol=1e-4)


def test_ends_ties_and_values_outside():
    x = np.array([-7.0, -1.0, 0.0, 1.0, 7.0, -0.003921568859368563], np.float32)
    x = x.reshape(1, 1, 6, 1)
    assert to_uint8(x, "nearest").ravel().tolist()[:5] == [0, 0, 128, 255, 255]
    assert to_uint8(x, "truncate").ravel().tolist()[:5] == [0, 0, 128, 255, 255]
    tie = np.full((1, 1, 1, 1), (126.5 / 127.5) - 1, np.float64)
    assert to_uint8(tie, "nearest").item() == 126
    assert to_uint8(tie, "truncate").item() == 127


def test_accelerator_types_are_accepted():
    images = jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16).reshape(1, 8, 8, 1)
    expected = to_uint8(np.asarray(images, np.float32))
    np.testing.assert_array_equal(to_uint8(images), expected)
    assert to_float(images).dtype == np.float32


def test_bad_images_are_refused_with_what_was_given():
    with pytest.raises(ValueError, match=r"unknown rounding rule 'floor'; known: nearest, trunc"):
        to_uint8(ALL_BYTES, "floor")
    with pytest.raises(ValueError, match=r"\[n, height, width, channels\], got shape \(8, 8\)"):
        to_uint8(np.zeros((8, 8)))
    with pytest.raises(ValueError, match="got int32"):
        to_uint8(np.zeros((1, 8, 8, 1), np.int32))
    with pytest.raises(ValueError, match="no pixels"):
        to_uint8(np.zeros((1, 0, 8, 1), np.float32))
    broken = np.zeros((3, 2, 2, 1), np.float32)
    broken[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 3 images hold values that are not finite"):
        to_uint8(broken)
