"""Encoding a split of images into a folder of latents: the work of launch/extract_features.py."""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import data as data_lib
from dit_jax.data.shards import HEADER, UNFINISHED
from dit_jax.interop import hub
from dit_jax.interop.autoencoder_kl import load_autoencoder
from dit_jax.launch import wiring
from dit_jax.models.autoencoder_kl import AutoencoderKL
from dit_jax.models.linear import resolve_dtype
from dit_jax.named_options import options_named
from dit_jax.parallel.mesh import DataParallel, create_mesh
from dit_jax.training.metrics import format_duration

SETTINGS = "extraction.json"
DEFAULT_BATCH = 32  # images a device


def choose_sizes(
    batch_size: int | None, shard_size: int | None, num_devices: int
) -> tuple[int, int]:
    """Batch and shard size; a shard holds whole batches, so that resuming cuts none differently.

    Raises:
        ValueError: the devices cannot share the batch, or a shard would split one.
    """
    batch_size = DEFAULT_BATCH * num_devices if batch_size is None else batch_size
    if batch_size < 1 or batch_size % num_devices:
        raise ValueError(f"--batch_size={batch_size}: expected a multiple of {num_devices} devices")
    return batch_size, wiring.choose_shard_size(shard_size, batch_size)


def source_options(args: argparse.Namespace, channels: int) -> dict[str, Any]:
    """What `open_source` needs for the command line.

    Raises:
        ValueError: an option is missing, or does nothing for this source.
    """
    takes = {
        "image_folder": {"path", "image_size", "test_fraction"},
        "tfds": {"path", "dataset", "image_size"},
        "jpeg_npz": {"path", "image_size"},
        "digits": {"image_size"},
    }[args.data]
    given = {"path": args.path or None, "dataset": args.dataset or None}
    given |= {"image_size": args.image_size, "test_fraction": args.test_fraction}
    useless = [name for name, value in given.items() if value is not None and name not in takes]
    if useless:
        raise ValueError(f"--{useless[0]} does nothing with --data={args.data}: leave it out")
    needed = {"image_folder": "path", "jpeg_npz": "path", "tfds": "dataset"}.get(args.data)
    if needed and given[needed] is None:
        raise ValueError(f"--data={args.data} needs --{needed}=...")
    options = {name: value for name, value in given.items() if value is not None}
    if args.data == "digits":
        options.pop("image_size", None)
        return options
    options["channels"] = channels
    if args.data == "jpeg_npz":
        options.pop("image_size", None)
        return {**options, "keep_decoded": False}  # each image is read once
    if args.data == "tfds" and "path" in options:
        options["data_dir"] = options.pop("path")
    return {**options, "resize": "adm" if args.image_size else "none"}


def open_images(args: argparse.Namespace, autoencoder: AutoencoderKL) -> data_lib.Source:
    """The images, checked against the autoencoder before anything is decoded.

    Raises:
        ValueError: a size or a number of channels that it cannot encode.
    """
    channels = autoencoder.config.in_channels
    if args.image_size is not None:
        autoencoder.latent_shape(args.image_size, args.image_size)
    names = {
        "resize='adm' and image_size": f"--image_size={autoencoder.config.sample_size or 256}",
        "image_size": "--image_size",
        "test_fraction": "--test_fraction",
    }
    with options_named(names):
        source = data_lib.open_source(args.data, args.split, **source_options(args, channels))
    height, width, found = source.info.image_shape
    if args.image_size is not None and (height, width) != (args.image_size,) * 2:
        raise ValueError(
            f"the images of {source.info.name} are {height}x{width} and --data={args.data} cannot "
            f"resize: leave out --image_size={args.image_size}"
        )
    if found != channels:
        raise ValueError(
            f"the images of {source.info.name} have {found} channels, the VAE encodes {channels}"
        )
    autoencoder.latent_shape(height, width)
    return source


def make_header(
    args: argparse.Namespace, autoencoder: AutoencoderKL, sha256: str, info: data_lib.DatasetInfo
) -> data_lib.LatentsHeader:
    """What the latents will be."""
    vae = Path(args.vae).expanduser().absolute()
    name = vae.parent.name if vae.name == "vae" else vae.name
    return data_lib.LatentsHeader(
        vae_name=name,
        vae_sha256=sha256,
        scaling_factor=autoencoder.config.scaling_factor,
        shift_factor=autoencoder.config.shift_factor,
        latent_shape=autoencoder.latent_shape(*info.image_shape[:2]),
        num_classes=info.num_classes,
        class_names=info.class_names,
        dtype=args.dtype,
        kind=args.kind,
        flip=args.flip,
        # TFDS has other names, slices too; the format knows these two.
        split="train" if args.split.startswith("train") else "test",
        source_name=info.name,
        source_fingerprint=info.fingerprint,
    )


