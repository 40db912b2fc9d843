"""The door where mistakes stop, and that every experiment of configs/ passes it."""

import functools
import importlib
import json
from pathlib import Path

import jax
import pytest

from dit_jax import abbreviations, experiment
from dit_jax import config as config_lib
from dit_jax.config import ConfigError, default_config, differences, resolve
from dit_jax.distill.student import build_teacher

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("[!_]*.py"))


def tree(path, value):
    """{'a': {'b': value}} of 'a.b'."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.dept", 3, "unknown key config.model.dept; did you mean config.model.dit.depth?"),
        ("learning_rate", 1.0, "did you mean config.optimizer.learning_rate?"),
        ("optimiser.learning_rate", 1.0, "did you mean config.optimizer.learning_rate?"),
        ("training.lr", 1.0, "unknown key config.training.lr"),
        ("model", 3, "unknown key config.model"),
        (
            "ema.decays",
            None,
            "config.ema.decays=None is of type NoneType, expected a tuple of float",
        ),
        ("ema.decays", '(float("nan"),)', "is of type str, expected a tuple of float (default"),
        ("ema.decays", (0.9, None), "config.ema.decays=(0.9, None) holds a value of type NoneType"),
        (
            "ema.decays",
            (float("nan"),),
            "config.ema.decays=(nan,): expected every element at least 0",
        ),
        (
            "model.song_unet.channel_mult",
            (1.5,),
            "holds a value of type float, expected a tuple of int",
        ),
        (
            "sampling.guidance_scale",
            float("nan"),
            "config.sampling.guidance_scale=nan: expected at",
        ),
        (
            "optimizer.learning_rate",
            float("inf"),
            "config.optimizer.learning_rate=inf: expected above",
        ),
        ("seed", 10**20, "expected at least 0 and at most 4294967295, a whole number"),
        (
            "model.dit.depth",
            3.0,
            "config.model.dit.depth=3.0 is of type float, expected int (default 28)",
        ),
        ("model.dit.depth", True, "is of type bool, expected int"),
        ("model.dit.learn_sigma", 1, "is of type int, expected bool"),
        ("model.dtype", None, "is of type NoneType, expected str (default 'auto')"),
        (
            "process.edm.sigma_data",
            0.7,
            "config.process.edm.sigma_data=0.7 would do nothing: config.process.name is 'ddpm'. "
            "Set config.process.name='edm'",
        ),
        ("timesteps.speed.k", 3.0, "would do nothing: config.timesteps.name is 'uniform'"),
        ("loss.p2.k", 2.0, "config.loss.weighting is 'none'"),
        ("sampling.heun.s_churn", 1.0, "config.sampling.solver is 'ddpm'"),
        ("optimizer.lion.beta1", 0.8, "config.optimizer.name is 'adamw'"),
        ("data.image_folder.path", "x", "config.data.name is 'latents'"),
        ("optimizer.final_learning_rate", 1e-5, "would do nothing with schedule='constant'"),
        ("process.name", "edm", "config.model.dit.learn_sigma=True would do nothing"),
    ],
)
def test_errors_of_single_keys(path, value, message):
    with pytest.raises(ConfigError) as error:
        resolve(tree(path, value))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.name": "unet"}, "config.model.name='unet': expected one of dit"),
        ({"process.name": "vp"}, "config.process.name='vp': expected one of ddpm, flow, edm"),
        ({"timesteps.name": "normal"}, "config.timesteps.name='normal': expected one of uniform"),
        ({"loss.weighting": "snr"}, "config.loss.weighting='snr'"),
        ({"method.name": "dmd"}, "config.method.name='dmd': expected one of denoising"),
        ({"method.name": "dmd"}, "did you mean dmd2?"),
        ({"optimizer.name": "adam"}, "did you mean adamw?"),
        ({"cache.name": "firstblock"}, "did you mean first_block?"),
        (
            {"optimizer.name": "sgd"},
            "config.optimizer.name='sgd': expected one of adamw, radam, lion",
        ),
        ({"sampling.solver": "dpm"}, "config.sampling.solver='dpm': expected one of ddpm, ddim"),
        ({"sampling.solver": "heunn"}, "did you mean heun?"),
        ({"sampling.steps": 1001}, "config.sampling"),
        ({"sampling.guidance_interval": (0.1,)}, "expected (low, high) or ()"),
        ({"sampling.guidance_channels": "first3"}, "would do nothing with"),
        ({"model.num_classes": 0, "sampling.guidance_scale": 2.0}, "config.model.num_classes is 0"),
        (
            {"model.image_size": 33},
            "image_size=33 is not divisible by config.model.dit.patch_size=2",
        ),
        ({"ema.decays": (1.5,)}, "config.ema.decays=(1.5,): expected every element at least 0 and"),
        (
            {"sampling.guidance_scale": 2.0, "sampling.guidance_interval": (0.8, 0.9)},
            "holds none of the solver's times",
        ),
        ({"sampling.guidance_interval": (2e3, 3e3)}, "times go from -1 to 999"),
        ({"ema.decays": ()}, "config.sampling.weights='ema': expected one of raw"),
        ({"sampling.weights": "ema_0.5"}, "expected one of ema, ema_0.9999, raw"),
        ({"training.num_microbatches": 0}, "config.training.num_microbatches=0"),
        ({"training.preview_images": 0}, "config.training.preview_images=0: expected at least 1"),
        ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate=-1.0: expected above 0"),
        ({"method.label_dropout": 2.0}, "method.label_dropout=2.0"),
    ],
)
def test_errors_of_values_no_object_takes(overrides, message):
    config = default_config()
    for path, value in overrides.items():
        section, _, key = path.rpartition(".")
        config[section][key] = value
    with pytest.raises(ConfigError) as error:
        experiment.resolve_config(config)
    assert message in str(error.value)


CHURN = "would do nothing with config.sampling.heun.s_churn=0.0: set"
NO_TEACHER = "would do nothing: config.method.name='denoising', as it is configured, asks no teach"
WITHOUT_EFFECT = {
    "sampling.heun.s_noise": (1.01, CHURN),
    "sampling.heun.s_max": (50.0, CHURN),
    "sampling.heun.s_min": (0.1, CHURN),
    "training.preview_images": (8, "would do nothing with config.training.preview_every=0: set"),
    "teacher.guidance_scale": (1.5, NO_TEACHER),
    "teacher.guidance_interval": ((0.1, 0.5), NO_TEACHER),
    "teacher.weights": ("raw", NO_TEACHER),
    "teacher.initialize_student": (False, NO_TEACHER),
    "model.second_time": ("r", "tells the network of one time. Set 'none', or config.method.name="),
}


@pytest.mark.parametrize("path", WITHOUT_EFFECT)
def test_keys_without_effect_are_refused_where_a_run_begins(path):
    value, message = WITHOUT_EFFECT[path]
    config = default_config()
    config.sampling.solver = "heun"
    config.model.dit.update(depth=1, hidden_size=32, num_heads=2)
    config = experiment.resolve_config(config)
    method = experiment.build_method(config)
    assert experiment.effect_error(config, method) is None
    config.update_from_flattened_dict({path: value})
    config = experiment.resolve_config(config)  # as records of runs are read
    error = experiment.effect_error(config, method)
    assert error.startswith(f"config.{path}={value!r} would do nothing") and message in error


def test_keys_that_others_give_an_effect_are_taken():
    config = default_config()
    config.sampling.solver = "heun"
    config.sampling.heun.update(s_churn=10.0, s_noise=1.01, s_max=50.0, s_min=0.1)
    config.training.update(preview_every=10, preview_images=8)
    config.method.name = "consistency"
    config.method.consistency.trajectory = "teacher"
    config.teacher.update(guidance_scale=1.5, weights="raw", initialize_student=False)
    config.model.dit.update(depth=1, hidden_size=32, num_heads=2, learn_sigma=False)
    config.process.name = "edm"
    config = experiment.resolve_config(config)
    method = experiment.build_method(config)
    assert experiment.effect_error(config, method) is None
    config.method.consistency.trajectory = "data"
    error = experiment.effect_error(config, experiment.build_method(config))
    assert "teacher.guidance_scale=1.5 would do nothing" in error and "'consistency', as" in error


def test_a_flags_choice_leaves_out_what_the_file_sets_for_another():
    config = importlib.import_module("dit_jax.configs.digits").get_config().lock()
    flow = {"process.flow.network_convention": "flux", "process.flow.time_scale": 1000.0}
    config.process.name = "edm"
    typed = {"process.name": "edm"}
    assert config_lib.leave_out_unchosen(config, typed) == {"process.name": flow}
    defaults = default_config().process.edm
    assert resolve(config).process.edm == defaults
    config.model.name = "song_unet"
    left_out = config_lib.leave_out_unchosen(config, {"model.name": "song_unet"})
    assert left_out["model.name"]["model.dit.hidden_size"] == 96
    assert resolve(config).model.name == "song_unet"
    # What is typed itself stays, to be refused; and what no flag changes stays as it is.
    config.process.flow.time_scale = 7.0
    for keys in ({**typed, "process.flow.time_scale": 7.0}, {"data.name": "digits"}):
        assert not config_lib.leave_out_unchosen(config, keys)
        with pytest.raises(ConfigError, match=r"process.flow.time_scale=7.0 would do nothing"):
            resolve(config)


def test_partial_configurations_are_filled_in_and_converted():
    config = resolve({"optimizer": {"learning_rate": 1}, "ema": {"decays": [0.9, 0.99]}})
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.ema.decays == (0.9, 0.99) and config.model.dit.depth == 28
    assert resolve({"ema": {"decays": 0.9}}).ema.decays == (0.9,)
    assert resolve({}) == default_config() and config.is_locked


def test_json_round_trip():
    config = resolve({"ema": {"power_stds": (0.05, 0.1)}, "name": "Fréchet", "seed": 3})
    text = config_lib.to_json(config)
    assert config_lib.from_json(text) == config
    assert list(json.loads(text)) == list(default_config().to_dict())
    with pytest.raises(ConfigError, match=r"config.model.depht"):
        config_lib.from_json('{"model": {"depht": 3}}')


def test_differences_name_the_keys():
    old, new = resolve({"seed": 1}), resolve({"model": {"depth": 3}})
    assert differences(old, new) == {"model.dit.depth": (28, 3), "seed": (1, 0)}
    assert differences({"a": 1}, {}) == {"a": (1, None)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_resolves_and_initialises(name):
    config = importlib.import_module(f"dit_jax.configs.{name}").get_config()
    resolved = experiment.resolve_config(config)
    assert config_lib.from_json(config_lib.to_json(resolved)) == resolved
    assert resolved.name == name
    # Traced faster; scanned layers are accelerators' choice besides.
    own = resolved.model[resolved.model.name]
    own.update({"layer_loop": "scan"} if "layer_loop" in own else {"num_blocks": 1})
    if "single_depth" in own:
        own.update({"hidden_size": 256, "num_heads": 2})  # a CPU's attention is traced by heads
    adversarial = "feature_indices" in resolved.method.get(resolved.method.name, {})
    if "channel_mult" in own and not adversarial:  # adversaries read the maps of all resolutions
        own.channel_mult = own.channel_mult[:2]
    method = experiment.build_method(resolved)
    assert experiment.effect_error(resolved, method) is None
    key = jax.random.key(0)
    network = build_teacher(resolved).denoiser.network
    frozen = {name: jax.eval_shape(network.init, key) for name in method.frozen_names}
    state = jax.eval_shape(method.init, key, None, frozen)
    assert jax.tree.leaves(jax.eval_shape(method.init, key)) == jax.tree.leaves(state)
    image = jax.ShapeDtypeStruct((8, *network.sample_shape), "float32")
    conditions = {
        key: jax.ShapeDtypeStruct((8, *(c.usual or c.shape)), c.dtype)
        for key, c in network.conditions.items()
        if c.required
    }
    batch = {"image": image, "noise": image, "conditions": conditions}
    nulls = {
        key: jax.ShapeDtypeStruct(conditions[key].shape[1:], c.dtype)
        for key, c in network.conditions.items()
        if c.null_is_given
    }
    frozen |= {"nulls": nulls} if nulls else {}
    for phase in method.phases:
        update = functools.partial(method.update, phase=phase)
        after, metrics = jax.eval_shape(update, state, batch, key, frozen)
        same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
        assert jax.tree.all(jax.tree.map(same, state, after))
        assert metrics["loss"].shape == ()


def test_default_experiment_is_the_papers():
    config = resolve(importlib.import_module("dit_jax.configs.dit_xl2").get_config())
    network = experiment.build_network(config)
    assert network.flops_per_example / 2 == pytest.approx(118.64e9, rel=1e-3)
    assert (config.training.batch_size, config.optimizer.learning_rate) == (256, 1e-4)
    assert config.ema.decays == (0.9999,) and config.optimizer.weight_decay == 0


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("training.bs", "training.batch_size"),
        ("sampling.bs", "sampling.batch_size"),
        ("sampling.cfg", "sampling.guidance_scale"),
        ("training.steps", "training.num_steps"),
        ("sampling.num_steps", "sampling.steps"),
        ("training.ema", "ema.decays"),
        ("ema.decay", "ema.decays"),
        ("training.depth", "model.dit.depth"),
        ("model.num-layers", "model.dit.depth"),
    ],
)
def test_a_word_of_the_field_is_understood(word, key):
    assert config_lib.nearest_key(word) == f"; did you mean config.{key}?"


def test_the_words_of_the_field_mean_keys_that_exist():
    known = {path for path, _ in config_lib.flatten(default_config())}
    for words, keys in abbreviations._MEANINGS.items():
        assert set(keys) <= known, words


def test_the_documentation_lists_every_key_with_its_default():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    listed = [line for line in text.splitlines() if line.startswith("config.")]
    assert listed == [
        f"config.{key} = {value!r}" for key, value in config_lib.flatten(default_config())
    ]
