"""Errors name what their reader can type."""

import os

import pytest
from absl import flags
from ml_collections import config_flags

from dit_jax import experiment
from dit_jax.config import ConfigError, default_config
from dit_jax.launch import configuration_flags, sample, wiring
from dit_jax.named_options import options_named, renamed
from tests.data.conftest import write_image  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("resize='adm' and image_size", "--resize='adm' and --size"),
        ("correct image_size, then resize it", "correct --size, then resize it"),
        ("config.model.image_size=3", "config.model.image_size=3"),
        ("model_image_size, --resize=x", "model_image_size, --resize=x"),
    ],
)
def test_names_are_replaced_where_they_are_arguments(text, shown):
    assert renamed(text, {"resize": "--resize", "image_size": "--size"}) == shown


def test_an_error_keeps_its_kind():
    with pytest.raises(FileNotFoundError, match="set --path"), options_named({"path": "--path"}):
        raise FileNotFoundError("set path=...")
    with pytest.raises(OSError, match="No space"), options_named({"path": "--path"}):
        raise OSError(28, "No space left", "path=")


def test_a_data_sets_errors_name_keys(tmp_path, write_image):  # noqa: F811
    config = default_config()
    config.data.name = "image_folder"
    config.data.image_folder.update(path=str(tmp_path), resize="none")
    write_image("a/0.png", size=(28, 28))
    write_image("a/1.png", size=(20, 28))
    config.model.update(image_size=28, in_channels=1)
    with pytest.raises(ValueError) as error:
        experiment.open_data(config, "train")
    assert "Set config.data.image_folder.resize='adm' and config.model.image_size" in str(
        error.value
    )
    with pytest.raises(
        FileNotFoundError, match=r"set config.data.image_folder.test_fraction \(for"
    ):
        experiment.open_data(config, "test")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.dit.layer_loop", "while", "config.model.dit.layer_loop='while': expected one of"),
        ("model.remat", "all", "config.model.remat='all': expected one of"),
        (
            "model.dit.patch_size",
            3,
            "config.model.image_size=32 is not divisible by config.model.dit.patch_",
        ),
    ],
)
def test_an_objects_errors_name_keys(path, value, message):
    config = default_config()
    config.update_from_flattened_dict({path: value})
    with pytest.raises(ConfigError) as error:
        experiment.resolve_config(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parallel=synchronous", "--patch_devices=1"], "--patch_devices=1 splits nothing"),
        (
            ["--parallel=synchronous", "--patch_devices=2", "--warmup_steps=2"],
            "--warmup_steps=2 would do nothing with --parallel='synchronous'",
        ),
    ],
)
def test_errors_of_one_image_on_many_devices_name_flags(options, message):
    args = sample.parse_arguments(["--out=x.png", *options])
    with pytest.raises(ValueError) as error:
        wiring.image_parallel(args)
    assert message in str(error.value)


def test_an_error_of_a_flag_of_the_field_names_the_key(capsys):
    with pytest.raises(SystemExit) as ending:
        configuration_flags.parse(["train.py", "--lr=3e-4"])
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert "unknown flag --lr; did you mean --config.optimizer.learning_rate?" in error


@pytest.fixture
def config_flag(monkeypatch):
    """The flag --config as it was before anything was parsed, here and afterwards."""
    values = flags.FlagValues()
    monkeypatch.setattr(configuration_flags.flags, "FLAGS", values)
    monkeypatch.setattr(configuration_flags, "_arguments", arguments := [])
    config_flags.DEFINE_config_file("config", None, "", values, sys_argv=arguments)
    return values


def test_mistakes_beside_the_configurations_keys_are_told(config_flag, capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    for options, message in (
        (["--config=configs/nope.py"], "--config=configs/nope.py does not exist; "),
        (["--config", "configs/digit.py"], "did you mean configs/digits.py? the experiments are"),
        ([f"--config={tmp_path / 'pipe.py'}"], "pipe.py is not a regular file"),
        (["--config=configs/digits.py", "--seed=5"], "--seed; did you mean --config.seed?"),
    ):
        with pytest.raises(SystemExit) as ending:
            configuration_flags.parse(["train.py", *options])
        assert ending.value.code == 2
        assert message in capsys.readouterr().err


def test_a_flag_that_has_to_be_given_is_asked_for_with_an_example(config_flag, capsys):
    flags.DEFINE_integer("devices", None, "", flag_values=config_flag)
    options = ["plan.py", "--config=configs/digits.py"]
    with pytest.raises(SystemExit):
        configuration_flags.parse(options, required={"devices": "8"})
    assert "--devices is missing, for example --devices=8" in capsys.readouterr().err
    configuration_flags.parse([*options, "--devices=2"], required={"devices": "8"})


def test_a_choice_by_flag_leaves_out_the_files_options_of_another(config_flag, capsys):
    options = ["--config=configs/digits.py", "--config.data.name=tfds", "--config.model.depth=2"]
    options += ["--config.process.name=edm", "--config.process.flow.time_scale=3.0"]
    configuration_flags.parse(["train.py", *options])
    assert capsys.readouterr().out == (
        "note: --config.process.name=edm leaves out what configs/digits.py sets for another: "
        "config.process.flow.network_convention='flux'\n"
    )
    config = config_flag["config"].value
    assert config.model.dit.depth == 2  # by the name of before
    with pytest.raises(ConfigError, match=r"config\.process\.flow\.time_scale=3\.0 would do noth"):
        experiment.resolve_config(config)
