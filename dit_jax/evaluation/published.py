"""How published figures were made, as data, and ours beside them, like with like."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dit_jax.nearest import one_of

README = "README of facebookresearch/DiT"
# Columns of the table: name in records, heading, digits.
_COLUMNS = (
    ("fid", "FID", 2),
    ("sfid", "sFID", 2),
    ("inception_score", "IS", 1),
    ("precision", "Prec.", 2),
    ("recall", "Recall", 2),
)


@dataclass(frozen=True)
class PublishedFigure:
    """One published row; scores under the names of records, as far as they were published.

    Attributes:
        model: Such as "DiT-XL/2".
        image_size: Side in pixels.
        trained_in: "JAX" or "PyTorch".
        scores: Names to values.
        source: Where it was published.
        note: What distinguishes it from the other rows.
    """

    model: str
    image_size: int
    trained_in: str
    scores: Mapping[str, float]
    source: str
    note: str = ""


@dataclass(frozen=True)
class Protocol:
    """How the published figures were made.

    Attributes:
        name: For command lines.
        description: For people.
        sampling: Values of the configuration, by dotted key.
        vae: The decoder, by its hub id.
        num_images: How many were scored.
        rounding: How they became bytes.
        train_steps: Of the checkpoint; None where it was trained for as long as its authors liked.
        references: File of ADM's reference batch, by image size.
        figures: The published rows.
    """

    name: str
    description: str
    sampling: Mapping[str, Any]
    vae: str
    num_images: int
    rounding: str
    train_steps: int | None
    references: Mapping[int, str]
    figures: tuple[PublishedFigure, ...]


_ANCESTRAL = {
    "sampling.solver": "ddpm",
    "sampling.steps": 250,
    "sampling.spacing": "iddpm",
    "sampling.guidance_interval": (),
    "sampling.ddpm.variance": "learned",
    "sampling.ddpm.clip_denoised": False,
    "sampling.weights": "ema",
}
# `ScoreSettings` as ADM's evaluator, with which all of these were scored.
_SCORING = {"split_size": 5000, "neighbours": 3, "allow_singular": False}
_REFERENCES = MappingProxyType(
    {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
)

DIT_400K = Protocol(
    name="dit_400k",
    description="DiT after 400,000 steps: 250 DDPM steps, mse decoder, no guidance",
    sampling=MappingProxyType(
        _ANCESTRAL | {"sampling.guidance_scale": 1.0, "sampling.guidance_channels": "all"}
    ),
    vae="stabilityai/sd-vae-ft-mse",
    num_images=50_000,
    rounding="truncate",
    train_steps=400_000,
    references=_REFERENCES,
    figures=(
        PublishedFigure("DiT-XL/2", 256, "JAX", {"fid": 19.5}, README),
        PublishedFigure("DiT-XL/2", 256, "PyTorch", {"fid": 18.1}, README, "seed 42"),
        PublishedFigure("DiT-B/4", 256, "JAX", {"fid": 68.4}, README),
        PublishedFigure("DiT-B/4", 256, "PyTorch", {"fid": 68.9}, README, "seed 42"),
        PublishedFigure("DiT-B/4", 256, "PyTorch", {"fid": 68.3}, README, "seed 100"),
    ),
)

DIT_FINAL = Protocol(
    name="dit_final",
    description="the final DiT-XL/2: 250 DDPM steps, ema decoder, guidance 1.5 on three channels",
    sampling=MappingProxyType(
        _ANCESTRAL | {"sampling.guidance_scale": 1.5, "sampling.guidance_channels": "first3"}
    ),
    vae="stabilityai/sd-vae-ft-ema",
    num_images=50_000,
    rounding="truncate",
    train_steps=None,
    references=_REFERENCES,
    figures=(
        PublishedFigure("DiT-XL/2", 256, "JAX", {"fid": 2.27, "inception_score": 278.24}, README),
        PublishedFigure("DiT-XL/2", 256, "JAX", {"fid": 2.21}, README, "sampled in PyTorch, fp32"),
        PublishedFigure("DiT-XL/2", 512, "JAX", {"fid": 3.04, "inception_score": 240.82}, README),
    ),
)

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({p.name: p for p in (DIT_400K, DIT_FINAL)})
"""By name, for command lines."""


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: There is none, with those there are.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: {one_of(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def deviations(protocol: Protocol, record: Mapping[str, Any]) -> list[str]:
    """What in a record's provenance is not as the protocol has it, one sentence each.

    Read from the record: counts.samples; provenance.sampling (the configuration's section), vae (a
    name, or a dictionary with "name"), step, image_size, rounding, settings, reference,
    standard_features.
    What a record does not say counts as a deviation: it cannot be known to be as published.
    """
    provenance = record["provenance"]
    found = []

    def expect(what: str, actual: Any, wanted: Any) -> None:
        if actual != wanted:
            shown = "not recorded" if actual is None else _shown(actual)
            found.append(f"{what}: {shown}, published with {_shown(wanted)}")

    expect("images", record["counts"].get("samples"), protocol.num_images)
    sampling = provenance.get("sampling")
    if sampling is None:
        found.append("sampling: not recorded")
    else:
        for key, wanted in protocol.sampling.items():
            actual = _lookup({"sampling": sampling}, key)
            if key == "sampling.spacing" and actual == "":
                actual = "iddpm"  # what the ddpm solver takes by default
            expect(key, actual, wanted)
        if provenance.get("weights") == "raw":
            found.append("weights: raw, published with their average")
    vae = provenance.get("vae")
    name = vae.get("name", vae.get("path")) if isinstance(vae, Mapping) else vae
    wanted_vae = protocol.vae.rpartition("/")[2]
    if name is None or wanted_vae not in str(name):
        expect("VAE decoder", name, protocol.vae)
    if protocol.train_steps is not None:
        expect("training steps", provenance.get("step"), protocol.train_steps)
    expect("rounding", provenance.get("rounding"), protocol.rounding)
    settings = provenance.get("settings") or {}
    for key, wanted in _SCORING.items():
        expect(f"scoring, {key}", settings.get(key), wanted)
    if not provenance.get("standard_features"):
        found.append("features: not of the standard Inception weights of 2015-12-05")
    size = provenance.get("image_size")
    if size not in protocol.references:
        expect("image size", size, " or ".join(map(str, protocol.references)))
    reference = str((provenance.get("reference") or {}).get("description"))
    wanted_files = (
        [protocol.references[size]]
        if size in protocol.references
        else list(protocol.references.values())
    )
    if os.path.basename(reference) not in wanted_files:
        expect("reference", reference, " or ".join(wanted_files))
    return found


def comparison_table(
    protocol: Protocol, record: Mapping[str, Any], *, label: str = "this run"
) -> str:
    """Ours above the published figures, aligned, and below it what was not as published.

    Args:
        protocol: Which figures.
        record: Of `evaluate_images`. With provenance.image_size (and .model, such as "DiT-B/4")
            only the figures of that size (and model) are shown, if there are any.
        label: Name of our row.
    """
    provenance = record["provenance"]
    figures = protocol.figures
    for attribute in ("image_size", "model"):
        value = provenance.get(attribute)
        figures = [f for f in figures if getattr(f, attribute) == value] or list(figures)
    rows = [["", "model", "px", *(heading for _, heading, _ in _COLUMNS), "images", "source"]]
    rows.append(
        [
            label,
            str(provenance.get("model") or "-"),
            str(provenance.get("image_size") or "-"),
            *_cells(record["scores"]),
            f"{record['counts'].get('samples', '-')}",
            "this record",
        ]
    )
    for figure in figures:
        source = f"{figure.source}, {figure.note}" if figure.note else figure.source
        rows.append(
            [
                f"published, {figure.trained_in}",
                figure.model,
                str(figure.image_size),
                *_cells(figure.scores),
                str(protocol.num_images),
                source,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Text to the left, numbers to the right.
    left = {0, 1, len(widths) - 1}
    lines = [f"Protocol {protocol.name}: {protocol.description}", ""]
    for row in rows:
        cells = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    unmet = deviations(protocol, record)
    lines.append("")
    if unmet:
        lines.append("NOT comparable as it stands; not as published:")
        lines += [f"  - {sentence}" for sentence in unmet]
    else:
        lines.append("Everything recorded is as published.")
    return "\n".join(lines)


def _cells(scores: Mapping[str, Any]) -> list[str]:
    cells = []
    for name, _, digits in _COLUMNS:
        value = scores.get(name)
        value = value["mean"] if isinstance(value, Mapping) else value
        cells.append("-" if value is None else f"{value:.{digits}f}")
    return cells


def _lookup(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return "none" if value == () else str(value)
