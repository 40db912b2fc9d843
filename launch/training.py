"""Wiring an experiment together and training it: the work of launch/train.py."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from dit_jax import class_names, experiment
from dit_jax import config as config_lib
from dit_jax import data as data_lib
from dit_jax.evaluation import Panel, labelled_panel, render_panels, save_picture
from dit_jax.interop.models import FoundModel
from dit_jax.launch import loading, methods, wiring
from dit_jax.launch.run_home import RunHome
from dit_jax.models import Network
from dit_jax.parallel import distributed
from dit_jax.parallel.mesh import DataParallel, put_whole
from dit_jax.parallel.partitioning import ShardedPlacement, format_table
from dit_jax.quantities import counted
from dit_jax.training import lock, loop, memory, optimizer, remat_choice, workdir
from dit_jax.training.checkpoints import Checkpoints
from dit_jax.training.saved_weights import choose_weights


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
    prepared = experiment.prepare(config)
    config = workdir.keep_earlier(directory, prepared.config)
    if config is not prepared.config:
        prepared = experiment.prepare(config)
    experiment.require_trainable(config)
    agreed = f"{config_lib.to_json(config)}{init_from}{force}"
    distributed.require_agreement(agreed, "the configuration, --init_from and --force")
    options = loop_options(config)
    with contextlib.ExitStack() as stack:
        # Of several processes the first holds the lock for all.
        held = distributed.on_first(lambda: stack.enter_context(lock.held(directory)))
        stack.enter_context(workdir.readable_disk_errors(directory))
        return train_in(directory, held, prepared, options, init_from, init_options, force)


def train_in(
    directory: Path,
    held: lock.WorkdirLock | None,
    prepared: experiment.Prepared,
    options: loop.LoopOptions,
    init_from: str | None,
    init_options: dict[str, Any] | None,
    force: bool,
) -> loop.TrainResult:
    """As `run`, in a workdir whose lock is `held`."""
    config, method, plan = prepared.config, prepared.method, prepared.sampling
    require_effect(directory, config, method)
    placement = wiring.create_placement(config)
    training = config.training
    placement.check_batch_size(training.batch_size, training.num_microbatches)
    workdir.require_same_run(directory, config, force=force)
    source = experiment.open_data(config, "train")
    models = methods.open_frozen(config, method)
    initial = None
    if init_from and config.lora.rank:
        raise config_lib.ConfigError(
            f"--init_from={init_from} would do nothing: a LoRA's network is --config.lora.base"
        )
    if init_from:
        initial = loading.open_initial(init_from, config, **(init_options or {}))
    initial = initial or models.start
    if not workdir.has_run(directory):
        experiment.require_augmented(config, source.info, initial is not None)
    decoder = open_decoder(config, placement) if training.preview_every else None
    placement.check_rows(source.info)
    options = dataclasses.replace(options, flops_per_example=mean_flops(config, source.info))
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(method.init, key)
    require_room(directory, config, abstract, source)
    loader = data_lib.make_loader(
        source,
        batch_size=training.batch_size,
        seed=config.seed,
        horizontal_flip=config.data.horizontal_flip,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    announce(first_screen(config, directory))
    if distributed.is_first():
        announce_start(config, abstract, source, directory)
    frozen = models.load(placement.put_params)
    methods.require_teacher_of_pairs(source, frozen, models)
    home = RunHome(directory, held, config, announce)
    home.records = {
        workdir.CONFIG_FILE: workdir.config_text(directory, config),
        methods.FROZEN_FILE: methods.frozen_record(directory, frozen, models),
        class_names.FILE: class_names_text(source, models),
        "placement.txt": describe_placement(placement, abstract),
        workdir.EXTENSIONS_FILE: workdir.extensions_text(config),
    }
    nulls = put_nulls(source, placement)
    if nulls:
        frozen["nulls"] = nulls
    teacher = models.models.get("teacher")
    beside = teacher and TeacherPictures(teacher.config, frozen["teacher"])
    shown = preview_conditions(source, plan.network, training.preview_images)
    shown = {"conditions": shown, "nulls": nulls, "decoder": decoder, "beside": beside}
    shown["params_of"] = functools.partial(sampled_params, method, frozen)
    preview = make_preview(config, plan, placement, directory, home.writers, **shown)
    batch = f"training in batches of {training.batch_size}"
    with (
        memory.exhaustion_explained(batch, memory.UPDATE_REMEDY),
        workdir.mismatch_explained(directory, config),
        Checkpoints(
            directory / workdir.CHECKPOINTS,
            keep_last=training.keep_last,
            keep_every=training.keep_every,
        ) as checkpoints,
    ):
        return loop.train(
            method,
            iter(loader),
            key,
            options,
            placement=placement,
            checkpoints=checkpoints,
            writers=home.create_writers,
            preview=preview if training.preview_every else None,
            strict=not force,
            announce=announce,
            initial_params=initial and (lambda: read_initial(initial, home.records, placement)),
            frozen=frozen or None,
            alternatives=remat_choice.alternatives(config, method, experiment.build_method),
            on_start=home.write_records,
            before_writing=home.mend,
        )


def require_effect(directory: Path, config, method) -> None:
    """Refuses keys that would do nothing; a run that was begun with them goes on with them."""
    message = experiment.effect_error(config, method)
    if not message:
        return
    if workdir.has_run(directory):
        begun = workdir.load_config(directory)
        if experiment.effect_error(begun, method) == message:
            return
    raise config_lib.ConfigError(message)


def class_names_text(source: data_lib.Source, models: methods.FrozenModels) -> str:
    """What the workdir keeps of the names of classes; those of pairs are the teacher's."""
    names = source.info.class_names
    if not names and isinstance(source, data_lib.Pairs) and "teacher" in models.models:
        names = models.models["teacher"].class_names
    return class_names.to_text(names)


