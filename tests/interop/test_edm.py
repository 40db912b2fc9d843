"""EDM's networks: the same outputs as NVlabs' code, round trips, configurations, refusals.

What NVlabs' code computes is in tests/references/data/edm_originals.npz, made from it by
edm_originals.py for small networks of every kind with random weights.
"""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax import experiment
from dit_jax.diffusion.process import EDM
from dit_jax.interop import edm
from dit_jax.interop.export import write_model
from dit_jax.interop.models import FoundModel, open_model
from dit_jax.interop.parameters import flatten
from dit_jax.interop.tensors import (
    InteropError,
    TensorSpec,
    open_tensors,
    write_pt,
    write_safetensors,
)
from dit_jax.models import DiTConfig, Network, Request
from dit_jax.models.edm import DhariwalUNetConfig, SongUNetConfig
from tests.interop.edm_originals import CASES, DATA, SIGMAS, inputs
from tests.interop.edm_pickles import TRACE, dump, random_tensors, snapshot
from tests.interop.test_models import assert_same, in_memory, random_params

ORIGINALS = os.environ.get("DIT_JAX_ORIGINALS", "")


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path, monkeypatch):
    """The source code in the pickles would create this file."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / TRACE).exists()


def tensors_of(case):
    """Random tensors under NVlabs' names."""
    with np.load(DATA) as data:
        shapes = json.loads(str(data[f"{case}_shapes"]))
    return random_tensors(shapes, CASES[case].get("resample_filter", (1, 1)))


def write_state_dict(path, tensors):
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in tensors.items()}
    write = write_safetensors if path.suffix == ".safetensors" else write_pt
    write(path, specs, iter(tensors.values()))
    return path


def write_pickle(path, case, **changes):
    return dump(path, snapshot(tensors_of(case), CASES[case] | changes))


def denoised(model, arguments):
    """Its outputs at every noise level of the reference."""
    denoiser = experiment.build_denoiser(model.config)
    params = model.load(lambda _, array: jnp.asarray(array))
    x, labels = inputs(arguments)
    conditions = {"label": jnp.asarray(labels)} if model.network.num_classes else {}
    predict = jax.jit(lambda x, sigma: denoiser.predict(params, Request(x, sigma, conditions)).x0)
    return np.stack([predict(jnp.asarray(x * s), jnp.full((2,), s)) for s in SIGMAS])


@pytest.mark.parametrize("case", CASES)
def test_a_pickle_computes_what_nvlabs_code_computes(case, tmp_path):
    model = open_model(write_pickle(tmp_path / "network.pkl", case))
    assert model.kind == "edm_pkl" and model.weights == "ema" and not model.notes
    with np.load(DATA) as data:
        expected = data[f"{case}_denoised"]
    difference = np.abs(denoised(model, CASES[case]) - expected).max(axis=(1, 2, 3, 4))
    print(f"{case}: {difference.max():.2g}, std {expected.std():.2g}")
    assert (difference < 1e-4).all() and expected[1:].std() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_tells_the_same_network(case, tmp_path):
    """By names and shapes alone, with and without the preconditioning around the network."""
    wanted = open_model(write_pickle(tmp_path / "network.pkl", case))
    tensors = tensors_of(case)
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    for names, suffix in ((tensors, "pt"), (bare, "safetensors")):
        model = open_model(write_state_dict(tmp_path / f"a.{suffix}", names))
        assert model.kind == "edm_pt" and "sigma_data" in model.notes[0]
        config = dataclasses.replace(model.network.config, dropout=wanted.network.config.dropout)
        assert config == wanted.network.config
        assert_same(model, wanted.load())


