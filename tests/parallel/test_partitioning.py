"""Partition rules: every parameter has one, every rule a parameter, whatever the configuration."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dit_jax import experiment
from dit_jax.models import FluxConfig, Network, lora
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dit_jax.models.text import CLIPTextConfig, T5Config, TextEncoder
from dit_jax.parallel import partitioning
from dit_jax.parallel.mesh import create_mesh
from dit_jax.parallel.partitioning import (
    CLIP_TEXT,
    FLUX,
    PLAYERS,
    T5_ENCODER,
    TABLES,
    VAE,
    Rule,
    RuleError,
    ShardedPlacement,
    format_table,
    place_tree,
    resolve_spec,
    rules_for,
)

SIZES = {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}


def shape(*dimensions):
    return jax.ShapeDtypeStruct(dimensions, jnp.float32)


# Together they have every part that experiments have.
EXPERIMENTS = (
    *("digits", "digits_dmd2", "digits_scm", "digits_mean_flow", "edm_dit_cifar10"),
    *("cifar10_edm_f_distill", "cifar10_edm_ladd"),
)


def experiments():
    for name in EXPERIMENTS:
        config = importlib.import_module(f"dit_jax.configs.{name}").get_config()
        if config.model.name == "song_unet":
            config.model.song_unet.num_blocks = 1
            config.teacher.path = config.teacher.path or "given"
        yield name, experiment.resolve_config(config)


def variants():
    """U-Nets and DiTs with the parts that no experiment has."""
    unet = importlib.import_module("dit_jax.configs.edm_cifar10").get_config
    for values in (
        {"encoder_type": "residual", "embedding_type": "fourier"},
        {"encoder_type": "skip", "decoder_type": "skip"},
    ):
        config = unet()
        config.model.song_unet.update(values, num_blocks=1)
        config.model.second_time = "r"
        yield experiment.resolve_config(config)
    config = importlib.import_module("dit_jax.configs.edm_imagenet64").get_config()
    config.model.dhariwal_unet.num_blocks = 1
    config.model.second_time = "r"
    yield experiment.resolve_config(config)


def test_the_rules_fit_every_experiment_and_divide_its_state_evenly():
    used = set()
    for name, config in experiments():
        method = experiment.build_method(config)
        state = jax.eval_shape(method.init, jax.random.key(0))
        rules = rules_for(config.model.name)
        placed = place_tree(state, rules, SIZES)
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert sum(p.bytes_per_device(SIZES) for p in placed) < 1.01 * whole / 8, name
        used |= {r for r in rules for p in placed if p.shape and r.matches(p.path)}
    for config in variants():
        network = experiment.build_network(config)
        state = jax.eval_shape(network.init, jax.random.key(0))
        rules = rules_for(config.model.name)
        placed = place_tree(state, rules, SIZES)
        used |= {r for r in rules for p in placed if p.shape and r.matches(p.path)}
    idle = {r.pattern for table in TABLES.values() for r in (*table, *PLAYERS)}
    beside = (*VAE, *FLUX, *CLIP_TEXT, *T5_ENCODER)
    idle -= {r.pattern for r in used} | {r.pattern for r in beside}
    assert not idle


def test_the_rules_fit_flux_and_divide_it_evenly():
    for name in ("flux_dev", "flux_schnell"):
        network = Network(FluxConfig.from_name(name))
        state = jax.eval_shape(network.init, jax.random.key(0))
        placed = place_tree(state, rules_for("flux"), SIZES)
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert sum(p.bytes_per_device(SIZES) for p in placed) < 1.01 * whole / 8, name
    unrolled = Network(dataclasses.replace(network.config, layer_loop="unroll"))
    apart = place_tree(jax.eval_shape(unrolled.as_sampled, state), rules_for("flux"), SIZES)
    of_first = next(p for p in apart if p.path == "double_blocks/text/mlp/fc2/kernel")
    assert of_first.spec == P("tensor", "fsdp")
    specs = {p.path: p.spec for p in placed}
    assert specs["double_blocks/text/mlp/fc2/kernel"] == P(None, "tensor", "fsdp")
    assert specs["single_blocks/linear1/kernel"] == P(None, "fsdp", "tensor")


def test_the_rules_fit_the_autoencoder():
    autoencoder = AutoencoderKL(AutoencoderKLConfig(scaling_factor=1.0))
    placed = place_tree(jax.eval_shape(autoencoder.init, jax.random.key(0)), VAE, SIZES)
    whole = sum(4 * np.prod(p.shape) for p in placed)
    assert sum(p.bytes_per_device(SIZES) for p in placed) < 1.01 * whole / 8
    specs = {p.path: p.spec for p in placed}
    assert specs["decoder/mid_block/resnets/0/conv1/kernel"] == P(None, None, "fsdp", "tensor")


@pytest.mark.parametrize(
    ("config", "rules"),
    [(CLIPTextConfig(with_projection=True), CLIP_TEXT), (T5Config(), T5_ENCODER)],
)
def test_the_rules_fit_the_text_encoders(config, rules):
    encoder = TextEncoder(config)
    placed = place_tree(jax.eval_shape(encoder.init, jax.random.key(0)), rules, SIZES)
    whole = sum(4 * np.prod(p.shape) for p in placed)
    assert sum(p.bytes_per_device(SIZES) for p in placed) < 1.01 * whole / 8
    specs = {p.path: p.spec for p in placed}
    assert specs["blocks/attn/proj/kernel"] == P(None, "tensor", "fsdp")


def test_averages_optimizer_and_players_follow_their_parameter():
    config = dict(experiments())["digits_dmd2"]
    method = experiment.build_method(config)
    state = jax.eval_shape(method.init, jax.random.key(0))
    specs = {p.path: p.spec for p in place_tree(state, rules_for("dit"), SIZES)}
    following = [path for path in specs if path.endswith("blocks/mlp/fc2/kernel")]
    assert len(following) >= 7  # parameters, average and two moments; the fake score's
    assert {specs[path] for path in following} == {P(None, "tensor", "fsdp")}


def test_a_parameter_without_a_rule_and_a_rule_without_a_parameter_are_errors():
    rules = (Rule(r"a/kernel", ("fsdp", "tensor")), Rule(r"b/kernel", (None,)))
    tree = {"a": {"kernel": shape(8, 8), "strange": shape(3)}}
    with pytest.raises(RuleError) as error:
        place_tree(tree, rules, SIZES)
    assert "a/strange (3,)" in str(error.value) and "b/kernel" in str(error.value)
    assert "match no parameter" in str(error.value)
    place_tree({"a": {"kernel": shape(8, 8)}}, rules, SIZES, complete=False)
    rules = (Rule(r"a/bias", (None,)), *rules)
    with pytest.raises(RuleError, match="match no parameter"):
        place_tree({"a": {"bias": shape(8)}}, rules, SIZES)
    with pytest.raises(RuleError, match="fewer dimensions"):
        place_tree({"a": {"kernel": shape(8)}}, rules, SIZES, complete=False)
    with pytest.raises(RuleError, match=r"'sdxl' has no partition rules; .*dit, flux"):
        rules_for("sdxl")


@pytest.mark.parametrize(
    ("dimensions", "spec", "note"),
    [
        ((8, 8), P("fsdp", "tensor"), ""),
        ((5, 8, 8), P(None, "fsdp", "tensor"), ""),  # a stack of layers
        ((3, 8), P(None, ("tensor", "fsdp")), "3 is not divisible by fsdp=4: moved"),
        ((8, 3), P(("fsdp", "tensor")), "3 is not divisible by tensor=2: moved"),
        ((3, 5), P(), "whole"),
    ],
)
def test_an_axis_that_does_not_divide_moves_or_is_left_out(dimensions, spec, note):
    found, told = resolve_spec("x", dimensions, ("fsdp", "tensor"), SIZES)
    assert found == spec and note in told and bool(note) == bool(told)


def test_the_table_tells_axes_bytes_and_departures():
    tree = {"a": shape(8, 8), "b": shape(3)}
    rules = (Rule("a", ("fsdp", "tensor")), Rule("b", partitioning.VECTOR))
    text = format_table(place_tree(tree, rules, SIZES), SIZES)
    lines = text.splitlines()
    assert lines[1].split()[:5] == ["a", "8x8", "fsdp,", "tensor", "32"]
    assert "whole" in lines[2] and "3 is not divisible" in lines[2]
    assert "44 bytes a device of 268 in all" in lines[3]


def test_factors_of_a_lora_follow_their_kernels():
    network = Network(FluxConfig.from_name("flux_tiny"))
    params = jax.eval_shape(network.init, jax.random.key(0))
    factors = jax.eval_shape(
        lambda key: lora.init(network, key, 4, list(lora.layer_shapes(network))), jax.random.key(0)
    )
    for tree in (lora.combine(params, factors), factors):
        specs = {placed.path: placed.spec for placed in place_tree(tree, FLUX, SIZES)}
        assert specs["single_blocks/linear1/lora_a"] == P(None, "fsdp")
        assert specs["single_blocks/linear1/lora_b"] == P(None, None, "tensor")
        assert specs["single_blocks/linear2/lora_a"] == P(None, "tensor")
        assert specs["final_layer/linear/lora_b"] == P()


def test_the_state_of_a_loras_training_is_of_factors_alone():
    config = importlib.import_module("dit_jax.configs.digits").get_config()
    config.lora.update(rank=2, base="given")
    method = experiment.build_method(experiment.resolve_config(config))
    state = jax.eval_shape(method.init, jax.random.key(0))
    specs = {placed.path: placed.spec for placed in place_tree(state, rules_for("dit"), SIZES)}
    following = [path for path in specs if path.endswith("blocks/attn/qkv/lora_b")]
    assert len(following) >= 4  # factors, average and two moments
    assert {specs[path] for path in following} == {P(None, None, "tensor")}


def test_a_frozen_parameter_is_read_to_its_shards():
    placement = ShardedPlacement(create_mesh(fsdp=4, tensor=2), rules_for("dit"))
    array = np.arange(2 * 8 * 16, dtype=np.float32).reshape(2, 8, 16)
    for path in ("blocks/mlp/fc1/kernel", "blocks.mlp.fc1.kernel"):
        placed = placement.put_params(path, array)
        assert placed.addressable_shards[0].data.shape == (2, 2, 8)
        np.testing.assert_array_equal(placed, array)
