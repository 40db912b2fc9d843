"""Displaced patches on a trained model: how far from one device's image, and what it costs.

  python launch/train.py --config=configs/digits.py --workdir=runs/digits --config.ema.warmup=False
  XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/study_displaced.py \\
      --workdir=runs/digits --devices 2 4 --out=docs/results/displaced_digits

Samples the same noise on one device and on several, with displaced, naive and synchronous patches,
and writes OUT.json with all numbers, OUT.md with a table and OUT.png: PSNR to one device's image,
and the Fréchet distance to held-out images in the features of a classifier of the run's data. An
image of fewer rows of patches than devices is refused: the digits' four rows go over 4 devices.
"""

import argparse
import dataclasses
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.launch import argument_types, classifier_scores, loading, wiring
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.parallel.transformer import ParallelTransformer, split_rows
from dit_jax.sampling import Carried, generate
from dit_jax.training import workdir


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way of sampling.

    Attributes:
        steps: of the solver.
        devices: 1 for none of what follows.
        mode: 'single', 'synchronous', 'displaced', 'naive', or 'naive after warm-up': synchronous
            steps, then none that exchanges anything.
        warmup: steps, of the modes that have any.
    """

    steps: int
    devices: int = 1
    mode: str = "single"
    warmup: int | None = None

    def __str__(self) -> str:
        text = f"{self.steps} steps, {self.devices} devices, {self.mode}"
        return text + (f", warm-up {self.warmup}" if self.warmup else "")


@dataclasses.dataclass(frozen=True)
class NaiveAfterWarmup(ParallelTransformer):
    """Displaced patches whose every exchange after the warm-up is left out."""

    def carried(self, batch: int, size: tuple[int, int]) -> Carried:
        """The warm-up of displaced patches; what it leaves is not looked at afterwards."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(ParallelTransformer)}
        return ParallelTransformer(**values | {"mode": "displaced"}).carried(batch, size)


def settings(devices: list[int], warmups: list[int], steps: list[int]) -> Iterator[Setting]:
    """All ways of sampling: everything at the first number of steps, the essential at others."""
    for number in steps:
        yield Setting(number)
        for count in devices:
            yield Setting(number, count, "naive")
            for warmup in warmups if number == steps[0] else warmups[-1:]:
                yield Setting(number, count, "displaced", warmup)
            if number == steps[0]:
                yield Setting(number, count, "naive after warm-up", warmups[-1])
                yield Setting(number, count, "synchronous")


def place(plan: experiment.SamplingPlan, setting: Setting, batch_size: int, params: Any):
    """A function (keys, labels) -> images, on as many devices as the setting says."""
    devices = tuple(jax.devices()[: setting.devices])
    if setting.mode == "single":
        return plan.bind(jax.device_put(params, devices[0]))
    mode = "displaced" if setting.warmup else setting.mode
    parallel = ImageParallel(
        mode, patch_devices=setting.devices, warmup_steps=setting.warmup, devices=devices
    )
    placement = parallel.distribute(plan, batch_size=batch_size)
    if setting.mode == "naive after warm-up":
        sampler = placement.plan.sampler
        network = sampler.denoiser.network
        values = {f.name: getattr(network, f.name) for f in dataclasses.fields(network)}
        network = NaiveAfterWarmup(**values | {"mode": "naive"})
        sampler = dataclasses.replace(
            sampler, denoiser=dataclasses.replace(sampler.denoiser, network=network)
        )
        plan = dataclasses.replace(placement.plan, sampler=sampler)
        placement = dataclasses.replace(placement, plan=plan)
    return placement.bind(params)


