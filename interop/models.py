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

from pathlib import Path
from typing import Any

import numpy as np

from dit_jax import class_names, experiment
from dit_jax.interop import hub, lora_runs
from dit_jax.interop.edm_pickle import looks_like_network_pickle
from dit_jax.interop.finiteness import Finiteness
from dit_jax.interop.foreign_models import (
    open_diffusers,
    open_edm,
    open_flux_model,
    open_original,
    open_registered,
)
from dit_jax.interop.found_model import FoundModel
from dit_jax.interop.kinds import kinds, registered
from dit_jax.interop.opened import found_model, require_applies
from dit_jax.interop.own_folders import CARD, WEIGHTS, card_config, read_card
from dit_jax.interop.parameters import flatten
from dit_jax.interop.recognise import (
    DIFFUSERS_DIT,
    DIFFUSERS_FLUX,
    EDM_UNET,
    ORIGINAL_DIT,
    ORIGINAL_FLUX,
    description,
    find_architectures,
)
from dit_jax.interop.tensors import InteropError, open_tensors
from dit_jax.nearest import one_of
from dit_jax.training import workdir
from dit_jax.training.saved_weights import RunWeights


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
    require_applies(
        kind == "dit_jax" or step is None, "step", step, kind, "has no checkpoints by step"
    )
    is_pt = kind in ("dit_pt", "sit_pt")
    for name, value in shape.items():
        require_applies(is_pt or value is None, name, value, kind, "knows its own")
    if kind == "dit_jax":
        require_applies(
            not time_frequency_spacing, "time_frequency_spacing", "", kind, "knows its own"
        )
        if (path / CARD).is_file():
            require_applies(step is None, "step", step, kind, "folder holds one set of weights")
            require_applies(
                not weights, "weights", weights, kind, "folder holds one set of weights"
            )
            return _open_folder(path)
        return _open_workdir(path, weights, step)
    if kind in ("edm_pkl", "edm_pt"):
        spacing = time_frequency_spacing
        require_applies(not spacing, "time_frequency_spacing", spacing, kind, "has one spacing")
        return open_edm(path, kind, weights)
    if is_pt:
        return open_original(path, kind, weights, time_frequency_spacing, shape, like)
    require_applies(not weights, "weights", weights, kind, "holds one set of weights")
    if kind == "flux_pt":
        spacing = time_frequency_spacing
        require_applies(not spacing, "time_frequency_spacing", spacing, kind, "has one spacing")
        return open_flux_model(path, kind)
    if kind in registered():
        spacing = time_frequency_spacing
        require_applies(not spacing, "time_frequency_spacing", spacing, kind, "knows its own")
        return open_registered(path, kind)
    return open_diffusers(path, time_frequency_spacing)


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


def _open_folder(path: Path) -> FoundModel:
    card = read_card(path)
    file = open_tensors(path / WEIGHTS, within=path)
    config = card_config(path, card, file)
    return found_model(
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
