"""Every method of distillation on the digits: quality at one, two and four steps, time to train.

  python benchmarks/study_distillation.py --workdir=runs/study \\
      --out=docs/results/distillation_digits

Trains the teacher (configs/digits.py), then each method's student from it or beside it, and scores
them all by the same classifier against the same held-out digits. Writes OUT.json with all numbers,
OUT.md with the table and OUT.png with samples of teacher and one-step students on the same noise.
What is trained already is not trained again: the same command goes on where it was. About an hour
on two CPU cores; --only=NAME... does a part, and leaves the other rows of OUT as they are.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_collections
import numpy as np

from dit_jax import evaluation, experiment
from dit_jax.config import default_config
from dit_jax.configs import digits, digits_cm, digits_dmd2, digits_kd, digits_mean_flow, digits_scm
from dit_jax.data.records.header import HEADER
from dit_jax.launch import (
    argument_types,
    classifier_scores,
    loading,
    pairs,
    train,
    wiring,
    write_pairs,
)

STEPS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        configure: makes the configuration; the teacher's path is filled in afterwards.
        overrides: of its values, as {'method.consistency.distil': True}.
        several_steps: further overrides for students of more than one step.
        few_step: whether a student is trained for one number of steps, so that each number needs
            a training of its own; else one student is sampled with all of them.
        stage1: name of the row whose student is this one's first stage.
    """

    configure: Callable[[], ml_collections.ConfigDict]
    overrides: dict = dataclasses.field(default_factory=dict)
    several_steps: dict = dataclasses.field(default_factory=dict)
    few_step: bool = False
    stage1: str = ""


def tcm_config() -> ml_collections.ConfigDict:
    """The second stage upon `digits_cm`, for the noisier half of time."""
    config = digits_cm.get_config()
    config.method.consistency = default_config().method.consistency
    config.method.name = "tcm"
    config.method.tcm.update(transition=0.5, weighting="c_out", huber_constant=0.06)
    config.method.tcm.update(ratio_limit=0.99, images_per_stage=1_000)
    config.method.tcm.stage1 = "stage1"  # filled in
    config.teacher = default_config().teacher
    config.timesteps = default_config().timesteps
    config.timesteps.name = "truncated_log_normal"
    config.timesteps.truncated_log_normal.update(mean=1.0, std=1.5, min_time=0.5)
    config.training.num_steps = 750
    return config


def f_distill_config() -> ml_collections.ConfigDict:
    """DMD2's recipe for the forward Kullback-Leibler divergence."""
    config = digits_dmd2.get_config()
    own = config.method.dmd2.to_dict()
    config.method = default_config().method
    config.method.name, config.method.label_dropout = "f_distill", 0.0
    config.method.f_distill.update(
        {k: v for k, v in own.items() if k in config.method.f_distill}, divergence="kl"
    )
    return config


def ladd_config() -> ml_collections.ConfigDict:
    """The discriminator alone, held back: without momentum, with R1, on the later features."""
    config = digits_dmd2.get_config()
    config.method = default_config().method
    config.method.name, config.method.label_dropout = "ladd", 0.0
    config.method.ladd.update(student_update_frequency=2, discriminator_learning_rate=1e-3)
    config.method.ladd.update(r1_weight=10.0, feature_indices=(2, 3))
    config.teacher.guidance_scale = 1.0
    config.timesteps.name = "logit_normal"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.adamw.update(beta1=0.0, beta2=0.99)
    config.training.num_steps = 2500
    return config


