"""Folders of our own: weights, and beside them a card that says what they are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax import experiment
from dit_jax.config import from_json
from dit_jax.interop.claims import check_counts, check_types, read_object
from dit_jax.interop.tensors import InteropError, TensorFile

CARD = "dit_jax.json"  # what a folder of ours says about itself
WEIGHTS = "weights.safetensors"
FORMAT = "dit-jax-model/1"


def read_card(folder: Path) -> dict[str, Any]:
    """What a folder of ours says about itself; {} if it is not one.

    Raises:
        InteropError: it cannot be read, or a later version wrote it.
    """
    file = folder / CARD
    if not file.is_file():
        return {}
    card = read_object(file, folder)
    if card.get("format") != FORMAT:
        raise InteropError(f"{file}: expected the format {FORMAT!r}")
    check_types(
        file,
        card,
        integers=("step", "num_classes"),
        texts=("weights", "time_frequency_spacing"),
        truths=("null_class", "pixels"),
        nullable=("time_frequency_spacing",),
    )
    names = card.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InteropError(f"{file}: class_names must be a list of strings")
    return card


def card_config(folder: Path, card: Mapping[str, Any], file: TensorFile) -> Any:
    """The configuration that a card tells, resolved.

    Args:
        folder: the card's.
        card: of `read_card`.
        file: the weights, against which its counts are checked before anything is built.

    Raises:
        InteropError: it cannot be used.
    """
    where, values = folder / CARD, card.get("config")
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise InteropError(f"{where}: its configuration is missing, or no object")
    model = values["model"]
    name = model.get("name")
    chosen = model.get(name) if isinstance(name, str) else None  # no other is ever built
    for section in (model, chosen):
        if isinstance(section, dict):
            check_counts(where, section, file)
    try:
        return experiment.resolve_config(from_json(json.dumps(card["config"])))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InteropError(f"{where}: its configuration cannot be used: {error}") from error
