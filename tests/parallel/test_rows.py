"""Layers that look at their neighbourhood, over rows on many devices, are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dit_jax.models import edm_layers
from dit_jax.models.spatial import LOCAL
from dit_jax.parallel.rows import RowExchange, Rows

FACTOR = 4  # rows of the image a unit


def layers(x, kernel, spatial):
    """Everything the seam offers, one result a layer."""
    mean, variance = spatial.group_statistics(x, 2)
    conv = spatial.convolve(x, kernel)
    strided = spatial.convolve(x, kernel, stride=2, padding=((0, 1), (0, 1)))
    wide = spatial.convolve(x, kernel, padding=((2, 2), (2, 2)))
    taps = (1, 3, 3, 1)
    rows = (
        conv,
        strided,
        edm_layers.downsample(wide, taps, padding=0),
        edm_layers.downsample(x, taps, spatial=spatial),
        edm_layers.upsample(x, taps, spatial=spatial),
        edm_layers.upsample(x, (1, 1), spatial=spatial),
    )
    tokens = x.reshape(x.shape[0], -1, 2, x.shape[-1] // 2)
    attention = spatial.attention or edm_layers.attention_lib.LocalAttention()
    attended, _ = attention(tokens, tokens, tokens)
    return (*rows, attended.reshape(x.shape)), (mean, variance)


@pytest.mark.parametrize(("units", "devices"), [(6, 2), (7, 3), (9, 5)])
def test_layers_over_rows_equal_one_device(units, devices):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(3, 1, size=(2, units * FACTOR, 6, 8)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(3, 3, 8, 4)), jnp.float32)
    expected = layers(x, kernel, LOCAL)
    rows = Rows(units, devices, ("ring",))
    # What is in the padding must not matter.
    padding = ((0, 0), (0, rows.padding * FACTOR), (0, 0), (0, 0))
    x = jnp.pad(x, padding, constant_values=1e3)
    slabs = PartitionSpec(None, "ring")
    evaluate = jax.shard_map(
        functools.partial(layers, spatial=RowExchange(rows)),
        mesh=Mesh(np.asarray(jax.devices()[:devices]), ("ring",)),
        in_specs=(slabs, PartitionSpec()),
        out_specs=(slabs, PartitionSpec()),
        check_vma=False,
    )
    found = jax.jit(evaluate)(x, kernel)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one[:, : other.shape[1]], other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("units", "devices", "message"),
    [(4, 5, "4 rows .* over 5 devices: .*1 would have none. Use 4 devices"), (4, 0, "at least 1")],
)
def test_devices_without_rows_are_refused(units, devices, message):
    with pytest.raises(ValueError, match=message):
        Rows(units, devices)


def test_more_neighbours_than_rows_are_refused():
    exchange = RowExchange(Rows(2, 2))
    with pytest.raises(ValueError, match="looks 2 rows beyond its own, but a device has 1"):
        exchange.extend(jnp.zeros((1, 1, 4, 1)), 2, 2)
