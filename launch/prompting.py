"""Pictures of prompts by a pretrained pipeline: the work of launch/sample.py --pretrained."""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax import evaluation
from dit_jax.data.images import DECODE_ERRORS, decode_image
from dit_jax.interop.lora_runs import open_adapter
from dit_jax.interop.lora_scales import PEFT_CONFIG
from dit_jax.interop.models import FoundModel, open_model
from dit_jax.interop.parameters import parameter_shapes
from dit_jax.interop.tensor_file import sha256_of
from dit_jax.launch import arguments, sampling, wiring
from dit_jax.models import Network
from dit_jax.models.lora import Adapter
from dit_jax.named_options import options_named
from dit_jax.output_formats import samples_format
from dit_jax.parallel.mesh import create_mesh
from dit_jax.pipelines.divided import bytes_a_device
from dit_jax.pipelines.flux import FluxPipeline
from dit_jax.quantities import counted, format_bytes
from dit_jax.training import memory, workdir

# Names of the pipeline's arguments, in its errors, on the command line.
_FLAGS = wiring.PARALLEL_FLAGS | {
    name: f"--{name}"
    for name in ("height", "width", "max_sequence_length", "guidance_scale", "vae_devices")
}
_FLAGS |= {"num_inference_steps": "--steps", "vae_tile": "--vae_tile"}
_DEFAULT_BATCH = 4  # pictures at once
# What makes weights smaller, or keeps them elsewhere.
SMALLER = (
    "--param_dtype=bfloat16 halves float32 weights, --quantization=int8 or fp8 the transformer's "
    "again, --offload keeps the encoders' on the host"
)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, one a line.

    Raises:
        ValueError: there is no such file; a line is empty, which is named; or there is none; or it
            is no text.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts={file} is no text: expected UTF-8") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"--prompts={file} cannot be read ({reason}): expected a file of prompts, one a line"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(
                f"--prompts={file}, line {number} is empty: expected a prompt on every line (for "
                "a picture of the empty prompt, --prompt='')"
            )
    if not lines:
        raise ValueError(f"--prompts={file} is empty: expected a prompt on every line")
    return lines


