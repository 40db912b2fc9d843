"""Sampling from a trained model into a grid, an .npz or a folder: the work of launch/sample.py."""

import argparse
import dataclasses
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax import class_names, evaluation, experiment
from dit_jax.evaluation import sample_store
from dit_jax.launch import arguments, loading, wiring
from dit_jax.named_options import options_named
from dit_jax.output_formats import samples_format
from dit_jax.parallel.sampling import ImageParallel, ImagePlacement
from dit_jax.programs import Programs
from dit_jax.quantities import counted
from dit_jax.training import memory
from dit_jax.untrusted import read_json

DEFAULT_COUNT = 64  # images, where neither their number nor labels are given


def choose_labels(
    args: argparse.Namespace, num_classes: int, names: tuple[str, ...] = ()
) -> np.ndarray:
    """One label an image.

    Raises:
        ValueError: labels of an unconditional model, out of range, or of an unknown name.
    """
    if args.labels is None:
        return wiring.balanced_labels(args.num_images or DEFAULT_COUNT, num_classes)
    if not num_classes:
        raise ValueError("--labels: the model is unconditional, it has no classes")
    labels = [class_names.find_label(label, names, num_classes) for label in args.labels]
    return np.resize(np.asarray(labels, np.int32), args.num_images or len(labels))


