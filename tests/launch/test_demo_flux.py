"""The pieces of the demo of text to image, small; its training is replaced by fresh parameters."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax import FluxPipeline, experiment
from dit_jax.data import open_source
from dit_jax.data.captioned_digits import halves
from dit_jax.launch import demo_flux, flux_demonstration, sample
from dit_jax.training.loop import TrainResult


@pytest.fixture
def small(monkeypatch):
    """Replaces what takes minutes; collects the configurations."""
    given = {}

    def train(config, directory):
        directory.mkdir()
        given[directory.name] = experiment.prepare(config).config
        return TrainResult(None, config.training.num_steps, False, 1.0, 5.0)

    def load(directory):
        config = given[directory.name]
        network = experiment.build_network(config)
        params = jax.jit(network.init)(jax.random.key(0))
        return SimpleNamespace(config=config, network=network, params=params)

    def teach(*given, **options):
        right = lambda cut: np.arange(len(cut)) % 10  # noqa: E731
        return SimpleNamespace(predict=right, accuracy=lambda *given: 0.99)

    teacher = flux_demonstration.teacher_config

    def tiny(directory):
        config = teacher(directory)
        config.model.flux.update(hidden_size=16, depth=1, single_depth=1, num_heads=2)
        config.sampling.update(solver="euler", steps=2)
        return config

    prepare = flux_demonstration.prepare
    monkeypatch.setattr(flux_demonstration, "teacher_config", tiny)
    monkeypatch.setattr(flux_demonstration, "prepare", lambda folder: prepare(folder, pairs=100))
    monkeypatch.setattr(flux_demonstration, "IMAGES_PER_PROMPT", 2)
    monkeypatch.setattr(flux_demonstration.training, "run", train)
    monkeypatch.setattr(flux_demonstration.loading, "load_model", load)
    monkeypatch.setattr(flux_demonstration.evaluation, "train_classifier", teach)
    return given


def test_the_demo_prepares_distils_scores_and_leaves_a_pipeline(small, tmp_path, capsys):
    home = tmp_path / "demo"
    demo_flux.main([f"--workdir={home}"])
    out = capsys.readouterr().out
    source = open_source("latents", "train", path=str(home / "features"))
    assert source.info.image_shape == (8, 16, 1) and len(source) == 1542
    assert small["student"].teacher.path == str(home / "teacher")
    assert small["student"].sampling.steps == 1 and "network evaluations a picture" in out
    assert (home / "samples.png").stat().st_size > 1000
    command = out.split("next: python launch/sample.py ")[1].splitlines()[0]
    assert "'--prompt=a handwritten seven'" in command
    options = [f"--pretrained={home / 'pipeline'}", "--prompt=a handwritten seven", "--steps=1"]
    options += [
        "--height=8",
        "--width=16",
        "--max_sequence_length=8",
        f"--out={tmp_path / 'a.png'}",
    ]
    assert all(option.strip("'") in command.replace("'", "") for option in options[:-1])
    sample.main(options)
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 0
    vae = json.loads((home / "pipeline" / "vae" / "config.json").read_text())
    assert vae["shift_factor"] == 0.0  # diffusers adds it
    pipeline = FluxPipeline.from_pretrained(home / "pipeline")
    sizes = {"height": 8, "width": 16, "num_inference_steps": 1, "max_sequence_length": 8}
    [image] = pipeline("a handwritten seven", **sizes).images
    assert image.size == (16, 8) and image.mode == "L"
    (home / "thesis.tex").write_text("")
    with pytest.raises(SystemExit):
        demo_flux.main([f"--workdir={home}"])
    assert "is not an earlier demo, it holds thesis.tex" in capsys.readouterr().err


def test_a_picture_counts_where_all_its_digits_are_in_their_places():
    prompts = flux_demonstration.PROMPTS
    assert len(prompts) == 10 and sum(len(digits) == 1 for digits in prompts) == 5
    pictures = np.zeros((20, 8, 16, 1), np.uint8)
    _, classes, of_picture = halves(pictures, flux_demonstration.asked(20))
    said = classes.copy()
    said[np.flatnonzero(of_picture == 1)[1]] += 1  # the right one of a pair
    said[np.flatnonzero(of_picture == 10)[0]] += 1
    judge = SimpleNamespace(predict=lambda cut: said)
    assert flux_demonstration.shares(judge, pictures) == (0.9, 0.9, 0.9)


def test_an_interruption_ends_the_demo(small, tmp_path, monkeypatch):
    stopped = TrainResult(None, 3, True, 0.1, 30.0)
    monkeypatch.setattr(flux_demonstration, "prepare", lambda folder: None)
    monkeypatch.setattr(flux_demonstration.training, "run", lambda config, folder: stopped)
    with pytest.raises(SystemExit) as ending:
        demo_flux.main([f"--workdir={tmp_path / 'demo'}", "--steps=4"])
    assert ending.value.code == 130
