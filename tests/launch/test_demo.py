"""The demo's report, with training and scoring replaced; and its stopwatch."""

import re
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import experiment
from dit_jax.launch import demo, demonstration
from dit_jax.launch.timing import Stopwatch
from dit_jax.training.loop import TrainResult


def test_a_stopwatch_keeps_compilations_apart():
    clock = Stopwatch()
    started = time.perf_counter()
    with clock("first"):
        jax.jit(lambda x: jnp.sin(x) + 0.12345)(jnp.ones(3))  # compiles
        time.sleep(0.05)
    elapsed = time.perf_counter() - started
    compiled = clock.compiling
    assert compiled > 0 and clock.seconds["first"] >= 0.05
    assert clock.seconds["first"] + compiled == pytest.approx(elapsed, abs=0.02)
    # One inside the other counts once, and nothing else that JAX times counts.
    jax.monitoring.record_event_duration_secs("/jax/core/compile/inner", 0.1)
    jax.monitoring.record_event_duration_secs("/jax/core/compile/outer", 0.3)
    jax.monitoring.record_event_duration_secs("/jax/other", 1.0)
    assert 0.3 - 1e-6 <= clock.compiling <= compiled + 0.31
    clock.close()
    jax.monitoring.record_event_duration_secs("/jax/core/compile/later", 100.0)
    assert clock.compiling < 100


def seconds(text):
    minutes, rest = re.fullmatch(r"(?:(\d+)m)?(\d+)s", text).groups()
    return 60 * int(minutes or 0) + int(rest)


@pytest.fixture
def configurations(monkeypatch):
    """Replaces what takes minutes, training and scoring, by what takes 0.2 s; collects configs."""
    given = {}

    def train(config, directory):
        given[directory.name] = config
        time.sleep(0.2)
        return TrainResult(None, config.training.num_steps, False, 0.2, 5.0)

    def evaluate(model, folder, *, num_images, phase):
        for name in ("classifier", "sampling", "scoring"):
            with phase(name):
                time.sleep(0.2)
        images, labels = np.zeros((num_images, 8, 8, 1)), np.arange(num_images) % 10
        scores = {"frechet_distance": 1.25, "frechet_distance_floor": 0.5}
        scores |= {"classifier_test_accuracy": 0.99, "label_accuracy": {"overall": 0.98}}
        return {"scores": scores}, images, labels, (images, labels)

    def load(directory):
        config = experiment.resolve_config(given["teacher"])
        return SimpleNamespace(config=config)

    monkeypatch.setattr(demonstration.training, "run", train)
    monkeypatch.setattr(demonstration.loading, "load_model", load)
    monkeypatch.setattr(demonstration.classifier_scores, "evaluate", evaluate)
    return given


def test_the_demo_tells_how_good_and_where_the_time_went(configurations, tmp_path, capsys):
    demo.main([f"--workdir={tmp_path / 'demo'}", "--num_images=100"])
    out = capsys.readouterr().out
    assert (tmp_path / "demo" / "samples.png").stat().st_size > 1000
    steps = [config.training.num_steps for config in configurations.values()]
    assert re.search(rf"training steps +{steps[0]} +{steps[1]}\n", out)
    assert re.search(r"images/s +\d{3} +\d{3}\n", out) and re.search(
        r"real ones: 0.50\) +1.25", out
    )
    assert configurations["student"].teacher.path == str(tmp_path / "demo" / "teacher")
    table = out.split("where the time went")[1].split("\n---")[0]
    spent = dict(re.findall(r"(\S.*?) {2,}(\S+)$", table, re.MULTILINE))
    assert list(spent) == [
        *("importing", "compiling", "training the teacher", "classifier", "sampling", "scoring"),
        *("training the student", "picture", "data, checkpoints and the rest"),
        "everything together",
    ]
    seconds = {name: int(text.removesuffix("s")) for name, text in spent.items()}
    total = seconds.pop("everything together")
    assert total >= 1 and total == pytest.approx(sum(seconds.values()), abs=0.5 * len(spent))


def test_another_folder_and_an_interruption_end_the_demo(configurations, tmp_path, monkeypatch):
    for name in ("demo", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("")
    (tmp_path / "demo" / "config.json").write_text("{}")  # of an earlier demo, which makes room
    stopped = TrainResult(None, 3, True, 0.1, 30.0)
    monkeypatch.setattr(demonstration.training, "run", lambda config, directory: stopped)
    for name, status in (("demo", 130), ("mine", 2)):
        with pytest.raises(SystemExit) as ending:
            demo.main([f"--workdir={tmp_path / name}"])
        assert ending.value.code == status
    assert (tmp_path / "mine" / "thesis.tex").exists() and not (tmp_path / "demo").exists()
