"""A diffusion model on disk, in any of the formats known here, opened as one thing.

    model = open_model("DiT-XL-2-256x256.pt")    # or a diffusers folder, a workdir, hub:owner/name
    params = model.load()                        # nested, float32, on the first device
    network = experiment.build_network(model.config)

Kinds: 'dit_jax' (a training run's workdir, or a folder that `launch/convert.py --to=dit_jax`
wrote), 'dit_pt' and 'sit_pt' (state dicts of the original code, fast-DiT and SiT, as .pt or
.safetensors), 'diffusers' (a pipeline or the folder of its transformer), 'edm_pkl' (a network
pickle of EDM's training loop), 'edm_pt' (a state dict of such a network) and 'flux_pt' (FLUX.1 in
the original layout; 'diffusers' is FLUX's folders, too).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax import class_names, experiment
from dit_jax.config import default_config, from_json
from dit_jax.config import flatten as config_flatten
from dit_jax.interop import dit, edm, hub, lora_runs
from dit_jax.interop.claims import check_counts, check_types, read_object
from dit_jax.interop.edm_pickle import looks_like_network_pickle, open_network_pickle
from dit_jax.interop.finiteness import Finiteness, WatchedFile
from dit_jax.interop.flux import FLUX_CLASS, default_flow_times, flux_sections
from dit_jax.interop.flux_files import open_flux
from dit_jax.interop.found_model import FoundModel
from dit_jax.interop.kinds import kinds, registered
from dit_jax.interop.prefixes import RenamedFile, without_prefix
from dit_jax.interop.recognise import (
    DIFFUSERS_DIT,
    DIFFUSERS_FLUX,
    EDM_UNET,
    ORIGINAL_DIT,
    ORIGINAL_FLUX,
    description,
    find_architectures,
)
from dit_jax.interop.schedulers import flow_times_from_scheduler, process_from_scheduler
from dit_jax.interop.sharded import find_weights
from dit_jax.interop.table import (
    ParameterReader,
    Table,
    flatten,
    native_table,
    parameter_shapes,
)
from dit_jax.interop.tensors import InteropError, TensorFile, open_tensors
from dit_jax.models import network_name
from dit_jax.nearest import one_of
from dit_jax.training import workdir
from dit_jax.training.saved_weights import RunWeights

CARD = "dit_jax.json"  # what a folder of ours says about itself
WEIGHTS = "weights.safetensors"
FORMAT = "dit-jax-model/1"


def open_model(
    source: str | Path,
    kind: str = "auto",
    *,
    weights: str = "",
    step: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    like: Any = None,
    time_frequency_spacing: str = "",
    allow_nonfinite: bool = False,
) -> FoundModel:
    """Opens a model without reading its parameters yet.

    Args:
        source: a path, or 'hub:owner/name[@revision][:path]'; 'KIND:' may stand before it.
        kind: one of `kinds()`, or 'auto' to tell by the content, which those that were registered
            have to be named for.
        weights: of a run 'raw', 'ema' or an average's name, of a training checkpoint 'ema' or
            'model', of a pickle the entry's name; by default the first average where there is one.
        step: of a run's checkpoints, which one.
        num_heads: of a .pt, where its width does not tell.
        num_classes: of a .pt, where its class table may or may not have a row for "no class".
        like: config.model of an experiment that the model is opened for: it settles what neither a
            .pt nor the two numbers above say.
        time_frequency_spacing: 'original' or 'diffusers', where it is known to differ from what
            the format's own code computes.
        allow_nonfinite: read NaN and infinity instead of refusing them.

    Raises:
        InteropError: nothing there, damaged, another architecture, or tensors and configuration
            contradict each other; everything wrong with the tensors in one list.
    """
    prefix, colon, rest = str(source).partition(":")
    if colon and prefix in kinds():
        source, kind = rest, prefix
    if kind not in ("auto", *kinds()):
        raise InteropError(f"unknown kind {kind!r}: {one_of(kind, kinds())}")
    path = hub.resolve(str(source))
    if not path.exists():
        raise InteropError(f"{path} does not exist")
    kind = _tell_kind(path) if kind == "auto" else kind
    shape = {"num_heads": num_heads, "num_classes": num_classes}
    found = _open(path, kind, weights, step, shape, like, time_frequency_spacing)
    found.finiteness.allowed = allow_nonfinite
    return found


def open_configured(source: str, weights: str, like: Any) -> FoundModel:
    """Opens a model that a configuration names, for an experiment.

    Args:
        source: as of `open_model`.
        weights: which of the several that a run or a training checkpoint has; a file or folder
            that holds one set is good for 'ema'.
        like: config.model of the experiment.

    Raises:
        InteropError: see `open_model`; or there are no such weights.
        CheckpointError: the run has no such weights.
    """
    found = open_model(source, like=like)
    if weights != "ema" or (found.path / workdir.CHECKPOINTS).is_dir():
        found = open_model(source, weights=weights, like=like)
    return found


def _open(
    path: Path,
    kind: str,
    weights: str,
    step: int | None,
    shape: dict[str, int | None],
    like: Any,
    time_frequency_spacing: str,
) -> FoundModel:
    _require(kind == "dit_jax" or step is None, "step", step, kind, "has no checkpoints by step")
    is_pt = kind in ("dit_pt", "sit_pt")
    for name, value in shape.items():
        _require(is_pt or value is None, name, value, kind, "knows its own")
    if kind == "dit_jax":
        _require(not time_frequency_spacing, "time_frequency_spacing", "", kind, "knows its own")
        if (path / CARD).is_file():
            _require(step is None, "step", step, kind, "folder holds one set of weights")
            _require(not weights, "weights", weights, kind, "folder holds one set of weights")
            return _open_folder(path)
        return _open_workdir(path, weights, step)
    if kind in ("edm_pkl", "edm_pt"):
        spacing = time_frequency_spacing
        _require(not spacing, "time_frequency_spacing", spacing, kind, "has one spacing")
        return _open_edm(path, kind, weights)
    if is_pt:
        return _open_original(path, kind, weights, time_frequency_spacing, shape, like)
    _require(not weights, "weights", weights, kind, "holds one set of weights")
    if kind == "flux_pt":
        spacing = time_frequency_spacing
        _require(not spacing, "time_frequency_spacing", spacing, kind, "has one spacing")
        return _open_flux(path, kind)
    if kind in registered():
        spacing = time_frequency_spacing
        _require(not spacing, "time_frequency_spacing", spacing, kind, "knows its own")
        return _open_registered(path, kind)
    return _open_diffusers(path, time_frequency_spacing)


def _require(condition: bool, name: str, value: Any, kind: str, reason: str) -> None:
    if not condition:
        raise InteropError(f"--{name}={value} does not apply: a {kind} {reason}")


def _tell_kind(path: Path) -> str:
    if path.is_dir():
        if (path / WEIGHTS).is_file() or (path / workdir.CHECKPOINTS).is_dir():
            return "dit_jax"
        if (path / workdir.CONFIG_FILE).is_file() or (path / "model_index.json").is_file():
            return "diffusers"
        if (path / "transformer").is_dir():
            return "diffusers"
        raise InteropError(
            f"{path} is neither a workdir of dit-jax ({workdir.CONFIG_FILE} and checkpoints/), nor "
            f"a folder it converted to ({CARD}, {WEIGHTS}), nor a diffusers pipeline "
            "(model_index.json)"
        )
    if looks_like_network_pickle(path):
        return "edm_pkl"
    file = open_tensors(path)
    found = set(find_architectures(file.specs).values())
    if EDM_UNET in found:
        return "edm_pt"
    if ORIGINAL_DIT in found:
        arguments = file.metadata.get("args") or {}
        return "sit_pt" if {"path_type", "prediction"} <= set(arguments) else "dit_pt"
    if ORIGINAL_FLUX in found:
        return "flux_pt"
    if {DIFFUSERS_DIT, DIFFUSERS_FLUX} & found:
        if (path.parent / workdir.CONFIG_FILE).is_file():
            return "diffusers"
        raise InteropError(
            f"{path} is a transformer of diffusers, whose config.json is not beside it: download "
            "that, too, and give the folder"
        )
    raise InteropError(f"{path} holds no DiT, EDM U-Net or FLUX: {description(file.specs)}")


def _configured(model: Mapping[str, Any], **sections: Mapping[str, Any]) -> Any:
    """A resolved configuration: the defaults with these sections' values."""
    config = default_config()
    for section, values in {"model": model, **sections}.items():
        for name, value in values.items():
            if isinstance(value, Mapping):
                config[section][name].update(value)
            else:
                config[section][name] = value
    return experiment.resolve_config(config)


