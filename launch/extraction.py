"""Encoding a split of images into a folder of latents: the work of launch/extract_features.py."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import data as data_lib
from dit_jax.data.captioned_folder import CAPTION, CaptionedImages, open_captioned_folder
from dit_jax.data.captioned_shards import open_captioned_shards
from dit_jax.data.images import as_size
from dit_jax.data.records import check_destination, unfinished_nulls
from dit_jax.data.records.header import LABEL
from dit_jax.interop import hub
from dit_jax.interop.autoencoder_kl import load_autoencoder
from dit_jax.launch import recording, wiring
from dit_jax.launch.text_extraction import (
    MAX_LENGTH,
    TextFeatures,
    find_encoders,
    open_texts,
    require_length,
)
from dit_jax.models.autoencoder_kl import AutoencoderKL
from dit_jax.models.linear import resolve_dtype
from dit_jax.named_options import options_named
from dit_jax.parallel import distributed
from dit_jax.parallel.mesh import DataParallel, create_mesh, put_whole
from dit_jax.quantities import counted

DEFAULT_BATCH = 32  # images a device
CAPTIONED = {"captioned_folder": open_captioned_folder, "captioned_shards": open_captioned_shards}


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
        "image_folder": {"path", "image_size", "buckets", "test_fraction"},
        **{name: {"path", "image_size", "buckets", "test_fraction"} for name in CAPTIONED},
        "tfds": {"path", "dataset", "image_size"},
        "jpeg_npz": {"path", "image_size"},
        "digits": {"image_size"},
    }[args.data]
    given = {"path": args.path or None, "dataset": args.dataset or None}
    given |= {"image_size": args.image_size, "test_fraction": args.test_fraction}
    given["buckets"] = args.buckets or None
    useless = [name for name, value in given.items() if value is not None and name not in takes]
    if useless:
        raise ValueError(f"--{useless[0]} does nothing with --data={args.data}: leave it out")
    folders = dict.fromkeys(("image_folder", *CAPTIONED, "jpeg_npz"), "path")
    needed = (folders | {"tfds": "dataset"}).get(args.data)
    if needed and given[needed] is None:
        raise ValueError(f"--data={args.data} needs --{needed}=...")
    options = {name: value for name, value in given.items() if value is not None}
    options["resize"] = "adm" if args.image_size or args.buckets else "none"
    if args.data == "digits":
        return options
    options["channels"] = channels
    if args.data == "jpeg_npz":
        options["keep_decoded"] = False  # each image is read once
    if args.data == "tfds" and "path" in options:
        options["data_dir"] = options.pop("path")
    return options


def open_images(args: argparse.Namespace, autoencoder: AutoencoderKL) -> data_lib.Source:
    """The images, checked against the autoencoder before anything is decoded.

    Raises:
        ValueError: a size or a number of channels that it cannot encode.
    """
    channels = autoencoder.config.in_channels
    if args.image_size is not None:
        autoencoder.latent_shape(*as_size(args.image_size))
    names = {
        "resize='adm' and image_size": f"--image_size={autoencoder.config.sample_size or 256}",
        "image_size": "--image_size",
        "buckets": "--buckets",
        "test_fraction": "--test_fraction",
    }
    with options_named(names):
        options = source_options(args, channels)
        if args.data in CAPTIONED:
            source = CAPTIONED[args.data](args.split, **options)
        else:
            source = data_lib.open_source(args.data, args.split, **options)
    height, width, found = source.info.image_shape
    if found != channels:
        raise ValueError(
            f"the images of {source.info.name} have {found} channels, the VAE encodes {channels}"
        )
    for size in [bucket.size for bucket in source.info.buckets] or [(height, width)]:
        autoencoder.latent_shape(*size)
    return source


def make_header(
    args: argparse.Namespace,
    autoencoder: AutoencoderKL,
    sha256: str,
    source: data_lib.Source,
    shard_size: int,
    texts: TextFeatures | None = None,
    text_dtype: str | None = None,
) -> data_lib.Header:
    """What the latents will be, with the embeddings of captions if there are `texts`."""
    vae = Path(args.vae).expanduser().absolute()
    info = source.info
    settings = {
        "data": args.data,
        "split": args.split,
        "image_size": args.image_size,
        "seed": args.seed,
        "compute_dtype": resolve_dtype(args.compute_dtype).name,
    }
    conditions = condition_fields(source) if texts is None else texts.fields(text_dtype)
    settings |= {} if texts is None else texts.provenance()
    shape = autoencoder.latent_shape(*info.image_shape[:2])
    if info.buckets:
        shape, settings["buckets"] = (None, None, shape[-1]), args.buckets
    return data_lib.latents_header(
        shape,
        scaling_factor=autoencoder.config.scaling_factor,
        shift_factor=autoencoder.config.shift_factor,
        dtype=args.dtype,
        kind=args.kind,
        flip=flip_of(args),
        conditions=conditions,
        provenance={
            "vae_name": vae.parent.name if vae.name == "vae" else vae.name,
            "vae_sha256": sha256,
            "source_name": info.name,
            "source_fingerprint": info.fingerprint,
            "settings": settings,
        },
        num_classes=info.num_classes,
        class_names=info.class_names,
        # TFDS has other names, slices too; the format knows these two.
        split="train" if args.split.startswith("train") else "test",
        shard_size=shard_size,
    )


def flip_of(args: argparse.Namespace) -> str:
    """--flip, by default none of captioned images: captions tell left from right."""
    return args.flip or ("none" if args.data in CAPTIONED else "pairs")


def check_captions(args: argparse.Namespace) -> None:
    """Refuses what the command line cannot mean of captions, before anything is read.

    Raises:
        ValueError: an option is missing, or would do nothing; a length that is no prompt's.
        InteropError: the encoders are no folder of a pipeline; those of the hub are fetched.
    """
    given = {"text_encoders": args.text_encoders, "text_length": args.text_length}
    given["text_dtype"] = args.text_dtype
    if args.data not in CAPTIONED:
        idle = [name for name, value in given.items() if value is not None]
        if idle:
            raise ValueError(f"--{idle[0]} does nothing with --data={args.data}: leave it out")
        return
    if args.text_encoders is None:
        raise ValueError(
            f"--data={args.data} needs --text_encoders=PIPELINE, the folder of the CLIP and T5 "
            "that captions are told by, or for instance hub:black-forest-labs/FLUX.1-dev"
        )
    require_length(text_length_of(args))
    find_encoders(args.text_encoders)


def open_captions(args: argparse.Namespace) -> tuple[TextFeatures, str] | tuple[None, None]:
    """The encoders of captions and the dtype of T5's states on disk, if there are captions."""
    if args.data not in CAPTIONED:
        return None, None
    texts = open_texts(args.text_encoders, text_length_of(args), args.compute_dtype)
    return texts, args.text_dtype or "bfloat16"


