"""Step caching on a trained model: time saved, and how far images move from those without it.

  python launch/train.py --config=configs/digits.py --workdir=runs/digits
  python benchmarks/study_step_cache.py --workdir=runs/digits --out=docs/results/step_cache_digits

Samples the same noise with and without a cache, at several thresholds and orders, and writes
OUT.json with all numbers and OUT.md with a table: the share of evaluations in which all blocks ran,
time (batches of the two taking turns, medians, compilation excluded), PSNR to the images without a
cache, and the Fréchet distance to held-out images in the features of a classifier of the run's
data.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.launch import argument_types, classifier_scores, loading, wiring
from dit_jax.sampling import image_keys

PLAIN = (0.0, 0)  # threshold and order of no cache


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="a trained run")
    parser.add_argument("--solver", default="euler")
    parser.add_argument("--steps", type=argument_types.solver_steps, default=28)
    parser.add_argument(
        "--thresholds", type=argument_types.share_below_one, nargs="+", default=[0.05, 0.1, 0.2]
    )
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1], choices=[0, 1, 2])
    parser.add_argument("--num_images", type=argument_types.count, default=1000)
    parser.add_argument("--batch_size", type=argument_types.count, default=250)
    parser.add_argument("--repeats", type=argument_types.count, default=3, help="timed batches")
    parser.add_argument("--out", type=Path, required=True, help="without a suffix")
    return parser.parse_args(argv)


def make_plan(config: Any, threshold: float, order: int) -> experiment.SamplingPlan:
    """How images are sampled at one setting."""
    config = config.copy_and_resolve_references()
    if threshold:
        config.cache.name = "first_block"
        config.cache.first_block.update(threshold=threshold, order=order)
    return experiment.build_sampling(config)


def sample(plan: experiment.SamplingPlan, params: Any, labels: np.ndarray, batch_size: int):
    """All images, and the mean share of evaluations that were computed."""
    draw = plan.bind_counted(params) if plan.has_cache else plan.bind(params)
    images, shares = [], []
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        drawn = draw(image_keys(0, np.arange(start, start + len(part))), part)
        drawn, share = drawn if plan.has_cache else (drawn, np.ones(len(part)))
        images.append(np.asarray(drawn))
        shares.append(np.asarray(share))
    return np.concatenate(images), float(np.concatenate(shares).mean())


def seconds_of(plan: experiment.SamplingPlan, params: Any, labels: np.ndarray) -> float:
    """Of one batch."""
    draw, keys = plan.bind(params), image_keys(1, np.arange(len(labels)))
    started = time.perf_counter()
    jax.block_until_ready(draw(keys, labels))
    return time.perf_counter() - started


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All settings' numbers."""
    overrides = {"sampling.solver": args.solver, "sampling.steps": args.steps}
    model = loading.load_model(args.workdir, overrides=overrides)
    images = classifier_scores.real_images(model.config)
    train = data_lib.to_arrays(experiment.open_data(images, "train"))
    test = data_lib.to_arrays(experiment.open_data(images, "test"))
    options = {"seed": 0, "cache_dir": args.workdir / "evaluation"}
    judge = evaluation.train_classifier(*train, model.config.model.num_classes, **options)
    real = evaluation.feature_statistics(judge, evaluation.batches_of(test[0], 500))
    labels = wiring.balanced_labels(args.num_images, model.config.model.num_classes)
    settings = [PLAIN, *((t, order) for order in args.orders for t in args.thresholds)]
    plans = {setting: make_plan(model.config, *setting) for setting in settings}
    reference, rows = None, []
    for setting, plan in plans.items():
        drawn, share = sample(plan, model.params, labels, args.batch_size)
        drawn = evaluation.to_uint8(drawn)
        reference = drawn if reference is None else reference
        found = evaluation.feature_statistics(judge, evaluation.batches_of(drawn, 500))
        row = {"threshold": setting[0], "order": setting[1], "computed": share}
        row["psnr"] = evaluation.mean_psnr(drawn, reference)
        row["frechet"] = float(evaluation.frechet_distance(found, real))
        rows.append(row)
        print(row, flush=True)
    batch = labels[: args.batch_size]
    times = {setting: [] for setting in settings}
    for repeat in range(args.repeats + 1):
        for setting, plan in plans.items():
            seconds = seconds_of(plan, model.params, batch)
            if repeat:  # the first compiles
                times[setting].append(seconds)
    for row, setting in zip(rows, settings, strict=True):
        row["seconds"] = float(np.median(times[setting]))
        row["speed"] = rows[0]["seconds"] / row["seconds"]
    return {
        "command": f"python benchmarks/study_step_cache.py --workdir=RUN --steps={args.steps}",
        "solver": args.solver,
        "steps": args.steps,
        "num_images": args.num_images,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": rows,
    }


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    lines = [
        "| threshold | order | evaluations computed | speed-up | PSNR, dB | Fréchet distance |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        psnr = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
        name = f"{row['threshold']:g} | {row['order']}" if row["threshold"] else "no cache |"
        lines.append(
            f"| {name} | {row['computed']:.0%} | {row['speed']:.2f} | {psnr} "
            f"| {row['frechet']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    record = study(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=True)
    text = table(record)
    args.out.with_suffix(".md").write_text(
        f"# Step caching of a digits model\n\n{record['solver']}, {record['steps']} steps, "
        f"{record['num_images']} images, on {record['device']}. Made by\n`{record['command']} "
        f"--out=docs/results/{args.out.name}`.\n\n{text}\n"
    )
    print(text)


if __name__ == "__main__":
    main()
