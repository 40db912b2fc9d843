"""Meshes from a configuration's axes, and what is refused."""

import jax
import numpy as np
import pytest
from flax import nnx

from dit_jax import experiment
from dit_jax.launch import wiring
from dit_jax.models import layers
from dit_jax.models.batch_axes import divided_by_rows
from dit_jax.parallel.mesh import AXES, DataParallel, create_mesh, resolve_axes
from dit_jax.parallel.partitioning import ShardedPlacement
from tests.launch.conftest import tiny_config


def test_one_axis_takes_the_devices_that_the_others_leave():
    assert dict(create_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert dict(create_mesh(fsdp=4).shape)["data"] == 2
    assert dict(create_mesh(data=1, fsdp=-1, sequence=2).shape)["fsdp"] == 4
    assert create_mesh(data=2, fsdp=4).axis_names == AXES


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, r"mesh.data=3.* multiply to 3, but there are 8 devices: set mesh.data=8"),
        ({"data": 2, "fsdp": 2}, r"multiply to 4, .*mesh.data=4 or mesh.fsdp=4"),
        ({"fsdp": 3}, r"multiply to 3, which does not divide 8 devices.* 1, 2, 4, 8"),
        ({"fsdp": -1}, r"only one axis can be -1"),
        ({"tensor": 0}, r"mesh.tensor=0: expected 1 or more"),
        ({"fsdp": 2, "tensor": 2}, r"mixes up the examples.*Set mesh.data=1 and mesh.fsdp=4, or"),
    ],
)
def test_axes_that_do_not_multiply_to_the_devices_are_an_error_with_values_that_do(axes, message):
    with pytest.raises(ValueError, match=message):
        create_mesh(**axes)


def test_any_number_of_devices_can_be_resolved():
    axes = {"data": -1, "fsdp": 64, "tensor": 2, "sequence": 1}
    assert resolve_axes(axes, 256)["data"] == 2


def test_the_default_mesh_keeps_whole_states_and_sets_no_mesh_for_tracing():
    placement = wiring.create_placement(experiment.resolve_config(tiny_config()))
    assert type(placement) is DataParallel and placement.batch_parts == 8
    with placement.tracing():
        assert jax.sharding.get_abstract_mesh().empty
    batch = placement.put_batch({"image": np.zeros((8, 4, 4, 1), np.float32)})
    assert batch["image"].addressable_shards[0].data.shape == (1, 4, 4, 1)


def test_batches_are_divided_over_data_and_fsdp_and_rows_over_sequence():
    config = experiment.resolve_config(tiny_config(**{"mesh.fsdp": 2, "mesh.sequence": 2}))
    placement = wiring.create_placement(config)
    assert type(placement) is ShardedPlacement
    assert (placement.batch_parts, placement.num_devices) == (4, 8)
    placement.check_batch_size(4)
    batch = placement.put_batch(
        {
            "image": np.zeros((8, 4, 4, 1), np.float32),
            "conditions": {"label": np.zeros(8, np.int32)},
        }
    )
    assert batch["image"].addressable_shards[0].data.shape == (2, 2, 4, 1)
    assert batch["conditions"]["label"].addressable_shards[0].data.shape == (2,)


def test_a_text_condition_is_not_divided_over_sequence_whatever_its_length_and_rank():
    placement = DataParallel(create_mesh(data=4, sequence=2))
    images = {
        "image": np.zeros((8, 3, 4, 6, 1), np.float32),  # with a time axis
        "path": np.zeros((8, 2, 4, 4, 1), np.float32),
    }
    conditions = {
        "text": np.ones((8, 7, 4), np.float32),
        "reference": np.zeros((8, 3, 7, 4), np.float32),
        "image": np.zeros((8, 3, 4, 4), np.float32),  # a condition, whatever its name
    }
    batch = placement.put_batch({**images, "conditions": conditions})
    shapes = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, batch)
    assert shapes.pop("conditions") == {
        "text": (2, 7, 4),
        "reference": (2, 3, 7, 4),
        "image": (2, 3, 4, 4),
    }
    assert shapes == {"image": (2, 3, 2, 6, 1), "path": (2, 2, 2, 4, 1)}

    text_layer, image_layer = (layers.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))

    @jax.jit
    def call(text, tokens):
        tokens = divided_by_rows(image_layer(tokens))
        rows = divided_by_rows(tokens.reshape(8, 3, 2, 4), axis=2)
        return text_layer(text), text_layer(text[:, :6]), tokens, rows

    tokens = np.ones((8, 6, 4), np.float32)
    with placement.tracing():
        outs = call(batch["conditions"]["text"], placement.put_batch({"tokens": tokens})["tokens"])
    of_device = [out.addressable_shards[0].data.shape for out in outs]
    assert of_device == [(2, 7, 4), (2, 6, 4), (2, 3, 4), (2, 3, 1, 4)]


def test_a_batch_the_axes_cannot_share_is_an_error():
    placement = DataParallel(create_mesh(data=2, fsdp=4))
    with pytest.raises(ValueError, match="not divisible by 8 devices: use 8 or 16"):
        placement.check_batch_size(12)
