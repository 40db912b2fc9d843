"""What 8-bit products cost in quality, emulated exactly: of the digits, or of any trained run.

  python benchmarks/study_quantization.py --out=docs/results/quantization_digits
  python benchmarks/study_quantization.py --workdir=runs/cifar10 --sampling_steps=10 \\
      --judge=small --out=docs/results/quantization_cifar10

Without --workdir the digits model is trained in bfloat16, and again with the blocks' products in
fp8, everything else equal, and losses of training and of held-out images are compared. The model
that was trained without, or --workdir's, is then sampled with quantised products, from the same
noise, and images (PSNR) and their Fréchet distances to held-out images are compared. Writes
OUT.json with all numbers, OUT.md with the tables and OUT.png with samples. Training takes about 10
minutes of a CPU core.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

import same_noise
from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.configs import digits
from dit_jax.launch import argument_types, loading, methods, wiring
from dit_jax.models.quantization import STORED

TRAINED = ("none", "fp8", "fp8_rowwise")
NOISES = 8  # draws of times and noise a held-out image


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
        params: its average.
        losses: of every step.
        held_out: of images it was not trained on, by the average.
    """

    params: Any
    losses: np.ndarray
    held_out: float


def configure(quantization: str, *, steps: int, seed: int, dtype: str):
    """The digits model."""
    config = digits.get_config()
    config.seed, config.training.num_steps = seed, steps
    config.model.dtype, config.model.quantization = dtype, quantization
    return experiment.resolve_config(config)


def train(quantization: str, *, steps: int, seed: int) -> Run:
    """One run, with the same batches, times and noise whatever the quantisation."""
    config = configure(quantization, steps=steps, seed=seed, dtype="bfloat16")
    method, placement = experiment.build_method(config), wiring.create_placement(config)
    source = experiment.open_data(config, "train")
    loader = iter(
        data_lib.make_loader(source, batch_size=config.training.batch_size, seed=config.seed)
    )
    key = jax.random.key(seed)
    state = jax.jit(method.init)(key)
    update = jax.jit(
        lambda state, batch, key: method.update(state, batch, jax.random.fold_in(key, state.step)),
        donate_argnums=0,
    )
    losses = []
    for step in range(1, steps + 1):
        state, metrics = update(state, placement.put_batch(next(loader)), key)
        losses.append(metrics["loss"])
        if step % 100 == 0:
            mean = np.mean(jax.device_get(losses[-100:]))
            print(f"{quantization} step {step}: loss {mean:.4f}", flush=True)
    params = next(iter(method.weights(state).values()))
    return Run(params, np.asarray(jax.device_get(losses), np.float64), held_out(config, params))


def held_out(config, params) -> float:
    """Mean loss of the images that are not trained on."""
    method = experiment.build_method(config)
    images, labels = data_lib.to_arrays(experiment.open_data(config, "test"))
    batch = {"image": images.astype(np.float32) / 127.5 - 1, "conditions": {"label": labels}}
    loss = jax.jit(lambda key: method.loss(params, method.draw_examples(batch, key))[0])
    return float(np.mean([loss(jax.random.key(number)) for number in range(NOISES)]))


def compare_training(runs: dict[str, Run]) -> dict[str, Any]:
    """Losses beside those of the run without quantisation."""
    base, last = runs["none"], len(runs["none"].losses) // 5
    rows = {}
    for name, run in runs.items():
        mean = float(run.losses[-last:].mean())
        rows[name] = {
            "loss_last_fifth": mean,
            "loss_change": mean / float(base.losses[-last:].mean()) - 1,
            "held_out_loss": run.held_out,
            "held_out_change": run.held_out / base.held_out - 1,
        }
    return rows


def trained_model(args: argparse.Namespace) -> loading.TrainedModel:
    """The model of --workdir, without quantisation and in float32."""
    values = {"model.dtype": "float32", "model.quantization": "none"}
    if args.solver:
        values["sampling.solver"] = args.solver
    if args.sampling_steps:
        values["sampling.steps"] = args.sampling_steps
    return loading.load_model(args.workdir, overrides=values)


