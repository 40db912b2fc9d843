"""Training on a mesh is training on one device, with the state divided."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from dit_jax import experiment
from dit_jax.parallel.mesh import AXES, DataParallel, create_mesh
from dit_jax.parallel.partitioning import ShardedPlacement, rules_for
from tests.launch.conftest import tiny_config
from tests.long import long
from tests.models.conftest import perturbed

STEPS = 5
DIT = {
    "model.dit.hidden_size": 64,
    "model.dit.depth": 2,
    "model.dit.num_heads": 8,
    "model.dit.layer_loop": "scan",
}
UNET = {
    "model.name": "song_unet",
    "model.dit.hidden_size": 1152,
    "model.dit.depth": 28,
    "model.dit.num_heads": 16,
    "model.dit.learn_sigma": True,
    "process.name": "edm",
    "timesteps.name": "log_normal",
    "model.song_unet.model_channels": 32,
    "model.song_unet.channel_mult": (1,),
    "model.song_unet.num_blocks": 1,
    "model.song_unet.attn_resolutions": (8,),
    "model.song_unet.dropout": 0.0,
    "sampling.solver": "heun",
}
DMD2 = {
    **DIT,
    "model.dit.depth": 1,
    "process.flow.network_convention": "flux",
    "teacher.path": "given",
    "method.name": "dmd2",
    "method.label_dropout": 0.0,
    "method.dmd2.student_update_frequency": 2,
    "sampling.solver": "consistency",
    "sampling.steps": 1,
}


def build(values):
    config = tiny_config(**{**values, "optimizer.learning_rate": 1e-4, "ema.power_stds": ()})
    return experiment.build_method(experiment.resolve_config(config))


def one_device():
    return DataParallel(jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES))


def shape_on(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def moved(params):
    """Parameters away from their start: gates of zero would hide what a mesh computes wrongly."""
    return perturbed(jax.tree.map(np.asarray, params), jax.random.key(5), 0.1)


def run(values, placement):
    """Losses of a few steps, the last state, and the compiled programs by phase."""
    method = build(values)
    key = jax.random.key(0)
    abstract = jax.eval_shape(method.init, key)
    shardings = placement.state_shardings(abstract)
    frozen = None
    if method.frozen_names:
        fresh = moved(jax.jit(method.init)(jax.random.key(7)).params)
        paths = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)
        }
        leaves = [placement.put_params(path, array) for path, array in paths.items()]
        frozen = {"teacher": jax.tree.unflatten(jax.tree.structure(fresh), leaves)}
    state = jax.jit(method.init, out_shardings=shardings)(key, None, frozen)
    params = jax.device_put(moved(state.params), shardings.params)
    state = dataclasses.replace(state, params=params)
    random = np.random.default_rng(0)
    compiled, losses = {}, []
    for step in range(STEPS):
        image = random.normal(size=(16, 8, 8, 1)).astype(np.float32)
        label = random.integers(0, 10, 16).astype(np.int32)
        batch = placement.put_batch({"image": image, "conditions": {"label": label}})
        phase = method.phase(step)
        if phase not in compiled:

            def update(state, batch, frozen, phase=phase):
                step_key = jax.random.fold_in(jax.random.key(0), state.step)
                return method.update(state, batch, step_key, frozen, phase)

            jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
            with placement.tracing():
                compiled[phase] = jitted.lower(state, batch, frozen).compile()
        state, metrics = compiled[phase](state, batch, frozen)
        losses.append(float(metrics["loss"]))
    return losses, state, compiled


def place(name, **axes):
    return ShardedPlacement(create_mesh(**axes), rules_for(name))


@pytest.fixture(scope="module")
def of_one_device():
    """Losses on one device, by case."""
    found = {}

    def losses(case, values):
        if case not in found:
            found[case] = run(values, one_device())[0]
        return found[case]

    return losses


CASES = [
    ("dit", DIT, {"fsdp": 8}),
    ("dit", DIT, {"fsdp": 4, "tensor": 2}),
    ("dit", DIT, {"fsdp": 1, "tensor": 2}),
    long("song_unet", UNET, {"fsdp": 4, "tensor": 2}),
    ("dmd2", DMD2, {"fsdp": 4, "tensor": 2}),
    long("song_unet", UNET, {"fsdp": 8}),
    long("song_unet", UNET, {"fsdp": 1, "tensor": 2}),
    long("dmd2", DMD2, {"fsdp": 8}),
]


@pytest.mark.parametrize(("case", "values", "axes"), CASES)
def test_the_loss_curve_is_that_of_one_device_and_every_device_holds_its_share(
    case, values, axes, of_one_device
):
    placement = place(values.get("model.name", "dit"), **axes)
    losses, state, compiled = run(values, placement)
    np.testing.assert_allclose(losses, of_one_device(case, values), rtol=0, atol=1e-4)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held = [0] * 8
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    parts = axes["fsdp"] * axes["tensor"] if "tensor" in axes else axes["fsdp"]
    assert max(held) < 1.1 * whole / parts, (held, whole)
    sizes = dict(placement.mesh.shape)
    listed = placement.table(jax.eval_shape(lambda s: s, state))
    assert sum(p.bytes_per_device(sizes) for p in listed) == held[0]
    if case == "dit" and axes == {"fsdp": 8}:
        check_fsdp(compiled["train"].as_text())


def check_fsdp(text):
    """Matrices are gathered, one layer at a time; what is summed over devices is no activation."""
    collective = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter)(?:-start)?\(.*")
    found = []
    for line in text.splitlines():
        if match := collective.search(line):
            shapes = [
                tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", match[1])
            ]
            found.append((match[2], shapes, "while/body" in line))
    gathered = [
        (shape, inside)
        for kind, shapes, inside in found
        for shape in shapes
        if kind == "all-gather"
    ]
    # qkv, the MLP's first layer and the modulation, of one layer, inside the scan.
    for shape in ((64, 192), (64, 256), (64, 384)):
        assert (shape, True) in gathered
    assert not [shape for shape, _ in gathered if shape[0] == 2 and len(shape) == 3]  # all layers
    summed = [shape for kind, shapes, _ in found for shape in shapes if kind != "all-gather"]
    tokens = (16 // 8) * 16  # of one device; of all there are 256
    assert summed and not [s for s in summed if s[0] in (tokens, 256) and s[1:] in ((192,), (384,))]


def test_rows_of_images_over_the_sequence_axis_give_the_curve_and_split_the_tokens(of_one_device):
    split_rows = DataParallel(create_mesh(data=2, sequence=4))
    losses, _, compiled = run(DIT, split_rows)
    np.testing.assert_allclose(losses, of_one_device("dit", DIT), rtol=0, atol=1e-4)
    text = compiled["train"].as_text()
    # One device's tokens: 8 examples, 16 tokens over 4 devices.
    assert "f32[8,4,192]" in text and "f32[8,16,192]" not in text
