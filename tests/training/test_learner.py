"""What denoising and all students do alike, and that their states are those of earlier runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import NoWeight, RectifiedFlow, Uniform
from dit_jax.distill.student import Player, Student
from dit_jax.models import DiTConfig, Network
from dit_jax.training import ema
from dit_jax.training.denoising import Denoising

FLOW = RectifiedFlow()
SIZE = {"image_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 1, "num_classes": 3}
NETWORK = Network(DiTConfig(**SIZE, learn_sigma=False))
SHARED = {
    "denoiser": Denoiser(NETWORK, FLOW),
    "optimizer": optax.sgd(0.5, momentum=0.9),
    "averages": tuple(ema.averages((0.5,), warmup=False)),
}
LEARNERS = {
    "denoising": lambda **more: Denoising(
        timesteps=Uniform(FLOW), weighting=NoWeight(), **SHARED, **more
    ),
    "student": lambda **more: Student(**SHARED, **more),
}


def started(name, learner):
    if name == "denoising":
        return learner.init(jax.random.key(0))
    players = {"critic": Player({"w": jnp.ones(2)}, ())}
    return learner.create_state(jax.random.key(0), players=players)


@pytest.mark.parametrize("name", LEARNERS)
def test_an_update_moves_parameters_and_averages_and_nothing_else(name):
    learner = LEARNERS[name]()
    state = started(name, learner)
    gradients = jax.tree.map(jnp.ones_like, state.params)
    new = learner.apply_gradients(state, gradients)
    assert jax.tree.structure(new) == jax.tree.structure(state) and new.step == 1
    for moved, before, average in zip(
        *map(jax.tree.leaves, (new.params, state.params, new.ema["ema_0.5"])), strict=True
    ):
        np.testing.assert_allclose(moved, before - 0.5, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(average, before - 0.25, rtol=1e-6, atol=1e-6)
    assert list(learner.weights(new)) == ["ema_0.5", "raw"]
    # The names that checkpoints know its parts by.
    paths = {
        jax.tree_util.keystr(path).split("[")[0]
        for path, _ in jax.tree_util.tree_leaves_with_path(new)
    }
    expected = {".step", ".params", ".ema", ".optimizer"}
    if name == "student":
        expected |= {".players"}
        np.testing.assert_array_equal(new.players["critic"].params["w"], 1.0)
    assert paths == expected


@pytest.mark.parametrize("name", LEARNERS)
def test_label_dropout_that_cannot_be_is_refused(name):
    with pytest.raises(ValueError, match=r"label_dropout=1\.5: expected 0 to 1"):
        LEARNERS[name](label_dropout=1.5)
