"""Trains a model.

  python launch/train.py --config=configs/dit_xl2.py --workdir=runs/dit_xl2 \\
      --config.optimizer.learning_rate=3e-4 --config.training.batch_size=1024

Running the same command again continues from the newest checkpoint. Ctrl-C saves and ends.
"""

from pathlib import Path

import jax
from absl import app, flags, logging
from clu import parameter_overview
from ml_collections import config_flags

from dit_jax import config as config_lib
from dit_jax import data as data_lib
from dit_jax import experiment
from dit_jax.evaluation import save_grid
from dit_jax.training import loop, metrics, workdir
from dit_jax.training.checkpoints import Checkpoints
from launch import wiring

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, a file of configs/; override with --config.key=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
_FORCE = flags.DEFINE_bool("force", False, "Go on in a workdir of another configuration.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show stack traces of errors.")


def run(config, directory: Path, *, force: bool = False) -> loop.TrainResult:
    """Trains the experiment `config` in `directory`, from where it was."""
    config = experiment.resolve_config(config)
    method = experiment.build_method(config)
    plan = experiment.build_sampling(config)
    placement = wiring.create_placement(config)
    training = config.training
    placement.check_batch_size(training.batch_size, training.num_microbatches)
    source = experiment.open_data(config, "train")
    workdir.prepare(directory, config, force=force)
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(method.init, key)
    workdir.require_space(directory, abstract, training.keep_last)
    loader = data_lib.make_loader(
        source,
        batch_size=training.batch_size,
        seed=config.seed,
        horizontal_flip=config.data.horizontal_flip,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    announce_start(config, abstract, source, directory)
    checkpoints = Checkpoints(
        directory / workdir.CHECKPOINTS,
        keep_last=training.keep_last,
        keep_every=training.keep_every,
    )
    writers = []

    def create_writers(step: int) -> list:
        writers.extend(
            metrics.create_writers(
                directory,
                resumed_at=step,
                tensorboard=training.tensorboard,
                wandb=training.wandb,
                config=config.to_dict(),
                name=config.name,
            )
        )
        return writers

    preview = make_preview(config, plan, placement, directory, writers)
    result = loop.train(
        method,
        iter(loader),
        key,
        loop.LoopOptions(
            num_steps=training.num_steps,
            batch_size=training.batch_size,
            log_every=training.log_every,
            preview_every=training.preview_every,
            checkpoint_every=training.checkpoint_every,
        ),
        placement=placement,
        checkpoints=checkpoints,
        writers=create_writers,
        preview=preview if training.preview_every else None,
        strict=not force,
    )
    checkpoints.close()
    return result


def announce_start(config, abstract, source, directory: Path) -> None:
    """Says what is about to be trained, on what, where."""
    info = source.info
    print(parameter_overview.get_parameter_overview(abstract.params, include_stats=False))
    print(
        f"{config.name or 'experiment'}: {info.num_examples} examples of {info.name}, "
        f"{info.num_classes} classes, images {info.image_shape}\n"
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, workdir {directory}",
        flush=True,
    )


def make_preview(config, plan, placement, directory: Path, writers: list):
    """A function that saves a grid of samples of the configured weights as PNG."""
    count = config.training.preview_images
    labels = wiring.balanced_labels(count, config.model.num_classes)

    def preview(step: int, weights: dict) -> None:
        name = wiring.choose_weights(weights, config.sampling.weights)
        images = wiring.sample_images(
            plan,
            weights[name],
            labels,
            seed=config.seed,
            placement=placement,
            batch_size=config.sampling.batch_size,
            announce=False,
        )
        if config.model.in_channels not in (1, 3):
            images = images[..., :3]  # latents without a decoder: their first channels
        path = directory / "previews" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        save_grid(path, images, overwrite=True)
        for writer in writers:
            writer.write_images(step, {"samples": (images.clip(-1, 1) + 1) / 2})

    return preview


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with mistakes told as all others are."""
    known = {path for path, _ in config_lib.flatten(config_lib.default_config())}
    with wiring.readable_errors():
        for argument in argv[1:]:
            key = argument.lstrip("-").partition("=")[0].removeprefix("no")
            if key.startswith("config.") and key.removeprefix("config.") not in known:
                hint = config_lib.nearest_key(key.removeprefix("config."))
                raise config_lib.ConfigError(f"unknown key {key}{hint}")
        try:
            rest = flags.FLAGS(argv)[1:]
        except flags.Error as error:
            raise ValueError(f"{error} (see --help)") from error
        if rest:
            raise ValueError(f"unexpected arguments: {' '.join(rest)}")
    return argv[:1]


def main(argv: list[str]) -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    directory = Path(_WORKDIR.value).absolute()
    with wiring.readable_errors(traceback=_TRACEBACK.value):
        result = run(_CONFIG.value, directory, force=_FORCE.value)
    if result.interrupted:
        print(f"saved step {result.step} in {directory}; run the same command to continue")
    else:
        print(f"done: step {result.step}, {result.steps_per_second:.4g} steps/s, in {directory}")
        print(f"next: python launch/sample.py --workdir={directory} --out=samples.png")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
