"""convert, and train, sample and evaluate --init_from any format."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dit_jax.evaluation import ScoreSettings, TooFewSamplesError, load_adm_npz
from dit_jax.evaluation.inception import parameter_shapes
from dit_jax.interop.autoencoder_kl import save_autoencoder
from dit_jax.interop.export import write_model
from dit_jax.interop.inception import inception_table
from dit_jax.interop.models import open_model
from dit_jax.interop.parameters import flat_shapes
from dit_jax.interop.table import export_arrays, export_specs
from dit_jax.interop.tensors import write_pt
from dit_jax.launch import convert, evaluate, inception_scores, sample, train
from dit_jax.models import DiTConfig
from dit_jax.models.autoencoder_kl import AutoencoderKLConfig
from tests.interop.test_models import assert_same, in_memory
from tests.launch.conftest import tiny_config
from tests.references import diffusers_autoencoder

LATENT = DiTConfig(
    image_size=4,
    in_channels=4,
    hidden_size=32,
    depth=1,
    num_heads=2,
    num_classes=5,
)
DIGITS = dataclasses.replace(LATENT, image_size=8, in_channels=1, num_classes=10, learn_sigma=False)
VAE = AutoencoderKLConfig(
    scaling_factor=0.2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
)
FLOW = {"name": "flow"}


def refusal(capsys, command, *arguments):
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as ending:
        command([str(a) for a in arguments])
    assert ending.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "sd-vae-ft-mse"
    model = diffusers_autoencoder.create(VAE)
    save_autoencoder(folder, *diffusers_autoencoder.ours(VAE, model))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A .pt of the original's layout."""
    path = tmp_path_factory.mktemp("pt") / "dit.pt"
    model, _ = in_memory(LATENT)
    write_model(model, "dit_pt", path)
    return path


def test_convert_prints_a_summary_and_round_trips(checkpoint, tmp_path, capsys):
    first = ["--from=dit_pt", "--to=diffusers", checkpoint, tmp_path / "a", "--num_heads=2"]
    convert.main([str(a) for a in [*first, "--dry_run"]])
    out = capsys.readouterr().out
    assert "would write" in out and "INEXACT" in out and not list(tmp_path.iterdir())
    convert.main([str(a) for a in first])
    out = capsys.readouterr().out
    sha256 = json.loads((tmp_path / "a/dit_jax.json").read_text())["sha256"]
    assert sha256 in out and "parameters" in out and "float32" in out
    convert.main(["--to=dit_pt", str(tmp_path / "a"), str(tmp_path / "b.pt")])
    assert (tmp_path / "b.pt").read_bytes() == checkpoint.read_bytes()


def test_convert_refuses_politely(checkpoint, tmp_path, capsys):
    error = refusal(capsys, convert.main, "--to=dit_jax", checkpoint, tmp_path / "a")
    assert "--num_heads" in error
    good = ("--to=dit_jax", "--num_heads=2", checkpoint, tmp_path / "a")
    convert.main([str(a) for a in good])
    assert "--overwrite" in refusal(capsys, convert.main, *good)
    convert.main([str(a) for a in (*good, "--overwrite")])
    error = refusal(capsys, convert.main, "--to=sit_pt", tmp_path / "a", tmp_path / "b")
    assert "--allow_inexact" in error
    error = refusal(capsys, convert.main, "--to=dit_pt", tmp_path / "a", tmp_path / "b", "--vae=x")
    assert "--vae does not apply to --to=dit_pt" in error
    (tmp_path / "names.json").write_text('["a", "b", "c", "d", "e"]')
    names = f"--class_names={tmp_path / 'names.json'}"
    error = refusal(capsys, convert.main, "--to=dit_pt", tmp_path / "a", tmp_path / "b", names)
    assert "--class_names does not apply" in error


def test_samples_are_decoded_and_an_interrupted_run_goes_on(
    checkpoint, vae, tmp_path, capsys, monkeypatch
):
    common = [
        f"--init_from=dit_pt:{checkpoint}",
        "--num_heads=2",
        "--solver=ddim",
        "--steps=3",
        "--batch_size=8",
        "--num_images=20",
    ]
    assert "--vae" in refusal(capsys, sample.main, *common, "--out", tmp_path / "x.npz")
    common.append(f"--vae={vae}")
    sample.main([*common, f"--out={tmp_path / 'whole.npz'}"])
    images, labels = load_adm_npz(tmp_path / "whole.npz")
    assert images.shape == (20, 8, 8, 3) and images.std() > 1
    np.testing.assert_array_equal(labels, np.arange(20) % 5)
    record = json.loads((tmp_path / "whole.json").read_text())
    assert record["autoencoder"]["sha256"] and record["sampling"]["steps"] == 3

    class Killed(Exception):
        pass

    from dit_jax.evaluation.sample_store import SampleStore

    append = SampleStore.append

    def dies(self, batch):
        append(self, batch)
        if self.done == 16:
            raise Killed

    monkeypatch.setattr(SampleStore, "append", dies)
    with pytest.raises(Killed):
        sample.main([*common, f"--out={tmp_path / 'parts.npz'}"])
    assert not (tmp_path / "parts.npz").exists()
    monkeypatch.setattr(SampleStore, "append", append)
    error = refusal(capsys, sample.main, *common, "--seed=3", f"--out={tmp_path / 'parts.npz'}")
    assert "interrupted run left 16 images" in error and "seed" in error
    sample.main([*common, f"--out={tmp_path / 'parts.npz'}"])
    assert "going on at image 16 of 20" in capsys.readouterr().out
    np.testing.assert_array_equal(load_adm_npz(tmp_path / "parts.npz")[0], images)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["parts.json", "parts.npz", "whole.json", "whole.npz"]
    sample.main([*common, f"--out={tmp_path / 'folder'}"])
    assert len(list((tmp_path / "folder").glob("*.png"))) == 20