def loop_options(config) -> loop.LoopOptions:
    """Lengths and periods of the run."""
    training = config.training
    return loop.LoopOptions(
        num_steps=training.num_steps,
        batch_size=training.batch_size,
        log_every=training.log_every,
        preview_every=training.preview_every,
        checkpoint_every=training.checkpoint_every,
    )


def mean_flops(config, info: data_lib.DatasetInfo) -> float | None:
    """Operations of an update and example, on average over buckets; None for images of one size."""
    if not info.buckets:
        return None
    config, total = config.copy_and_resolve_references(), 0.0
    for bucket in info.buckets:
        with config.unlocked():
            config.model.input_size = bucket.size
        total += bucket.count * experiment.build_method(config).flops_per_example
    return total / info.num_examples


def require_room(directory: Path, config, abstract, source) -> None:
    """Refuses a run whose batches or checkpoints cannot fit."""
    training, shape = config.training, source.info.image_shape
    memory.require_batches(training.batch_size, shape, abstract)
    if training.preview_every:
        memory.require_host_memory(
            8.0 * training.preview_images * float(np.prod(shape)),
            f"previews of {training.preview_images} images",
            "lower config.training.preview_images",
        )
    every = training.keep_every
    for_good = training.num_steps // every if every else 0
    workdir.require_space(directory, abstract, training.keep_last, for_good)


def put_nulls(source: data_lib.Source, placement: DataParallel) -> dict[str, jax.Array]:
    """What stands for the absence of conditions, where it comes with the data; on all devices."""
    nulls = source.info.null_conditions or {}
    return {name: put_whole(value, placement.replicated) for name, value in nulls.items()}


def announce(text: str) -> None:
    """Prints a line, in the first process."""
    if distributed.is_first():
        print(text, flush=True)


def describe_placement(placement: DataParallel, abstract) -> str:
    """The table of how a divided state lies on the devices, whose sum is printed; '' for whole."""
    if not isinstance(placement, ShardedPlacement):
        return ""
    sizes = dict(placement.mesh.shape)
    table = format_table(placement.table(abstract), sizes)
    axes = ", ".join(f"{name} {size}" for name, size in sizes.items())
    announce(f"mesh {axes}: {table.splitlines()[-1]}, see placement.txt")
    return table + "\n"


def read_initial(initial: FoundModel, records: dict[str, str], placement: DataParallel) -> dict:
    """The parameters to start from, placed; what they are is added to the workdir's records."""
    origin = {
        "path": str(initial.path),
        "kind": initial.kind,
        "weights": initial.weights,
        "step": initial.step,
    }
    announce(f"starting from {initial.kind} {initial.path}{initial.chosen_weights}")
    for note in initial.notes:
        announce(f"note: {note}")
    records["init_from.json"] = json.dumps(origin, indent=2) + "\n"
    # Whole states take them from the host when they are initialised.
    sharded = isinstance(placement, ShardedPlacement)
    return initial.load(placement.put_params if sharded else lambda path, array: array)


def open_decoder(config, placement) -> loading.Decoder | None:
    """What makes previews of latents pictures: the VAE of config.autoencoder, if there is one."""
    path = config.autoencoder.path
    return loading.Decoder(config, Path(path), placement) if path else None


def first_screen(config, directory: Path) -> str:
    """What is to be trained, and on what."""
    training = config.training
    what = f"training {config.name or config.model.name} by {config.method.name}"
    what += f": to step {training.num_steps} in batches of {training.batch_size}"
    return wiring.first_screen(what, directory, "time left: after the first steps")


