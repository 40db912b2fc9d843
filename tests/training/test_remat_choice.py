import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from dit_jax import config as config_lib
from dit_jax import experiment
from dit_jax.training import memory, remat_choice

GIB = 2**30


@dataclasses.dataclass
class Analysis:
    temp_size_in_bytes: int
    argument_size_in_bytes: int = 2 * GIB
    output_size_in_bytes: int = 2 * GIB
    alias_size_in_bytes: int = 2 * GIB


@dataclasses.dataclass
class Program:
    temporaries: int

    def memory_analysis(self):
        return Analysis(self.temporaries)


NEEDS = {"none": 90, "activations": 50, "dots": 40, "block": 10}  # GiB of temporaries


def choose(limit, policies=remat_choice.POLICIES, bounds=None):
    """(chosen, compiled, lines) with a device of `limit` GiB."""
    lines, compiled = [], []

    def compile_with(policy):
        compiled.append(policy)
        return {"train": Program(NEEDS[policy] * GIB)}

    def require_fits(program):
        needed = memory.bytes_needed(program)
        if needed > limit * GIB:
            raise memory.MemoryNeededError(f"an update needs {needed}")

    methods = {policy: policy for policy in policies}
    choice = remat_choice.Choice(methods, lines.append, limit=limit * GIB)
    bound = (lambda policy: bounds[policy] * GIB) if bounds else (lambda policy: 0)
    method, _ = choice.compiled(compile_with, bound, require_fits)
    return method, compiled, lines


@pytest.mark.parametrize(
    ("limit", "expected"), [(100, "none"), (80, "activations"), (45, "dots"), (13, "block")]
)
def test_the_first_policy_that_fits_is_taken_and_said(limit, expected):
    method, compiled, lines = choose(limit)
    assert method == expected and compiled[-1] == expected
    needed = NEEDS[expected] + 2
    assert lines[-1] == (
        f"config.model.remat='auto': {expected!r} fits: an update needs {needed:.2f} GiB (a device "
        f"has {limit:.2f} GiB)"
    )


def test_what_cannot_fit_is_not_compiled():
    method, compiled, lines = choose(45, bounds={"none": 85, "activations": 48, "dots": 38})
    assert method == "dots" and compiled == ["dots"]
    assert "'none' needs at least 85.00 GiB, more than there is" in lines[0]


def test_a_policy_named_is_neither_announced_nor_replaced():
    method, compiled, lines = choose(60, policies=("activations",))
    assert (method, compiled, lines) == ("activations", ["activations"], [])
    with pytest.raises(memory.MemoryNeededError, match="an update needs"):
        choose(20, policies=("activations",))


def test_the_last_error_is_the_last_policys():
    with pytest.raises(memory.MemoryNeededError, match=f"needs {12 * GIB}"):
        choose(5)


def tiny(**overrides):
    return config_lib.resolve(
        {
            "model": {
                "image_size": 8,
                "num_classes": 7,
                "dit": {"hidden_size": 48, "depth": 3, "num_heads": 3, "layer_loop": "scan"},
                **overrides,
            },
            "training": {"batch_size": 8},
        }
    )


def alternatives(config, backend):
    method = experiment.build_method(config)
    found = remat_choice.alternatives(config, method, experiment.build_method, backend)
    assert len(found) > 1 or next(iter(found.values())) is method
    return found


def test_alternatives_go_by_backend_and_configuration():
    found = alternatives(tiny(), "gpu")
    assert tuple(found) == remat_choice.AUTOMATIC
    assert [m.denoiser.network.config.remat for m in found.values()] == list(found)
    assert list(alternatives(tiny(), "cpu")) == ["none"]
    named = alternatives(tiny(remat="block"), "gpu")
    assert list(named) == ["block"]


def test_what_a_method_keeps_is_of_one_microbatch():
    config = tiny(remat="block")
    whole = experiment.build_method(config)
    parts = dataclasses.replace(whole, num_microbatches=2)
    key = jax.random.key(0)
    state = jax.eval_shape(whole.init, key)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 8, 8, 4), jnp.float32),
        "conditions": {"label": jax.ShapeDtypeStruct((8,), jnp.int32)},
    }
    kept = whole.kept_bytes(state, batch, key)
    assert kept >= 3 * 8 * 16 * 48 * 4  # the blocks' inputs
    assert 0.4 * kept < parts.kept_bytes(state, batch, key) < 0.6 * kept
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert remat_choice.least_bytes(whole, state, batch, key, 4) == (held + kept) // 4
    assert remat_choice.least_bytes(object(), state, batch, key, 4) == 0


@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_text_conditioned_network_keeps_is_known_with_its_nulls(rank):
    config = importlib.import_module("dit_jax.configs.flux_tiny").get_config()
    config.model.update(remat="block")
    config.model.flux.update(depth=1, single_depth=1, layer_loop="scan")
    if rank:
        config.lora.update(rank=rank, base="a/run")
    method = experiment.build_method(config_lib.resolve(config.to_dict()))
    assert method.label_dropout > 0
    declared, side = method.denoiser.network.conditions, method.denoiser.network.config.image_size
    told = {"text": (3, *declared["text"].shape[1:]), "pooled": declared["pooled"].shape}
    image = (8, side, side, method.denoiser.network.config.in_channels)
    shape = jax.ShapeDtypeStruct
    batch = {
        "image": shape(image, jnp.float32),
        "conditions": {name: shape((8, *size), jnp.bfloat16) for name, size in told.items()},
    }
    frozen = {"nulls": {name: shape(size, jnp.bfloat16) for name, size in told.items()}}
    key = jax.random.key(0)
    state = jax.eval_shape(method.init, key)
    inputs = (state, batch, key)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    least = remat_choice.least_bytes(method, *inputs, 1, frozen)
    assert least == held + method.kept_bytes(*inputs, frozen)
    assert least > held
    with pytest.raises(ValueError, match="null value"):
        method.kept_bytes(*inputs)
