"""What three people do with one run: trained and interrupted, tuned and continued, handed on.

In folders whose names have spaces, accents and a quote.
"""

import signal

import numpy as np
import pytest
from PIL import Image

from dit_jax.launch import convert, sample, training
from dit_jax.training.workdir import WorkdirError, load_config
from tests.launch.conftest import start

diffusers = pytest.importorskip("diffusers")

CLASSES = ("chat noir", "hérisson d'été")


def write_images(folder):
    random = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"image n° {number}.png")


def test_a_run_of_three_people(tmp_path, capsys):
    home = tmp_path / "Zoë's données"
    write_images(home / "photos")
    workdir = home / "première course"
    options = [
        *("--config=configs/digits.py", f"--workdir={workdir}"),
        *("--config.data.name=image_folder", f"--config.data.image_folder.path={home / 'photos'}"),
        *("--config.model.hidden_size=32", "--config.model.depth=1", "--config.model.num_heads=2"),
        *("--config.model.num_classes=2", "--config.optimizer.schedule=constant"),
        *("--config.training.batch_size=8", "--config.training.num_steps=100000"),
        *("--config.training.log_every=1", "--config.training.preview_every=0"),
        "--config.training.tensorboard=False",
    ]

    # The first trains, and stops it with Ctrl-C.
    process = start("train", *options)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in out + err
    step = int(out.split("saved step ")[1].split()[0])
    assert (workdir / "checkpoints" / str(step)).is_dir()

    # The second wants another learning rate and batch, and another average beside the first.
    config = load_config(workdir)
    before = (workdir / "config.json").read_bytes()
    config.optimizer.learning_rate = 5e-4
    config.training.update(batch_size=16, num_steps=step + 2)
    config.ema.decays = (0.995, 0.9)
    with pytest.raises(WorkdirError, match="--force") as refused:
        training.run(config, workdir)
    for key in ("optimizer.learning_rate", "training.batch_size", "ema.decays"):
        assert f"config.{key}: " in str(refused.value)
    assert (workdir / "config.json").read_bytes() == before
    assert training.run(config, workdir, force=True).step == step + 2
    out = capsys.readouterr().out
    assert f"continuing from step {step}" in out and "ema_0.9 is new" in out

    # The third samples by the classes' names, and hands the new average on to users of diffusers.
    picture = home / "deux d'entre eux.png"
    sample.main(
        [
            *(f"--workdir={workdir}", "--weights=ema_0.9", f"--out={picture}"),
            *("--labels", CLASSES[1], CLASSES[0], "--steps=2"),
        ]
    )
    assert f"2 images of ema_0.9, step {step + 2}" in capsys.readouterr().out
    assert min(Image.open(picture).size) >= 8
    exported = home / "pour l'équipe"
    convert.main(["--to=diffusers", "--weights=ema_0.9", str(workdir), str(exported)])
    pipeline = diffusers.DiTPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    labels = pipeline.get_label_ids([CLASSES[1]])
    assert labels == [1]
    images = pipeline(labels, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 1) and np.isfinite(images).all()
