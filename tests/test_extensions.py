"""What is added from outside: a network told by text, its rules, a source, a solver, a method.

tests/toy holds the network, its partition rules, its data, a solver and a method, in a file each,
and nothing of the library knows of them. Here they are trained, distilled, sampled, divided and
exported all the same.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import conditions as conditions_lib
from dit_jax import config_help, data, experiment, options
from dit_jax.config import ConfigError, default_config, resolve
from dit_jax.data import registry
from dit_jax.diffusion.solvers import SOLVERS
from dit_jax.interop import kinds
from dit_jax.interop.export import write_model
from dit_jax.interop.kinds import register_state_dict
from dit_jax.interop.models import open_model
from dit_jax.interop.tensors import InteropError, open_tensors
from dit_jax.launch import convert, pairs, training, write_pairs
from dit_jax.models import NETWORK_CONFIGS, Network, register_network
from dit_jax.models import network as network_lib
from dit_jax.parallel import partitioning
from dit_jax.parallel.mesh import DataParallel, create_mesh
from dit_jax.parallel.network import IMAGE_NETWORKS
from dit_jax.parallel.partitioning import ShardedPlacement, rules_for
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.sampling import image_keys
from tests.models.conftest import random_params
from tests.toy import captions, names, network, overshoot, rules, shrunken

SECTIONS = (("method", "sampling"), ("data", "timesteps"))
TABLES = (
    (NETWORK_CONFIGS, network_lib._MODULES),
    (partitioning.TABLES, IMAGE_NETWORKS),
    (registry.SOURCES, SOLVERS),
    (kinds._REGISTERED, experiment.METHODS),
    (options.sections()["model"].choices,),
    *((options.sections()[a].choices, options.sections()[b].choices) for a, b in SECTIONS),
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The toy among the library's own, for the tests of this file alone."""
    tables = [table for pair in TABLES for table in pair]
    before = [dict(table) for table in tables]
    for module in (network, rules, names, captions, overshoot, shrunken):
        module.register()
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def config_of(**overrides):
    config = default_config()
    config.name = "toy"
    config.model.update(name="toy", image_size=8, in_channels=1, num_classes=0)
    config.data.name = "captions"
    config.process.name = "flow"
    config.ema.decays = (0.9,)
    config.optimizer.update(warmup_steps=0, schedule="constant", learning_rate=3e-3)
    config.training.update(num_steps=2, batch_size=8, checkpoint_every=0, tensorboard=False)
    config.training.update(preview_every=2, preview_images=4, log_every=1)
    config.sampling.update(solver="euler", steps=4, batch_size=4, guidance_scale=2.0)
    for key, value in overrides.items():
        *sections, leaf = key.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[leaf] = value
    return config


def batch_of(config):
    loader = data.make_loader(
        experiment.open_data(config, "train"), batch_size=8, seed=0, shuffle=False
    )
    return jax.tree.map(jnp.asarray, next(iter(loader)))


NULLS = {"text": jnp.asarray(captions.EMPTY)}


