"""FID and its kin of samples against a reference set: the part of launch/evaluate.py for them."""

import argparse
from pathlib import Path
from typing import Any

from dit_jax import evaluation, experiment
from dit_jax.evaluation.sample_store import record_path
from dit_jax.training.metrics import format_duration
from dit_jax.untrusted import read_json
from interop.inception import default_cache_dir, load_extractor
from launch import arguments, loading, wiring
from parallel.mesh import create_mesh


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
        raise FileNotFoundError(f"no samples {path}")
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
    rounding = args.rounding or (protocol.rounding if protocol else "nearest")
    placement = wiring.create_placement(model.config)
    decoder = loading.Decoder(model.config, model.autoencoder, placement)
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
    mesh = create_mesh()
    model = None
    if not args.samples:  # before the long part: whether there is a model at all
        overrides = protocol_overrides(args) | arguments.sampling_overrides(args)
        model = loading.load_from_arguments(args, overrides)
    batch_size = -(-args.feature_batch_size // mesh.size) * mesh.size
    extractor = load_extractor(
        args.inception,
        allow_other=args.other_inception_weights,
        flag="--inception",
        batch_size=batch_size,
        mesh=mesh,
        grey=args.grey,
    )
    images, record = existing_samples(args.samples) if args.samples else new_samples(args, model)
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
    scores = tuple(args.scores) if args.scores else None
    settings = evaluation.ScoreSettings(scores=scores, allow_singular=args.allow_singular)
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
