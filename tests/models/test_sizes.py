"""What a network is said to take: sizes of its input, features and operations that follow."""

import dataclasses
import math

import numpy as np
import pytest

from dit_jax import experiment
from dit_jax.config import ConfigError, default_config
from dit_jax.models import DhariwalUNetConfig, DiTConfig, Network, SongUNetConfig

DIT = DiTConfig(image_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=0)
UNET = {"image_size": 8, "num_classes": 0, "model_channels": 32, "channel_mult": (1, 2)}
UNET |= {"num_blocks": 1, "attn_resolutions": (4,)}
UNETS = [SongUNetConfig(**UNET), DhariwalUNetConfig(**UNET)]


def test_a_dit_counts_patches():
    network = Network(DIT)
    wide = network.at_size((8, 16))
    assert wide.sample_shape == (8, 16, 3) and wide.feature_shapes == ((4, 8, 16),) * 2
    assert (
        wide.flops_per_example
        == Network(dataclasses.replace(DIT, image_size=(16, 8))).flops_per_example
    )
    assert 2 < wide.flops_per_example / network.flops_per_example < 4
    assert network.at_size((8, 8)) is network and network.side_multiple == 2
    with pytest.raises(ValueError, match=r"model.input_size=\(8, 9\) is not divisible by"):
        network.at_size((8, 9))


@pytest.mark.parametrize("config", UNETS)
def test_a_unet_keeps_its_layers_and_counts_pixels(config):
    network = Network(config)
    wide = network.at_size((8, 24))
    assert wide.sample_shape == (8, 24, 3) and wide.side_multiple == 2
    assert wide.feature_shapes == tuple((h, 3 * w, c) for h, w, c in network.feature_shapes)
    assert [a.name for a in wide.config.encoder] == [a.name for a in config.encoder]
    # Three times the convolutions, nine times attention's products, the mapping once.
    square = dataclasses.replace(config, image_size=16, attn_resolutions=(8,))
    tall, large = (Network(config).at_size(s).flops_per_example for s in ((8, 16), (16, 16)))
    assert Network(square).flops_per_example == large
    assert network.flops_per_example < tall < wide.flops_per_example < large
    with pytest.raises(ValueError, match=r"model.input_size=\(8, 9\): .*multiple of 2"):
        network.at_size((8, 9))


def test_the_configuration_says_both_sides():
    config = default_config()
    config.model.input_size = (32, 48)
    config = experiment.resolve_config(config)
    assert experiment.build_network(config).sample_shape == (32, 48, 4)
    sampler = experiment.build_sampling(config, size=(16, 64)).sampler
    assert sampler.sample_shape == sampler.denoiser.network.sample_shape == (16, 64, 4)
    assert experiment.size_setting(config, (8, 8)) == "config.model.input_size=8,8"
    # It is how a network is run, not what it is: another size can go on with the parameters.
    assert "input_size" not in experiment.architecture(config)
    for size, message in (
        ((32,), r"config.model.input_size=\(32,\): expected \(height, width\) or \(\)"),
        ((32, 33), r"config.model.input_size=\(32, 33\) is not divisible by config.model.dit"),
        ((32, 0), r"config.model.input_size=\(32, 0\): expected every element at least 1"),
    ):
        config.model.input_size = size
        with pytest.raises(ConfigError, match=message):
            experiment.resolve_config(config)


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """A network's configuration that knows of no other size."""

    title, input_size = "a network", (8, 8)


def test_a_network_of_one_size_says_so(monkeypatch):
    from dit_jax.models import network

    monkeypatch.setitem(network.NETWORK_CONFIGS, "fixed", _Fixed)
    with pytest.raises(ValueError, match=r"a network takes inputs of \(8, 8\) alone"):
        Network(_Fixed()).at_size((8, 16))


def test_times_are_shifted_by_the_number_of_tokens():
    config = default_config()
    config.process.name = "flow"
    config.model.dit.learn_sigma = False
    config.sampling.update(solver="euler", steps=4, shift_by_tokens=(256.0, 0.5, 4096.0, 1.15))
    config = experiment.resolve_config(config)
    times = {}
    for side in (32, 128):  # 256 and 4096 tokens
        plan = experiment.build_sampling(config, size=(side, side))
        assert plan.network.num_tokens == side**2 // 4
        times[side] = plan.times
    for side, mu in ((32, 0.5), (128, 1.15)):
        shift, t = math.exp(mu), np.linspace(1, 0, 5)
        np.testing.assert_allclose(times[side], shift * t / (1 + (shift - 1) * t), atol=1e-6)
    tall = experiment.build_sampling(config, size=(16, 64)).times
    np.testing.assert_array_equal(tall, times[32])
    for options, message in (
        ({"shift": 3.0}, r"shift=3.0 would do nothing beside shift_by_tokens=\(256.0, 0.5"),
        ({"shift_by_tokens": (256.0, 0.5)}, r"expected \(tokens, log of the shift, other tokens"),
        ({"times": (1.0, 0.5, 0.2, 0.1, 0.0)}, r"shift_by_tokens=.* beside explicit times"),
    ):
        broken = config.copy_and_resolve_references()
        with broken.unlocked():
            broken.sampling.update(options)
        with pytest.raises(ConfigError, match=message):
            experiment.build_sampling(broken)