@pytest.mark.parametrize("case", CASES)
def test_round_trips_bit_for_bit(case, tmp_path):
    """NVlabs' pickle -> ours -> NVlabs' state dict: every tensor as it was, buffers too."""
    model = open_model(write_pickle(tmp_path / "network.pkl", case))
    write_model(model, "dit_jax", tmp_path / "ours")
    ours = open_model(tmp_path / "ours")
    assert_same(ours, model.load())
    assert ours.network == model.network
    assert experiment.build_process(ours.config) == experiment.build_process(model.config)
    summary = write_model(ours, "edm_pt", tmp_path / "back.pt")
    assert "EDMPrecond(img_resolution=8" in summary.notes[0]
    back, tensors = torch.load(tmp_path / "back.pt", weights_only=True), tensors_of(case)
    assert back.keys() == tensors.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor.numpy(), tensors[name], name)
    write_model(open_model(tmp_path / "back.pt"), "edm_pt", tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "back.pt").read_bytes()


SHARED = {
    "in_channels": st.sampled_from([1, 3]),
    "num_classes": st.sampled_from([0, 3]),
    "augment_dim": st.sampled_from([0, 2]),
    "channel_mult_emb": st.integers(1, 4),
    "num_blocks": st.integers(1, 2),
    "image_size": st.sampled_from([8, 12]),
}
UNETS = st.one_of(
    st.builds(
        SongUNetConfig,
        model_channels=st.sampled_from([8, 12]),
        channel_mult=st.sampled_from([(1,), (2, 1), (1, 2, 3)]),
        attn_resolutions=st.sampled_from([(), (8,), (4, 6)]),
        embedding_type=st.sampled_from(["positional", "fourier"]),
        channel_mult_noise=st.integers(1, 2),
        encoder_type=st.sampled_from(["standard", "residual", "skip"]),
        decoder_type=st.sampled_from(["standard", "skip"]),
        resample_filter=st.sampled_from([(1, 1), (1, 3, 3, 1), (1, 2, 2, 1)]),
        **SHARED,
    ),
    st.builds(
        DhariwalUNetConfig,
        model_channels=st.just(64),
        channel_mult=st.sampled_from([(1,), (1, 2), (2, 1)]),
        attn_resolutions=st.sampled_from([(), (4, 6)]),
        **SHARED,
    ),
)


def visible(config):
    """What of a configuration shows in names and shapes."""
    sides = [config.image_size >> level for level in range(len(config.channel_mult))]
    attention = tuple(side for side in sides if side in config.attn_resolutions)
    config = dataclasses.replace(config, attn_resolutions=attention, dropout=0.1)
    if isinstance(config, SongUNetConfig) and len(sides) == 1:
        fixed = {"encoder_type": "standard", "decoder_type": "standard", "resample_filter": (1, 1)}
        config = dataclasses.replace(config, **fixed)
    return config