VARIANTS: dict[str, Variant] = {
    "kd": Variant(digits_kd.get_config, few_step=True),
    "consistency distillation": Variant(digits_cm.get_config),
    "consistency training": Variant(
        digits_cm.get_config,
        {"method.consistency.trajectory": "data", "teacher.guidance_scale": 1.0},
    ),
    "tcm": Variant(tcm_config, stage1="consistency distillation"),
    "scm (sCD)": Variant(digits_scm.get_config),
    "scm (sCT)": Variant(
        digits_scm.get_config, {"method.scm.velocity": "data", "teacher.guidance_scale": 1.0}
    ),
    "mean_flow (teacher)": Variant(digits_mean_flow.get_config),
    "mean_flow (data, guided)": Variant(
        digits_mean_flow.get_config,
        {
            "method.mean_flow.velocity": "data",
            "method.mean_flow.guidance_omega": 1.0,
            "method.mean_flow.guidance_kappa": 1 / 3,
            "method.label_dropout": 0.1,
            "teacher.guidance_scale": 1.0,
        },
    ),
    "mean_flow (improved)": Variant(
        digits_mean_flow.get_config,
        {
            "method.mean_flow.velocity": "data",
            "method.mean_flow.direction": "network",
            "method.mean_flow.guidance_omega": 1.0,
            "method.mean_flow.guidance_kappa": 1 / 3,
            "method.label_dropout": 0.1,
            "teacher.guidance_scale": 1.0,
        },
    ),
    "dmd2": Variant(
        digits_dmd2.get_config,
        several_steps={"method.dmd2.student_input": "simulation"},
        few_step=True,
    ),
    "f_distill (kl)": Variant(
        f_distill_config,
        several_steps={"method.f_distill.student_input": "simulation"},
        few_step=True,
    ),
    "ladd": Variant(
        ladd_config, several_steps={"method.ladd.student_input": "simulation"}, few_step=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Score:
    """How good, and how costly.

    Attributes:
        frechet_distance: to held-out digits, in the classifier's features.
        label_accuracy: share of samples that the classifier takes for their label.
        evaluations: of the network for one image, those of guidance included.
        images_per_second: of sampling, compilation excluded.
    """

    frechet_distance: float
    label_accuracy: float
    evaluations: int
    images_per_second: float


def train_teacher(directory: Path, seed: int) -> float:
    """Trains the teacher unless it is there; returns the seconds it took, 0 if it was."""
    config = digits.get_config()
    config.seed = seed
    config.ema.warmup = False  # as all of the record was made
    config.training.tensorboard = False
    return train.run(config, directory).seconds


def configure(
    variant: Variant, teacher: Path, steps: int, *, seed: int, pairs: Path
) -> ml_collections.ConfigDict:
    """The configuration of a student of `steps` steps."""
    config = variant.configure().copy_and_resolve_references()
    overrides = variant.overrides | (variant.several_steps if steps > 1 else {})
    config = ml_collections.ConfigDict(wiring.override(config.to_dict(), overrides))
    config.seed = seed
    config.ema.warmup = False
    config.training.tensorboard = False
    config.training.preview_every = 0
    config.sampling.steps = steps
    if config.teacher.path:
        config.teacher.path = str(teacher)
    if config.data.name == "pairs":
        config.data.pairs.path = str(pairs)
    return config


def score(model: loading.TrainedModel, judge_folder: Path, num_images: int) -> tuple[Score, dict]:
    """Samples `model` as it is configured; returns its score and (samples, labels, test)."""
    record, samples, labels, test = classifier_scores.evaluate(
        model, judge_folder, num_images=num_images
    )
    plan = experiment.build_sampling(model.config)
    guided = 2 if plan.guidance_scale != 1.0 else 1
    scores = record["scores"]
    return Score(
        scores["frechet_distance"],
        scores["label_accuracy"]["overall"],
        guided * plan.evaluations,
        wiring.sampling_rate(model.config, plan, model.params),
    ), {"samples": samples, "labels": labels, "test": test}


def kept_samples(workdir: Path, name: str) -> Path:
    """Where a row's samples in one step are."""
    return workdir / f"{run_directory(workdir, name).name}.npy"


def study_variant(name: str, variant: Variant, teacher: Path, args: argparse.Namespace) -> dict:
    """Trains and scores one row; returns its record."""
    record, seconds = {"steps": {}}, 0.0
    trainings = STEPS if variant.few_step else STEPS[:1]
    for steps in STEPS:
        directory = run_directory(args.workdir, name, steps if variant.few_step else 0)
        config = configure(variant, teacher, steps, seed=args.seed, pairs=args.workdir / "pairs")
        if steps in trainings:
            if config.data.name == "pairs":
                write_digit_pairs(teacher, args.workdir / "pairs")
                record["pairs_seconds"] = _earlier_seconds(args.workdir / "pairs")
            if variant.stage1:
                config.method.tcm.stage1 = str(run_directory(args.workdir, variant.stage1))
            result = train.run(config, directory)
            seconds = result.seconds or _earlier_seconds(directory)
            _keep_seconds(directory, seconds)
            record.update(training_steps=config.training.num_steps)
            record.setdefault("training_seconds", {})[str(steps)] = seconds
        model = loading.load_model(directory, overrides={"sampling.steps": steps})
        found, images = score(model, teacher, args.num_images)
        record["steps"][str(steps)] = dataclasses.asdict(found)
        if steps == 1:
            np.save(kept_samples(args.workdir, name), images["samples"])
        print(
            f"{name}, {steps} steps: Fréchet {found.frechet_distance:.3f}, "
            f"labels {found.label_accuracy:.1%}",
            flush=True,
        )
    return record


def run_directory(workdir: Path, name: str, steps: int = 0) -> Path:
    """Of a row's student, or of that of one number of steps."""
    slug = "".join(c if c.isalnum() else "_" for c in name)
    return (workdir / (f"{slug}_{steps}" if steps else slug)).absolute()


def write_digit_pairs(teacher: Path, folder: Path) -> None:
    """The teacher's pairs, with the states where students of two and four steps begin theirs."""
    if (folder / HEADER).is_file():
        return
    started = time.perf_counter()
    pairs.run(
        write_pairs.parse_arguments(
            [
                f"--workdir={teacher}",
                "--num_pairs=20000",
                "--solver=heun",
                "--steps=20",
                "--path_times",
                *("0.75", "0.5", "0.25"),
                f"--out={folder}",
            ]
        )
    )
    _keep_seconds(folder, time.perf_counter() - started)


def _keep_seconds(directory: Path, seconds: float) -> None:
    evaluation.save_json(directory / "seconds.json", {"seconds": seconds}, overwrite=True)


def _earlier_seconds(directory: Path) -> float:
    file = directory / "seconds.json"
    return json.loads(file.read_text())["seconds"] if file.is_file() else 0.0


def continued(file: Path, record: dict) -> dict:
    """The record of a study that was interrupted or is done in parts, else `record`: teacher and
    scoring have to be the same."""
    if not file.is_file():
        return record
    earlier = json.loads(file.read_text())
    alike = all(earlier[key] == record[key] for key in ("seed", "num_images"))
    distances = (other["teacher"]["frechet_distance"] for other in (earlier, record))
    return earlier if alike and math.isclose(*distances, rel_tol=1e-3) else record


def markdown(record: dict) -> str:
    """The table."""
    teacher = record["teacher"]
    lines = [
        "| method | training | 1 step | 2 steps | 4 steps | 1 step over teacher |",
        "|---|---|---|---|---|---|",
        f"| teacher, {teacher['evaluations']} evaluations | {teacher['training_seconds']:.0f} s | "
        f"{_cell(teacher)} | | | 1 |",
    ]
    for name, row in record["students"].items():
        cells = " | ".join(_cell(row["steps"][str(steps)]) for steps in STEPS)
        seconds = row["training_seconds"]["1"] + row.get("pairs_seconds", 0.0)
        ratio = row["steps"]["1"]["frechet_distance"] / teacher["frechet_distance"]
        lines.append(
            f"| {name} | {row['training_steps']} updates, {seconds:.0f} s | {cells} | {ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _cell(score: dict) -> str:
    return f"{score['frechet_distance']:.2f} ({score['label_accuracy']:.1%})"


def save_pictures(path: Path, pictures: dict[str, np.ndarray]) -> None:
    """A row of twenty samples of each, the same noise and labels below one another."""
    images = np.concatenate([samples[:20] for samples in pictures.values()])
    evaluation.save_grid(
        path, images, columns=20, row_labels=list(pictures), upscale=5, overwrite=True
    )


def main() -> None:
    """Entry point."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="for all runs of the study")
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    parser.add_argument("--teacher", type=Path, help="workdir of a digits run; default: train one")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--num_images", type=argument_types.count, default=1000)
    parser.add_argument("--seed", type=argument_types.seed, default=0)
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    args = parser.parse_args()
    with wiring.readable_errors(traceback=args.traceback):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        teacher = (args.teacher or args.workdir / "teacher").absolute()
        seconds = train_teacher(teacher, args.seed) if args.teacher is None else 0.0
        seconds = seconds or _earlier_seconds(teacher)
        if args.teacher is None:
            _keep_seconds(teacher, seconds)
        found, images = score(loading.load_model(teacher), teacher, args.num_images)
        command = shlex.join(["python", "benchmarks/study_distillation.py", *sys.argv[1:]])
        record = {
            "command": command,
            "seed": args.seed,
            "num_images": args.num_images,
            "teacher": {**dataclasses.asdict(found), "training_seconds": seconds},
            "students": {},
        }
        record = continued(args.out.with_suffix(".json"), record)
        rows = record["students"]
        for name in args.only:
            samples = kept_samples(args.workdir, name)
            if name not in rows or not samples.is_file():
                row = study_variant(name, VARIANTS[name], teacher, args)
                rows[name] = {**row, "command": command}
            record["students"] = {name: rows[name] for name in VARIANTS if name in rows}
            evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=True)
            args.out.with_suffix(".md").write_text(markdown(record))
        print(markdown(record))
        files = {name: kept_samples(args.workdir, name) for name in record["students"]}
        if missing := [name for name, file in files.items() if not file.is_file()]:
            print(f"{args.out}.png stays: --workdir has no samples of {', '.join(missing)}")
        else:
            pictures = {name: np.load(file) for name, file in files.items()}
            pictures = {"teacher": images["samples"], **pictures}
            save_pictures(args.out.with_suffix(".png"), pictures)


if __name__ == "__main__":
    main()
