"""Mistakes end with a message that says what to do, before anything is trained."""

import shlex
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax import config as config_lib
from dit_jax import experiment
from dit_jax.configs import digits_dmd2, digits_kd, dit_xl2
from dit_jax.evaluation import load_adm_npz
from dit_jax.launch import evaluate, extract_features, loading, sample, train, training, wiring
from dit_jax.training import workdir as workdir_lib
from tests.launch.conftest import tiny_config


def refusal(capsys, function, *arguments, **options):
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as ending, wiring.readable_errors():
        function(*arguments, **options)
    assert ending.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run, made in this process, on 8 virtual devices."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    result = train.run(tiny_config(**{"training.num_steps": 4}), workdir)
    assert result.step == 4 and not result.interrupted
    return workdir


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"training.batch_size": 20},
            "a batch of 20 is not divisible by 8 devices: use 16 or 24",
        ),
        (
            {"training.batch_size": 24, "training.num_microbatches": 2},
            "not divisible by 8 devices x 2 microbatches: use 16 or 32",
        ),
        (
            {"model.dit.patch_size": 3},
            "config.model.image_size=8 is not divisible by config.model.dit.patch_size=3",
        ),
        ({"model.image_size": 16}, "set config.model.image_size=8 and config.model.in_channels=1"),
        ({"model.num_classes": 7}, "set config.model.num_classes=10"),
        ({"mesh.data": 3}, "multiply to 3, but there are 8 devices: set mesh.data=8"),
        (
            {"data.name": "image_folder"},
            "config.data.image_folder.path is empty: set --config.data.image_folder.path=IMAGES, a "
            "folder with a subfolder of images for every class (IMAGES/cat/1.jpg",
        ),
        ({"data.name": "digit"}, "did you mean digits?"),
        ({"training.num_steps": 0}, "config.training.num_steps=0: expected at least 1"),
        ({"sampling.batch_size": 0}, "config.sampling.batch_size=0: expected at least 1"),
        ({"sampling.weights": "ema_0.5"}, "expected one of ema, ema_0.9, ema_std0.1, raw"),
        ({"sampling.solver": "ddpm"}, "config.sampling"),
        ({"data.name": "digits", "data.horizontal_flip": True, "seed": -1}, "seed=-1"),
        ({"model.augment_dim": 9}, "config.model.augment_dim=9 would do nothing: no image is"),
        ({"training.preview_images": 8}, "do nothing with config.training.preview_every=0"),
    ],
)
def test_training_is_refused(capsys, monkeypatch, tmp_path, overrides, message):
    said = []
    monkeypatch.setattr(training, "announce", said.append)
    error = refusal(capsys, train.run, tiny_config(**overrides), tmp_path / "run")
    assert message in error and not said  # what is to be trained is said of what can be
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_begun_with_a_key_without_effect_goes_on(capsys, monkeypatch, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    begun = tiny_config(**{"training.num_steps": 4, "training.preview_images": 8})
    (workdir / "config.json").write_text(config_lib.to_json(begun))
    built, build = [], experiment.METHODS["denoising"]
    counted = lambda config: built.append(build(config)) or built[-1]  # noqa: E731
    monkeypatch.setitem(experiment.METHODS, "denoising", counted)
    assert train.run(begun, workdir).step == 4
    assert len(built) == 1  # from the door to the loop
    other = tiny_config(**{"training.num_steps": 4, "training.preview_images": 9})
    assert "preview_images=9 would do nothing" in refusal(capsys, train.run, other, workdir)


def test_a_missing_teacher_or_its_pairs_are_told_with_the_command_that_makes_them(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, train.run, digits_dmd2.get_config(), tmp_path / "run")
    assert "config.teacher.path=runs/digits: there is no such model yet; train it first: " in error
    assert "python launch/train.py --config=configs/digits.py --workdir=runs/digits," in error
    error = refusal(capsys, train.run, digits_kd.get_config(), tmp_path / "run")
    assert "python launch/write_pairs.py --workdir=TEACHER" in error
    assert "--out=pairs/digits" in error


def test_what_is_said_of_missing_latents_works(capsys, tmp_path):
    error = refusal(capsys, train.run, dit_xl2.get_config(), tmp_path / "run")
    extract = next(line for line in error.splitlines() if "extract_features" in line)
    args = extract_features.parse_arguments(shlex.split(extract)[2:])
    assert (args.image_size, args.vae) == (256, "hub:stabilityai/sd-vae-ft-mse")
    # The small network on digits that is suggested trains.
    config = dit_xl2.get_config()
    flags = next(line for line in error.splitlines() if "--config.data.name=digits" in line)
    values = dict(flag.removeprefix("--config.").split("=") for flag in flags.split())
    assert len(values) == 8
    config.update_from_flattened_dict(
        {key: value if key == "data.name" else int(value) for key, value in values.items()}
    )
    config.training.update(num_steps=1, batch_size=8, tensorboard=False)
    config.model.dit.layer_loop = "scan"  # compiled sooner
    assert train.run(config, tmp_path / "run").step == 1
    # A path that names nothing: the command that fills it, for a shell.
    config = dit_xl2.get_config()
    config.data.latents.path = str(tmp_path / "the user's latents")
    error = refusal(capsys, train.run, config, tmp_path / "other")
    extract = next(line for line in error.splitlines() if "extract_features" in line)
    args = extract_features.parse_arguments(shlex.split(extract)[2:])
    assert args.out == tmp_path / "the user's latents"


def test_a_workdir_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    error = refusal(capsys, train.run, tiny_config(), tmp_path / "file")
    assert f"cannot write to {tmp_path / 'file'}" in error


def test_a_full_disk_is_refused(capsys, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(workdir_lib.shutil, "disk_usage", lambda path: usage)
    error = refusal(capsys, train.run, tiny_config(), tmp_path / "run")
    assert "1000 bytes free" in error and "config.training.keep_last" in error


def test_a_workdir_of_another_configuration_is_refused(capsys, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    changed = {"training.num_steps": 6, "optimizer.learning_rate": 5e-4, "training.batch_size": 32}
    error = refusal(capsys, train.run, tiny_config(**changed), workdir)
    assert "config.optimizer.learning_rate: 0.001 there, 0.0005 now" in error
    assert "config.training.batch_size: 16 there, 32 now" in error
    assert "num_steps" not in error and "--force" in error
    # Refused, nothing has changed; forced, it goes on: with other data, another seed even.
    assert workdir_lib.load_config(workdir).training.batch_size == 16
    result = train.run(tiny_config(**changed, seed=3), workdir, force=True)
    assert result.step == 6
    assert workdir_lib.load_config(workdir).training.batch_size == 32


def test_a_checkpoint_of_another_network_is_refused_even_by_force(capsys, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    config = tiny_config(**{"model.dit.hidden_size": 48, "training.num_steps": 6})
    error = refusal(capsys, train.run, config, workdir, force=True)
    assert "belongs to another configuration" in error
    assert "config.model.dit.hidden_size: 32 there, 48 now\nUse another --workdir" in error
    assert "blocks/attn/qkv/kernel: (1, 32, 96) in the checkpoint, (1, 48, 144) expected" in error
    assert (workdir / "checkpoints" / "4").is_dir()


def test_a_truncated_checkpoint_gives_way_to_the_one_before(capsys, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    # The run is older than a key of the configuration, too: it goes on as it began.
    old = config_lib.to_json(workdir_lib.load_config(workdir), without=["ema.warmup"])
    (workdir / "config.json").write_text(old)
    train.run(tiny_config(**{"training.num_steps": 8}), workdir)
    for file in (workdir / "checkpoints" / "8").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    model = loading.load_model(workdir)
    assert model.step == 4 and (workdir / "checkpoints" / "8").is_dir()
    error = refusal(capsys, loading.load_model, workdir, step=8)
    assert str(workdir / "checkpoints" / "8") in error and "cannot be read" in error
    capsys.readouterr()
    result = train.run(tiny_config(**{"training.num_steps": 8}), workdir)
    assert result.step == 8 and "continuing from step 4" in capsys.readouterr().out
    assert (workdir / "checkpoints" / "8.damaged").is_dir()
    model = loading.load_model(workdir)
    assert model.step == 8 and not model.config.ema.warmup


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "3", "10"], "--labels 10: the model's classes are 0 to 9"),
        (["--num_images=0"], "--num_images: '0': expected at least 1"),
        (["--weights=ema_0.5"], "no weights 'ema_0.5'; there are ema_0.9, ema_std0.1, raw"),
        (["--step=3"], "no checkpoint of step 3"),
        (["--solver=dpm"], "'dpm'"),
        (["--solver=ddpm"], "config.sampling"),
        (["--steps=0"], "--steps: '0': expected at least 1"),
        (["--batch_size=0"], "--batch_size: '0': expected at least 1"),
    ],
)
def test_sampling_is_refused(capsys, trained, tmp_path, options, message):
    out = tmp_path / "a.png"
    error = refusal(capsys, sample.main, [f"--workdir={trained}", f"--out={out}", *options])
    assert message in error
    assert not out.exists()


def test_what_is_no_run_is_refused(capsys, tmp_path):
    out = f"--out={tmp_path / 'a.png'}"
    error = refusal(capsys, sample.main, [f"--workdir={tmp_path}", out])
    assert "is not the workdir of a run: it has no config.json" in error
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny_config()))
    error = refusal(capsys, evaluate.main, [f"--workdir={tmp_path}"])
    assert "has no checkpoint yet" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    (tmp_path / "config.json").write_text('{"model": {"dept')
    error = refusal(capsys, sample.main, [f"--workdir={tmp_path}", out])
    assert str(tmp_path / "config.json") in error


