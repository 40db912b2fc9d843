import copy
import dataclasses

import pytest

from dit_jax import config as config_lib
from dit_jax import experiment
from dit_jax.evaluation import PROTOCOLS, ScoreSettings, comparison_table, deviations, find_protocol


def config_of(protocol):
    config = config_lib.default_config().to_dict()
    for key, value in protocol.sampling.items():
        section = config
        *parents, leaf = key.split(".")
        for part in parents:
            section = section[part]
        assert leaf in section, key
        section[leaf] = value
    return config_lib.resolve(config)


def record_of(protocol, **provenance):
    """A record that meets the protocol in everything but `provenance`."""
    met = {
        "sampling": config_of(protocol).sampling.to_dict(),
        "vae": {"name": protocol.vae, "fingerprint": "1234"},
        "step": 400_000,
        "rounding": "truncate",
        "standard_features": True,
        "settings": dataclasses.asdict(ScoreSettings()),
        "image_size": 256,
        "model": "DiT-XL/2",
        "reference": {"description": "/data/VIRTUAL_imagenet256_labeled.npz"},
    }
    return {
        "scores": {
            "fid": 2.352,
            "sfid": 4.7,
            "inception_score": {"mean": 270.04, "std": 3.0, "splits": 10},
            "precision": 0.8251,
            "recall": None,
        },
        "counts": {"samples": 50_000},
        "provenance": met | provenance,
    }


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_protocol_is_a_configuration_this_library_samples_with(name):
    protocol = find_protocol(name)
    plan = experiment.build_sampling(config_of(protocol))
    assert plan.guidance_scale == {"dit_400k": 1.0, "dit_final": 1.5}[name]
    assert plan.sampler.guided_channels == {"dit_400k": "all", "dit_final": "first3"}[name]
    assert len(plan.times) == 251
    assert deviations(protocol, record_of(protocol)) == []


def test_published_figures():
    def fids(name):
        figures = PROTOCOLS[name].figures
        return [(f.model, f.image_size, f.trained_in, f.scores["fid"]) for f in figures]

    assert fids("dit_400k") == [
        ("DiT-XL/2", 256, "JAX", 19.5),
        ("DiT-XL/2", 256, "PyTorch", 18.1),
        ("DiT-B/4", 256, "JAX", 68.4),
        ("DiT-B/4", 256, "PyTorch", 68.9),
        ("DiT-B/4", 256, "PyTorch", 68.3),
    ]
    assert [row[1::2] for row in fids("dit_final")] == [(256, 2.27), (256, 2.21), (512, 3.04)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vae": "stabilityai/sd-vae-ft-mse"}, "VAE decoder: stabilityai/sd-vae-ft-mse, published"),
        ({"vae": None}, "VAE decoder: not recorded, published with stabilityai/sd-vae-ft-ema"),
        ({"sampling": None}, "sampling: not recorded"),
        ({"settings": {"split_size": 5000, "neighbours": 3, "allow_singular": True}}, "singular"),
        ({"weights": "raw"}, "weights: raw"),
        ({"rounding": "nearest"}, "rounding: nearest, published with truncate"),
        ({"standard_features": False}, "features: not of the standard Inception"),
        ({"image_size": 64}, "image size: 64, published with 256 or 512"),
        ({"reference": {"description": "imagenet/"}}, "reference: imagenet/, published with"),
        ({"image_size": 512}, "published with VIRTUAL_imagenet512.npz"),
    ],
)
def test_each_deviation_is_named(change, expected):
    found = deviations(PROTOCOLS["dit_final"], record_of(PROTOCOLS["dit_final"], **change))
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 50), ("solver", "ddim"), ("guidance_scale", 4.0), ("guidance_channels", "all")],
)
def test_each_different_sampling_setting_is_named(key, value):
    protocol = PROTOCOLS["dit_final"]
    record = copy.deepcopy(record_of(protocol))
    record["provenance"]["sampling"][key] = value
    wanted = protocol.sampling[f"sampling.{key}"]
    assert deviations(protocol, record) == [f"sampling.{key}: {value}, published with {wanted}"]


def test_steps_and_samples_count_and_the_default_spacing_is_the_published_one():
    protocol = PROTOCOLS["dit_400k"]
    record = record_of(protocol, step=399_999)
    record["counts"]["samples"] = 10_000
    record["provenance"]["sampling"]["spacing"] = ""
    assert deviations(protocol, record) == [
        "images: 10000, published with 50000",
        "training steps: 399999, published with 400000",
    ]


def test_the_table_is_aligned_and_warns():
    protocol = PROTOCOLS["dit_final"]
    table = comparison_table(protocol, record_of(protocol))
    lines = table.splitlines()
    rows = [line for line in lines if "DiT-XL/2" in line and "Protocol" not in line]
    assert len(rows) == 3  # ours and the two of this size
    column = lines[2].index("FID") + len("FID")
    assert [row[:column].split()[-1] for row in rows] == ["2.35", "2.27", "2.21"]
    assert "270.0" in rows[0] and "278.2" in rows[1]
    assert lines[-1] == "Everything recorded is as published."
    other = comparison_table(protocol, record_of(protocol, vae="mine", model=None, image_size=None))
    assert "NOT comparable" in other
    assert "  - VAE decoder: mine, published with" in other
    assert "3.04" in other


def test_unknown_protocol_refused():
    with pytest.raises(ValueError, match="expected one of dit_400k, dit_final"):
        find_protocol("dit_1m")
