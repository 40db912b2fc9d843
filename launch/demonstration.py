"""What the demo does: a teacher, its one-step student, their scores, and where the time went.

A slow machine has four minutes: half the batches of the experiments in configs/, fewer than half
the steps at higher rates, and fewer steps of the teacher's solver. Fréchet distances are hardly
worse (teacher 1.54 instead of 1.38, student 1.66 instead of 1.45).
"""

import dataclasses
import shutil
import sys
import time
from pathlib import Path

import ml_collections
import numpy as np

from dit_jax import evaluation, experiment
from dit_jax.configs import digits, digits_cm
from dit_jax.launch import classifier_scores, loading, training
from dit_jax.launch.timing import Stopwatch, times
from dit_jax.quantities import table
from dit_jax.training.metrics import format_duration
from dit_jax.training.workdir import CONFIG_FILE


@dataclasses.dataclass(frozen=True)
class Result:
    """A trained model, scored.

    Attributes:
        training: how its training ended.
        scores: of `evaluation.evaluate_samples`.
        samples: images, one a label.
        evaluations: of the network for one image, those of guidance included.
        images_per_second: of sampling, compilation excluded.
    """

    training: training.loop.TrainResult
    scores: dict
    samples: np.ndarray
    evaluations: int
    images_per_second: float


def start_afresh(directory: Path) -> None:
    """Removes an earlier demo.

    Raises:
        ValueError: the directory holds something else.
    """
    if directory.exists() and any(directory.iterdir()):
        runs = (directory, directory / "teacher")  # demos of before had one run only
        if not any((run / CONFIG_FILE).exists() for run in runs):
            raise ValueError(f"{directory} is not empty and not an earlier demo: choose another")
        shutil.rmtree(directory)


def teacher_config() -> ml_collections.ConfigDict:
    """configs/digits.py with half its batch and 640 steps, sampled in a third of its own."""
    config = digits.get_config()
    config.training.batch_size //= 2
    config.training.num_steps = 640
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 40
    config.sampling.steps = 8
    return _without_extras(config)


def student_config(teacher: Path) -> ml_collections.ConfigDict:
    """configs/digits_cm.py with half its batch and steps, of the teacher in `teacher`."""
    config = digits_cm.get_config()
    config.training.batch_size //= 2
    config.training.num_steps = 740
    config.optimizer.learning_rate = 6e-4
    config.method.consistency.images_per_stage = 2_960  # the same eight stages
    config.teacher.path = str(teacher)
    return _without_extras(config)


def _without_extras(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config.training.tensorboard = False  # spares the demo TensorFlow's start-up
    config.training.preview_every = 0
    config.training.checkpoint_every = 0  # the last step has one
    config.sampling.batch_size = 250  # four batches of 1,000 images, none of them padded
    return config


def train_and_score(config, directory: Path, judge_folder: Path, num_images: int, clock: Stopwatch):
    """Trains `config` and scores it; returns its result, the labels and (held-out images, labels).

    The result is None after an interruption. Times are added to the clock's.
    """
    trained = training.run(config, directory)
    clock.add(f"training the {directory.name}", trained.seconds)
    if trained.interrupted:
        return None, None, None
    model = loading.load_model(directory)
    before = clock.seconds.get("sampling", 0.0)
    record, samples, labels, test = classifier_scores.evaluate(
        model, judge_folder, num_images=num_images, phase=clock
    )
    seconds = clock.seconds["sampling"] - before
    plan = experiment.build_sampling(model.config)
    evaluations = plan.evaluations * (2 if plan.guidance_scale != 1.0 else 1)
    result = Result(trained, record["scores"], samples, evaluations, num_images / seconds)
    return result, labels, test


def report(teacher: Result, student: Result, clock: Stopwatch) -> str:
    """The closing table: how good, how fast, and where the time went."""

    def row(name, value):
        return (name, value(teacher), value(student))

    floor = teacher.scores["frechet_distance_floor"]
    real = teacher.scores["classifier_test_accuracy"]
    scores = table(
        [
            ("", "teacher", "one-step student"),
            row("training steps", lambda r: f"{r.training.step}"),
            row("steps/s", lambda r: f"{r.training.steps_per_second:.1f}"),
            row("training time", lambda r: format_duration(r.training.seconds)),
            row("network evaluations an image", lambda r: f"{r.evaluations}"),
            row("images/s", lambda r: f"{r.images_per_second:.0f}"),
            row(
                f"Fréchet distance to held-out digits (real ones: {floor:.2f})",
                lambda r: f"{r.scores['frechet_distance']:.2f}",
            ),
            row(
                f"samples classified as their label (real ones: {real:.1%})",
                lambda r: f"{r.scores['label_accuracy']['overall']:.1%}",
            ),
        ]
    )
    return f"{scores}\n\n{times(clock)}"


def save_picture(path: Path, teacher, student, labels, test) -> None:
    """Five samples a class of teacher and student on the same noise, and held-out digits."""
    panels = []
    titled = (
        (f"teacher, {teacher.evaluations} evaluations", teacher.samples, labels),
        (f"student, {student.evaluations}, same noise", student.samples, labels),
        ("real (held out)", *test),
    )
    names = [str(c) for c in range(10)]
    for title, images, its_labels in titled:
        images = np.concatenate([images[its_labels == c][:5] for c in range(10)])
        panels.append(evaluation.Panel(images, title, columns=5, row_labels=names))
    evaluation.save_panels(path, panels, overwrite=True)


def run(workdir: Path, num_images: int, started: float) -> None:
    """The whole demo; `started` is when it began, by time.perf_counter(), before the imports."""
    clock = Stopwatch(started)
    clock.add("importing", time.perf_counter() - started)
    start_afresh(workdir)
    directory = workdir.absolute()
    options = {"judge_folder": directory, "num_images": num_images, "clock": clock}
    runs = directory / "teacher", directory / "student"
    print("first the teacher ...", flush=True)
    teacher, labels, test = train_and_score(teacher_config(), runs[0], **options)
    if teacher is not None:
        print("now a student of one step ...", flush=True)
        student, _, _ = train_and_score(student_config(runs[0]), runs[1], **options)
    if teacher is None or student is None:
        print("interrupted; run the demo again to start afresh")
        sys.exit(130)
    picture = directory / "samples.png"
    with clock("picture"):
        save_picture(picture, teacher, student, labels, test)
    print(report(teacher, student, clock))
    print(f"teacher and student on the same noise, beside real digits: {picture}")
