import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.models import DiTConfig, Network, Request
from dit_jax.models import dit as dit_lib
from dit_jax.models.apart import Apart
from tests.models.conftest import SMALL, random_inputs, random_params
from tests.references import torch_dit
from tests.references.torch_params import from_torch


def torch_output(model, x, t, label):
    with torch.no_grad():
        x, t, label = (torch.tensor(np.array(a)) for a in (x, t, label))
        return model(x.permute(0, 3, 1, 2), t, label.long()).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"depth": 12, "hidden_size": 384, "num_heads": 6}, id="S/2"),
        pytest.param({"image_size": 64, "depth": 2, "hidden_size": 96, "num_heads": 4}, id="512"),
        pytest.param({**SMALL, "time_frequency_spacing": "diffusers"}, id="diffusers' spacing"),
        pytest.param({**SMALL, "learn_sigma": False, "patch_size": 4}, id="no sigma, patch 4"),
        pytest.param({**SMALL, "in_channels": 1, "learn_sigma": False}, id="grey pixels"),
        pytest.param({**SMALL, "in_channels": 3, "mlp_ratio": 2.5}, id="colour pixels"),
    ],
)
def test_forward_matches_pytorch(shape):
    config = DiTConfig(**shape)
    model = torch_dit.DiT(
        depth=config.depth,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        input_size=config.image_size,
        num_classes=config.num_classes,
        mlp_ratio=config.mlp_ratio,
        learn_sigma=config.learn_sigma,
        frequency_shift=1.0 if config.time_frequency_spacing == "diffusers" else 0.0,
    )
    torch_dit.randomise(model, seed=0)
    params = from_torch(model.state_dict(), config)
    network = Network(config)
    expected_shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected_shapes)
    x, t, conditions = random_inputs(config)
    out = jax.jit(network.apply)(params, Request(x, t, conditions)).out
    expected = torch_output(model, x, t, conditions["label"])
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(out, expected, atol=1e-4, rtol=0)


def test_unconditional_and_rectangular_inputs_match_pytorch():
    # Without classes: a class table of zeros. Not square: the reference's own positions replaced.
    config = DiTConfig(**{**SMALL, "image_size": (4, 12), "num_classes": 0})
    model = torch_dit.DiT(depth=3, hidden_size=48, num_heads=3, input_size=8, num_classes=1)
    torch_dit.randomise(model, seed=0)
    with torch.no_grad():
        model.y_embedder.embedding_table.weight.zero_()
    frequencies = 10_000.0 ** (-np.arange(12) / 12)
    rows, columns = np.divmod(np.arange(12), 6)
    angles = [np.outer(columns, frequencies), np.outer(rows, frequencies)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    model.pos_embed = torch.nn.Parameter(torch.tensor(table[None], dtype=torch.float32), False)
    x, t, conditions = random_inputs(config)
    assert conditions == {}
    params = from_torch(model.state_dict(), config)
    out = Network(config).apply(params, Request(x, t, {})).out
    expected = torch_output(model, x, t, np.zeros(2, int))
    np.testing.assert_allclose(out, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "millions"), [("S", 32.96), ("B", 130.51), ("L", 458.10), ("XL", 675.13)]
)
def test_parameter_counts_are_the_papers(name, millions):
    network = Network(DiTConfig.from_name(f"DiT-{name}/2"))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    positions = 256 * network.config.hidden_size  # fixed, and counted by the reference
    assert (count + positions) / 1e6 == pytest.approx(millions, abs=0.01)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


def test_flops_are_the_papers():
    # Table 1 of the paper counts a multiply-add once.
    gflops = {"S/8": 0.36, "B/4": 5.56, "L/2": 80.71, "XL/2": 118.64}
    for name, expected in gflops.items():
        flops = dit_lib.flops_per_example(DiTConfig.from_name(f"DiT-{name}")) / 2
        assert flops / 1e9 == pytest.approx(expected, rel=0.01), name


def test_initially_the_output_is_zero_and_blocks_are_the_identity():
    network = Network(DiTConfig(**SMALL))
    params = network.init(jax.random.key(0))
    assert not np.any(network.apply(params, Request(*random_inputs(network.config))).out)
    params["final_layer"] = random_params(network)["final_layer"]
    shuffled = {**params, "blocks": jax.tree.map(lambda a: a[::-1], params["blocks"])}
    x = random_inputs(network.config)
    np.testing.assert_array_equal(
        network.apply(params, Request(*x)).out, network.apply(shuffled, Request(*x)).out
    )


def test_bfloat16_computes_close_to_float32_and_answers_in_float32(small):
    config, params, inputs = small
    exact = Network(config).apply(params, Request(*inputs)).out
    rounded = (
        Network(dataclasses.replace(config, dtype="bfloat16")).apply(params, Request(*inputs)).out
    )
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - exact).mean() / np.abs(exact).mean()
    assert 1e-4 < error < 0.05


def test_face_of_a_network(small):
    config = small[0]
    network = Network(config)
    assert network.sample_shape == (8, 8, 4) and network.learn_sigma
    assert list(network.conditions) == ["label"] and network.conditions["label"].null == 7
    assert network == Network(config) and hash(network) == hash(Network(config))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 9}, "model.image_size=9 is not divisible by model.dit.patch_size=2"),
        (
            {"hidden_size": 50},
            "model.dit.hidden_size=50 must be a multiple of model.dit.num_heads=3",
        ),
        ({"depth": 0}, "model.dit.depth=0: expected at least 1"),
        ({"num_classes": -1}, "model.num_classes=-1"),
        ({"time_frequency_spacing": "linear"}, "model.dit.time_frequency_spacing='linear'"),
        ({"layer_loop": "for"}, "layer_loop='for': expected one of"),
        ({"remat": "all"}, "remat='all': expected one of"),
        ({"attention": "flash"}, "attention='flash': expected one of"),
        ({"attention": "cudnn"}, "attention='cudnn' needs an NVIDIA GPU"),
        ({"dtype": "float8"}, "dtype='float8': expected"),
    ],
)
def test_errors_say_what_was_expected(overrides, message):
    with pytest.raises(ValueError) as error:
        DiTConfig(**{**SMALL, **overrides})
    assert message in str(error.value)


def test_named_sizes_and_errors():
    config = DiTConfig.from_name("DiT-B/4", image_size=64)
    assert (config.depth, config.hidden_size, config.num_heads) == (12, 768, 12)
    assert config.grid == (16, 16) and config.out_channels == 8
    for name in ("DiT-M/2", "DiT-S/3", "S/2"):
        with pytest.raises(ValueError, match="expected DiT-"):
            DiTConfig.from_name(name)


def test_layers_with_arrays_of_their_own_give_the_same():
    network = Network(DiTConfig(**SMALL, layer_loop="unroll"))
    params, inputs = random_params(network), random_inputs(network.config)
    apart = network.as_sampled(params)
    assert isinstance(apart["blocks"]["attn"]["qkv"]["kernel"], Apart)
    apply, request = jax.jit(network.apply), Request(*inputs)
    np.testing.assert_allclose(
        apply(apart, request).out, apply(params, request).out, rtol=1e-5, atol=1e-5
    )