def texts(count=4):
    source = captions.open_captions("train", 8)
    first = source.batch(np.arange(count))
    return {name: first[name] for name in ("text", "text_mask")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a training run by the training command's own function."""
    directory = tmp_path_factory.mktemp("toy") / "run"
    steps = {"training.num_steps": 150, "training.preview_every": 150, "training.log_every": 50}
    result = training.run(config_of(**steps), directory)
    return directory, result


def test_it_trains_by_the_command_and_samples_what_the_text_says(run):
    directory, result = run
    assert (directory / "previews" / "step_00000150.png").stat().st_size > 100
    model = open_model(directory)
    assert isinstance(model.network.config, network.ToyConfig)
    plan = experiment.build_sampling(model.config)
    params = result.state.ema["ema_0.9"]
    images = plan.bind(params, NULLS)(image_keys(0, np.arange(4)), texts())
    dark, bright = np.asarray(images)[::2].mean(), np.asarray(images)[1::2].mean()
    assert dark < -0.3 and bright > 0.3
    with pytest.raises(ValueError, match="dropping text needs its null value"):
        plan.bind(params)(image_keys(0, np.arange(4)), texts())


TEACHER = {"teacher.guidance_scale": 1.5}
STUDENTS = {
    "consistency": {"method.consistency.trajectory": "teacher", **TEACHER},
    "scm": {"method.scm.velocity": "teacher", "model.custom_gradients": "off", **TEACHER},
    "dmd2": {"sampling.steps": 1, **TEACHER},
    "ladd": {"sampling.steps": 1},
    "kd": {"data.name": "pairs", "sampling.steps": 1},
}


@pytest.mark.parametrize("name", STUDENTS)
def test_every_family_of_methods_distils_it(name):
    overrides = {"method.name": name, "sampling.guidance_scale": 1.0, **STUDENTS[name]}
    config = experiment.resolve_config(config_of(**overrides))
    method = experiment.build_method(config)
    params = random_params(Network(network.ToyConfig()), scale=0.1)
    frozen = {**{key: params for key in method.frozen_names}, "nulls": NULLS}
    batch = batch_of(config_of())
    if name == "kd":
        batch["noise"] = jax.random.normal(jax.random.key(5), batch["image"].shape)
    state = jax.jit(method.init)(jax.random.key(0), params, frozen)
    for phase in method.phases:
        update = jax.jit(method.update, static_argnames="phase")
        state, metrics = update(state, batch, jax.random.key(1), frozen, phase=phase)
        assert np.isfinite([float(value) for value in metrics.values()]).all()
    # And a condition the network does not know, or one that is missing, reaches no method's loss.
    wrong = {**batch, "conditions": {"text": batch["conditions"]["text"], "style": jnp.zeros(8)}}
    with pytest.raises(ValueError, match=r"unknown: style; missing: text_mask\. It takes text"):
        jax.eval_shape(
            lambda batch: method.update(state, batch, jax.random.key(1), frozen, method.phases[0]),
            wrong,
        )


def test_its_texts_become_records_and_its_samples_pairs_to_distil_from(run, tmp_path):
    directory, _ = run
    shapes = {"text": ((3, 4), "bfloat16"), "text_mask": ((3,), "bool")}
    fields = {name: data.Field(*given, condition=True) for name, given in shapes.items()}
    writer = data.RecordWriter(
        tmp_path / "texts",
        data.Header("embeddings", fields, {"encoder": "two words"}),
        nulls={"text": captions.EMPTY},
    )
    writer.add(**texts(4))
    writer.finish()
    arguments = [f"--workdir={directory}", "--num_pairs=12", "--batch_size=8", "--shard_size=8"]
    arguments.append(f"--out={tmp_path / 'pairs'}")
    with pytest.raises(ValueError, match=r"has to be told text, text_mask: give --conditions=DIR"):
        pairs.run(write_pairs.parse_arguments(arguments))
    arguments.append(f"--conditions={tmp_path / 'texts'}")
    pairs.run(write_pairs.parse_arguments(arguments))
    overrides = {"data.name": "pairs", "data.pairs.path": str(tmp_path / "pairs")}
    overrides |= {"method.name": "kd", "sampling.steps": 1, "sampling.guidance_scale": 1.0}
    source = experiment.open_data(experiment.resolve_config(config_of(**overrides)), "train")
    batch = source.batch(np.arange(12))
    np.testing.assert_array_equal(batch["text"], np.tile(texts(2)["text"], (6, 1, 1)))
    np.testing.assert_array_equal(source.info.null_conditions["text"], captions.EMPTY)
    assert batch["image"][::2].mean() < -0.3 and batch["image"][1::2].mean() > 0.3
    assert training.run(config_of(**overrides), tmp_path / "student").step == 2

    wide = {**overrides, "model.toy.text_dim": 5}
    with pytest.raises(ConfigError, match=r"text float32 \[b, 3, 4\], the network takes .*any, 5"):
        experiment.open_data(experiment.resolve_config(config_of(**wide)), "train")


@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"fsdp": 4, "tensor": 2}])
def test_it_is_divided_by_its_rules(axes):
    config = experiment.resolve_config(config_of())
    method = experiment.build_method(config)
    mesh = create_mesh(**axes)
    losses = []
    for placement in (DataParallel(create_mesh()), ShardedPlacement(mesh, rules_for("toy"))):
        state = jax.jit(method.init)(jax.random.key(0))
        shardings = placement.state_shardings(jax.eval_shape(lambda s: s, state))
        state = jax.device_put(state, shardings)
        batch = placement.put_batch(jax.tree.map(np.asarray, batch_of(config)))
        with placement.tracing():
            update = jax.jit(method.update)
            state, metrics = update(state, batch, jax.random.key(1), {"nulls": NULLS})
        losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    kernel = state.params["blocks"]["qkv"]["kernel"]
    parts = axes["fsdp"] * axes.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * parts == kernel.size


