"""DiTs without a class for "none": told from others, never guided, exported as what they are."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.interop.export import write_model
from dit_jax.interop.models import open_model
from dit_jax.interop.pipelines import load_pipeline
from dit_jax.interop.tensors import InteropError
from dit_jax.launch import convert, loading, sample, train
from dit_jax.models import Network, Request
from tests.interop.test_models import TINY, assert_same, in_memory, on_device
from tests.launch.conftest import tiny_config
from tests.launch.test_interop_commands import DIGITS, FLOW, refusal

WITHOUT = dataclasses.replace(TINY, null_class=False, num_classes=10)
HEADS = {"num_heads": TINY.num_heads}


def write(config, path, args=None, **process):
    """A .pt of the original's layout, with the arguments of a training script or without."""
    model, params = in_memory(config, **process)
    write_model(model, "sit_pt" if process else "dit_pt", path)
    if args:
        content = {"model": torch.load(path), "args": argparse.Namespace(**args)}
        torch.save(content, path)
    return params


def test_num_classes_settles_what_the_rows_mean(tmp_path):
    params = write(WITHOUT, tmp_path / "x.pt")
    assumed = open_model(tmp_path / "x.pt", **HEADS)
    assert (assumed.network.num_classes, assumed.network.null_class) == (9, True)
    assert "10 rows, taken as 9 classes and the null class" in assumed.notes[0]
    assert "--num_classes=10" in assumed.notes[0]
    settled = open_model(tmp_path / "x.pt", **HEADS, num_classes=10)
    assert settled.network.config == WITHOUT and not settled.notes
    assert_same(settled, params)
    nine = open_model(tmp_path / "x.pt", **HEADS, num_classes=9)
    assert nine.network.num_classes == 9 and nine.network.null_class and not nine.notes
    with pytest.raises(InteropError, match="10 rows, which is not 7 classes"):
        open_model(tmp_path / "x.pt", **HEADS, num_classes=7)
    write(WITHOUT, tmp_path / "told.pt", {"num_classes": 10})
    told = open_model(tmp_path / "told.pt", **HEADS)
    assert told.network.config == WITHOUT and not told.notes


def test_a_table_of_one_row_is_told_as_what_it_is(tmp_path):
    write(dataclasses.replace(WITHOUT, num_classes=1), tmp_path / "x.pt")
    found = open_model(tmp_path / "x.pt", **HEADS)
    assert (found.network.num_classes, found.network.null_class) == (1, False)
    assert "one row" in found.notes[0] and "unconditional" in found.notes[0]
    with pytest.raises(InteropError, match="it can only be 1 class without a null class"):
        open_model(tmp_path / "x.pt", **HEADS, num_classes=3)


def test_a_thousand_rows_are_imagenets_classes(tmp_path):
    for count, null_class in ((1000, False), (1000, True)):
        config = dataclasses.replace(TINY, num_classes=count, null_class=null_class)
        write(config, tmp_path / f"{null_class}.pt")
        found = open_model(tmp_path / f"{null_class}.pt", **HEADS)
        assert found.network.config == config and bool(found.notes) != null_class


def test_guidance_is_refused_wherever_it_is_asked_for(tmp_path, capsys):
    write(dataclasses.replace(DIGITS, null_class=False), tmp_path / "x.pt", process=FLOW)
    options = [f"--init_from=sit_pt:{tmp_path / 'x.pt'}", "--num_heads=2", "--num_classes=10"]
    out = f"--out={tmp_path / 'x.png'}"
    error = refusal(capsys, sample.main, *options, "--guidance_scale=2", out)
    assert (
        "needs a null class, and this model has none" in error and not (tmp_path / "x.png").exists()
    )
    few = ["--solver=euler", "--steps=1", "--num_images=1"]
    sample.main([*options, *few, "--labels", "9", out])  # the last class is a class
    assert (tmp_path / "x.png").exists()

    network = Network(dataclasses.replace(DIGITS, null_class=False))
    assert not network.null_class and network.conditions["label"].null is None
    config = tiny_config(**{"model.dit.null_class": False})
    with pytest.raises(ConfigError, match=r"method.label_dropout=0"):
        experiment.resolve_config(config)
    config.method.label_dropout = 0.0
    plan = experiment.build_sampling(experiment.resolve_config(config))
    params = jax.jit(network.init)(jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match=r"label 10 is out of range.* no null class"):
        plan.bind(params)(keys, [10])
    config.sampling.guidance_scale = 2.0
    with pytest.raises(ConfigError, match=r"guidance_scale=2.0 needs a null class"):
        experiment.resolve_config(config)


