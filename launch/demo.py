"""The demo: trains on handwritten digits, distils to one step, and shows both.

python launch/demo.py

Everything goes to runs/demo (or --workdir): the teacher's run in teacher/, the student's in
student/. Running it again starts afresh there.
"""

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

import numpy as np

from configs import digits, digits_cm
from dit_jax import evaluation, experiment
from dit_jax.training.metrics import format_duration
from dit_jax.training.workdir import CONFIG_FILE
from launch import argument_types, classifier_scores, loading, training, wiring


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


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--num_images", type=argument_types.count, default=1000, help="samples to evaluate"
    )
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser.parse_args()


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


def train_and_score(config, directory: Path, judge_folder: Path, num_images: int):
    """Trains `config` and scores it; returns its result, the labels and (held-out images, labels).

    The result is None after an interruption.
    """
    config.training.tensorboard = False  # spares the demo TensorFlow's start-up
    config.training.preview_every = 0
    trained = training.run(config, directory)
    if trained.interrupted:
        return None, None, None
    model = loading.load_model(directory)
    record, samples, labels, test = classifier_scores.evaluate(
        model, judge_folder, num_images=num_images
    )
    plan = experiment.build_sampling(model.config)
    evaluations = plan.evaluations * (2 if plan.guidance_scale != 1.0 else 1)
    rate = wiring.sampling_rate(model.config, plan, model.params)
    return Result(trained, record["scores"], samples, evaluations, rate), labels, test


def report(teacher: Result, student: Result, seconds: float) -> str:
    """The closing table."""

    def row(name, value):
        return (name, value(teacher), value(student))

    floor = teacher.scores["frechet_distance_floor"]
    real = teacher.scores["classifier_test_accuracy"]
    return wiring.table(
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
            ("everything together", "", format_duration(seconds)),
        ]
    )


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


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    started = time.perf_counter()
    with wiring.readable_errors(traceback=args.traceback):
        start_afresh(args.workdir)
        directory = args.workdir.absolute()
        print("first the teacher ...", flush=True)
        teacher, labels, test = train_and_score(
            digits.get_config(), directory / "teacher", directory, args.num_images
        )
        if teacher is None:
            print("interrupted; run the demo again to start afresh")
            return
        print("now a student of one step ...", flush=True)
        config = digits_cm.get_config()
        config.teacher.path = str(directory / "teacher")
        student, _, _ = train_and_score(config, directory / "student", directory, args.num_images)
        if student is None:
            print("interrupted; run the demo again to start afresh")
            return
        picture = directory / "samples.png"
        save_picture(picture, teacher, student, labels, test)
    print(report(teacher, student, time.perf_counter() - started))
    print(f"teacher and student on the same noise, beside real digits: {picture}")


if __name__ == "__main__":
    main()