@settings(max_examples=4, deadline=None)
@given(config=UNETS, seed=st.integers(0, 99))
def test_any_network_is_recognised_in_its_own_state_dict(tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp("any")
    config = visible(config)
    params = random_params(Network(config), seed)
    leaves = dict(flatten(params))
    sections = edm.sections(edm.Preconditioned(config))
    from dit_jax.interop.opened import configured

    model = FoundModel(
        "dit_jax", folder / "none", configured(**sections), leaves.__getitem__, tuple(leaves)
    )
    assert model.network.config == config
    write_model(model, "edm_pt", folder / "a.pt")
    found = open_model(folder / "a.pt")
    assert found.network.config == config
    assert_same(found, params)


def test_the_configuration_is_that_of_the_recommended_sampling(tmp_path):
    model = open_model(write_pickle(tmp_path / "a.pkl", "adm", label_dropout=0.2, sigma_min=0.01))
    config = model.config
    assert experiment.build_process(config) == EDM(sigma_data=0.4, sigma_min=0.01, sigma_max=80.0)
    assert config.method.label_dropout == 0.2
    assert experiment.build_sampling(config).evaluations == 35
    assert config.sampling.heun.s_churn == 0
    assert open_model(write_pickle(tmp_path / "b.pkl", "ddpmpp")).config.method.label_dropout == 0
    for network, evaluations, churn in (
        (SongUNetConfig(num_classes=10), 35, 0.0),
        (SongUNetConfig(image_size=64, channel_mult=(1, 2, 2, 2)), 79, 0.0),
        (DhariwalUNetConfig(), 511, 40.0),
    ):
        sampling = edm.sections(edm.Preconditioned(network))["sampling"]
        assert 2 * sampling["steps"] - 1 == evaluations
        assert sampling.get("heun", {}).get("s_churn", 0.0) == churn


def test_positional_arguments_are_read(tmp_path):
    arguments = dict(CASES["ddpmpp"])
    outer = [arguments.pop(name) for name in ("img_resolution", "img_channels", "label_dim")]
    content = snapshot(tensors_of("ddpmpp"), arguments)
    content["ema"].meta["state"]["_init_args"] = tuple(outer)
    model = open_model(dump(tmp_path / "a.pkl", content))
    expected = open_model(write_pickle(tmp_path / "b.pkl", "ddpmpp"))
    assert model.network == expected.network


@pytest.mark.parametrize("kind", ["pkl", "pt"])
def test_all_that_is_wrong_with_tensors_is_in_one_error(kind, tmp_path):
    tensors = tensors_of("ddpmpp")
    del tensors["model.map_layer1.bias"]
    tensors["model.dec.8x8_up.conv1.weight"] = np.ones((2, 2, 3, 3), np.float32)
    tensors["model.enc.4x4_block0.qkv.bias"] = np.ones(5, np.float32)
    tensors["model.logvar"] = np.ones(1, np.float32)
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        write_state_dict(path, tensors)
    else:
        dump(path, snapshot(tensors, CASES["ddpmpp"]))
    with pytest.raises(InteropError) as error:
        open_model(path)
    for line in (
        "SongUNet of EDM that its configuration describes (4 differences)",
        "missing: model.map_layer1.bias [64] (ours: map_layer1.bias)",
        "shape: model.dec.8x8_up.conv1.weight is [2, 2, 3, 3], expected [32, 32, 3, 3]",
        "shape: model.enc.4x4_block0.qkv.bias is [5], expected [96]",
        "unexpected: model.logvar [1]",
    ):
        assert line in str(error.value)


def test_another_filter_than_the_configured_is_refused(tmp_path):
    tensors = tensors_of("ncsnpp")
    tensors["model.dec.8x8_up.skip.resample_filter"][0, 0, 1, 1] += 0.01
    for path in (
        dump(tmp_path / "a.pkl", snapshot(tensors, CASES["ncsnpp"])),
        write_state_dict(tmp_path / "a.pt", tensors),
    ):
        with pytest.raises(InteropError, match=r"up.skip.resample_filter is fixed"):
            open_model(path)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_type": "DhariwalUNet"}, "network is a SongUNet, configured as DhariwalUNet"),
        ({"fir_kernel": 3}, "arguments that EDM's has not: fir_kernel=3"),
        ({"channel_mult": [1, 0]}, "is not one of this library.*channel_mult"),
        ({"model_channels": "many"}, "is not one of this library"),
        ({"embedding_type": "learned"}, "embedding_type='learned'"),
        ({"sigma_data": 0.0}, "sigma_data > 0"),
        ({"img_resolution": None}, "is not one of this library"),
        ({"model_channels": 32}, r"shape: model.map_label.weight is \[16, 4\], expected \[32, 4\]"),
    ],
)
def test_configurations_that_are_not_ours_are_refused(changes, says, tmp_path):
    arguments = CASES["ddpmpp"] | changes
    content = snapshot(tensors_of("ddpmpp"), arguments)
    if "model_type" in changes:
        content["ema"].meta["state"]["_modules"]["model"].meta["class_name"] = "SongUNet"
    with pytest.raises(InteropError, match=says):
        open_model(dump(tmp_path / "a.pkl", content))


