"""What 8-bit products cost in quality: the digits, trained and sampled with them, emulated exactly.

  python benchmarks/study_quantization.py --out=docs/results/quantization_digits

Trains the digits model in bfloat16, and again with the blocks' products in fp8, everything else
equal, and compares losses of training and of held-out images. Then samples the model that was
trained without with quantised products, from the same noise, and compares images (PSNR) and their
Fréchet distances to held-out images. Writes OUT.json with all numbers and OUT.md with the tables.
About 10 minutes of a CPU core.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.configs import digits
from dit_jax.launch import argument_types, wiring
from dit_jax.models.quantization import QUANTIZATIONS

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


def compare_samples(params: Any, *, seed: int, num_images: int) -> dict[str, Any]:
    """Samples of one model by all quantisations, beside those by none."""
    train_images = data_lib.to_arrays(data_lib.open_source("digits", "train"))
    test = data_lib.to_arrays(data_lib.open_source("digits", "test"))
    judge = evaluation.train_classifier(
        *train_images, 10, seed=0, test_images=test[0], test_labels=test[1]
    )
    real = evaluation.feature_statistics(judge, [test[0]])
    labels, rows, base = wiring.balanced_labels(num_images, 10), {}, None
    for name in QUANTIZATIONS:
        config = configure(name, steps=1, seed=seed, dtype="float32")
        plan = experiment.build_sampling(config)
        network = plan.sampler.denoiser.network
        stored = params if name == "none" else jax.jit(network.quantize)(params)
        images = wiring.sample_images(
            plan,
            stored,
            labels,
            seed=seed,
            placement=wiring.create_placement(config),
            batch_size=250,
            announce=False,
        )
        base = images if base is None else base
        statistics = evaluation.feature_statistics(
            judge, evaluation.batches_of(evaluation.to_uint8(images), 500)
        )
        found = {
            "frechet_distance": evaluation.frechet_distance(statistics, real),
            "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(stored)),
        }
        if name != "none":
            pairs = (np.clip(x, -1, 1) for x in (base, images))
            found["psnr"] = float(np.mean(evaluation.psnr(*pairs)))
        change = found["frechet_distance"] / rows.get("none", found)["frechet_distance"] - 1
        rows[name] = {**found, "frechet_change": change}
        print(f"{name}: {rows[name]}", flush=True)
    return rows


def report(record: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = [
        "# Quality of 8-bit products: digits",
        "",
        f"`{record['command']}`",
        "",
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
    lines += [
        "",
        f"The model trained without, sampled in float32 by {record['sampling_steps']} Heun steps, "
        f"{record['num_images']} images from the same noise; PSNR to those without quantisation, "
        "Fréchet distance of a small classifier's features to held-out digits.",
        "",
        "| `model.quantization` | PSNR, dB | Fréchet distance | change | parameters, MB |",
        "|---|---|---|---|---|",
    ]
    for name, row in record["sampling"].items():
        psnr = f"{row['psnr']:.1f}" if "psnr" in row else ""
        lines.append(
            f"| {name} | {psnr} | {row['frechet_distance']:.3f} | {row['frechet_change']:+.2%} | "
            f"{row['parameter_bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry point."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    parser.add_argument("--steps", type=argument_types.count, default=1500)
    parser.add_argument("--num_images", type=argument_types.count, default=2000)
    parser.add_argument("--seed", type=argument_types.seed, default=0)
    args = parser.parse_args()
    with wiring.readable_errors():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        runs = {name: train(name, steps=args.steps, seed=args.seed) for name in TRAINED}
        record = {
            "command": shlex.join(["python", "benchmarks/study_quantization.py", *sys.argv[1:]]),
            "jax": jax.__version__,
            "steps": args.steps,
            "seed": args.seed,
            "num_images": args.num_images,
            "sampling_steps": digits.get_config().sampling.steps,
            "training": compare_training(runs),
        }
        print(record["training"], flush=True)
        record["sampling"] = compare_samples(
            runs["none"].params, seed=args.seed, num_images=args.num_images
        )
        evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=True)
        args.out.with_suffix(".md").write_text(report(record))


if __name__ == "__main__":
    main()