@dataclasses.dataclass
class Run:
    """A trained model, and what its images are judged by.

    Attributes:
        model: the weights.
        devices: numbers of devices to study on it.
        num_images: of every setting.
        num_scored: of one device and of displaced patches at the most warm-up, for a Fréchet
            distance of more images; at least `num_images`.
        classifier: makes the features.
        real: features of held-out images.
        floor: Fréchet distance of training images to those.
    """

    model: loading.TrainedModel
    devices: list[int]
    num_images: int
    num_scored: int
    classifier: evaluation.Classifier
    real: evaluation.GaussianStatistics
    floor: float

    @classmethod
    def open(cls, args: argparse.Namespace) -> "Run":
        """Loads the weights, and trains or loads the classifier of the run's data."""
        overrides = {"sampling.solver": args.solver} if args.solver else {}
        model = loading.load_model(args.workdir, overrides=overrides)
        config = classifier_scores.real_images(model.config)
        train = data_lib.to_arrays(experiment.open_data(config, "train"))
        test = data_lib.to_arrays(experiment.open_data(config, "test"))
        options = {"seed": 0, "cache_dir": args.workdir / "evaluation"}
        classifier = evaluation.train_classifier(*train, config.model.num_classes, **options)
        real = evaluation.feature_statistics(classifier, evaluation.batches_of(test[0], 500))
        seen = evaluation.feature_statistics(classifier, evaluation.batches_of(train[0], 500))
        floor = evaluation.frechet_distance(seen, real)
        num_scored = max(args.num_images, args.num_scored)
        return cls(model, args.devices, args.num_images, num_scored, classifier, real, floor)

    def sample(self, setting: Setting, count: int, batch_size: int) -> np.ndarray:
        """`count` images of one setting, float32 in [-1, 1]; image i of the same noise in all."""
        config = self.model.config.copy_and_resolve_references()
        config.sampling.steps = setting.steps
        plan = experiment.build_sampling(config)
        labels = wiring.balanced_labels(count, config.model.num_classes)
        params = jax.device_get(self.model.params)
        with warnings.catch_warnings():  # of few steps, which are measured here
            warnings.simplefilter("ignore")
            draw = place(plan, setting, batch_size, params)
        return evaluation.to_float(
            np.concatenate(list(generate(draw, labels, seed=0, batch_size=batch_size)))
        )

    def frechet(self, images: np.ndarray) -> float:
        """Distance to held-out images, of images rounded to bytes."""
        batches = evaluation.batches_of(evaluation.to_uint8(images), 500)
        statistics = evaluation.feature_statistics(self.classifier, batches)
        return evaluation.frechet_distance(statistics, self.real)

    def measure(self, setting: Setting, images: np.ndarray, single: np.ndarray) -> dict[str, Any]:
        """Scores of one setting's images beside one device's of the same noise and steps."""
        part = slice(self.num_images)
        row = dataclasses.asdict(setting)
        row["frechet_distance"] = {str(self.num_images): self.frechet(images[part])}
        if len(images) > self.num_images:
            row["frechet_distance"][str(len(images))] = self.frechet(images)
        if setting.mode != "single":
            psnr = evaluation.psnr(images[part], single[part])
            finite = psnr[np.isfinite(psnr)]
            row["psnr"] = evaluation.mean_psnr(images[part], single[part])
            row["psnr_lowest"] = float(finite.min()) if finite.size else None
            row["equal_images"] = int(np.isinf(psnr).sum())
            row["largest_difference"] = float(np.abs(images[part] - single[part]).max())
        return row


def is_scored(setting: Setting, warmups: list[int], steps: list[int]) -> bool:
    """Whether a setting gets the Fréchet distance of more images."""
    if setting.steps != steps[0]:
        return False
    displaced = setting.mode == "displaced" and setting.warmup == warmups[-1]
    return displaced or setting.mode == "single"


def study(run: Run, args: argparse.Namespace, save) -> dict[str, np.ndarray]:
    """Measures all settings of one run; `save(row)` after each. Returns a few images of each."""
    shown, single, reference = {}, {}, {}
    for setting in settings(run.devices, args.warmups, args.steps):
        count = run.num_images
        if is_scored(setting, args.warmups, args.steps):
            count = run.num_scored
        batch_size = min(args.batch_size, count)
        images = run.sample(setting, count, batch_size)
        if setting.mode == "single":
            single[setting.steps] = images
        row = run.measure(setting, images, single[setting.steps])
        if setting.mode == "single":
            reference[setting.steps] = row["frechet_distance"]
        row["frechet_over_single"] = {
            count: distance / reference[setting.steps][count]
            for count, distance in row["frechet_distance"].items()
        }
        save(row)
        if setting.steps == args.steps[0]:
            shown[setting] = images[:10]
        psnr = f"PSNR {row['psnr']:.2f} dB, " if row.get("psnr") else ""
        distances = ", ".join(f"{d:.3f} ({n})" for n, d in row["frechet_distance"].items())
        print(f"{setting}: {psnr}Fréchet distance {distances}", flush=True)
    return shown


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| steps | devices | patches | warm-up | PSNR (lowest) | Fréchet distance "
        "| over one device | of more images | over one device |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        few, *more = row["frechet_distance"].items()
        ratios = row["frechet_over_single"]
        psnr = "" if row["mode"] == "single" else "equal"
        if row.get("psnr"):
            psnr = f"{row['psnr']:.1f} ({row['psnr_lowest']:.1f}) dB"
        cells = [str(row["steps"]), str(row["devices"]), row["mode"], str(row["warmup"] or "")]
        cells += [psnr, f"{few[1]:.3f}", f"{ratios[few[0]]:.3f}"]
        cells += [f"{more[0][1]:.3f}", f"{ratios[more[0][0]]:.3f}"] if more else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summarise(rows: list[dict[str, Any]], steps: int, warmup: int) -> list[dict[str, Any]]:
    """Against the goals, for each number of devices: decibels above naive, Fréchet distance."""
    found = []
    for devices in sorted({row["devices"] for row in rows} - {1}):
        mine = {
            (row["mode"], row["warmup"]): row
            for row in rows
            if row["devices"] == devices and row["steps"] == steps
        }
        displaced, naive = mine["displaced", warmup], mine["naive", None]
        warmed = mine["naive after warm-up", warmup]
        count, ratio = list(displaced["frechet_over_single"].items())[-1]
        found.append(
            {
                "devices": devices,
                "warmup": warmup,
                "decibels_above_naive": displaced["psnr"] - naive["psnr"],
                "decibels_above_naive_after_warmup": displaced["psnr"] - warmed["psnr"],
                "frechet_over_single": ratio,
                "frechet_images": int(count),
            }
        )
    return found