@pytest.mark.parametrize("mode", ["displaced", "synchronous", "ulysses", "ring"])
def test_one_image_on_many_devices(mode):
    config = experiment.resolve_config(config_of(**{"sampling.steps": 6}))
    plan = experiment.build_sampling(config)
    params = random_params(plan.network, scale=0.3)
    keys = image_keys(0, np.arange(2))
    expected = np.asarray(plan.bind(params, NULLS)(keys, texts(2)))
    displaced = mode == "displaced"
    parallel = ImageParallel(mode, patch_devices=2, warmup_steps=2 if displaced else None)
    with pytest.warns(UserWarning) if displaced else contextlib.nullcontext():
        placement = parallel.distribute(plan, batch_size=2)
    found = np.asarray(placement.bind(params, NULLS)(keys, texts(2)))
    scale = np.abs(expected).max()
    difference = np.abs(found - expected).max() / scale
    assert 1e-4 < difference < 0.2 if displaced else difference < 1e-5


def test_it_is_exported_and_read_back(run, tmp_path):
    directory, _ = run
    model = open_model(directory)
    write_model(model, "dit_jax", tmp_path / "exported")
    again = open_model(tmp_path / "exported")
    assert again.network == model.network
    jax.tree.map(np.testing.assert_array_equal, again.load(), model.load())
    for kind in ("diffusers", "dit_pt"):
        with pytest.raises(ValueError, match=r"is a Toy, which can be written as dit_jax, toy_pt$"):
            write_model(model, kind, tmp_path / kind)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_its_table_of_names_is_one_file(run, tmp_path, monkeypatch, suffix):
    monkeypatch.setenv(options.EXTENSIONS, "tests.toy.names:register")
    model, file = open_model(run[0]), tmp_path / f"toy{suffix}"
    convert.main(["--to=toy_pt", str(run[0]), str(file)])
    found = set(open_tensors(file).specs)
    assert {"layers.1.query.weight", "layers.0.wide.bias", "pixels.weight"} <= found
    again = open_model(f"toy_pt:{file}")
    assert again.network == model.network and again.config.process == model.config.process
    jax.tree.map(np.testing.assert_array_equal, again.load(), model.load())
    with pytest.raises(InteropError, match=r"'toy_p': expected one of dit_jax.*mean toy_pt\?$"):
        open_model(file, "toy_p")
    with pytest.raises(ValueError, match="there is a kind 'dit_pt' already"):
        register_state_dict("dit_pt", network.ToyConfig, names.table, names.network)


def test_data_that_do_not_tell_what_the_network_takes_are_refused():
    config = experiment.resolve_config(config_of(**{"data.name": "digits"}))
    with pytest.raises(ConfigError, match=r"digits tells of an image label; the network of .*toy"):
        experiment.open_data(config, "train")
    with pytest.raises(ValueError, match="registered already"):
        register_network("toy", network.ToyConfig, network.Block)


