"""Wiring an experiment together and training it: the work of launch/train.py."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from dit_jax import config as config_lib
from dit_jax import data as data_lib
from dit_jax import experiment
from dit_jax.evaluation import Panel, render_panels, save_json, save_picture
from dit_jax.training import loop, metrics, workdir
from dit_jax.training.checkpoints import Checkpoints
from dit_jax.training.saved_weights import choose_weights
from interop.models import FoundModel
from launch import loading, methods, wiring
from parallel import distributed
from parallel.mesh import DataParallel
from parallel.partitioning import ShardedPlacement, format_table


def run(
    config,
    directory: Path,
    *,
    init_from: str | None = None,
    init_options: dict[str, Any] | None = None,
    force: bool = False,
) -> loop.TrainResult:
    """Trains the experiment `config` in `directory`, from where it was.

    Args:
        config: of the experiment.
        directory: the workdir.
        init_from: a checkpoint whose parameters a new run starts from (`interop.open_model`).
        init_options: how to read it, for instance num_classes.
        force: go on in a workdir of another configuration.
    """
    config = workdir.keep_earlier(directory, methods.resolve_config(config))
    experiment.require_trainable(config)
    agreed = f"{config_lib.to_json(config)}{init_from}{force}"
    distributed.require_agreement(agreed, "the configuration, --init_from and --force")
    method = methods.build_method(config)
    plan = experiment.build_sampling(config)
    placement = wiring.create_placement(config)
    training = config.training
    placement.check_batch_size(training.batch_size, training.num_microbatches)
    source = experiment.open_data(config, "train")
    models = methods.open_frozen(config, method)
    initial = None
    if init_from:
        initial = loading.open_initial(init_from, config, **(init_options or {}))
    initial = initial or models.start
    decoder = open_decoder(config, placement) if training.preview_every else None
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
    if distributed.is_first():
        announce_start(config, abstract, source, directory)
        announce_placement(placement, abstract, directory)
    checkpoints = Checkpoints(
        directory / workdir.CHECKPOINTS,
        keep_last=training.keep_last,
        keep_every=training.keep_every,
    )
    frozen = models.load(placement.put_params)
    methods.require_teacher_of_pairs(source, frozen, models)
    methods.record_frozen(directory, frozen, models)
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

    teacher = models.models.get("teacher")
    beside = teacher and TeacherPictures(teacher.config, frozen["teacher"])
    preview = make_preview(config, plan, placement, directory, writers, decoder, beside)
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
        announce=announce,
        initial_params=initial and (lambda: read_initial(initial, directory, placement)),
        frozen=frozen or None,
    )
    checkpoints.close()
    return result


def announce(text: str) -> None:
    """Prints a line, in the first process."""
    if distributed.is_first():
        print(text, flush=True)


def announce_placement(placement: DataParallel, abstract, directory: Path) -> None:
    """Tells how a divided state lies on the devices; the whole table goes into the workdir."""
    if isinstance(placement, ShardedPlacement):
        sizes = dict(placement.mesh.shape)
        table = format_table(placement.table(abstract), sizes)
        (directory / "placement.txt").write_text(table + "\n")
        axes = ", ".join(f"{name} {size}" for name, size in sizes.items())
        print(f"mesh {axes}: {table.splitlines()[-1]}, see placement.txt", flush=True)


def read_initial(initial: FoundModel, directory: Path, placement: DataParallel) -> dict:
    """The parameters to start from, placed; what they are is noted in the workdir."""
    origin = {
        "path": str(initial.path),
        "kind": initial.kind,
        "weights": initial.weights,
        "step": initial.step,
    }
    announce(f"starting from {initial.kind} {initial.path}, weights {initial.weights}")
    for note in initial.notes:
        announce(f"note: {note}")
    if distributed.is_first():
        save_json(directory / "init_from.json", origin, overwrite=True)
    # Whole states take them from the host when they are initialised.
    return initial.load(placement.put_params if isinstance(placement, ShardedPlacement) else None)


def open_decoder(config, placement) -> loading.Decoder | None:
    """What makes previews of latents pictures: the VAE of config.autoencoder, if there is one."""
    path = config.autoencoder.path
    return loading.Decoder(config, Path(path), placement) if path else None


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


@dataclasses.dataclass(frozen=True)
class TeacherPictures:
    """What a distilled student is shown beside: its teacher, sampled as it was configured."""

    config: ml_collections.ConfigDict
    params: Any

    def plan(self) -> experiment.SamplingPlan:
        """The teacher's own way of sampling."""
        return experiment.build_sampling(self.config)


def make_preview(
    config, plan, placement, directory: Path, writers: list, decoder, beside: TeacherPictures | None
):
    """A function that saves a grid of samples of the configured weights as PNG.

    With a teacher the grid has its samples of the same noise and labels on the left.
    """
    count = config.training.preview_images
    labels = wiring.balanced_labels(count, config.model.num_classes)

    def draw(plan, params) -> np.ndarray:
        images = wiring.sample_images(
            plan,
            params,
            labels,
            seed=config.seed,
            placement=placement,
            batch_size=config.sampling.batch_size,
            decode=decoder,
            announce=False,
        )
        # Latents without a decoder: their first channels.
        return images if images.shape[-1] in (1, 3) else images[..., :3]

    of_teacher = functools.cache(lambda: draw(beside.plan(), beside.params))

    def preview(step: int, weights: dict) -> None:
        name = choose_weights(weights, config.sampling.weights)
        images = draw(plan, weights[name])
        teachers = of_teacher() if beside else None
        if not distributed.is_first():  # the others only helped to sample
            return
        path = directory / "previews" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        if beside:
            panels = [Panel(teachers, "teacher"), Panel(images, "student, the same noise")]
        else:
            panels = [Panel(images)]
        picture = render_panels(panels)
        save_picture(path, picture, overwrite=True)
        for writer in writers:
            writer.write_images(step, {"samples": np.asarray(picture, np.float32)[None] / 255})
            writer.flush()  # to be seen now, not at the end
        announce(f"samples of step {step}: {path}")

    return preview