def compare_samples(
    config: ml_collections.ConfigDict,
    params: Any,
    args: argparse.Namespace,
    names: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Samples of one model by all quantisations, beside those by none; saves the picture.

    Args:
        config: of the model without.
        params: its parameters.
        args: the command line.
        names: of the classes.
    """
    folder = args.workdir and args.workdir / "evaluation"
    judge = same_noise.Judge.open(config, args.judge, args.num_images, folder)
    labels = same_noise.labels_of(config, args.num_images)
    weights, rows, ways, features = methods.weights_hash(params), {}, {}, {}
    for name in ("none", *STORED):
        config = config.copy_and_resolve_references()
        config.model.quantization = name
        plan = experiment.build_sampling(config)
        network = plan.sampler.denoiser.network
        stored = params if name == "none" else jax.jit(network.quantize)(params)
        kept = same_noise.kept_folder(args.keep, config, weights)
        how = {"seed": args.seed, "batch_size": args.batch_size, "folder": kept}
        ways[name] = same_noise.draw(plan, stored, labels, **how)
        features[name] = judge.classifier(evaluation.to_uint8(ways[name].images))
        rows[name] = {
            "frechet_distance": judge.distance(features[name]),
            "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(stored)),
        }
        if name != "none":
            rows[name]["psnr"] = evaluation.mean_psnr(ways[name].images, ways["none"].images)
            change, error = judge.change(features[name], features["none"])
            rows[name] |= {"frechet_change": change, "frechet_change_error": error}
        print(f"{name}: {rows[name]}", flush=True)
    shown = {f"{name} products": way for name, way in ways.items() if name != "fp8_rowwise"}
    shown = {"without": shown.pop("none products"), **shown}
    same_noise.save_picture(args.out.with_suffix(".png"), shown, labels, names)
    return {"sampling": rows, "judge": judge.describe(), "judged": judge.sentence()}


def training_table(record: dict[str, Any]) -> list[str]:
    """Losses, as lines of Markdown."""
    lines = [
        f"Trained in bfloat16, {record['steps']} steps, seed {record['seed']}; the same batches, "
        f"times and noise. Loss: mean of the last fifth of the steps; held-out: {NOISES} draws an "
        "image, averaged weights.",
        "",
        "| `model.quantization` | loss | change | held-out loss | change |",
        "|---|---|---|---|---|",
    ]
    for name, row in record["training"].items():
        lines.append(
            f"| {name} | {row['loss_last_fifth']:.4f} | {row['loss_change']:+.2%} | "
            f"{row['held_out_loss']:.4f} | {row['held_out_change']:+.2%} |"
        )
    return [*lines, ""]


def report(record: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = [
        f"# Quality of 8-bit products: {record['name']}",
        "",
        f"`{record['command']}`",
        "",
        *(training_table(record) if "training" in record else ()),
        f"The model trained without, sampled in float32 by {record['sampling_steps']} "
        f"{record['solver'].capitalize()} steps, {record['num_images']} images from the same "
        f"noise; PSNR to those without quantisation. {record['judged']}",
        "",
        "| `model.quantization` | PSNR, dB | Fréchet distance | change | parameters, MB |",
        "|---|---|---|---|---|",
    ]
    for name, row in record["sampling"].items():
        quality, change = "", ""
        if name != "none":
            quality = "same" if row["psnr"] is None else f"{row['psnr']:.1f}"
            change = f"{row['frechet_change']:+.2%} ± {row['frechet_change_error']:.2%}"
        lines.append(
            f"| {name} | {quality} | {row['frechet_distance']:.3f} | {change} | "
            f"{row['parameter_bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines) + "\n"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    parser.add_argument("--workdir", type=Path, help="a trained run; default: digits, trained here")
    parser.add_argument("--solver", help="with --workdir; default: the run's")
    parser.add_argument("--sampling_steps", type=argument_types.solver_steps, help="the same")
    parser.add_argument(
        "--steps", type=argument_types.count, help="of training, without --workdir; default: 1500"
    )
    parser.add_argument("--seed", type=argument_types.seed, default=0)
    same_noise.add_arguments(parser, 2000)
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    args = parser.parse_args(argv)
    if args.workdir and args.steps:
        parser.error("--steps would do nothing with --workdir: nothing is trained")
    if not args.workdir and (args.solver or args.sampling_steps):
        parser.error("--solver and --sampling_steps are for --workdir: the digits have their own")
    args.steps = args.steps or 1500
    return args


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers."""
    record = {
        "command": shlex.join(["python", "benchmarks/study_quantization.py", *sys.argv[1:]]),
        "jax": jax.__version__,
        "seed": args.seed,
        "num_images": args.num_images,
    }
    if args.workdir:
        model = trained_model(args)
        config, params, names = model.config, model.params, model.class_names
        record |= {"weights": model.weights, "step": model.step}
    else:
        runs = {name: train(name, steps=args.steps, seed=args.seed) for name in TRAINED}
        config = configure("none", steps=1, seed=args.seed, dtype="float32")
        params, names = runs["none"].params, ()
        record |= {"steps": args.steps, "training": compare_training(runs)}
        print(record["training"], flush=True)
    record |= {
        "name": config.name,
        "solver": config.sampling.solver,
        "sampling_steps": config.sampling.steps,
    }
    return record | compare_samples(config, params, args, names)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with wiring.readable_errors(traceback=args.traceback):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = study(args)
        evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=True)
        args.out.with_suffix(".md").write_text(report(record))


if __name__ == "__main__":
    main()