# What of a network's configuration says how it is run, not what it is.
_EXECUTION = (
    "layer_loop",
    "remat",
    "attention",
    "custom_gradients",
    "dtype",
    "param_dtype",
    "quantization",
)


def model_section(network_config: Any) -> dict[str, Any]:
    """The part of a network's configuration that the architecture decides, for `config.model`."""
    name = network_name(network_config)
    own = default_config().model.get(name, {})
    values = {
        key: value
        for key, value in dataclasses.asdict(network_config).items()
        if key not in _EXECUTION
    }
    shared = {key: value for key, value in values.items() if key not in own}
    return {"name": name, **shared, name: {key: values[key] for key in own if key in values}}


def _found(
    kind: str, path: Path, config: Any, table: Table | None, file: TensorFile, **more: Any
) -> FoundModel:
    shapes = parameter_shapes(experiment.build_network(config))
    seen = Finiteness()
    try:
        reader = ParameterReader(table or native_table(shapes), shapes, WatchedFile(file, seen))
    except InteropError as error:
        if not isinstance(file, RenamedFile):
            raise
        raise InteropError(f"{error}\n(read so: {'; '.join(more.get('notes', ()))})") from error
    paths, dtypes = tuple(reader.paths()), reader.file_dtypes
    return FoundModel(
        kind, path, config, reader, paths, finiteness=seen, file_dtypes=dtypes, **more
    )


