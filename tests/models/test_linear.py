"""What is computed and stored in what: roles, storage apart from computation, no conversions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

from dit_jax.models import DhariwalUNetConfig, DiTConfig, Network, Request, SongUNetConfig
from dit_jax.models.linear import ZEROS, Initialization, Linear, Precision, product
from tests.models.conftest import random_params

COMMON = {"image_size": 8, "in_channels": 3, "num_classes": 5, "augment_dim": 4}
UNET = {"channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (4,), "second_time": "r"}
CONFIGS = {
    "dit, scanned": DiTConfig(
        hidden_size=32, depth=2, num_heads=2, second_time="t-r", layer_loop="scan", **COMMON
    ),
    "dit, unrolled": DiTConfig(hidden_size=32, depth=2, num_heads=2, layer_loop="unroll", **COMMON),
    "ddpm++": SongUNetConfig(model_channels=16, **UNET, **COMMON),
    "adm": DhariwalUNetConfig(model_channels=64, **UNET, **COMMON),
}
NAMED = pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in CONFIGS.items()])


# Sums of absolute initial values of key 0, from the layers' first form.
SUMS = {
    "dit, scanned": 2914.65584,
    "dit, unrolled": 2803.00839,
    "ddpm++": 5258.04001,
    "adm": 30017.70802,
}


def stored(config, compute="bfloat16", storage="float32"):
    return Network(dataclasses.replace(config, dtype=compute, param_dtype=storage))


def as_stored(network, params):
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, shapes)


def evaluate(network, params):
    config, t = network.config, jnp.asarray([0.3, 0.7, 0.1])
    x = jax.random.normal(jax.random.key(2), (3, 8, 8, 3))
    conditions = {"label": jnp.asarray([1, 5, 0]), "augment": jnp.ones((3, 4))}
    if config.second_time != "none":
        conditions["r"] = t / 2
    return network.apply(params, Request(x, t, conditions)).out


def converted(jaxpr, is_parameter):
    """Shapes of all parameters, or slices of them, that a program converts to another dtype."""
    found, ours = [], {v for v, is_one in zip(jaxpr.invars, is_parameter, strict=True) if is_one}
    passes = ("slice", "dynamic_slice", "squeeze", "reshape", "split", "broadcast_in_dim")
    for equation in jaxpr.eqns:
        taken = [isinstance(v, core.Var) and v in ours for v in equation.invars]
        if equation.primitive.name == "convert_element_type" and taken[0]:
            found.append(equation.invars[0].aval.str_short())
        if equation.primitive.name in passes and taken[0]:
            ours.update(equation.outvars)
        for inner in core.jaxprs_in_params(equation.params):
            # Operands of a call are the last ones of the equation.
            found += converted(inner, taken[len(taken) - len(inner.invars) :])
    return found


@NAMED
def test_nothing_stored_as_it_is_computed_is_converted(config):
    def conversions(storage):
        network = stored(config, storage=storage)
        params = as_stored(network, random_params(network, scale=0.2))
        program = jax.make_jaxpr(lambda params: evaluate(network, params))(params).jaxpr
        return converted(program, [True] * len(program.invars))

    assert conversions("bfloat16") == []
    assert len(conversions("float32")) > 10  # of the same walk: it does see them


@NAMED
def test_stored_bfloat16_gives_the_bits_of_a_conversion_at_each_call(config):
    wide, narrow = stored(config), stored(config, storage="bfloat16")
    params = random_params(wide, scale=0.2)
    expected = jax.jit(lambda params: evaluate(wide, params))(params)
    assert np.std(expected) > 0.1
    out = jax.jit(lambda params: evaluate(narrow, params))(as_stored(narrow, params))
    np.testing.assert_array_equal(out, expected)


def test_what_stays_float32_whatever_the_storage():
    shapes = jax.eval_shape(
        stored(CONFIGS["dit, scanned"], storage="bfloat16").init, jax.random.key(0)
    )
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    wide = {path[0].key for path, leaf in paths if leaf.dtype == jnp.float32}
    assert wide == {"t_embedder", "r_embedder", "y_embedder", "augment_embedder", "final_layer"}
    assert shapes["final_layer"]["linear"]["kernel"].dtype == jnp.float32
    assert shapes["final_layer"]["adaLN_modulation"]["kernel"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["blocks"])} == {jnp.dtype("bfloat16")}
    block = jax.eval_shape(stored(CONFIGS["adm"], storage="bfloat16").init, jax.random.key(0))
    block = block["enc"]["8x8_block0"]
    assert block["norm0"]["scale"].dtype == block["affine"]["kernel"].dtype == jnp.float32
    assert block["conv0"]["kernel"].dtype == jnp.bfloat16


def test_roles():
    precision = Precision("bfloat16", "bfloat16", embedding="float32", conditioning="bfloat16")
    x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    dtypes = {role: product(x, kernel, precision, role).dtype.name for role in ("hidden", "output")}
    assert dtypes == {"hidden": "bfloat16", "output": "float32"}
    assert precision.stored("embedding") == precision.dtype("embedding") == jnp.float32
    assert precision.stored("conditioning") == jnp.bfloat16
    assert Precision("float32", "bfloat16").dtype("hidden") == jnp.float32
    with pytest.raises(ValueError, match="role 'mlp': expected one of"):
        precision.dtype("mlp")
    for name in ("dtype", "param_dtype"):
        with pytest.raises(ValueError, match=f"{name}='float8': expected"):
            DiTConfig(**{name: "float8"})


def test_initial_values_stay_those_of_checkpoints_begun_before():
    # A layer that draws another number of keys changes the values of all layers after it.
    sums = {}
    for name, config in CONFIGS.items():
        params = jax.jit(stored(config).init)(jax.random.key(0))
        sums[name] = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(params))
    assert sums == pytest.approx(SUMS, rel=1e-5)


def test_zeros_by_mode_take_a_key_and_by_scale_none():
    def second(init):
        rngs = nnx.Rngs(params=0)
        assert not Linear(2, 3, rngs=rngs, init=init).kernel[...].any()
        return np.asarray(Linear(2, 3, rngs=rngs).kernel[...])

    first = np.asarray(Linear(2, 3, rngs=nnx.Rngs(params=0)).kernel[...])
    np.testing.assert_array_equal(second(Initialization(scale=0.0)), first)
    assert not np.array_equal(second(ZEROS), first)