def prompts_of(args: argparse.Namespace) -> list[str]:
    """One prompt a picture: those given, in turn."""
    prompts = args.prompt if args.prompts is None else read_prompts(args.prompts)
    count = args.num_images or len(prompts)
    return [prompts[i % len(prompts)] for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures number `start` on, in batches.

    Attributes:
        pipeline: that makes them.
        prompts: one a picture.
        seed: picture i depends on it, on i, and on its prompt.
        batch_size: pictures at once.
        options: of the pipeline's call.
    """

    pipeline: FluxPipeline
    prompts: list[str]
    seed: int
    batch_size: int
    options: dict[str, Any]

    def __call__(self, start: int = 0) -> Iterator[np.ndarray]:
        """Yields them as bytes [n, h, w, c]; the last batch is filled up, for the same program."""
        count = len(self.prompts)
        for first in range(start, count, self.batch_size):
            places = range(first, first + self.batch_size)
            prompts = [self.prompts[min(i, count - 1)] for i in places]
            options = {**self.options, "seed": self.seed, "first_image": first}
            latents = self.pipeline(prompts, output_type="latent", **options).images
            kept = latents[: min(self.batch_size, count - first)]
            yield evaluation.to_uint8(self.pipeline.decode(kept))


def _arithmetic(args: argparse.Namespace) -> dict[str, Any]:
    """What is computed in which numbers, and what is skipped: arguments of the pipeline."""
    return {
        "dtype": args.dtype or "auto",
        "param_dtype": args.param_dtype or "auto",
        "quantization": args.quantization or "none",
        "step_cache": args.step_cache or 0.0,
    }


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was trained here, of a pipeline: a transformer in place of its own, or a LoRA of that.

    Attributes:
        transformer: None for the pipeline's.
        adapter: a network and its LoRA; None for none.
    """

    transformer: FoundModel | None = None
    adapter: tuple[Network, Adapter] | None = None


def open_tuned(args: argparse.Namespace) -> Tuned:
    """What --workdir or --init_from names; nothing, where neither is given.

    Raises:
        WorkdirError, CheckpointError, InteropError: it cannot be read.
    """
    source = args.workdir or args.init_from
    if not source:
        return Tuned()
    choice = {"weights": args.weights, "step": args.step}
    if args.workdir and workdir.load_config(args.workdir).lora.rank:
        network, adapter = open_adapter(args.workdir, **choice)
        print(f"{args.workdir}: a LoRA of rank {adapter.rank}", flush=True)
        return Tuned(adapter=(network, adapter))
    choice["allow_nonfinite"] = args.allow_nonfinite
    found = open_model(str(source), kind="dit_jax" if args.workdir else "auto", **choice)
    step = f", step {found.step}" if found.step else ""
    print(f"transformer of {source}{found.chosen_weights}{step}", flush=True)
    return Tuned(transformer=found)


def _add_adapter(pipeline: FluxPipeline, run: Path, network: Network, adapter: Adapter) -> None:
    """Uses the LoRA of a run.

    Raises:
        ValueError: the pipeline's transformer is not of the shape of the run's network.
    """
    own = pipeline.parts.transformer
    if dict(parameter_shapes(network)) != dict(parameter_shapes(own)):
        raise ValueError(
            f"--workdir={run} is a LoRA of a {network.config.title}, the pipeline has a "
            f"{own.config.title}: give the one that it was trained for (config.lora.base)"
        )
    pipeline.add_adapter(adapter)


def _load_adapters(pipeline: FluxPipeline, args: argparse.Namespace) -> None:
    options = {
        "ignore_text_encoders": args.lora_ignore_text_encoders,
        "allow_nonfinite": args.allow_nonfinite,
    }
    for path, weight in args.lora or ():
        pipeline.load_lora_weights(path, weight, **options)


def open_pipeline(args: argparse.Namespace) -> FluxPipeline:
    """The pipeline that the options choose, and how it runs."""
    options = {
        **_arithmetic(args),
        "offload": args.offload,
        "mesh": mesh_of(args),
        "parallel": wiring.image_parallel(args),
        "vae_devices": args.vae_devices,
        "vae_tile": args.vae_tile,
        "programs": sampling.open_programs(args.programs),
    }
    tuned = open_tuned(args)
    with memory.exhaustion_explained(f"loading {args.pretrained}", SMALLER):
        pipeline = FluxPipeline.from_pretrained(
            args.pretrained, transformer=tuned.transformer, **options
        )
        for note in () if tuned.transformer is None else tuned.transformer.finiteness.note():
            print(f"note: {note}", flush=True)
        if tuned.adapter is not None:
            _add_adapter(pipeline, args.workdir, *tuned.adapter)
        _printing_warnings(lambda: _load_adapters(pipeline, args))
    if options["mesh"] is not None:
        parts = pipeline.parts
        held = bytes_a_device(parts.params, parts.clip.params, parts.t5.params)
        divided = f"weights divided over {options['mesh'].size} devices, each with at most"
        print(f"{divided} {format_bytes(held)}", flush=True)
    return pipeline


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The devices of --fsdp and --tensor; None where neither divides anything.

    Raises:
        ValueError: there are not so many.
    """
    fsdp, tensor = args.fsdp or 1, args.tensor or 1
    if fsdp * tensor == 1:
        return None
    devices = jax.devices()
    if fsdp * tensor > len(devices):
        raise ValueError(
            f"--fsdp={fsdp} times --tensor={tensor} are {fsdp * tensor} devices; there are "
            f"{len(devices)}"
        )
    return create_mesh(data=1, fsdp=fsdp, tensor=tensor, devices=devices[: fsdp * tensor])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call."""
    return {
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "max_sequence_length": args.max_sequence_length,
    }


def read_image(args: argparse.Namespace) -> dict[str, Any]:
    """What is to be edited, as arguments of the pipeline's call; {} for nothing.

    Raises:
        ValueError: --image cannot be read.
    """
    if args.image is None:
        return {}
    try:
        pixels = decode_image(args.image, channels=3)
    except DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--image={args.image} cannot be read: {reason}") from error
    return {"image": pixels, "auto_resize": not args.keep_image_size}


def compile_programs(args: argparse.Namespace) -> None:
    """Keeps the programs of a command line of prompts: the work of launch/compile.py."""
    given = args.prompt is not None or args.prompts is not None
    count = len(prompts_of(args)) if given else args.num_images or 1
    batch_size = min(args.batch_size or _DEFAULT_BATCH, count)
    pipeline = open_pipeline(args)

    def work() -> None:
        _print_notes(check(pipeline, args, batch_size))
        options = settings(args)
        del options["guidance_scale"]  # an input
        pipeline.compile(num_images=batch_size, **options)

    _printing_warnings(work)
    made = counted(batch_size, "picture")
    print(f"{made} at once of {pipeline.title} start from {args.programs}")


def check_image(pipeline: FluxPipeline, args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Refuses an --image that the pipeline cannot edit; says so where it was not trained to.

    Raises:
        ValueError: it is too small; pictures of the pipeline are not of RGB.
    """
    try:
        pipeline.reference_pixels(options["image"], auto_resize=options["auto_resize"])
    except ValueError as error:
        raise ValueError(f"--image={args.image}: {error}") from error
    if not pipeline.parts.kontext:
        print(
            f"note: {args.pretrained} was not saved as a FluxKontextPipeline, which is what edits "
            "images",
            flush=True,
        )


def check(pipeline: FluxPipeline, args: argparse.Namespace, batch_size: int) -> tuple[str, ...]:
    """Refuses what the pipeline cannot make, before anything is compiled.

    Returns:
        How an image is split over devices, in words.

    Raises:
        ValueError: sizes, a guidance scale, devices that it does not take.
    """
    if args.guidance_scale and not pipeline.is_guided:
        raise ValueError(
            f"--guidance_scale={args.guidance_scale:g}: {pipeline.title} is not told a guidance "
            "scale; leave it out"
        )
    with options_named(_FLAGS):
        return pipeline.check(batch_size, **settings(args))


def run(args: argparse.Namespace) -> None:
    """Samples what the command line asks for, into its --out."""
    evaluation.check_destination(args.out, overwrite=args.overwrite)
    prompts, options = prompts_of(args), settings(args) | read_image(args)
    pipeline = open_pipeline(args)
    if args.image is not None:
        check_image(pipeline, args, options)
    batch_size = min(args.batch_size or _DEFAULT_BATCH, len(prompts))

    def work() -> None:
        notes = check(pipeline, args, batch_size)  # before the first screen promises
        pictures = Pictures(pipeline, prompts, args.seed, batch_size, options)
        what = f"sampling {counted(len(prompts), 'picture')} of {args.pretrained}, {pipeline.title}"
        _print_notes(notes)
        print(_screen(what, args), flush=True)
        remedy = f"lower --batch_size={batch_size}, --height or --width, or give --vae_tile=64; "
        what = f"sampling {counted(batch_size, 'picture')} at once"
        with memory.exhaustion_explained(what, remedy + SMALLER):
            _write(args, pictures)

    _printing_warnings(work)
    print(f"{counted(len(prompts), 'picture')}: {args.out}")


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", flush=True)


def _screen(what: str, args: argparse.Namespace) -> str:
    return wiring.first_screen(what, args.out, "time left: known after the first batch")


def record_of(args: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    """Everything that decides pictures, as JSON values: only a run of equal ones goes on."""
    ways = (
        "fsdp",
        "tensor",
        "parallel",
        "patch_devices",
        "warmup_steps",
        "ulysses_devices",
        "vae_tile",
    )
    record = {
        "pretrained": str(args.pretrained),
        **{
            name: str(value)
            for name in ("workdir", "init_from", "weights", "step", "fsdp", "tensor")
            if arguments.is_given(value := getattr(args, name))
        },
        "seed": args.seed,
        "num_images": len(prompts),
        "prompts": prompts,
        **_arithmetic(args),
        **{name: getattr(args, name) for name in (*ways, "vae_devices")},
        **settings(args),
    }
    if args.image is not None:
        record["image"] = sha256_of(args.image)
        record["keep_image_size"] = args.keep_image_size
    if args.workdir and args.step is None:
        record["step"] = _newest_step(args.workdir)
    if args.lora:
        record["lora"] = [
            {"path": str(path), "sha256": _contents(Path(path)), "weight": weight}
            for path, weight in args.lora
        ]
        record["lora_ignore_text_encoders"] = args.lora_ignore_text_encoders
    return record


def _newest_step(run: Path) -> int:
    """Of a run's checkpoints: what is sampled where no step is given."""
    names = (path.name for path in (run / workdir.CHECKPOINTS).glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _contents(path: Path) -> list[str]:
    """Of a LoRA's file, or of those of its folder, and of PEFT's configuration beside it."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    beside = (path if path.is_dir() else path.parent) / PEFT_CONFIG
    return [sha256_of(file) for file in (*files, beside) if file.is_file()]


def _write(args: argparse.Namespace, pictures: Pictures) -> None:
    if samples_format(args.out) == "picture":
        images = np.concatenate(list(pictures()))
        evaluation.save_grid(args.out, images, overwrite=args.overwrite)
        return
    pipeline, count = pictures.pipeline, len(pictures.prompts)
    shape = (*pipeline.picture_size(args.height, args.width), pipeline.channels)
    record, restart = record_of(args, pictures.prompts), {"restart": args.overwrite}
    store = evaluation.SampleStore(args.out, count, shape, record, **restart)
    if store.done:
        print(f"going on at picture {store.done} of {count}", flush=True)
    for images in pictures(store.done):
        store.append(images)
    store.finish(None, overwrite=args.overwrite)


def _printing_warnings(work: Callable[[], None]) -> None:
    """Does `work`; what it warns of is printed as the commands print it, each once."""
    said = set()

    def show(message: Any, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            print(f"warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        work()