def _open_workdir(path: Path, weights: str, step: int | None) -> FoundModel:
    prepared = experiment.prepare(workdir.load_config(path))
    config = prepared.config
    saved = RunWeights(path, prepared.method, weights or config.sampling.weights).open(step)
    leaves = dict(flatten(saved.leaves))
    found_autoencoder = Path(config.autoencoder.path) if config.autoencoder.path else None
    seen = Finiteness()

    def read(name: str, dtype: Any = np.float32) -> np.ndarray:
        return seen.look(name, saved.read(leaves[name])).astype(dtype, copy=False)

    found = FoundModel(
        "dit_jax",
        path,
        config,
        read,
        tuple(leaves),
        saved.name,
        saved.step,
        found_autoencoder,
        class_names.load(path, config.model.num_classes),
        finiteness=seen,
    )
    if not config.lora.rank:
        return found
    options = prepared.method.lora
    base = open_configured(options.base, options.weights, config.model)
    return lora_runs.merged(found, base, options)


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


def _card_config(folder: Path, card: Mapping[str, Any], file: TensorFile) -> Any:
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


def _open_folder(path: Path) -> FoundModel:
    card = read_card(path)
    file = open_tensors(path / WEIGHTS, within=path)
    config = _card_config(path, card, file)
    return _found(
        "dit_jax",
        path,
        config,
        None,
        file,
        weights=card.get("weights", "ema"),
        step=card.get("step", 0),
        class_names=tuple(card.get("class_names", ())),
        autoencoder=Path(config.autoencoder.path) if config.autoencoder.path else None,
    )


def _open_original(
    path: Path, kind: str, weights: str, spacing: str, shape: dict[str, int | None], like: Any
) -> FoundModel:
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
    config = _configured(model_section(network), **sections)
    arguments = file.metadata.get("args") or {}
    if kind == "sit_pt":
        _refuse_other_sit(path, arguments)
    return _found(
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


def _open_edm(path: Path, kind: str, weights: str) -> FoundModel:
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
    config = _configured(**edm.sections(found))
    shapes = parameter_shapes(experiment.build_network(config))
    prefix = edm.prefix_of(file.specs)
    table = edm.edm_table(found.network, shapes, prefix, found.process)
    named = file.metadata.get("weights")
    more = {"weights": named or "ema", "has_choice": bool(named), "notes": notes}
    return _found(kind, path, config, table, file, **more)


def _open_registered(path: Path, kind: str) -> FoundModel:
    known, file = registered()[kind], open_tensors(path)
    network = known.network(file)
    config = _configured(model_section(network), **known.sections)
    return _found(kind, path, config, known.table(network), file)


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


def _open_diffusers(path: Path, spacing: str) -> FoundModel:
    given = path if path.is_file() else None  # one of several, or under another name
    path = path.parent if given else path
    is_pipeline = (path / "model_index.json").is_file() or (path / "transformer").is_dir()
    folder = path / "transformer" if is_pipeline else path
    card = read_card(path)
    values = read_object(folder / "config.json", path)
    if values.get("_class_name") == FLUX_CLASS:
        _require(not spacing, "time_frequency_spacing", spacing, "FLUX", "has one spacing")
        return _open_flux(given or path, "diffusers")
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
        config = _card_config(path, card, file)
        config = _agree(path, config, network, spacing)
    else:
        scheduler = path / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            process = process_from_scheduler(read_object(scheduler, path), str(scheduler))
        else:
            process = process_from_scheduler({"_class_name": "DDIMScheduler"}, "")
            notes.append("no scheduler beside it: taken as DDPM with the linear schedule")
        try:
            config = _configured(model_section(network), **process)
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
    return _found(
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


def _open_flux(path: Path, kind: str) -> FoundModel:
    found = open_flux(path)
    if (found.layout == "original") != (kind == "flux_pt"):
        raise InteropError(f"{path} is FLUX in the {found.layout} layout, not a {kind}")
    folder = path if path.is_dir() else path.parent
    card = read_card(folder) if kind == "diffusers" else {}
    if card:
        config = _agree(folder, _card_config(folder, card, found.file), found.config, "")
    else:
        times = default_flow_times(found.config)
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if kind == "diffusers" and scheduler.is_file():
            values = read_object(scheduler, folder)
            times = flow_times_from_scheduler(values, str(scheduler))
        config = _configured(model_section(found.config), **flux_sections(found.config, times))
    vae = folder / "vae"
    return _found(
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
