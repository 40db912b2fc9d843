"""Distilling end to end: a tiny teacher, students of it, and what is refused before compiling."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax.config import ConfigError
from dit_jax.launch import loading, train, wiring
from dit_jax.training.checkpoints import CheckpointError
from tests.launch.conftest import curve, tiny_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A finished run's workdir."""
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    train.run(tiny_config(**{"process.flow.network_convention": "flux"}), workdir)
    return workdir


def student_config(teacher, method, **overrides):
    """A tiny student of one step."""
    values = {
        "process.flow.network_convention": "flux",
        "teacher.path": str(teacher),
        "method.name": method,
        "method.label_dropout": 0.0,
        "sampling.solver": "consistency",
        "sampling.steps": 1,
        "training.num_steps": 6,
        "training.log_every": 1,
        "training.checkpoint_every": 3,
        "ema.power_stds": (),
    }
    return tiny_config(**{**values, **overrides})


def test_a_student_starts_from_its_teacher_and_takes_turns_with_its_critics(teacher, tmp_path):
    config = student_config(
        teacher,
        "dmd2",
        **{"training.preview_every": 3, "training.preview_images": 10},
        **{"method.dmd2.student_update_frequency": 3, "optimizer.learning_rate": 1e-9},
    )
    workdir = tmp_path / "student"
    result = train.run(config, workdir)
    assert result.step == 6
    of_teacher = loading.load_model(teacher).params
    of_student = loading.load_model(workdir, weights="raw").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), of_teacher, of_student)
    names = curve(workdir)
    # Student's turn, then two of the critics'.
    assert "gan_generator" in names[1] and "gan_generator" in names[4]
    assert not any("gan_generator" in names[step] for step in (2, 3, 5, 6))
    assert {"student_mean", "student_std", "loss"} < set(names[1])
    # Teacher and student side by side: wider than high.
    width, height = Image.open(workdir / "previews" / "step_00000006.png").size
    assert width > 1.8 * height
    record = json.loads((workdir / "frozen.json").read_text())
    assert record["teacher"]["source"] == str(teacher) and record["teacher"]["weights"] == "ema_0.9"


def test_an_interrupted_distillation_resumes_bit_for_bit(teacher, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = {"method.dmd2.student_update_frequency": 2}
    train.run(student_config(teacher, "dmd2", **options), whole)
    train.run(student_config(teacher, "dmd2", **options, **{"training.num_steps": 3}), halves)
    train.run(student_config(teacher, "dmd2", **options), halves)
    first, second = (loading.load_model(d, weights="raw") for d in (whole, halves))
    assert first.weights_hash() == second.weights_hash()


def test_sampling_a_student_needs_no_teacher(teacher, tmp_path):
    config = student_config(
        teacher,
        "mean_flow",
        **{"model.second_time": "t-r", "model.custom_gradients": "off"},
        **{"sampling.solver": "mean_flow", "training.num_steps": 2},
    )
    config.model.custom_gradients = "off"
    workdir = tmp_path / "student"
    train.run(config, workdir)
    values = json.loads((workdir / "config.json").read_text())
    values["teacher"]["path"] = "/nowhere"
    (workdir / "config.json").write_text(json.dumps(values))
    model = loading.load_model(workdir)
    from dit_jax import experiment

    images = wiring.sample_images(
        experiment.build_sampling(model.config),
        model.params,
        wiring.balanced_labels(4, 10),
        seed=0,
        placement=wiring.create_placement(model.config),
        batch_size=4,
        announce=False,
    )
    assert images.shape == (4, 8, 8, 1) and np.isfinite(images).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher.path": ""}, "config.method.name='dmd2' needs a trained model"),
        ({"model.dit.depth": 2}, "--config.model.dit.depth=1"),
        ({"process.flow.network_convention": "sit"}, "network_convention=flux"),
        ({"process.name": "ddpm", "process.flow.network_convention": "sit"}, "process.name=flow"),
        ({"sampling.steps": 2, "sampling.times": (1.0, 0.0)}, "steps + 1 times"),
        ({"sampling.solver": "heun"}, "consistency"),
        ({"training.batch_size": 1}, "fewer than 2 examples a part"),
    ],
)
def test_refused_before_anything_is_compiled_error(teacher, tmp_path, overrides, message):
    with pytest.raises((ConfigError, ValueError)) as error:
        train.run(student_config(teacher, "dmd2", **overrides), tmp_path / "student")
    assert message in str(error.value)
    assert not (tmp_path / "student" / "checkpoints").exists()


def test_a_truncated_model_without_a_first_stage_is_refused_error(tmp_path):
    times = {"timesteps.name": "truncated_log_normal"}
    flux = {"process.name": "edm", "process.flow.network_convention": "sit", "teacher.path": ""}
    config = student_config("", "tcm", **times, **flux)
    config.timesteps.truncated_log_normal.min_time = 1.0
    with pytest.raises(ConfigError, match=r"--config\.method\.tcm\.stage1="):
        train.run(config, tmp_path / "student")


def test_a_teacher_without_averages_is_refused_error(tmp_path):
    workdir = tmp_path / "teacher"
    bare = {"ema.decays": (), "ema.power_stds": (), "sampling.weights": "raw"}
    flux = {"process.flow.network_convention": "flux", "training.num_steps": 1}
    train.run(tiny_config(**bare, **flux), workdir)
    with pytest.raises(CheckpointError, match="no weights 'ema'; there are raw"):
        train.run(student_config(workdir, "dmd2"), tmp_path / "student")
    raw = student_config(workdir, "dmd2", **{"teacher.weights": "raw", "training.num_steps": 1})
    assert train.run(raw, tmp_path / "student").step == 1


def test_another_teacher_is_refused_on_resuming_error(teacher, tmp_path):
    config = student_config(teacher, "dmd2", **{"training.num_steps": 3})
    train.run(config, tmp_path / "student")
    other = tmp_path / "other"
    flux = {"process.flow.network_convention": "flux", "seed": 1, "training.num_steps": 1}
    train.run(tiny_config(**flux), other)
    config = student_config(other, "dmd2")
    with pytest.raises(ConfigError, match="begun with another teacher"):
        train.run(config, tmp_path / "student", force=True)
