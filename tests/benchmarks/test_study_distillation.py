"""The study of distillation: rows done in parts, and its table."""

import json

import pytest

import study_distillation as study
from dit_jax import experiment


def row(distance):
    score = {"frechet_distance": distance, "label_accuracy": 0.9}
    return {
        "training_steps": 10,
        "training_seconds": {"1": 3.0},
        "steps": {str(steps): score for steps in study.STEPS},
    }


def record(distance=1.38, **changes):
    teacher = {
        "frechet_distance": distance,
        "label_accuracy": 0.99,
        "evaluations": 98,
        "training_seconds": 60.0,
    }
    start = {"command": "now", "seed": 0, "num_images": 1000, "teacher": teacher, "students": {}}
    return start | changes


def test_rows_of_an_earlier_study_stay_if_it_was_scored_alike(tmp_path):
    file = tmp_path / "study.json"
    assert study.continued(file, record()) == record()
    earlier = record(1.3801, command="then", students={"kd": row(1.4)})
    file.write_text(json.dumps(earlier))
    assert study.continued(file, record()) == earlier
    for other in (record(seed=1), record(num_images=500), record(distance=1.5)):
        assert study.continued(file, other) == other


def test_table():
    text = study.markdown(record(students={"kd": row(2.76)}))
    assert "| teacher, 98 evaluations | 60 s | 1.38 (99.0%) | | | 1 |" in text
    assert "| kd | 10 updates, 3 s | 2.76 (90.0%) | 2.76 (90.0%) | 2.76 (90.0%) | 2.00 |" in text


@pytest.mark.parametrize("name", study.VARIANTS)
def test_every_row_builds(name, tmp_path):
    """Of one and of several steps, before anything is trained."""
    for steps in study.STEPS:
        config = study.configure(
            study.VARIANTS[name], tmp_path, steps, seed=0, pairs=tmp_path / "pairs"
        )
        if name == "tcm":
            config.method.tcm.stage1 = str(tmp_path)
        experiment.build_method(experiment.resolve_config(config))
