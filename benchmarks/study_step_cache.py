"""Step caching on a trained model: time saved, and how far images move from those without it.

  python launch/train.py --config=configs/digits.py --workdir=runs/digits
  python benchmarks/study_step_cache.py --workdir=runs/digits --out=docs/results/step_cache_digits

Samples the same noise with and without a cache, at several thresholds and orders, and writes
OUT.json with all numbers, OUT.md with a table and OUT.png with samples: the share of evaluations in
which all blocks ran, time (batches of the settings taking turns, medians, compilation excluded),
PSNR to the images without a cache, and the Fréchet distance to held-out images in the features of a
classifier of the run's data. With --keep the images may be drawn first, and times measured when the
machine is quiet.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import same_noise
from dit_jax import evaluation, experiment
from dit_jax.launch import argument_types, loading, wiring
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
    same_noise.add_arguments(parser, 1000)
    parser.add_argument(
        "--timed",
        type=argument_types.count,
        nargs="*",
        default=[1, 16],
        help="images at once, where time is measured; nothing: nowhere",
    )
    parser.add_argument("--repeats", type=argument_types.count, default=3, help="timed batches")
    parser.add_argument("--out", type=Path, required=True, help="without a suffix")
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser.parse_args(argv)


def make_plan(config: Any, threshold: float, order: int) -> experiment.SamplingPlan:
    """How images are sampled at one setting."""
    return experiment.build_sampling(configure(config, threshold, order))


def configure(config: Any, threshold: float, order: int) -> Any:
    """The configuration of one setting."""
    config = config.copy_and_resolve_references()
    if threshold:
        config.cache.name = "first_block"
        config.cache.first_block.update(threshold=threshold, order=order)
    return config


def measure(
    plans: dict[Any, experiment.SamplingPlan], params: Any, labels: np.ndarray, repeats: int
) -> dict[Any, list[float]]:
    """Seconds of one batch by setting; each setting has its turn in each round."""
    seconds = {setting: [] for setting in plans}
    draws = {setting: plan.bind(params) for setting, plan in plans.items()}
    for repeat in range(repeats + 1):
        keys = image_keys(1 + repeat, np.arange(len(labels)))
        for setting, draw in draws.items():
            started = time.perf_counter()
            jax.block_until_ready(draw(keys, labels))
            if repeat:  # the first compiles
                seconds[setting].append(time.perf_counter() - started)
    return seconds


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All settings' numbers; saves the picture."""
    overrides = {"sampling.solver": args.solver, "sampling.steps": args.steps}
    model = loading.load_model(args.workdir, overrides=overrides)
    config, weights = model.config, model.weights_hash()
    judge = same_noise.Judge.open(config, args.judge, args.num_images, args.workdir / "evaluation")
    labels = same_noise.labels_of(config, args.num_images)
    settings = [PLAIN, *((t, order) for order in args.orders for t in args.thresholds)]
    plans = {setting: make_plan(config, *setting) for setting in settings}
    rows, ways, features = [], {}, {}
    for setting, plan in plans.items():
        kept = same_noise.kept_folder(args.keep, configure(config, *setting), weights)
        how = {"seed": 0, "batch_size": args.batch_size, "folder": kept}
        drawn = ways[setting] = same_noise.draw(plan, model.params, labels, **how)
        features[setting] = judge.classifier(evaluation.to_uint8(drawn.images))
        row = {"threshold": setting[0], "order": setting[1]}
        row["computed"] = float(drawn.computed.mean())
        row["psnr"] = evaluation.mean_psnr(drawn.images, ways[PLAIN].images)
        row["frechet"] = judge.distance(features[setting])
        change = judge.change(features[setting], features[PLAIN])
        row |= dict(zip(("frechet_change", "frechet_change_error"), change, strict=True))
        rows.append(row)
        print(row, flush=True)
    for count in args.timed:
        seconds = measure(plans, model.params, labels[:count], args.repeats)
        for row, setting in zip(rows, settings, strict=True):
            row.setdefault("seconds", {})[str(count)] = seconds[setting]
            row.setdefault("speed", {})[str(count)] = float(
                np.median(seconds[PLAIN]) / np.median(seconds[setting])
            )
    shown = [PLAIN, *((t, args.orders[-1]) for t in args.thresholds)]
    titles = ["no cache", *(f"threshold {t:g}" for t in args.thresholds)]
    picture = {title: ways[setting] for title, setting in zip(titles, shown, strict=True)}
    same_noise.save_picture(args.out.with_suffix(".png"), picture, labels, model.class_names)
    return {
        "command": shlex.join(["python", "benchmarks/study_step_cache.py", *sys.argv[1:]]),
        "name": config.name,
        "weights": model.weights,
        "step": model.step,
        "solver": args.solver,
        "steps": args.steps,
        "guidance_scale": config.sampling.guidance_scale,
        "num_images": args.num_images,
        "timed": args.timed,
        "judge": judge.describe(),
        "judged": judge.sentence(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": rows,
    }


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    timed = [str(count) for count in record["timed"]]
    columns = [f"ms, {count} at once | times faster" for count in timed]
    names = ["threshold", "order", "computed", *columns, "PSNR, dB", "Fréchet distance", "change"]
    lines = [f"| {' | '.join(names)} |", "|---" * (6 + 2 * len(timed)) + "|"]
    for row in record["rows"]:
        cells = [f"{row['threshold']:g}", str(row["order"])] if row["threshold"] else ["none", ""]
        cells.append(f"{row['computed']:.0%}")
        for count in timed:
            milliseconds = 1e3 * np.median(row["seconds"][count])
            cells += [f"{milliseconds:.0f}", f"{row['speed'][count]:.2f}"]
        cells += ["" if row["psnr"] is None else f"{row['psnr']:.1f}", f"{row['frechet']:.3f}"]
        change = f"{row['frechet_change']:+.2%} ± {row['frechet_change_error']:.2%}"
        lines.append(f"| {' | '.join([*cells, change if row['threshold'] else ''])} |")
    return "\n".join(lines)


def report(record: dict[str, Any]) -> str:
    """The page, as Markdown."""
    scale = record["guidance_scale"]
    guidance = f", guidance {scale:g}" if scale != 1 else ""
    return (
        f"# Step caching: {record['name']}\n\n`{record['command']}`\n\n"
        f"{record['solver'].capitalize()}, {record['steps']} steps{guidance}, "
        f"{record['num_images']} images of the same noise with and without a cache, on "
        f"{record['device']}, jax {record['jax']}. Computed: share of the evaluations, over "
        "images, in which all blocks ran; a batch skips blocks where all its images do. "
        + ("Times are medians of batches that took turns. " if record["timed"] else "")
        + f"{record['judged']}\n\n{table(record)}\n"
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with wiring.readable_errors(traceback=args.traceback):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = study(args)
        evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=True)
        args.out.with_suffix(".md").write_text(report(record))
        print(table(record))


if __name__ == "__main__":
    main()