def plot(path: Path, rows: list[dict[str, Any]], shown: dict[Setting, np.ndarray]) -> None:
    """PSNR over warm-up, and the same noise under every setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5.5), width_ratios=[1, 1.1], constrained_layout=True
    )
    steps = rows[0]["steps"]
    for i, devices in enumerate(sorted({row["devices"] for row in rows} - {1})):
        mine = [row for row in rows if row["devices"] == devices and row["steps"] == steps]
        points = [(row["warmup"], row["psnr"]) for row in mine if row["mode"] == "displaced"]
        name = f"{devices} devices"
        left.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=f"displaced, {name}")
        for mode, style in (("naive after warm-up", "x"), ("naive", ":")):
            row = next(row for row in mine if row["mode"] == mode)
            options = {"color": f"C{i}", "label": f"{mode}, {name}"}
            if mode == "naive":
                left.axhline(row["psnr"], linestyle=style, **options)
            else:
                left.plot([row["warmup"]], [row["psnr"]], style, **options)
    left.set(xlabel="synchronous steps of warm-up", ylabel="PSNR to one device's image (dB)")
    left.set_title(f"{steps} steps")
    left.set_xticks(sorted({row["warmup"] for row in rows if row["warmup"]}))
    left.legend(fontsize=8)
    height = next(iter(shown.values())).shape[1]
    strips = [
        np.pad(np.concatenate(list(images[..., 0]), axis=1), ((0, 1), (0, 0)), constant_values=1)
        for images in shown.values()
    ]
    right.imshow(np.concatenate(strips), cmap="gray", vmin=-1, vmax=1, aspect="equal")
    ticks = (height + 1) * np.arange(len(strips)) + height / 2 - 0.5
    right.set_yticks(ticks, [_row_name(setting) for setting in shown], fontsize=8)
    right.set_xticks([])
    right.set_title("the same noise")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _row_name(setting: Setting) -> str:
    if setting.mode == "single":
        return "one device"
    warmup = f", warm-up {setting.warmup}" if setting.mode == "displaced" else ""
    return f"{setting.devices}: {setting.mode}{warmup}"


def check_devices(args: argparse.Namespace) -> None:
    """Refuses numbers of devices that this machine or the image does not have, before the rest.

    Raises:
        ValueError: naming the number.
    """
    if max(args.devices) > jax.device_count():
        raise ValueError(
            f"--devices {max(args.devices)}, but there are {jax.device_count()}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={max(args.devices)}"
        )
    config = workdir.load_config(args.workdir)
    rows = config.model.image_size // config.model.dit.patch_size
    for devices in args.devices:
        split_rows(rows, devices)


def main() -> None:
    """Entry point."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    parser.add_argument("--devices", type=argument_types.count, nargs="+", default=[2, 4])
    parser.add_argument("--warmups", type=argument_types.count, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=argument_types.count, nargs="+", default=[50, 20])
    parser.add_argument(
        "--num_images", type=argument_types.count, default=256, help="of every setting"
    )
    parser.add_argument(
        "--num_scored",
        type=argument_types.count,
        default=1024,
        help="of one device and of the default warm-up",
    )
    parser.add_argument("--solver", help="default: the run's")
    parser.add_argument("--batch_size", type=argument_types.count, default=128)
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    args = parser.parse_args()
    with wiring.readable_errors(traceback=args.traceback):
        check_devices(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run = Run.open(args)
        record: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/study_displaced.py", *sys.argv[1:]]),
            "sampling": run.model.config.sampling.to_dict(),
            "model": run.model.config.model.to_dict(),
            "weights": run.model.weights,
            "step": run.model.step,
            "frechet_of_training_images": run.floor,
            "rows": [],
        }

        def save(row: dict[str, Any]) -> None:
            record["rows"].append(row)
            evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=True)

        shown = study(run, args, save)
        plot(args.out.with_suffix(".png"), record["rows"], shown)
        record["summary"] = summarise(record["rows"], args.steps[0], args.warmups[-1])
        evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=True)
        args.out.with_suffix(".md").write_text(table(record["rows"]) + "\n")
        for line in record["summary"]:
            print(line)


if __name__ == "__main__":
    main()