def require_labels(args: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    """Refuses a network that is told texts: the encoders of prompts are in a pipeline.

    Raises:
        ValueError: with the command that samples it.
    """
    if config.model.name != "flux":
        return
    given = f"--workdir={args.workdir}" if args.workdir else f"--init_from={args.init_from}"
    source = pipeline_of(args.workdir, config)
    command = ["python", "launch/sample.py", f"--pretrained={source or 'FLUX.1-dev'}", given]
    out = str(getattr(args, "out", ""))  # of scores and of pairs it is no picture
    command += ["--prompt=a cat", f"--out={out if out.endswith('.png') else 'cat.png'}"]
    raise ValueError(
        f"{given} is a FLUX, which is told prompts: their encoders and the decoder are of a "
        f"pipeline, so --pretrained is missing. Give the one that it was trained from: "
        f"{shlex.join(command)}"
    )


def pipeline_of(directory: Path | None, config: ml_collections.ConfigDict) -> str:
    """The pipeline that a network was trained from, as far as its workdir tells; else ''."""
    source = config.lora.base if config.lora.rank else ""
    record = directory / "init_from.json" if directory else None
    if record is not None and record.is_file():
        source = str(read_json(record).get("path", ""))
    whole = source.startswith("hub:") or (Path(source) / "model_index.json").is_file()
    return source if whole else ""


def require_room(args: argparse.Namespace, shape: tuple[int, int, int], batch_size: int) -> None:
    """Refuses more images, or larger ones, than memory or the disk holds.

    Args:
        args: the command line.
        shape: of an image.
        batch_size: images at once.
    """
    count = args.num_images or len(args.labels or ()) or DEFAULT_COUNT
    if samples_format(args.out) == "picture":
        remedy = "lower --num_images, or --out=x.npz or a folder, which grow on disk"
        require_memory(count, shape, remedy)
        return
    require_memory(count)
    require_batch_memory(min(count, batch_size), shape)
    if args.overwrite or not sample_store.is_begun(args.out):
        sample_store.require_space(args.out, count, shape)


def require_batch_memory(batch_size: int, shape: tuple[int, int, int]) -> None:
    """Refuses images too large to be in memory as many at a time as they are drawn."""
    require_memory(batch_size, shape, f"lower --batch_size={batch_size}, --height or --width")


def require_memory(
    count: int,
    whole: tuple[int, int, int] | None = None,
    remedy: str = "lower --num_images",
    beside: int = 0,
) -> None:
    """Refuses more images than this machine has memory for, before anything is drawn.

    Args:
        count: images.
        whole: (height, width, channels) of images that are all in memory together; None where
            they are not.
        remedy: what to do.
        beside: bytes that are kept of every image, as its features.

    Raises:
        MemoryNeededError: with the memory needed and free.
    """
    size = 8 + beside  # labels, drawn and as they are written
    if whole:
        size += 9 * int(np.prod(whole))  # as float32, then together, as bytes
    memory.require_host_memory(size * count, counted(count, "image"), remedy)


def sample_to_store(
    args: argparse.Namespace, model: loading.TrainedModel, labels: np.ndarray, stream, shape
) -> None:
    """Samples into `args.out`, going on where an interrupted run stopped."""
    record = {
        "seed": args.seed,
        "rounding": args.rounding,
        "num_images": len(labels),
        "labels_hash": evaluation.content_hash(labels),
        **stream.provenance,
    }
    store = evaluation.SampleStore(args.out, len(labels), shape, record, restart=args.overwrite)
    if store.done:
        print(f"going on at image {store.done} of {len(labels)}", flush=True)
    for images in stream(store.done):
        store.append(evaluation.to_uint8(images, args.rounding))
    store.finish(labels if model.config.model.num_classes else None, overwrite=args.overwrite)


def distribute(
    parallel: ImageParallel, plan: experiment.SamplingPlan, batch_size: int
) -> ImagePlacement:
    """The plan on many devices; prints how, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with options_named(wiring.PARALLEL_FLAGS):
            placement = parallel.distribute(plan, batch_size=batch_size)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr, flush=True)
    shape = " x ".join(f"{name} {size}" for name, size in placement.mesh.shape.items() if size > 1)
    print(f"{parallel.mode}: {shape}", flush=True)
    for note in placement.notes:
        print(f"note: {note}", flush=True)
    return placement


@dataclasses.dataclass(frozen=True)
class Stream:
    """Everything bound but the first image's number."""

    draw: Callable[[int], Iterator[np.ndarray]]
    provenance: dict

    def __call__(self, start: int) -> Iterator[np.ndarray]:
        """Pictures from image `start` on, in batches."""
        return self.draw(start)


def describe(model: loading.TrainedModel, count: int, out: Path) -> str:
    """The first screen."""
    sampling = model.config.sampling
    what = f"sampling {counted(count, 'image')} of {model.source}, weights {model.weights}"
    what += f", step {model.step}"
    guidance = f", guidance {sampling.guidance_scale:g}" if sampling.guidance_scale != 1 else ""
    height, width, _ = model.network.sample_shape
    if model.config.model.input_size:
        what += f", of {height} x {width}"
    what += f"\n  by {sampling.solver}, {sampling.steps} steps{guidance}"
    if model.config.cache.name == "first_block":
        cache = model.config.cache.first_block
        what += f", step cache at {cache.threshold:g}"
    return wiring.first_screen(what, out, "time left: known after the first batch")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that a command line of samples chooses.

    Attributes:
        model: what is sampled.
        labels: one an image.
        plan: how, on `placement`.
        params: the model's, placed.
        decoder: from samples to pictures.
        shape: of a picture.
        programs: the folder of compiled programs, or None.
        record: how images were made.
    """

    model: loading.TrainedModel
    labels: np.ndarray
    plan: experiment.SamplingPlan
    params: Any
    placement: Any
    decoder: loading.Decoder
    shape: tuple[int, int, int]
    programs: Programs | None
    record: dict[str, Any]


def prepare(
    args: argparse.Namespace,
    check: Callable[[tuple[int, int, int], int], None] = lambda shape, batch_size: None,
) -> Prepared:
    """Loads the model and places it.

    Args:
        args: the command line.
        check: told the shape of a picture and how many are made at once, before any is placed.

    Raises:
        ValueError: options that do not go together.
    """
    parallel = wiring.image_parallel(args)
    programs = open_programs(args.programs)
    overrides = arguments.sampling_overrides(args)
    model = loading.load_from_arguments(
        args, overrides, lambda config: require_labels(args, config)
    )
    placement = wiring.create_placement(model.config)
    decoder = loading.Decoder(
        model.config,
        model.autoencoder,
        placement,
        row_devices=args.vae_devices,
        programs=programs,
    )
    shape = decoder.image_shape(model.network.sample_shape)
    decoder.require_rows(model.network.sample_shape)
    check(shape, model.config.sampling.batch_size)
    labels = choose_labels(args, model.config.model.num_classes, model.class_names)
    plan, params = experiment.build_sampling(model.config), model.params
    record = loading.provenance(model, decoder)
    if parallel:
        batch = min(len(labels), model.config.sampling.batch_size)
        placement = distribute(parallel, plan, batch)
        plan, params = placement.plan, placement.place(params)
        record["parallel"] = {
            **dataclasses.asdict(parallel),
            "warmup_steps": plan.sampler.denoiser.network.warmup_steps,
            "devices": placement.mesh.size,
        }
    return Prepared(model, labels, plan, params, placement, decoder, shape, programs, record)


def open_programs(folder: Path | None) -> Programs | None:
    """The folder of --programs.

    Raises:
        ValueError: it is no folder; several processes.
    """
    if folder is None:
        return None
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--programs={folder} is a file: give a folder")
    if jax.process_count() > 1:
        raise ValueError(
            f"--programs: compiled programs are kept by one process, and there are "
            f"{jax.process_count()}: leave it out"
        )
    return Programs(folder, lambda line: print(line, flush=True))


def compile_programs(args: argparse.Namespace) -> None:
    """Keeps the programs of a command line of samples: the work of launch/compile.py."""
    ready = prepare(args)
    batch_size = ready.model.config.sampling.batch_size
    batch = np.arange(wiring.whole_batch(ready.labels, batch_size, ready.placement))
    labels = ready.labels[batch % len(ready.labels)]
    with ready.placement.tracing():
        numbers = wiring.numbers(ready.placement, args.seed, batch)
        ready.programs.ready(ready.plan.program(ready.params, *numbers, labels))
    ready.decoder.make_ready()
    print(f"samples of {counted(len(batch), 'image')} at once start from {args.programs}")


def stream_of(args: argparse.Namespace, ready: Prepared) -> Stream:
    """What makes the pictures of a command line."""
    options = {
        "seed": args.seed,
        "placement": ready.placement,
        "batch_size": ready.model.config.sampling.batch_size,
        "decode": ready.decoder,
        "programs": ready.programs,
    }
    return Stream(
        lambda start: wiring.stream_images(
            ready.plan, ready.params, ready.labels, start=start, **options
        ),
        ready.record,
    )


def run(args: argparse.Namespace) -> None:
    """Samples what the command line asks for, into its --out."""
    evaluation.check_destination(args.out, overwrite=args.overwrite)
    ready = prepare(args, lambda *size: require_room(args, *size))
    model, labels = ready.model, ready.labels
    print(describe(model, len(labels), args.out), flush=True)
    stream = stream_of(args, ready)
    if samples_format(args.out) == "picture":
        images = np.concatenate(list(stream(0)))
        panel = evaluation.Panel(images)
        if model.config.model.num_classes:
            panel = evaluation.labelled_panel(images, labels)
        evaluation.save_panels(args.out, [panel], rounding=args.rounding, overwrite=args.overwrite)
    else:
        sample_to_store(args, model, labels, stream, ready.shape)
    made = counted(len(labels), "image")
    print(f"{made} of {model.weights}, step {model.step}: {args.out}")
