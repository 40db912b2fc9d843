"""FID and its kin of samples against a reference set: the part of launch/evaluate.py for them."""

import argparse
import functools
from pathlib import Path
from typing import Any

from dit_jax import evaluation, experiment
from dit_jax.evaluation.sample_store import record_path
from dit_jax.interop.inception import default_cache_dir, load_extractor
from dit_jax.launch import arguments, loading, sampling, wiring
from dit_jax.parallel.mesh import create_mesh
from dit_jax.training.metrics import format_duration
from dit_jax.untrusted import read_json


def protocol_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling of --protocol, over which single options still go."""
    if not args.protocol:
        return {}
    return dict(evaluation.find_protocol(args.protocol).sampling)


def _announce(progress: evaluation.Progress) -> None:
    print(
        f"{progress.what}: {progress.done}/{progress.total}  "
        f"{progress.images_per_second:.4g} images/s  ETA {format_duration(progress.eta_seconds)}",
        flush=True,
    )


def existing_samples(path: Path) -> tuple[Any, dict[str, Any]]:
    """Samples on disk and what the record beside them says.

    Raises:
        FileNotFoundError: there are none.
    """
    if not path.exists():
        raise FileNotFoundError(f"--samples={path}: there is no such file or folder")
    images = evaluation.FolderImages(path) if path.is_dir() else evaluation.NpzImages(path)
    record = record_path(path)
    return images, read_json(record) if record.is_file() else {}


def new_samples(
    args: argparse.Namespace, model: loading.TrainedModel
) -> tuple[evaluation.BatchImages, dict[str, Any]]:
    """Samples made while they are scored, and how."""
    protocol = evaluation.find_protocol(args.protocol) if args.protocol else None
    count = args.num_images or (protocol and protocol.num_images)
    count = count or model.config.evaluation.num_images
    sampling.require_memory(count)
    rounding = args.rounding or (protocol.rounding if protocol else "nearest")
    placement = wiring.create_placement(model.config)
    decoder = loading.Decoder(model.config, model.autoencoder, placement)
    batch_size = min(count, model.config.sampling.batch_size)
    shape = decoder.image_shape(model.network.sample_shape)
    sampling.require_batch_memory(batch_size, shape)
    stream = wiring.stream_images(
        experiment.build_sampling(model.config),
        model.params,
        wiring.balanced_labels(count, model.config.model.num_classes),
        seed=args.seed,
        placement=placement,
        batch_size=model.config.sampling.batch_size,
        decode=decoder,
        announce=False,
    )
    images = evaluation.BatchImages(stream, count, rounding, description="sampled for this score")
    record = loading.provenance(model, decoder)
    record |= {"seed": args.seed, "rounding": rounding}
    return images, record


def require_reference(reference: str) -> None:
    """Refuses a --reference that is not there.

    Raises:
        FileNotFoundError: naming it.
    """
    if not reference.startswith("tfds:") and not Path(reference).expanduser().exists():
        raise FileNotFoundError(f"--reference={reference}: there is no such file or folder")


def require_enough(
    count: int, settings: evaluation.ScoreSettings, dim: int, *, of_file: bool
) -> None:
    """Refuses too few images for a score that is wanted in any case, before any are made or read.

    Args:
        count: images to score.
        settings: which scores; those that a reference may not permit are left to
            `evaluation.evaluate_images` unless they are named.
        dim: features of the extractor.
        of_file: the images are there already.

    Raises:
        TooFewSamplesError: naming the least number.
    """
    named = settings.scores or ("fid",)
    least = {"fid": 2 if settings.allow_singular else dim + 1, "kid": settings.kid_subset_size}
    for name in named:
        if count < least.get(name, 2):
            given = f"--samples: {count} images" if of_file else f"--num_images={count}"
            raise evaluation.TooFewSamplesError(
                f"{given}: {name} needs at least {least.get(name, 2)}. "
                + ("Score more images" if of_file else "Give a larger --num_images")
                + (", or --allow_singular for a quick look" if name == "fid" else "")
                + ", or leave it out of --scores"
            )


def _provenance(record: dict[str, Any]) -> dict[str, Any]:
    """A sampling record as `evaluation.comparison_table` reads it."""
    renamed = {k: v for k, v in record.items() if k not in ("seed", "rounding", "model")}
    if "autoencoder" in renamed:
        renamed["vae"] = renamed.pop("autoencoder")
    if "model" in record:
        renamed["model"], renamed["network"] = model_name(record["model"]), record["model"]
    return renamed


def model_name(section: dict[str, Any]) -> str:
    """The field's name of a model section, 'DiT-XL/2', or what it is."""
    return experiment.network_of(section).config.title


def score(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Scores what the command line names.

    Returns:
        The record, and what to print of it.
    """
    # Before the long part, and before weights are fetched: whether all that is named is there.
    existing = existing_samples(args.samples) if args.samples else None
    require_reference(args.reference)
    mesh = create_mesh()
    if existing:
        images, record = existing
    else:
        overrides = protocol_overrides(args) | arguments.sampling_overrides(args)
        images, record = new_samples(
            args,
            loading.load_from_arguments(
                args, overrides, functools.partial(sampling.require_labels, args)
            ),
        )
    scores = tuple(args.scores) if args.scores else None
    settings = evaluation.ScoreSettings(scores=scores, allow_singular=args.allow_singular)
    batch_size = -(-args.feature_batch_size // mesh.size) * mesh.size
    extractor = load_extractor(
        args.inception,
        allow_other=args.other_inception_weights,
        flag="--inception",
        batch_size=batch_size,
        mesh=mesh,
        grey=args.grey,
    )
    require_enough(images.count, settings, extractor.dim, of_file=bool(existing))
    reference = evaluation.open_reference(
        args.reference,
        extractor,
        split=args.reference_split,
        image_size=args.reference_size,
        resize=args.reference_resize,
        cache_dir=default_cache_dir() / "references",
        batch_size=batch_size,
        progress=_announce,
    )
    if reference.features is not None and {"precision_recall", "kid"} & set(
        scores or evaluation.SCORES
    ):
        remedy = "use fewer images, or leave precision_recall and kid out of --scores"
        sampling.require_memory(images.count, None, remedy, beside=4 * extractor.dim)
    result = evaluation.evaluate_images(
        images,
        reference,
        extractor,
        settings=settings,
        rounding=record.get("rounding"),
        seeds=record.get("seed"),
        sampling=record.get("sampling"),
        provenance=_provenance(record),
        batch_size=batch_size,
        progress=_announce,
    )
    text = evaluation.format_scores(result)
    if args.protocol:
        protocol = evaluation.find_protocol(args.protocol)
        text += "\n\n" + evaluation.comparison_table(protocol, result)
    return result, text