def describe_sizes(info: data_lib.DatasetInfo, batch_size: int) -> str:
    """The size of the images, or their buckets with how many images each has."""
    if not info.buckets:
        return f"images {info.image_shape}"
    lines = [f"images in {counted(len(info.buckets), 'bucket')} (height x width):"]
    for bucket in info.buckets:
        line = (
            f"  {bucket}: {counted(bucket.count, 'image')}, {bucket.count / info.num_examples:.1%}"
        )
        if bucket.count < batch_size:
            line += f" (fewer than a batch of {batch_size}, which holds some more than once)"
        lines.append(line)
    return "\n".join(lines)


def announce_start(config, abstract, source, directory: Path) -> None:
    """Says what is about to be trained, on what, where."""
    info = source.info
    print(
        f"{config.name or 'experiment'}: {counted(info.num_examples, 'example')} of {info.name}, "
        f"{info.num_classes} classes, {describe_sizes(info, config.training.batch_size)}\n"
        f"workdir {directory}; compiling, then Ctrl-C saves and ends"
    )
    table = parameter_overview.get_parameter_overview(abstract.params, include_stats=False)
    print(table, flush=True)
    asked = (config.optimizer.schedule, config.optimizer.warmup_steps, config.training.num_steps)
    if optimizer.fitted_warmup(*asked) != asked[1]:
        announce(
            f"the run of {asked[2]} steps is too short for config.optimizer.warmup_steps="
            f"{asked[1]}: it warms up for {optimizer.fitted_warmup(*asked)}, then decays"
        )


@dataclasses.dataclass(frozen=True)
class TeacherPictures:
    """What a distilled student is shown beside: its teacher, sampled as it was configured."""

    config: ml_collections.ConfigDict
    params: Any

    def plan(self) -> experiment.SamplingPlan:
        """The teacher's own way of sampling."""
        return experiment.build_sampling(self.config)


def sampled_params(method, frozen: dict[str, Any], weights: Any) -> Any:
    """The parameters to sample with: one of a method's weights, of a LoRA with its network."""
    return method.sampled(weights, frozen) if hasattr(method, "sampled") else weights


def preview_conditions(source: data_lib.Source, network: Network, count: int) -> Any:
    """What previews show: classes in turn, or what the first examples of the data are told by.

    Returns:
        labels [count], or for a network that takes more than those arrays by name, [count, ...].
    """
    needed = {name for name, condition in network.conditions.items() if condition.required}
    if needed <= {"label"}:
        return wiring.balanced_labels(count, network.num_classes)
    several = bool(source.info.buckets)  # then those of one size, which are read together
    pool = source.members(0) if several else np.arange(len(source))
    first = source.batch(np.resize(pool, count))
    return {name: value for name, value in first.items() if name in needed}


def make_preview(
    config,
    plan,
    placement,
    directory: Path,
    writers: list,
    *,
    conditions: Any,
    nulls: dict[str, jax.Array],
    decoder: loading.Decoder | None,
    beside: TeacherPictures | None,
    params_of: Callable[[Any], Any],
):
    """A function that saves a grid of samples of the configured weights as PNG.

    With a teacher the grid has its samples of the same noise and conditions on the left.
    """

    def draw(plan, params) -> np.ndarray:
        images = wiring.sample_images(
            plan,
            params,
            conditions,
            nulls=nulls,
            seed=config.seed,
            placement=placement,
            batch_size=config.sampling.batch_size,
            decode=decoder,
            announce=False,
        )
        # Latents without a decoder: their first channels.
        return images if images.shape[-1] in (1, 3) else images[..., :3]

    def panel(images: np.ndarray, title: str | None = None) -> Panel:
        if "label" not in plan.network.conditions:
            return Panel(images, title)
        labels = conditions["label"] if isinstance(conditions, dict) else conditions
        return labelled_panel(images, labels, title)

    of_teacher = functools.cache(lambda: draw(beside.plan(), beside.params))

    def preview(step: int, weights: dict) -> None:
        name = choose_weights(weights, config.sampling.weights)
        images = draw(plan, params_of(weights[name]))
        teachers = of_teacher() if beside else None
        if not distributed.is_first():  # the others only helped to sample
            return
        path = directory / "previews" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        if beside:
            panels = [panel(teachers, "teacher"), panel(images, "student, the same noise")]
        else:
            panels = [panel(images)]
        picture = render_panels(panels)
        save_picture(path, picture, overwrite=True)
        for writer in writers:
            writer.write_images(step, {"samples": np.asarray(picture, np.float32)[None] / 255})
            writer.flush()  # to be seen now, not at the end
        announce(f"samples of step {step}: {path}")

    return preview