def check_destination(folder: Path) -> None:
    """Refuses early what would be refused after the VAE and the images were opened.

    Raises:
        FileExistsError: finished latents, or other files, are there.
    """
    if (folder / HEADER).exists():
        raise FileExistsError(
            f"{folder} holds a finished set of latents: delete it or choose another --out"
        )
    foreign = folder.is_dir() and {path.stem for path in folder.iterdir()} - {Path(SETTINGS).stem}
    if folder.exists() and (not folder.is_dir() or (foreign and not (folder / SETTINGS).exists())):
        raise FileExistsError(
            f"{folder} exists and was not begun by this command: choose another --out"
        )


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Records what decides the bits and is not in the header, or compares it with the record.

    Raises:
        ValueError: the extraction was begun with other settings.
    """
    path = folder / SETTINGS
    if path.exists() and (folder / UNFINISHED).exists():
        begun = json.loads(path.read_text())
        differing = [
            f"{name}: {begun.get(name)!r} -> {value!r}"
            for name, value in settings.items()
            if begun.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{folder} was begun with other settings ({'; '.join(differing)}): use those, or "
                f"another --out"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(temporary, path)


def make_encoder(
    autoencoder: AutoencoderKL, placement: DataParallel, *, kind: str, flip: str, seed: int
) -> Callable[[Any, np.ndarray, np.ndarray], jax.Array]:
    """A function (params, images float32 [b, h, w, c], their numbers int32 [b]) -> stored values.

    The values are those of `LatentsHeader.record_shape`, split over the devices as the images are.
    Noise depends on the seed and an image's number only, not on batches and devices.
    """
    key = jax.random.key(seed)

    @functools.partial(jax.jit, out_shardings=placement.split)
    def encode(params, images, numbers):
        if flip == "pairs":
            images = jnp.stack([images, images[:, :, ::-1]], axis=1)
            images = images.reshape(-1, *images.shape[2:])
        mean, logvar = autoencoder.encode(params, images)
        shape = (numbers.shape[0], -1, *mean.shape[1:])
        mean, logvar = mean.reshape(shape), logvar.reshape(shape)
        if kind == "moments":
            return jnp.concatenate([mean, logvar], axis=-1)
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return mean + jnp.exp(0.5 * logvar) * noise

    def run(params, images, numbers):
        images, numbers = jax.device_put((images, numbers), placement.split)
        return encode(params, images, numbers)

    return run


def read_batches(
    source: data_lib.Source, batch_size: int, *, start: int, num_workers: int
) -> Iterator[data_lib.Batch]:
    """Batches in the source's order from image `start` on, decoded ahead by threads or workers."""
    if start >= len(source):  # killed between the last shard and the header
        return
    loader = data_lib.make_loader(
        source,
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        repeat=False,
        drop_remainder=False,
        num_workers=num_workers,
    )
    batches = iter(loader)
    batches.set_state({**batches.get_state(), "next_batch": start // batch_size})
    try:
        yield from batches
    finally:
        batches.close()


def extract(
    batches: Iterator[data_lib.Batch],
    encode: Callable[[np.ndarray, np.ndarray], jax.Array],
    writer: data_lib.LatentsWriter,
    *,
    batch_size: int,
    total: int,
    seconds_between_reports: float = 10.0,
) -> None:
    """Encodes and writes what `writer` lacks.

    While the devices encode a batch, threads decode the next ones and this one writes the last.
    """
    first = number = writer.count
    begun = reported = time.perf_counter()
    pending: tuple[jax.Array, np.ndarray] | None = None

    def store() -> None:
        latents, labels = pending
        writer.add(np.asarray(latents)[: len(labels)], labels)

    for batch in batches:
        images, labels = batch["image"], batch["conditions"]["label"]
        missing = batch_size - len(images)  # the last batch is filled up: one compiled shape
        images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], mode="edge")
        encoded = encode(images, np.arange(number, number + batch_size, dtype=np.int32))
        encoded.copy_to_host_async()
        if pending:
            store()
            done, now = number - first, time.perf_counter()
            if now - reported >= seconds_between_reports:
                rate = done / (now - begun)
                left = format_duration((total - number) / rate)
                print(f"encoded {number}/{total}  {rate:.4g} images/s  ETA {left}", flush=True)
                reported = now
        pending = encoded, labels
        number += len(labels)
    if pending:
        store()
    seconds = time.perf_counter() - begun
    print(f"encoded {number}/{total}  {(number - first) / seconds:.4g} images/s", flush=True)


def run(args: argparse.Namespace) -> tuple[Path, data_lib.LatentsHeader]:
    """Extracts the latents of one split; returns their folder and what they are."""
    if jax.process_count() > 1:
        raise ValueError("extraction runs in one process, over all of its devices")
    folder = args.out.expanduser() / ("train" if args.split.startswith("train") else "test")
    check_destination(folder)
    placement = DataParallel(create_mesh())
    batch_size, shard_size = choose_sizes(args.batch_size, args.shard_size, placement.num_devices)
    autoencoder, params, sha256 = load_autoencoder(
        hub.resolve(args.vae), dtype=args.compute_dtype, sharding=placement.replicated
    )
    source = open_images(args, autoencoder)
    header = make_header(args, autoencoder, sha256, source.info)
    settings = {
        "data": args.data,
        "split": args.split,
        "image_size": args.image_size,
        "shard_size": shard_size,
        "seed": args.seed,
        "compute_dtype": resolve_dtype(args.compute_dtype).name,
    }
    check_settings(folder, settings)
    total = len(source)
    with data_lib.LatentsWriter(folder, header, shard_size=shard_size, resume=True) as writer:
        what = (
            f"{total} images of {source.info.name}, {args.split} -> {args.kind} of "
            f"{header.latent_shape}, flip {args.flip}, with {header.vae_name}"
        )
        print(wiring.first_screen(what, folder, "time left: every 10 seconds"), flush=True)
        if writer.count:
            print(f"continuing after {writer.count} images", flush=True)
        encode = make_encoder(
            autoencoder, placement, kind=args.kind, flip=args.flip, seed=args.seed
        )
        extract(
            read_batches(source, batch_size, start=writer.count, num_workers=args.num_workers),
            functools.partial(encode, params),
            writer,
            batch_size=batch_size,
            total=total,
        )
    return folder, header