def test_a_solver_is_one_file():
    params = random_params(Network(network.ToyConfig()), scale=0.3)
    draws = []
    for overrides in (
        {},
        {"sampling.solver": "overshoot"},
        {"sampling.solver": "overshoot", "sampling.overshoot.factor": 1.2},
    ):
        plan = experiment.build_sampling(experiment.resolve_config(config_of(**overrides)))
        draws.append(np.asarray(plan.bind(params, NULLS)(image_keys(0, np.arange(2)), texts(2))))
    np.testing.assert_allclose(draws[0], draws[1], atol=1e-5)
    assert np.abs(draws[2] - draws[0]).max() > 0.01
    with pytest.raises(ConfigError, match=r"sampling\.overshoot\.factor=1\.2 would do nothing"):
        experiment.resolve_config(config_of(**{"sampling.overshoot.factor": 1.2}))


def test_a_method_is_one_file():
    batch, key = batch_of(config_of()), jax.random.key(0)
    moved = []
    for overrides in (
        {"method.name": "denoising"},
        {"method.name": "shrunken"},
        {"method.name": "shrunken", "method.shrunken.factor": 0.0},
    ):
        method = experiment.build_method(experiment.resolve_config(config_of(**overrides)))
        state = method.init(key)
        new, _ = jax.jit(method.update)(state, batch, key, {"nulls": NULLS})
        leaf = [s.params["out"]["bias"] for s in (state, new)]
        moved.append(np.asarray(leaf[1] - leaf[0]))
    np.testing.assert_allclose(moved[1], 0.5 * moved[0], rtol=1e-5)
    assert not moved[2].any() and np.abs(moved[0]).min() > 0
    assert conditions_lib.can_guide(method.denoiser.network.conditions)


def test_a_source_of_data_is_one_file():
    for overrides, count in (({}, 32), ({"data.captions.count": 6}, 6)):
        config = experiment.resolve_config(config_of(**overrides))
        assert experiment.open_data(config, "train").info.num_examples == count


OPTIONS = [
    ("model.name", "toy", "text_dim", 4, "width of a token of the text", 0),
    ("data.name", "captions", "count", 32, "how many there are", 0),
    ("sampling.solver", "overshoot", "factor", 1.0, "by which a step is too long", 0.0),
    ("method.name", "shrunken", "factor", 0.5, "share of every update that is made", 1.5),
]


@pytest.mark.parametrize(("key", "name", "option", "default", "meaning", "wrong"), OPTIONS)
def test_options_of_an_extension_are_keys_like_all_others(
    key, name, option, default, meaning, wrong
):
    section, chosen_by = key.split(".")
    path = f"{section}.{name}.{option}"
    assert default_config()[section][name][option] == default
    line, *_ = config_help.explain(path).splitlines()
    assert line.split(maxsplit=2) == [f"config.{path}", repr(default), meaning]
    listed, *_ = config_help.explain(f"config.{key}").splitlines()
    assert listed.endswith(f"| {name}")
    with pytest.raises(ConfigError, match=rf"config\.{path}={wrong}: expected"):
        experiment.resolve_config(config_of(**{key: name, path: wrong}))
    with pytest.raises(ConfigError, match=rf"did you mean config\.{path}\?"):
        resolve({section: {name: {f"{option}s": default}}})
    others = {"model.name": "dit", "data.name": "digits"}
    others |= {"sampling.solver": "ddim", "method.name": "denoising"}
    other = 3 if option != "factor" else 0.25
    with pytest.raises(ConfigError, match=rf"config\.{path}={other} would do nothing"):
        resolve({section: {chosen_by: others[key], name: {option: other}}})
    with pytest.raises(ValueError, match=rf"config\.{section}\.{name} is there already"):
        options.register(section, name, options.NoOptions)


def test_what_a_method_does_not_read_is_refused():
    path = "loss.vlb_weight"
    with pytest.raises(ConfigError, match=rf"config\.{path}=2\.0 would do nothing"):
        experiment.resolve_config(config_of(**{"method.name": "shrunken", path: 2.0}))
    weighted = config_of(**{"method.name": "shrunken", "loss.weighting": "min_snr"})
    assert experiment.resolve_config(weighted).loss.weighting == "min_snr"
