"""Models of other projects: the original code's, EDM's, diffusers', and registered ones."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax import experiment
from dit_jax.config import flatten as config_flatten
from dit_jax.interop import dit, edm
from dit_jax.interop.claims import check_counts, read_object
from dit_jax.interop.edm_pickle import open_network_pickle
from dit_jax.interop.flux import FLUX_CLASS, default_flow_times, flux_sections
from dit_jax.interop.flux_files import open_flux
from dit_jax.interop.found_model import FoundModel
from dit_jax.interop.kinds import registered
from dit_jax.interop.opened import configured, found_model, model_section, require_applies
from dit_jax.interop.own_folders import CARD, card_config, read_card
from dit_jax.interop.parameters import parameter_shapes
from dit_jax.interop.prefixes import without_prefix
from dit_jax.interop.recognise import (
    DIFFUSERS_DIT,
    EDM_UNET,
    ORIGINAL_DIT,
    description,
    find_architectures,
)
from dit_jax.interop.schedulers import flow_times_from_scheduler, process_from_scheduler
from dit_jax.interop.sharded import find_weights
from dit_jax.interop.tensors import InteropError, TensorFile, open_tensors


def open_original(
    path: Path, kind: str, weights: str, spacing: str, shape: dict[str, int | None], like: Any
) -> FoundModel:
    """A state dict of DiT's or SiT's code, of shapes that `shape` and `like` (config.model) settle.

    Raises:
        InteropError: it cannot be read, or is something else.
    """
    file, notes = _open_state_dict(path, weights, ORIGINAL_DIT)
    network, assumed = dit.config_from_original(
        file, **shape, like=like if like is not None and like.name == "dit" else None
    )
    if spacing:
        network = dataclasses.replace(network, time_frequency_spacing=spacing)
    if kind == "sit_pt":
        sections = {
            "process": {"name": "flow"},
            "sampling": {"solver": "heun", "steps": 125, "weights": "ema"},
        }
    else:
        sections = {"process": {"name": "ddpm"}, "sampling": {"solver": "ddpm", "steps": 250}}
    if not network.null_class:
        sections["method"] = {"label_dropout": 0.0}
    config = configured(model_section(network), **sections)
    arguments = file.metadata.get("args") or {}
    if kind == "sit_pt":
        _refuse_other_sit(path, arguments)
    return found_model(
        kind,
        path,
        config,
        dit.original_table(network),
        file,
        weights=file.metadata.get("weights") or "ema",
        has_choice=bool(file.metadata.get("weights")),
        notes=notes + assumed,
    )


def _open_state_dict(
    path: Path, weights: str, architecture: str
) -> tuple[TensorFile, tuple[str, ...]]:
    """The network's tensors by its own names, and what was left out of a file that has more."""
    choice = {"": "auto", "raw": "model"}.get(weights, weights)
    try:
        file, choice = open_tensors(path, weights=choice, keep_names=True), ""
    except InteropError:
        if choice == "auto":
            raise
        # No entry is called so: perhaps tensors' names begin so.
        file = open_tensors(path, keep_names=True)
        if len(find_architectures(file.specs)) < 2:
            raise
    file, notes = without_prefix(file, (architecture,), choice)
    if architecture not in find_architectures(file.specs).values():
        raise InteropError(f"{path} holds no {architecture}: {description(file.specs)}")
    return file, notes


def open_edm(path: Path, kind: str, weights: str) -> FoundModel:
    """EDM's network, of a pickle or a state dict.

    Raises:
        InteropError: it cannot be read, or is something else.
    """
    notes: tuple[str, ...] = ()
    file: TensorFile
    if kind == "edm_pkl":
        file = open_network_pickle(path, weights=weights or "auto")
        found = _network_of_pickle(path, file)
    else:
        file, notes = _open_state_dict(path, weights, EDM_UNET)
        found = edm.from_tensors(file)
        notes += (
            "a state dict tells neither sigma_data, nor the range of noise levels, nor dropout: "
            "taken as EDM's defaults",
        )
    config = configured(**edm.sections(found))
    shapes = parameter_shapes(experiment.build_network(config))
    prefix = edm.prefix_of(file.specs)
    table = edm.edm_table(found.network, shapes, prefix, found.process)
    named = file.metadata.get("weights")
    more = {"weights": named or "ema", "has_choice": bool(named), "notes": notes}
    return found_model(kind, path, config, table, file, **more)


def open_registered(path: Path, kind: str) -> FoundModel:
    """A state dict of a kind that `kinds.register_state_dict` made known.

    Raises:
        InteropError: it cannot be read, or is something else.
    """
    known, file = registered()[kind], open_tensors(path)
    network = known.network(file)
    config = configured(model_section(network), **known.sections)
    return found_model(kind, path, config, known.table(network), file)


def _network_of_pickle(path: Path, file: TensorFile) -> edm.Preconditioned:
    positional, keywords = file.metadata["arguments"]
    given = {f"argument {i}": value for i, value in enumerate(positional)} | dict(keywords)
    check_counts(path, given, file)
    try:
        return edm.from_arguments(file)
    except InteropError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InteropError(f"{path}: the arguments of its network are not EDM's") from error


