"""Models of every format: parity with PyTorch on random weights, round trips, what is refused."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax import config as config_lib
from dit_jax import experiment
from dit_jax.config import default_config
from dit_jax.interop import dit
from dit_jax.interop.export import write_model
from dit_jax.interop.models import FoundModel, open_model
from dit_jax.interop.parameters import flatten
from dit_jax.interop.tensors import InteropError, open_tensors, write_pt, write_safetensors
from dit_jax.models import DiTConfig, Network, Request
from tests.models.conftest import random_params
from tests.references import torch_dit

TINY = DiTConfig(
    image_size=8,
    in_channels=4,
    patch_size=2,
    hidden_size=32,
    depth=2,
    num_heads=4,
    num_classes=5,
)


def in_memory(config: DiTConfig, seed=0, process=None, **fields):
    """A FoundModel whose parameters are random."""
    full = default_config()
    for name, value in dataclasses.asdict(config).items():
        section = full.model.dit if name in full.model.dit else full.model
        section[name] = value
    for name, value in (process or {"name": "ddpm"}).items():
        full.process[name] = value
    if full.process.name == "flow":
        full.sampling.solver = "euler"
    if not config.null_class:
        full.method.label_dropout = 0.0
    full = experiment.resolve_config(full)
    params = jax.tree.map(np.asarray, random_params(Network(config), seed, 0.1))
    leaves = dict(flatten(params))
    model = FoundModel(
        "dit_jax", Path("/nowhere"), full, leaves.__getitem__, tuple(leaves), **fields
    )
    return model, params


def on_device(model):
    return model.load(lambda _, array: jnp.asarray(array))


def assert_same(model, params):
    found = dict(flatten(model.load()))
    wanted = dict(flatten(params))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path].view(np.uint32), value.view(np.uint32), path)


CONFIGS = st.builds(
    lambda heads, head_dim, depth, patch, grid, classes, learn_sigma, channels: DiTConfig(
        image_size=patch * grid,
        in_channels=channels,
        patch_size=patch,
        hidden_size=heads * head_dim,
        depth=depth,
        num_heads=heads,
        num_classes=classes,
        learn_sigma=learn_sigma,
    ),
    st.integers(1, 3),
    st.sampled_from([4, 8]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.sampled_from([1, 7, 1000, 1003]),
    st.booleans(),
    st.sampled_from([1, 3, 4]),
)
# Pairs whose processes agree; SiT's is another than DiT's and diffusers' (refused, see below).
PAIRS = [
    *itertools.product(("dit_pt", "diffusers", "dit_jax"), repeat=2),
    ("sit_pt", "sit_pt"),
    ("sit_pt", "dit_jax"),
    ("dit_jax", "sit_pt"),
]


@settings(max_examples=5, deadline=None)
@given(config=CONFIGS, seed=st.integers(0, 99))
@pytest.mark.parametrize("first,second", PAIRS)
def test_round_trips_bit_for_bit(tmp_path_factory, first, second, config, seed):
    """Ours -> first -> second -> first; parameters and files equal bit for bit."""
    process = {"name": "flow"} if "sit_pt" in (first, second) else {"name": "ddpm"}
    model, params = in_memory(config, seed, process)
    folder = tmp_path_factory.mktemp("round")
    heads = {"num_heads": config.num_heads}
    options = {"dit_pt": heads, "sit_pt": heads}
    path = folder / "a"
    write_model(model, first, path, allow_inexact=True)
    one = open_model(path, first, **options.get(first, {}))
    assert_same(one, params)
    assert one.network.config == dataclasses.replace(config)
    write_model(one, second, folder / "b", allow_inexact=True)
    two = open_model(folder / "b", second, **options.get(second, {}))
    assert_same(two, params)
    again = write_model(two, first, folder / "c", allow_inexact=True)
    weights = [folder / name for name in ("a", "c")]
    if first == "dit_jax":
        weights = [file / "weights.safetensors" for file in weights]
    elif first == "diffusers":
        weights = [f / "transformer/diffusion_pytorch_model.safetensors" for f in weights]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert again.sha256


@pytest.mark.parametrize(
    "size,options",
    [
        ("S", {}),
        ("XL", {"depth": 2}),
        ("S", {"input_size": 64, "depth": 2}),
        ("S", {"patch_size": 4, "learn_sigma": False, "depth": 2}),
    ],
    ids=["S/2", "XL/2 of 2 blocks", "512 pixels", "S/4 without sigma"],
)
def test_a_state_dict_computes_the_same_here(tmp_path, size, options):
    """The twin carries the original's names; it was checked against the original's code."""
    values = {**torch_dit.SIZES[size], **options}
    twin = torch_dit.randomise(torch_dit.DiT(**values), seed=0).eval()
    torch.save(twin.state_dict(), tmp_path / "dit.pt")
    model = open_model(tmp_path / "dit.pt")
    assert model.kind == "dit_pt"
    side = values.get("input_size", 32)
    x = np.random.default_rng(1).normal(size=(2, side, side, 4)).astype(np.float32)
    t, y = np.array([3.0, 977.0], np.float32), np.array([7, 1000])
    ours = model.network.apply(
        on_device(model), Request(jnp.asarray(x), jnp.asarray(t), {"label": jnp.asarray(y)})
    ).out
    with torch.no_grad():
        theirs = twin(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t), torch.from_numpy(y)
        )
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def diffusers_model(config: DiTConfig, seed=0, **changes):
    import diffusers

    values = dit.config_to_diffusers(config) | changes
    values = {k: v for k, v in values.items() if not k.startswith("_")}
    model = diffusers.DiTTransformer2DModel(**values).eval()
    torch_dit.randomise(model, seed=seed)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:  # what differs here cannot be represented
        block.norm1.emb.load_state_dict(first)
    return model


def diffusers_forward(model, x, t, y):
    with torch.no_grad():
        out = model(
            torch.from_numpy(x).permute(0, 3, 1, 2),
            timestep=torch.from_numpy(t),
            class_labels=torch.from_numpy(y),
        ).sample
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "config",
    [
        DiTConfig.from_name("DiT-S/2", depth=12),
        DiTConfig.from_name("DiT-S/2", depth=2, image_size=64),
        dataclasses.replace(TINY, learn_sigma=False, in_channels=3),
    ],
    ids=["S/2", "S/2 of 2 blocks, 512 pixels", "tiny"],
)
def test_a_diffusers_transformer_computes_the_same_here(tmp_path, config):
    theirs = diffusers_model(config, norm_eps=1e-5)  # diffusers' default
    theirs.save_pretrained(tmp_path / "transformer")
    model = open_model(tmp_path)
    assert model.kind == "diffusers"
    found = model.network.config
    assert found.time_frequency_spacing == "diffusers" and found.mlp_norm_epsilon == 1e-5
    x = np.random.default_rng(1).normal(size=(2, *model.network.sample_shape)).astype(np.float32)
    t, y = np.array([3.0, 977.0], np.float32), np.array([2, config.num_classes])
    ours = model.network.apply(
        on_device(model), Request(jnp.asarray(x), jnp.asarray(t), {"label": jnp.asarray(y)})
    ).out
    np.testing.assert_allclose(ours, diffusers_forward(theirs, x, t, y), atol=1e-4)


def test_half_precision_checkpoints_come_back_as_they_were(tmp_path):
    theirs = diffusers_model(TINY).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "a")
    model = open_model(tmp_path / "a")
    write_model(model, "diffusers", tmp_path / "b", dtype="bfloat16")
    found = open_tensors(tmp_path / "b/transformer")
    padded = "class_embedder"  # filled up to a thousand classes
    for name, tensor in theirs.state_dict().items():
        (array,) = found.read([name])
        expected = tensor.view(torch.int16).numpy()
        if padded not in name:
            np.testing.assert_array_equal(array.view(np.int16), expected, name)


def test_training_checkpoints_give_the_average_by_default(tmp_path):
    import argparse

    twin = torch_dit.DiT(**torch_dit.SIZES["S"] | {"depth": 1})
    model, ema = (torch_dit.randomise(twin, seed=s).state_dict() for s in (0, 0))
    ema = {name: value + 1 for name, value in model.items() if name != "pos_embed"}
    ema["pos_embed"] = model["pos_embed"]
    model = {f"module.{name}": value for name, value in model.items()}
    arguments = argparse.Namespace(model="DiT-S/2", image_size=256, num_classes=1000)
    torch.save({"model": model, "ema": ema, "opt": {}, "args": arguments}, tmp_path / "c.pt")
    found = open_model(tmp_path / "c.pt")
    assert found.weights == "ema"
    raw = open_model(tmp_path / "c.pt", weights="model")
    bias = "final_layer.linear.bias"
    np.testing.assert_array_equal(found.read(bias), raw.read(bias) + 1)


def test_a_bare_state_dict_has_no_weights_by_name(tmp_path):
    write_model(in_memory(TINY)[0], "dit_pt", tmp_path / "x.pt")
    assert open_model(tmp_path / "x.pt", num_heads=TINY.num_heads).chosen_weights == ""
    torch.save({"ema": torch.load(tmp_path / "x.pt")}, tmp_path / "y.pt")
    assert open_model(tmp_path / "y.pt", num_heads=4).chosen_weights == ", weights ema"


def test_a_workdir_is_a_source(tmp_path):
    from dit_jax.training import workdir
    from dit_jax.training.checkpoints import Checkpoints

    model, _ = in_memory(TINY)
    method = experiment.build_method(model.config)
    state = jax.jit(method.init)(jax.random.key(3))
    state = dataclasses.replace(
        state, ema={n: jax.tree.map(lambda a: a + 1, v) for n, v in state.ema.items()}
    )
    files = workdir.RunFiles(tmp_path / "run")
    files.write(workdir.CONFIG_FILE, config_lib.to_json(model.config))
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    for step in (3, 5):
        checkpoints.save(step, {"state": state, "key": jnp.zeros(2, jnp.uint32)}, {})
        checkpoints.wait()
    checkpoints.close()
    found = open_model(tmp_path / "run")
    assert (found.weights, found.step) == ("ema_0.9999", 5)
    assert_same(found, jax.tree.map(np.asarray, state.ema["ema_0.9999"]))
    assert_same(
        open_model(tmp_path / "run", weights="raw", step=3), jax.tree.map(np.asarray, state.params)
    )
    summary = write_model(found, "dit_jax", tmp_path / "weights")
    assert summary.parameters == sum(a.size for a in jax.tree.leaves(state.params))
    assert open_model(tmp_path / "weights").step == 5


def test_the_wrong_architecture_is_named_error(tmp_path):
    from tests.interop.test_table import Tensors

    names = {"joint_blocks.0.x_block.attn.qkv.weight": np.zeros((2, 2), np.float32)}
    specs = Tensors(names).specs
    write_safetensors(tmp_path / "sd3.safetensors", specs, iter(names.values()))
    with pytest.raises(InteropError, match=r"EDM U-Net or FLUX: it looks like a Stable Diffusion"):
        open_model(tmp_path / "sd3.safetensors")
    write_pt(tmp_path / "other.pt", specs, iter(names.values()))
    with pytest.raises(InteropError, match="looks like a Stable Diffusion"):
        open_model(tmp_path / "other.pt", "dit_pt")


def test_a_configuration_that_contradicts_the_tensors_is_refused(tmp_path):
    diffusers_model(TINY).save_pretrained(tmp_path / "transformer")
    file = tmp_path / "transformer/config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"num_layers": 3}))
    with pytest.raises(
        InteropError, match=r"missing: transformer_blocks\.2\.norm1\.linear\.weight"
    ):
        open_model(tmp_path)
    file.write_text(json.dumps(values | {"activation_fn": "geglu"}))
    with pytest.raises(InteropError, match="activation_fn='geglu'"):
        open_model(tmp_path)
    file.write_text(json.dumps(values | {"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(InteropError, match="describes a SD3Transformer2DModel"):
        open_model(tmp_path)
    for name in ("in_channels", "attention_head_dim", "num_layers", "sample_size", "norm_eps"):
        file.write_text(json.dumps(values | {name: None}))
        with pytest.raises(InteropError, match=rf"config\.json: {name}=null; expected a"):
            open_model(tmp_path)
    file.write_text(json.dumps(values | {"num_attention_heads": 0}))
    with pytest.raises(InteropError, match=r"config\.json: num_attention_heads=0; expected an int"):
        open_model(tmp_path)
    file.write_text(json.dumps(values | {"patch_size": 3}))
    with pytest.raises(InteropError, match=r"transformer/config\.json: .*patch_size=3: choose"):
        open_model(tmp_path)
    file.write_text(json.dumps(values | {"out_channels": None}))
    scheduler = tmp_path / "scheduler/scheduler_config.json"
    scheduler.parent.mkdir()
    for beta, message in ((None, "beta_end=null; expected a"), (7.5, r".*beta_end=7\.5")):
        scheduler.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_end": beta}))
        with pytest.raises(InteropError, match=rf"scheduler_config\.json: {message}"):
            open_model(tmp_path)


def test_a_block_far_beyond_the_others_is_refused(tmp_path):
    write_model(in_memory(TINY)[0], "dit_pt", tmp_path / "x.pt")
    tensors = torch.load(tmp_path / "x.pt") | {"blocks.1000000.x": torch.zeros(1)}
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(InteropError, match=r"depth=1000001, but .* holds only .* tensors"):
        open_model(tmp_path / "x.pt", num_heads=TINY.num_heads)


def test_embedders_trained_apart_are_refused(tmp_path):
    model = diffusers_model(TINY)
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias += 1
    model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(InteropError, match="differs from its copy in the first block"):
        open_model(tmp_path).load()


def test_unknown_heads_and_inapplicable_options_are_refused(tmp_path):
    model, _ = in_memory(TINY)
    write_model(model, "dit_pt", tmp_path / "x.pt")
    with pytest.raises(InteropError, match="--num_heads"):
        open_model(tmp_path / "x.pt")
    with pytest.raises(InteropError, match="step=3 does not apply"):
        open_model(tmp_path / "x.pt", num_heads=4, step=3)
    with pytest.raises(InteropError, match="does not exist"):
        open_model(tmp_path / "y.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InteropError, match="neither a workdir"):
        open_model(tmp_path / "empty")


def test_what_the_other_side_computes_otherwise_is_refused(tmp_path):
    spaced = dataclasses.replace(TINY, time_frequency_spacing="diffusers", mlp_norm_epsilon=1e-5)
    model, _ = in_memory(spaced)
    with pytest.raises(InteropError, match=r"(?s)spaced as diffusers'.*mlp_norm_epsilon.*allow_in"):
        write_model(model, "dit_pt", tmp_path / "x.pt")
    flow, _ = in_memory(TINY, process={"name": "flow"})
    with pytest.raises(InteropError, match="it denoises RectifiedFlow"):
        write_model(flow, "dit_pt", tmp_path / "x.pt")
    with pytest.raises(InteropError, match="network_convention='flux'"):
        write_model(flow, "diffusers", tmp_path / "x")
    with pytest.raises(InteropError, match="SiT"):
        write_model(model, "sit_pt", tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_destinations_are_not_overwritten(tmp_path):
    model, _ = in_memory(TINY)
    kept = tmp_path / "precious"
    kept.mkdir()
    (kept / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_model(model, "dit_jax", kept)
    with pytest.raises(InteropError, match="no conversion wrote"):
        write_model(model, "dit_jax", kept, overwrite=True)
    assert (kept / "file").read_text() == "mine"
    write_model(model, "dit_jax", tmp_path / "out")
    other, _ = in_memory(TINY, seed=1)
    write_model(other, "dit_jax", tmp_path / "out", overwrite=True)
    found = open_model(tmp_path / "out")
    with pytest.raises(InteropError, match="the model being read"):
        write_model(found, "diffusers", tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("kind", ["dit_pt", "dit_jax", "diffusers"])
def test_a_failed_export_leaves_nothing_and_the_old_one(tmp_path, kind):
    model, params = in_memory(TINY)
    write_model(model, kind, tmp_path / "old")
    calls = []

    def fails(path):
        calls.append(path)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return dict(flatten(params))[path]

    broken = dataclasses.replace(model, read=fails)
    before = sorted(p.name for p in tmp_path.iterdir())
    for name, options in (("new", {}), ("old", {"overwrite": True})):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            write_model(broken, kind, tmp_path / name, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    heads = {"num_heads": 4} if kind == "dit_pt" else {}
    assert_same(open_model(tmp_path / "old", kind, **heads), params)


def test_a_dry_run_writes_nothing(tmp_path):
    model, _ = in_memory(TINY)
    summary = write_model(model, "diffusers", tmp_path / "out", dry_run=True)
    assert summary.tensors > 30 and not summary.sha256 and not list(tmp_path.iterdir())


def test_parameters_go_straight_to_sharded_devices(tmp_path):
    from jax.sharding import NamedSharding, PartitionSpec

    model, params = in_memory(TINY)
    write_model(model, "dit_pt", tmp_path / "x.pt")
    mesh = jax.make_mesh((jax.device_count(),), ("data",))

    def put(path, array):
        axis = next((i for i, n in enumerate(array.shape) if n % mesh.size == 0), None)
        spec = [None] * array.ndim
        if axis is not None:
            spec[axis] = "data"
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    found = open_model(tmp_path / "x.pt", num_heads=4).load(put)
    kernel = found["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // mesh.size
    for path, leaf in flatten(found):
        np.testing.assert_array_equal(np.asarray(leaf), dict(flatten(params))[path])
