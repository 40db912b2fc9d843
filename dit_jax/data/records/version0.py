"""Headers of the formats before this one, "dit_jax.latents" and "dit_jax.pairs": read, not written.

Their arrays are those of records of the kinds latents and pairs; only what describes them differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from dit_jax.data.records.header import (
    LABEL,
    MAX_CLASSES,
    MAX_RECORDS,
    MAX_SIDE,
    Field,
    Header,
    Shard,
    check_counts,
    parse_file,
)
from dit_jax.untrusted import Fields, FileRefusedError

_FILE = ("file", "bytes", "sha256")
_VERSIONS = {"none": ("plain",), "pairs": ("plain", "mirrored")}
_LATENTS_PROVENANCE = ("vae_name", "vae_sha256", "source_name", "source_fingerprint")
_LATENTS = (*_LATENTS_PROVENANCE, "scaling_factor", "latent_shape", "num_classes", "shift_factor")
_LATENTS += ("dtype", "kind", "flip", "class_names", "split", "count", "shards")
_PAIRS_PROVENANCE = ("teacher_source", "teacher_hash", "process", "sampling", "times", "path_times")
_PAIRS_PROVENANCE += ("start_scale", "seed", "batch_size")
_PAIRS = (*_PAIRS_PROVENANCE, "sample_shape", "num_classes", "dtype", "count", "shards")


def _latents(fields: Fields) -> Header:
    fields.check_names(list(_LATENTS))
    if fields.number("scaling_factor") == 0:
        raise FileRefusedError(f"{fields.where}: scaling_factor is 0, which no VAE has")
    latents = Field(
        fields.counts("latent_shape", 3, 1, MAX_SIDE),
        _one_of(fields, "dtype", ("float16", "float32")),
        versions=_VERSIONS[_one_of(fields, "flip", tuple(_VERSIONS))],
        posterior=_one_of(fields, "kind", ("samples", "moments")) == "moments",
        shift=fields.number("shift_factor"),
        scale=fields.number("scaling_factor"),
    )
    shards = [_latents_shard(shard) for shard in fields.objects("shards")]
    provenance = {name: fields.text(name) for name in _LATENTS_PROVENANCE}
    split = _one_of(fields, "split", ("train", "test"))
    fields_of = {"latents": latents, "label": LABEL}
    return _header(fields, "latents", fields_of, provenance, shards, "images", split)


def _latents_shard(fields: Fields) -> Shard:
    names = [f"{part}_{what}" for part in ("latents", "labels") for what in _FILE]
    fields.check_names(["count", *names])
    files = {
        name: parse_file(fields, *(f"{part}_{what}" for what in _FILE))
        for name, part in (("latents", "latents"), ("label", "labels"))
    }
    return Shard(fields.count("count", 1, MAX_RECORDS), files)


def _pairs(fields: Fields) -> Header:
    fields.check_names(list(_PAIRS))
    shape = fields.counts("sample_shape", 3, 1, MAX_SIDE)
    dtype = _one_of(fields, "dtype", ("float16", "float32"))
    times = fields.numbers("path_times")
    image = Field(shape, dtype)
    names = {"noise": image, "x0": image, "label": LABEL}
    if len(times) > 1:
        names["path"] = Field((min(len(times) - 1, MAX_SIDE), *shape), dtype)
    # `dit_jax.data.pairs` looks at the rest.
    provenance = {
        "teacher_source": fields.text("teacher_source"),
        "teacher_hash": fields.text("teacher_hash"),
        "process": fields.mapping("process"),
        "sampling": fields.mapping("sampling"),
        "times": list(fields.numbers("times")),
        "path_times": list(times),
        "start_scale": fields.number("start_scale"),
        "seed": fields.count("seed", 0, 2**64),
        "batch_size": fields.count("batch_size", 1),
        "conditions": "",
    }
    shards = [_pairs_shard(shard, list(names)) for shard in fields.objects("shards")]
    return _header(fields, "pairs", names, provenance, shards, "pairs", "train")


def _pairs_shard(fields: Fields, names: Sequence[str]) -> Shard:
    old = {"label": "labels"}
    files = {name: fields.object(old.get(name, name)) for name in names}
    return Shard(
        fields.count("count", 1, MAX_RECORDS),
        {name: parse_file(file) for name, file in files.items()},
    )


def _header(fields, kind, names, provenance, shards, what, split) -> Header:
    class_names = fields.texts("class_names") if kind == "latents" else ()
    try:
        header = Header(
            kind,
            names,
            provenance,
            split=split,
            num_classes=fields.count("num_classes", 0, MAX_CLASSES),
            class_names=class_names,
            count=fields.count("count", 0, MAX_RECORDS),
            shards=tuple(shards),
        )
    except FileRefusedError:
        raise
    except ValueError as error:
        raise FileRefusedError(f"{fields.where}: {error}") from None
    check_counts(header, fields.where, what)
    return header


def _one_of(fields: Fields, name: str, valid: tuple[str, ...]) -> str:
    value = fields.text(name)
    if value not in valid:
        raise FileRefusedError(f"{fields.where}: {name} must be one of {list(valid)}")
    return value


READERS = {"dit_jax.latents": _latents, "dit_jax.pairs": _pairs}