@pytest.mark.parametrize("class_name", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_preconditionings_are_other_processes(class_name, tmp_path):
    arguments = CASES["ddpmpp"] | {"model_type": "SongUNet"}
    tensors = tensors_of("ddpmpp")
    name = class_name.removesuffix("Precond").lower()
    if name == "iddpm":
        for leaf in ("weight", "bias"):
            key = f"model.dec.8x8_aux_conv.{leaf}"
            tensors[key] = np.concatenate([tensors[key], -tensors[key]])
        tensors["u"] = EDM(preconditioning="iddpm", sigma_min=0.01).coefficients.table
    else:
        arguments |= {"vp": {"beta_d": 18.0}, "ve": {"sigma_max": 90.0}}[name]
    content = snapshot(tensors, arguments)
    content["ema"].meta["class_name"] = class_name
    found = open_model(dump(tmp_path / "a.pkl", content))
    process = experiment.build_process(found.config)
    assert process.preconditioning == name
    assert process.vp_beta_d == (18.0 if name == "vp" else 19.9)
    assert process.ve_sigma_max == (90.0 if name == "ve" else 100.0)
    low, high = process.coefficients.sigma_range
    assert (process.sigma_min, process.sigma_max) == (max(0.002, low), min(80.0, high))
    assert found.network.learn_sigma == (name == "iddpm")
    write_model(found, "edm_pt", tmp_path / "b.pt")
    back = open_tensors(tmp_path / "b.pt")
    assert set(back.specs) == set(tensors)


def test_other_networks_are_refused(tmp_path):
    content = snapshot(tensors_of("ddpmpp"), CASES["ddpmpp"])
    content["ema"].meta["class_name"] = "Generator"
    with pytest.raises(
        InteropError, match="its network is a Generator; expected one of EDMPrecond"
    ):
        open_model(dump(tmp_path / "a.pkl", content))


def test_unrecorded_arguments_are_refused(tmp_path):
    content = snapshot(tensors_of("ddpmpp"), CASES["ddpmpp"])
    content["ema"].meta["state"] |= {"_init_args": None, "_init_kwargs": None}
    with pytest.raises(InteropError, match="were not recorded"):
        open_model(dump(tmp_path / "a.pkl", content))


def test_state_dicts_of_other_networks_are_refused(tmp_path):
    tensors = tensors_of("ddpmpp")

    def opened(changes, kind="auto"):
        left = {name: array for name, array in (tensors | changes).items() if array is not None}
        return open_model(write_state_dict(tmp_path / "a.pt", left), kind)

    doubled = {
        f"model.dec.8x8_aux_conv.{leaf}": np.repeat(tensors[f"model.dec.8x8_aux_conv.{leaf}"], 2, 0)
        for leaf in ("weight", "bias")
    }
    filters = dict.fromkeys([name for name in tensors if name.endswith("resample_filter")])
    for changes, says in (
        (doubled, "3 channels in and 6 out"),
        (filters, "has no resample_filter"),
        ({"model.map_layer0.weight": None}, "no 'map_layer0.weight'"),
        ({"model.enc.8x8_conv.weight": None}, "expected one tensor named as enc.32x32_conv"),
        ({"model.map_layer0.weight": np.ones((60, 16), np.float32)}, "60 channels, no multiple"),
        ({"model.enc.4x4_down.conv0.resample_filter": np.ones(2, np.float32)}, "no filter"),
    ):
        with pytest.raises(InteropError, match=says):
            opened(changes)
    path = write_state_dict(tmp_path / "b.pt", {"unet.enc.8x8_conv.weight": np.ones(2)})
    for kind in ("auto", "edm_pt"):
        with pytest.raises(InteropError, match="looks like an EDM2 U-Net"):
            open_model(path, kind)


def test_options_of_other_kinds_are_refused(tmp_path):
    path = write_pickle(tmp_path / "a.pkl", "ddpmpp")
    for options, says in (
        ({"num_heads": 2}, "--num_heads=2 does not apply: a edm_pkl"),
        ({"time_frequency_spacing": "diffusers"}, "--time_frequency_spacing=diffusers"),
        ({"step": 3}, "--step=3"),
        ({"weights": "raw"}, r"networks 'ema'; choose one of them \(weights='raw'\)"),
    ):
        with pytest.raises(InteropError, match=says):
            open_model(path, **options)


def test_exports_that_cannot_hold_the_model_are_refused(tmp_path):
    unet = open_model(write_pickle(tmp_path / "a.pkl", "ddpmpp"))
    for kind in ("dit_pt", "sit_pt", "diffusers"):
        with pytest.raises(
            InteropError, match=r"this model is a SongUNet, which can be written as"
        ):
            write_model(unet, kind, tmp_path / "out")
    with pytest.raises(InteropError, match="--to=edm_pt writes the state dict"):
        write_model(unet, "edm_pkl", tmp_path / "out")
    with pytest.raises(InteropError, match="a state dict has no room"):
        write_model(unet, "edm_pt", tmp_path / "out", class_names=["a"])
    dit, _ = in_memory(DiTConfig(image_size=8, hidden_size=16, depth=1, num_heads=2))
    with pytest.raises(
        InteropError, match="this model is a DiT, which can be written as dit_jax, dit_pt"
    ):
        write_model(dit, "edm_pt", tmp_path / "out")

    def changed(section, **values):
        config = unet.config.copy_and_resolve_references()
        config[section].update(values)
        network = experiment.build_network(config)
        leaves = dict(flatten(random_params(network)))
        return dataclasses.replace(
            unet, config=config, read=leaves.__getitem__, paths=tuple(leaves)
        )

    with pytest.raises(InteropError, match="parameters for it that no EDM state dict holds"):
        write_model(changed("model", second_time="r"), "edm_pt", tmp_path / "out")
    flow = changed("process", name="flow")
    with pytest.raises(InteropError, match="it denoises RectifiedFlow"):
        write_model(flow, "edm_pt", tmp_path / "out")
    notes = write_model(flow, "edm_pt", tmp_path / "out", allow_inexact=True).notes
    assert "not what the original code computes" in notes[0]
    assert open_tensors(tmp_path / "out").specs.keys() == tensors_of("ddpmpp").keys()


@pytest.mark.skipif(not ORIGINALS, reason="DIT_JAX_ORIGINALS names no folder")
def test_the_original_code_computes_the_same(tmp_path):
    """Pickled, imported, exported and loaded again by NVlabs' code, in a process of its own."""
    checkout = Path(ORIGINALS) / "edm"
    if not (checkout / "training" / "networks.py").is_file():
        pytest.skip("no edm in DIT_JAX_ORIGINALS")

    def run(*arguments):
        command = [sys.executable, "-m", "tests.interop.edm_originals", *map(str, arguments)]
        root = Path(__file__).parents[2]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout

    run("make", checkout, tmp_path)
    assert not {"torch_utils", "dnnlib"} & set(sys.modules)
    with np.load(tmp_path / "originals.npz") as data:
        expected = {name: data[name] for name in data.files}
    for case, arguments in CASES.items():
        model = open_model(tmp_path / f"{case}.pkl")
        difference = np.abs(denoised(model, arguments) - expected[f"{case}_denoised"]).max()
        write_model(model, "edm_pt", tmp_path / f"{case}_back.pt")
        theirs = float(run("load", checkout, tmp_path / f"{case}_back.pt", case))
        print(f"{case}: here {difference:.2g}, exported and loaded there {theirs:.2g}")
        assert difference < 1e-4 and theirs < 1e-6
        again = torch.load(tmp_path / f"{case}_back.pt", weights_only=True)
        original = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        assert again.keys() == original.keys()
        assert all(torch.equal(again[name], original[name]) for name in again)
    with pytest.raises(ModuleNotFoundError):
        pickle.loads((tmp_path / "adm.pkl").read_bytes())