def test_an_existing_output_is_refused(capsys, trained, tmp_path):
    (tmp_path / "a.png").write_bytes(b"mine")
    error = refusal(capsys, sample.main, [f"--workdir={trained}", f"--out={tmp_path / 'a.png'}"])
    assert "exists already" in error
    assert (tmp_path / "a.png").read_bytes() == b"mine"


def test_sampling_options_replace_the_runs_own(trained, tmp_path):
    # An interval and churn belong to the run; asked for another solver or no guidance they go.
    workdir = shutil.copytree(trained, tmp_path / "copy")
    config = workdir_lib.load_config(workdir)
    config.sampling.update(solver="heun", guidance_scale=2.0, guidance_interval=(0.1, 0.9))
    config.sampling.heun.s_noise = 1.01
    (workdir / "config.json").write_text(config_lib.to_json(config))
    common = [f"--workdir={workdir}", "--num_images=3", "--labels", "7", "1"]
    sample.main([*common, f"--out={tmp_path / 'guided'}"])
    assert len(list((tmp_path / "guided").glob("*.png"))) == 3
    for number, options in enumerate((["--solver=euler", "--guidance_scale=1"], ["--weights=raw"])):
        out = tmp_path / f"{number}.npz"
        sample.main([*common, *options, f"--out={out}"])
        np.testing.assert_array_equal(load_adm_npz(out)[1], [7, 1, 7])


def test_a_folder_of_grey_pngs_needs_config_values_only(tmp_path):
    random = np.random.default_rng(0)
    for label in ("circles", "squares", "stars"):
        (tmp_path / "mine" / label).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 256, (28, 28), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mine" / label / f"{number}.png")
    config = tiny_config(
        **{"model.image_size": 28, "model.dit.patch_size": 4, "model.num_classes": 3}
    )
    config.data.name = "image_folder"
    config.data.image_folder.path = str(tmp_path / "mine")
    result = train.run(config, tmp_path / "run")
    assert result.step == 12
    sample.main([f"--workdir={tmp_path / 'run'}", "--num_images=6", f"--out={tmp_path / 'a.npz'}"])
    images, labels = load_adm_npz(tmp_path / "a.npz")
    assert images.shape == (6, 28, 28, 1) and labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert jax.device_count() == 8
