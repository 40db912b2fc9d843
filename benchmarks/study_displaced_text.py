"""One picture of a prompt on several devices: how far displaced patches move FLUX's images.

  python launch/demo_flux.py
  XLA_FLAGS=--xla_force_host_platform_device_count=4 python benchmarks/study_displaced_text.py \\
      --workdir=runs/demo_flux --out=docs/results/displaced_flux

Samples the demo's teacher on the same noise on one device and on several, by exact, displaced and
naive patches, and writes OUT.json and OUT.md: PSNR to one device's images, how many show what the
prompt asks for, and the Fréchet distance of their digits to held-out ones.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import evaluation, experiment
from dit_jax.data import captioned_digits, to_arrays
from dit_jax.data.captioned_digits import caption
from dit_jax.data.digits import open_digits
from dit_jax.launch import argument_types, flux_demonstration, loading, wiring
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.pipelines.flux import FluxPipeline
from dit_jax.sampling import image_keys

NULL = 0  # the empty prompt's row


def encoded(pipeline: FluxPipeline) -> dict[str, np.ndarray]:
    """States of the empty prompt and of the demo's, by condition."""
    prompts = ["", *map(caption, flux_demonstration.PROMPTS)]
    length = flux_demonstration.TEXT_LENGTH
    states = pipeline.encode_prompt(prompts, max_sequence_length=length)
    return {name: np.asarray(s) for name, s in zip(("text", "pooled"), states, strict=True)}


def draw(
    model: loading.TrainedModel, told: dict[str, np.ndarray], args: argparse.Namespace, **how: Any
) -> np.ndarray:
    """All images, bytes [n, h, w, 1], on one device or as `ImageParallel(**how)` says."""
    plan = experiment.build_sampling(model.config)
    nulls = {name: array[NULL] for name, array in told.items()}
    if how:
        devices = tuple(jax.devices()[: how["patch_devices"]])
        parallel = ImageParallel(**how, devices=devices)
        sample = parallel.distribute(plan, batch_size=args.batch_size).bind(model.params, nulls)
    else:
        sample = plan.bind(jax.device_put(model.params, jax.devices()[0]), nulls)
    images = []
    for first in range(0, args.num_images, args.batch_size):
        numbers = np.arange(first, first + args.batch_size)
        rows = 1 + numbers % len(flux_demonstration.PROMPTS)
        conditions = {name: array[rows] for name, array in told.items()}
        images.append(np.asarray(sample(image_keys(0, numbers), conditions)))
    return evaluation.to_uint8(np.concatenate(images)[: args.num_images])


def settings(devices: list[int], warmups: list[int]) -> list[tuple[str, dict[str, Any]]]:
    """Names of rows and how they are sampled, one device first."""
    rows: list[tuple[str, dict[str, Any]]] = [("one device", {})]
    for count in devices:
        shared = {"patch_devices": count}
        rows.append((f"{count}: synchronous", {"mode": "synchronous", **shared}))
        for warmup in warmups:
            how = {"mode": "displaced", "warmup_steps": warmup, **shared}
            rows.append((f"{count}: displaced, warm-up {warmup}", how))
        rows.append((f"{count}: naive", {"mode": "naive", **shared}))
    return rows


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows."""
    overrides = {"sampling.solver": args.solver, "sampling.steps": args.steps}
    model = loading.load_model(args.workdir / "teacher", overrides=overrides)
    told = encoded(FluxPipeline.from_pretrained(args.workdir / "pipeline"))
    judge = evaluation.train_classifier(
        *to_arrays(open_digits("train")), 10, seed=0, cache_dir=args.workdir / "evaluation"
    )
    held_out = to_arrays(open_digits("test"))[0]
    real = evaluation.feature_statistics(judge, evaluation.batches_of(held_out, 500))
    asked, single, rows = flux_demonstration.asked(args.num_images), None, []
    for name, how in settings(args.devices, args.warmups):
        images = draw(model, told, args, **how)
        single = images if single is None else single
        cut = captioned_digits.halves(images, asked)[0]
        features = evaluation.feature_statistics(judge, evaluation.batches_of(cut, 500))
        row = {"name": name, **how}
        row["psnr"] = evaluation.mean_psnr(images, single)
        row["shown_as_asked"] = flux_demonstration.shares(judge, images)[2]
        row["frechet"] = float(evaluation.frechet_distance(features, real))
        rows.append(row)
        print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| devices | PSNR, dB | shown as asked | Fréchet distance | over one device's |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        psnr = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
        ratio = row["frechet"] / rows[0]["frechet"]
        lines.append(
            f"| {row['name']} | {psnr} | {row['shown_as_asked']:.1%} | {row['frechet']:.2f} "
            f"| {ratio:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of launch/demo_flux.py")
    parser.add_argument("--out", type=Path, required=True, help="without a suffix")
    parser.add_argument("--devices", type=argument_types.count, nargs="+", default=[2, 4])
    parser.add_argument("--warmups", type=argument_types.count, nargs="+", default=[1, 4])
    parser.add_argument("--solver", default="euler")
    parser.add_argument("--steps", type=argument_types.solver_steps, default=28)
    parser.add_argument("--num_images", type=argument_types.count, default=500)
    parser.add_argument("--batch_size", type=argument_types.count, default=250)
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    args = parser.parse_args(argv)
    with wiring.readable_errors(traceback=args.traceback):
        if max(args.devices) > jax.device_count():
            raise ValueError(
                f"--devices {max(args.devices)}, but there are {jax.device_count()}: set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={max(args.devices)}"
            )
        rows = study(args)
        command = shlex.join(["python", "benchmarks/study_displaced_text.py", *sys.argv[1:]])
        record = {"command": command, "solver": args.solver, "steps": args.steps, "rows": rows}
        record |= {"num_images": args.num_images, "jax": jax.__version__}
        evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=True)
        head = f"# One picture of a prompt on several devices\n\n`{command}`\n"
        head += f"({args.solver}, {args.steps} steps; the demo's teacher, guided; virtual devices)"
        args.out.with_suffix(".md").write_text(f"{head}\n\n{table(rows)}\n")
        print(table(rows))


if __name__ == "__main__":
    main()