def _refuse_other_sit(path: Path, arguments: Mapping[str, Any]) -> None:
    for name, wanted in (("path_type", "Linear"), ("prediction", "velocity")):
        if arguments.get(name, wanted) != wanted:
            raise InteropError(
                f"{path} was trained with {name}={arguments[name]!r}; this library's flow is "
                f"{name}={wanted!r}"
            )


def open_diffusers(path: Path, spacing: str) -> FoundModel:
    """A folder of diffusers, a pipeline's or its transformer's, or one file of it.

    Raises:
        InteropError: it cannot be read, or is something else.
    """
    given = path if path.is_file() else None  # one of several, or under another name
    path = path.parent if given else path
    is_pipeline = (path / "model_index.json").is_file() or (path / "transformer").is_dir()
    folder = path / "transformer" if is_pipeline else path
    card = read_card(path)
    values = read_object(folder / "config.json", path)
    if values.get("_class_name") == FLUX_CLASS:
        require_applies(not spacing, "time_frequency_spacing", spacing, "FLUX", "has one spacing")
        return open_flux_model(given or path, "diffusers")
    dit.check_diffusers_types(values, folder / "config.json")
    file = open_tensors(given or find_weights(folder), within=path, keep_names=True)
    check_counts(folder / "config.json", values, file)
    network = dit.config_from_diffusers(
        values,
        num_classes=card.get("num_classes"),
        null_class=card.get("null_class", True),
        time_frequency_spacing=spacing or card.get("time_frequency_spacing") or "diffusers",
        where=str(folder / "config.json"),
    )
    notes = []
    if card:
        config = card_config(path, card, file)
        config = _agree(path, config, network, spacing)
    else:
        scheduler = path / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            process = process_from_scheduler(read_object(scheduler, path), str(scheduler))
        else:
            process = process_from_scheduler({"_class_name": "DDIMScheduler"}, "")
            notes.append("no scheduler beside it: taken as DDPM with the linear schedule")
        try:
            config = configured(model_section(network), **process)
        except ValueError as error:
            of_process = scheduler.is_file() and "config.process." in str(error)
            where = scheduler if of_process else folder / "config.json"
            raise InteropError(f"{where}: {error}") from error
        if not is_pipeline and path.name == "transformer" and (path.parent / CARD).is_file():
            notes.append(
                f"{path.parent / CARD}, which says more of this model (its classes, its spacing of "
                f"time frequencies), is read only if the folder {path.parent} is given"
            )
        notes.append(
            "taken with diffusers' spacing of time frequencies, which is what diffusers computes; "
            "weights trained by the original code need --time_frequency_spacing=original"
        )
    table = dit.diffusers_table(network, values.get("num_embeds_ada_norm", 1000))
    names = _class_names(path, network.num_classes) if is_pipeline else ()
    file, left_out = without_prefix(file, (DIFFUSERS_DIT,))
    vae = path / "vae"
    return found_model(
        "diffusers",
        path,
        config,
        table,
        file,
        weights=card.get("weights", "ema"),
        has_choice="weights" in card,
        step=card.get("step", 0),
        autoencoder=None if card.get("pixels") or not vae.is_dir() else vae,
        class_names=names,
        notes=(*left_out, *notes),
    )


def open_flux_model(path: Path, kind: str) -> FoundModel:
    """FLUX.1, of diffusers' folders or in the original layout.

    Raises:
        InteropError: it cannot be read, or is something else.
    """
    found = open_flux(path)
    if (found.layout == "original") != (kind == "flux_pt"):
        raise InteropError(f"{path} is FLUX in the {found.layout} layout, not a {kind}")
    folder = path if path.is_dir() else path.parent
    card = read_card(folder) if kind == "diffusers" else {}
    if card:
        config = _agree(folder, card_config(folder, card, found.file), found.config, "")
    else:
        times = default_flow_times(found.config)
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if kind == "diffusers" and scheduler.is_file():
            values = read_object(scheduler, folder)
            times = flow_times_from_scheduler(values, str(scheduler))
        config = configured(model_section(found.config), **flux_sections(found.config, times))
    vae = folder / "vae"
    return found_model(
        kind,
        path,
        config,
        found.table,
        found.file,
        weights=card.get("weights", "ema"),
        has_choice="weights" in card,
        step=card.get("step", 0),
        autoencoder=vae if kind == "diffusers" and vae.is_dir() else None,
        notes=found.notes,
    )


def _agree(path: Path, config: Any, network: Any, spacing: str) -> Any:
    """The card's configuration, whose model must be the transformer's."""
    config = config.copy_and_resolve_references()
    if spacing:
        config.model.dit.time_frequency_spacing = spacing
    found = dict(config_flatten(config.model))
    sizes = ("image_size", "flux.text_length") if config.model.name == "flux" else ()
    for name, value in config_flatten(model_section(network)):
        if found[name] != value and name not in sizes:  # of FLUX its config.json says no size
            raise InteropError(
                f"{path}: {CARD} says model.{name}={found[name]!r}, transformer/config.json "
                f"{value!r}: which one is right? Correct it, or remove {CARD}"
            )
    return config


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    index = path / "model_index.json"
    names = read_object(index, path).get("id2label") or {} if index.is_file() else {}
    if not isinstance(names, dict) or not all(str(i) in names for i in range(count)):
        return ()
    return tuple(str(names[str(i)]) for i in range(count))