def text_length_of(args: argparse.Namespace) -> int:
    """--text_length, by default the longest."""
    return MAX_LENGTH if args.text_length is None else args.text_length


def condition_fields(source: data_lib.Source) -> dict[str, data_lib.Field]:
    """What the images' conditions are stored as; their shapes are those of the first example."""
    names = source.info.conditions
    fields = {"label": LABEL} if "label" in names else {}
    others = [name for name in names if name not in fields]
    example = source.batch(np.array([0])) if others else {}
    for name in others:
        values = example[name]
        fields[name] = data_lib.Field(values.shape[1:], values.dtype.name, condition=True)
    return fields


def make_encoder(
    autoencoder: AutoencoderKL, placement: DataParallel, *, kind: str, flip: str, seed: int
) -> Callable[[Any, np.ndarray, np.ndarray], jax.Array]:
    """A function (params, images float32 [b, h, w, c], their numbers int32 [b]) -> stored values.

    The values are those of the field "latents" on disk, split over the devices as the images are.
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

    return encode


def read_batches(
    source: data_lib.Source, batch_size: int, *, start: int, num_workers: int
) -> Iterator[tuple[np.ndarray, data_lib.Batch]]:
    """This process's share of batches in the source's order from image `start` on.

    They are decoded ahead by threads or workers. The last is filled up: one compiled shape.

    Yields:
        The numbers of all processes' images of the batch, and the batch with its conditions.
    """
    options = {"batch_size": batch_size, "num_workers": num_workers}
    first = 0
    for part in parts_of(source):
        skipped = min(max(0, start - first), len(part))
        yield from _read_part(part, start=skipped, first=first, **options)
        first += len(part)


def _read_part(
    source: data_lib.Source, batch_size: int, *, start: int, first: int, num_workers: int
) -> Iterator[tuple[np.ndarray, data_lib.Batch]]:
    """`read_batches` of images of one size, of which image 0 is number `first`."""
    if start >= len(source):  # killed between its last shard and what follows
        return
    count = jax.process_count()
    loader = data_lib.make_loader(
        source,
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        repeat=False,
        drop_remainder=False,
        num_workers=num_workers,
        process_index=jax.process_index(),
        process_count=count,
    )
    batches = iter(loader)
    batches.set_state({**batches.get_state(), "next_batch": start // batch_size})

    def filled(array: np.ndarray) -> np.ndarray:
        missing = batch_size // count - len(array)
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

    try:
        for number, batch in enumerate(batches):
            batch = jax.tree.map(filled, {"image": batch["image"], **batch["conditions"]})
            begun = first + start + number * batch_size
            yield np.arange(batch_size, dtype=np.int32) + begun, batch
    finally:
        batches.close()


class _Part(data_lib.Source):
    """The images of one bucket of a source."""

    def __init__(self, source: data_lib.Source, bucket: int):
        self._source, self._members = source, source.members(bucket)
        found, channels = source.info.buckets[bucket], source.info.image_shape[-1]
        self.slow_to_read = source.slow_to_read
        self.info = dataclasses.replace(
            source.info,
            image_shape=(*found.size, channels),
            num_examples=found.count,
            buckets=(),
        )

    def __getitem__(self, index: int) -> data_lib.Example:
        return self._source[int(self._members[index])]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._members[index]))

    def batch(self, indices, **options) -> data_lib.Batch:
        return self._source.batch(self._members[indices], **options)


def parts_of(source: data_lib.Source) -> list[data_lib.Source]:
    """A source whose images have one size, or a source for each of its buckets."""
    return [_Part(source, number) for number in range(len(source.info.buckets))] or [source]


def batch_counts(source: data_lib.Source, batch_size: int) -> list[int]:
    """Images of each batch: the last of every size may have fewer."""
    counts = []
    for part in parts_of(source):
        full, rest = divmod(len(part), batch_size)
        counts += [batch_size] * full + [rest] * bool(rest)
    return counts


def tell_of_captions(texts: TextFeatures, source: CaptionedImages) -> None:
    """Says how many captions there are, and which do not fit the encoders."""
    captions = [source.captions[number] for number in source.used]
    told = counted(len(set(captions)), "different caption")
    print(f"{told}, told by {texts.name} in {texts.t5.length} tokens of T5", flush=True)
    empty = [number for number, text in enumerate(captions) if not text.strip()]
    if empty:
        are = "is" if len(empty) == 1 else "are"
        print(
            f"note: {len(empty)} of {counted(len(captions), 'caption')} {are} empty, as dropped "
            f"captions are; the first is of {source.describe(empty[0])}",
            flush=True,
        )
    for line in texts.cut_captions(captions, source.describe):
        print(line, flush=True)


def run(args: argparse.Namespace) -> tuple[Path, data_lib.Header]:
    """Extracts the latents of one split; returns their folder and what they are."""
    check_captions(args)
    folder = args.out.expanduser() / ("train" if args.split.startswith("train") else "test")
    check_destination(folder, "latents", "another --out")
    placement = DataParallel(create_mesh())
    batch_size, shard_size = choose_sizes(args.batch_size, args.shard_size, placement.num_devices)
    several = jax.process_count() > 1  # each reads it, and what they read becomes one array
    autoencoder, params, sha256 = load_autoencoder(
        hub.resolve(args.vae),
        dtype=args.compute_dtype,
        sharding=None if several else placement.replicated,
    )
    if several:
        params = jax.tree.map(lambda array: put_whole(array, placement.replicated), params)
    source = open_images(args, autoencoder)
    texts, text_dtype = open_captions(args)
    header = make_header(args, autoencoder, sha256, source, shard_size, texts, text_dtype)
    encode = make_encoder(
        autoencoder, placement, kind=args.kind, flip=flip_of(args), seed=args.seed
    )
    nulls, embed = source.info.null_conditions, None
    if texts:
        distributed.on_first(lambda: tell_of_captions(texts, source))
        embed = texts.encoding(placement)
        nulls = texts.nulls(embed, placement, batch_size)
        # Of a set that was begun: another --batch_size is another program, which rounds otherwise.
        nulls |= distributed.on_first(lambda: unfinished_nulls(folder)) or {}

    def compute(given) -> dict[str, jax.Array]:
        numbers, batch = given
        if texts:
            captions = [source.captions[number] for number in batch.pop(CAPTION)]
            batch |= texts.ids(captions)
        batch = placement.put_batch(batch)
        latents = encode(params, batch.pop("image"), put_whole(numbers, placement.split))
        latents.copy_to_host_async()
        return {"latents": latents, **(embed(batch) if embed else batch)}

    size = "x".join(map(str, header.fields["latents"].shape))
    if source.info.buckets:
        listed = ", ".join(f"{bucket} ({bucket.count})" for bucket in source.info.buckets)
        size = f"{len(source.info.buckets)} sizes, of images of {listed}"
    header = recording.record(
        folder,
        header,
        lambda start: read_batches(source, batch_size, start=start, num_workers=args.num_workers),
        compute,
        what=f"{len(source)} images of {source.info.name}, {args.split} -> {args.kind} of {size}, "
        f"flip {flip_of(args)}, with {header.provenance['vae_name']}",
        done="encoded",
        unit="image",
        total=len(source),
        batch_size=batch_size,
        counts=batch_counts(source, batch_size),
        nulls=nulls,
        remedy="--dtype=float16 halves that, --kind=samples too",
    )
    return folder, header