def test_training_starts_from_a_checkpoint(tmp_path, capsys):
    model, params = in_memory(DIGITS, process=FLOW)
    write_model(model, "dit_jax", tmp_path / "start")
    config = tiny_config(
        **{"training.num_steps": 1, "optimizer.learning_rate": 1e-30, "ema.decays": (0.9,)}
    )
    train.run(config, tmp_path / "run", init_from=str(tmp_path / "start"))
    assert "starting from dit_jax" in capsys.readouterr().out
    for weights in ("raw", "ema"):
        assert_same(open_model(tmp_path / "run", weights=weights), params)
    assert json.loads((tmp_path / "run/init_from.json").read_text())["kind"] == "dit_jax"


def test_training_refuses_another_network(tmp_path):
    model, _ = in_memory(dataclasses.replace(DIGITS, depth=2), process=FLOW)
    write_model(model, "dit_jax", tmp_path / "start")
    with pytest.raises(ValueError, match=r"--config\.model\.dit\.depth=2"):
        train.run(tiny_config(), tmp_path / "run", init_from=str(tmp_path / "start"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A weights file of random numbers."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    table, shapes = inception_table(), flat_shapes(parameter_shapes())
    generator = np.random.default_rng(0)

    def draw(name):
        shape = shapes[name]
        if len(shape) > 1:
            scale = np.prod(shape[:-1]) ** -0.5
            return (generator.normal(size=shape) * scale).astype(np.float32)
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)

    specs = export_specs(table, shapes)
    write_pt(path, specs, export_arrays(table, shapes, draw))
    return path


def test_evaluate_scores_samples_beside_what_was_published(
    checkpoint, vae, inception, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "reference.npz", pixels)
    common = [
        f"--reference={tmp_path / 'reference.npz'}",
        f"--inception={inception}",
        "--allow_singular",
        "--feature_batch_size=8",
    ]
    model = [f"--init_from={checkpoint}", "--num_heads=2", f"--vae={vae}", "--num_images=8"]
    out = tmp_path / "scores.json"
    assert "6726825d" in refusal(capsys, evaluate.main, *model, *common, f"--out={out}")
    common.append("--other_inception_weights")
    sampling = ["--protocol=dit_400k", "--steps=2", "--batch_size=8"]
    evaluate.main([*model, *sampling, *common, "--scores", "fid", "sfid", f"--out={out}"])
    text = capsys.readouterr().out
    assert "published, JAX" in text and "19.5" in text and "NOT comparable" in text
    record = json.loads(out.read_text())
    assert record["scores"]["fid"] > 0 and record["scores"]["sfid"] > 0
    provenance = record["provenance"]
    assert provenance["rounding"] == "truncate" and provenance["sampling"]["solver"] == "ddpm"
    assert provenance["seeds"] == [0] and provenance["vae"]["sha256"]
    assert "VAE decoder" not in text and "images: 8, published with 50000" in text

    # The same images from a file give the same score.
    same = [*model, "--solver=ddpm", "--steps=2", "--batch_size=8", "--rounding=truncate"]
    sample.main([*same, "--spacing=iddpm", f"--out={tmp_path / 'x.npz'}"])
    scores = ["--scores", "fid", f"--out={tmp_path / 'again.json'}"]
    evaluate.main([f"--samples={tmp_path / 'x.npz'}", *common, *scores])
    again = json.loads((tmp_path / "again.json").read_text())
    np.testing.assert_allclose(again["scores"]["fid"], record["scores"]["fid"], rtol=1e-5)
    assert again["provenance"]["seeds"] == [0]


def test_evaluate_refuses_what_would_do_nothing(tmp_path, capsys):
    out = f"--out={tmp_path / 'x.json'}"
    assert "needs --reference" in refusal(capsys, evaluate.main, "--protocol=dit_final", out)
    error = refusal(capsys, evaluate.main, "--samples=x.npz", "--reference=y", "--steps=3", out)
    assert "--steps does not apply" in error
    error = refusal(capsys, evaluate.main, "--samples=x.npz", "--reference=y", "--seed=3", out)
    assert "--seed does not apply" in error
    # What is not there is said before weights are fetched.
    samples, given = tmp_path / "samples.npz", [f"--samples={tmp_path / 'samples.npz'}", out]
    error = refusal(capsys, evaluate.main, *given, "--reference=nope.npz")
    assert f"--samples={samples}: there is no such file" in error
    np.savez(samples, np.zeros((3, 8, 8, 3), np.uint8))
    error = refusal(capsys, evaluate.main, *given, "--reference=nope.npz")
    assert "--reference=nope.npz: there is no such file" in error
    wanted = r"--num_images=9: fid needs at least 2049\. Give a larger .*--allow_singular"
    with pytest.raises(TooFewSamplesError, match=wanted):
        inception_scores.require_enough(9, ScoreSettings(), 2048, of_file=False)
    inception_scores.require_enough(9, ScoreSettings(allow_singular=True), 2048, of_file=False)
    assert "--grey needs" in refusal(capsys, evaluate.main, "--workdir=x", "--grey=repeat", out)
    picture = f"--out={tmp_path / 'x.png'}"
    assert "give one of --workdir" in refusal(capsys, sample.main, picture)
    assert list(Path(tmp_path).iterdir()) == [samples]