def test_a_run_without_label_dropout_knows_that_its_null_class_means_nothing(tmp_path):
    config = tiny_config(**{"method.label_dropout": 0.0, "sampling.guidance_scale": 2.0})
    with pytest.raises(ConfigError, match="never has"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.sampling.guidance_scale = 1.0
    config.training.num_steps = 1
    train.run(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="never has"):
        loading.load_model(tmp_path / "run", overrides={"sampling.guidance_scale": 2.0})
    student = tiny_config(
        **{
            "method.name": "dmd2",
            "method.label_dropout": 0.0,
            "teacher.path": str(tmp_path / "run"),
            "teacher.guidance_scale": 1.5,
        }
    )
    with pytest.raises(ConfigError, match=r"teacher.guidance_scale=1.5.* never has"):
        train.run(student, tmp_path / "student")
    found = open_model(tmp_path / "run")
    summary = write_model(found, "dit_pt", tmp_path / "x.pt", allow_inexact=True, dry_run=True)
    assert any("guidance would mean nothing" in note for note in summary.notes)


def test_training_settles_it_by_its_configuration(tmp_path, capsys):
    """As --num_classes does; a configuration that says otherwise is told what to set."""
    write(dataclasses.replace(DIGITS, null_class=False), tmp_path / "x.pt", process=FLOW)
    source = f"sit_pt:{tmp_path / 'x.pt'}"
    with pytest.raises(ConfigError, match=r"--config\.model\.dit\.null_class=False"):
        loading.open_initial(source, experiment.resolve_config(tiny_config()))
    config = tiny_config(**{"model.dit.null_class": False, "method.label_dropout": 0.0})
    found = loading.open_initial(source, experiment.resolve_config(config))
    assert found.network.num_classes == 10 and not found.network.null_class
    with pytest.raises(ConfigError, match=r"--config\.model\.num_classes=9"):
        loading.open_initial(source, experiment.resolve_config(tiny_config()), num_classes=9)


def test_exports_say_that_there_is_no_null_class(tmp_path, capsys):
    params = write(WITHOUT, tmp_path / "x.pt")
    common = ["--num_heads=4", "--num_classes=10", str(tmp_path / "x.pt")]
    convert.main(["--to=diffusers", *common, str(tmp_path / "pipeline")])
    assert "WRONG with guidance" in capsys.readouterr().out
    card = json.loads((tmp_path / "pipeline/dit_jax.json").read_text())
    assert card["null_class"] is card["guidance"] is False
    assert "guidance_scale=1," in (tmp_path / "pipeline/README.md").read_text()
    again = open_model(tmp_path / "pipeline")
    assert again.network.config == WITHOUT
    assert_same(again, params)
    part = open_model(tmp_path / "pipeline/transformer")  # without the card, one folder up
    assert any(f"only if the folder {tmp_path / 'pipeline'} is given" in n for n in part.notes)
    write_model(again, "dit_pt", tmp_path / "y.pt")
    assert (tmp_path / "y.pt").read_bytes() == (tmp_path / "x.pt").read_bytes()

    pipeline = load_pipeline(tmp_path / "pipeline", vae=None)
    x = np.random.default_rng(0).normal(size=(2, *again.network.sample_shape)).astype(np.float32)
    t, y = np.array([3.0, 977.0], np.float32), np.array([2, 9])
    ours = again.network.apply(
        on_device(again), Request(jnp.asarray(x), jnp.asarray(t), {"label": jnp.asarray(y)})
    ).out
    inputs = torch.from_numpy(x).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = pipeline.transformer(
            inputs, timestep=torch.from_numpy(t), class_labels=torch.from_numpy(y)
        ).sample
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    with pytest.raises(InteropError, match="guidance_scale=1"):
        pipeline.transformer(
            inputs, timestep=torch.from_numpy(t), class_labels=torch.tensor([2, 1000])
        )
