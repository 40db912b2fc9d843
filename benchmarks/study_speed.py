"""SpeeD against uniform times on the digits: Fréchet distance over training steps, several seeds.

  python benchmarks/study_speed.py --out=docs/results/speed_digits

Trains the digits model as a DDPM (SpeeD's own setting) with each distribution of times, everything
else equal, and measures samples of the averaged weights at regular steps. Writes OUT.json with all
numbers and OUT.png with the curves. About 20 minutes on two CPU cores.
"""

import shlex
import sys
from pathlib import Path

import jax
import numpy as np

from dit_jax import data as data_lib
from dit_jax import evaluation, experiment
from dit_jax.config import default_config
from dit_jax.configs import digits
from dit_jax.launch import argument_types, wiring

DISTRIBUTIONS = ("uniform", "speed", "speed_first_release")


def configure(distribution: str, seed: int, steps: int):
    """The digits model as a DDPM with one distribution of times."""
    config = digits.get_config()
    config.seed = seed
    defaults = default_config()
    config.process.update(defaults.process)
    config.model.dit.time_frequency_spacing = defaults.model.dit.time_frequency_spacing
    config.timesteps.name = distribution
    config.optimizer.schedule = "constant"
    config.ema.decays = (0.99,)
    config.ema.warmup = False  # as the record was made
    config.training.num_steps = steps
    config.sampling.solver = "dpmpp_2m"
    config.sampling.steps = 25
    config.sampling.guidance_scale = 1.0
    return experiment.resolve_config(config)


def curve(distribution: str, seed: int, *, steps: int, every: int, num_images: int, judge, real):
    """Fréchet distances [(step, distance)] of one run."""
    config = configure(distribution, seed, steps)
    method, plan = experiment.build_method(config), experiment.build_sampling(config)
    placement = wiring.create_placement(config)
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
    labels = wiring.balanced_labels(num_images, config.model.num_classes)
    found = []
    for step in range(1, steps + 1):
        state, _ = update(state, placement.put_batch(next(loader)), key)
        if step % every:
            continue
        params = next(iter(method.weights(state).values()))
        images = wiring.sample_images(
            plan, params, labels, seed=0, placement=placement, batch_size=250, announce=False
        )
        images = evaluation.to_uint8(images)
        statistics = evaluation.feature_statistics(judge, evaluation.batches_of(images, 500))
        found.append((step, evaluation.frechet_distance(statistics, real)))
        print(f"{distribution} seed {seed} step {step}: {found[-1][1]:.3f}", flush=True)
    return found


def steps_to_reach(steps: np.ndarray, values: np.ndarray, target: float) -> float:
    """First step, interpolated, at which the running minimum is down to `target`; inf if never."""
    best = np.minimum.accumulate(values)
    reached = np.flatnonzero(best <= target)
    if not reached.size:
        return float("inf")
    i = reached[0]
    if i == 0:
        return float(steps[0])
    fraction = (best[i - 1] - target) / (best[i - 1] - best[i])
    return float(steps[i - 1] + fraction * (steps[i] - steps[i - 1]))


def summarise(curves: dict[str, list]) -> dict:
    """Mean curves, and how many steps each needs for the quality uniform reaches at the end."""
    steps = np.array([step for step, _ in curves["uniform"][0]])
    means = {
        name: np.mean([[d for _, d in run] for run in runs], 0) for name, runs in curves.items()
    }
    summary = {"steps": steps.tolist(), "mean": {n: m.tolist() for n, m in means.items()}}
    ratios = {}
    for share in (0.5, 1.0):
        target = float(means["uniform"][int(len(steps) * share) - 1])
        needed = {name: steps_to_reach(steps, mean, target) for name, mean in means.items()}
        ratios[f"uniform after {int(steps[int(len(steps) * share) - 1])} steps"] = {
            "distance": target,
            "steps": {n: s if np.isfinite(s) else None for n, s in needed.items()},
            "uniform_steps_over_its_own": {
                n: needed["uniform"] / s if np.isfinite(s) else None for n, s in needed.items()
            },
        }
    return {**summary, "steps_to_equal_quality": ratios}


def plot(path: Path, curves: dict[str, list], floor: float) -> None:
    """Mean curves with the seeds' range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for name, runs in curves.items():
        steps = [step for step, _ in runs[0]]
        values = np.array([[d for _, d in run] for run in runs])
        axes.plot(steps, values.mean(0), marker="o", markersize=3, label=name)
        axes.fill_between(steps, values.min(0), values.max(0), alpha=0.15)
    axes.axhline(floor, color="grey", linestyle=":", label="real training digits")
    axes.set(xlabel="training steps", ylabel="Fréchet distance to held-out digits", yscale="log")
    axes.set_title(f"Times in DDPM training, digits, {len(next(iter(curves.values())))} seeds")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Entry point."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    parser.add_argument("--steps", type=argument_types.count, default=1500)
    parser.add_argument("--every", type=argument_types.count, default=150)
    parser.add_argument("--seeds", type=argument_types.seed, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=argument_types.count, default=1000)
    parser.add_argument(
        "--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS)
    )
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    args = parser.parse_args()
    with wiring.readable_errors(traceback=args.traceback):
        if "uniform" not in args.distributions:
            raise ValueError("--distributions needs uniform, which the others are compared with")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        train = data_lib.to_arrays(data_lib.open_source("digits", "train"))
        test = data_lib.to_arrays(data_lib.open_source("digits", "test"))
        judge = evaluation.train_classifier(
            *train, 10, seed=0, test_images=test[0], test_labels=test[1]
        )
        real = evaluation.feature_statistics(judge, [test[0]])
        floor = evaluation.frechet_distance(
            evaluation.feature_statistics(judge, evaluation.batches_of(train[0], 500)), real
        )
        options = {"steps": args.steps, "every": args.every, "num_images": args.num_images}
        curves = {
            name: [curve(name, seed, judge=judge, real=real, **options) for seed in args.seeds]
            for name in args.distributions
        }
        record = {
            "command": shlex.join(["python", "benchmarks/study_speed.py", *sys.argv[1:]]),
            "seeds": args.seeds,
            "floor": floor,
            "curves": curves,
            **summarise(curves),
        }
        evaluation.save_json(args.out.with_suffix(".json"), record, overwrite=True)
        plot(args.out.with_suffix(".png"), curves, floor)
        print(record["steps_to_equal_quality"])


if __name__ == "__main__":
    main()
