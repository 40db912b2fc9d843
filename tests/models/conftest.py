import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models import DiTConfig, Network

SMALL = {"image_size": 8, "hidden_size": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def random_like(tree, seed=0, scale=None):
    """Something random in place of every array or shape, by default such that signals live on."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        spread = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.2
        return jnp.asarray(random.normal(size=leaf.shape) * (scale or spread), jnp.float32)

    return jax.tree.map(draw, tree)


def random_params(network, seed=0, scale=None):
    """Every parameter random: the initial gates are zero."""
    return random_like(jax.eval_shape(network.init, jax.random.key(0)), seed, scale)


@jax.jit
def perturbed(params, key, scale):
    """Parameters with something random added to every one of them."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [
            leaf + scale * jax.random.normal(k, leaf.shape)
            for leaf, k in zip(leaves, keys, strict=True)
        ]
    )


def random_inputs(config, batch=2, seed=1):
    """(x, t, conditions) for `Network.apply`."""
    random = np.random.default_rng(seed)
    x = jnp.asarray(
        random.normal(size=(batch, *config.input_size, config.in_channels)), jnp.float32
    )
    t = jnp.asarray(random.uniform(0, 1000, batch), jnp.float32)
    label = jnp.asarray(random.integers(0, config.num_classes + 1, batch), jnp.int32)
    return x, t, {"label": label} if config.num_classes else {}


@pytest.fixture(scope="module")
def small():
    """A small configuration, its random parameters and inputs."""
    config = DiTConfig(**SMALL)
    return config, random_params(Network(config)), random_inputs(config)
