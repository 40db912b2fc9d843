"""The demo: trains on handwritten digits, samples, evaluates, and shows the result.

python launch/demo.py

Everything goes to runs/demo (or --workdir); running it again starts afresh there.
"""

import argparse
import shutil
import time
from pathlib import Path

from configs import digits
from dit_jax.training.metrics import format_duration
from dit_jax.training.workdir import CONFIG_FILE
from launch import evaluate, loading, train, wiring


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--num_images", type=int, default=1000, help="samples to evaluate")
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser.parse_args()


def start_afresh(directory: Path) -> None:
    """Removes an earlier demo.

    Raises:
        ValueError: the directory holds something else.
    """
    if directory.exists() and any(directory.iterdir()):
        if not (directory / CONFIG_FILE).exists():
            raise ValueError(f"{directory} is not empty and not an earlier demo: choose another")
        shutil.rmtree(directory)


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    started = time.perf_counter()
    with wiring.readable_errors(traceback=args.traceback):
        start_afresh(args.workdir)
        config = digits.get_config()
        config.training.tensorboard = False  # spares the demo TensorFlow's start-up
        directory = args.workdir.absolute()
        result = train.run(config, directory)
        if result.interrupted:
            print(f"interrupted at step {result.step}; run the demo again to start afresh")
            return
        model = loading.load_model(directory)
        record, samples, labels, test = evaluate.evaluate(
            model, directory, num_images=args.num_images
        )
        picture = directory / "samples.png"
        evaluate.save_picture(picture, samples, labels, test, overwrite=True)
    scores = record["scores"]
    floor, real = scores["frechet_distance_floor"], scores["classifier_test_accuracy"]
    rows = [
        ("training steps", f"{result.step}"),
        ("steps/s", f"{result.steps_per_second:.1f}"),
        ("training time", format_duration(result.seconds)),
        ("everything together", format_duration(time.perf_counter() - started)),
        ("Fréchet distance to held-out digits", f"{scores['frechet_distance']:.2f}"),
        ("  real training digits have", f"{floor:.2f}"),
        ("samples classified as their label", f"{scores['label_accuracy']['overall']:.1%}"),
        ("  real held-out digits are", f"{real:.1%}"),
    ]
    print(wiring.table(rows))
    print(f"samples beside real digits: {picture}")


if __name__ == "__main__":
    main()
