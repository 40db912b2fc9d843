"""Writing a model in another format: state dicts of the original code, diffusers pipelines, ours.

Parameters go from the source to the destination one at a time. A destination appears whole or not
at all. What the other side would compute differently is an error, or, for diffusers, written into
the model card, the summary and `dit_jax.json`, from which
`dit_jax.interop.pipelines` mends it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dit_jax import __version__, experiment
from dit_jax import config as config_lib
from dit_jax.atomic import atomic_file, atomic_folder, check_destination
from dit_jax.interop import dit, flux
from dit_jax.interop.autoencoder_kl import load_autoencoder, save_autoencoder
from dit_jax.interop.export_plans import ExportPlan, plan_export
from dit_jax.interop.finiteness import Finiteness
from dit_jax.interop.flux_pipelines import TRANSFORMER, OtherParts, open_others
from dit_jax.interop.found_model import FoundModel, no_guidance
from dit_jax.interop.kinds import KINDS, registered
from dit_jax.interop.model_card import model_card
from dit_jax.interop.own_folders import CARD, FORMAT, WEIGHTS
from dit_jax.interop.parameters import parameter_shapes
from dit_jax.interop.pixel_autoencoder import TOLERANCE, pixel_autoencoder
from dit_jax.interop.schedulers import scheduler_config
from dit_jax.interop.table import export_arrays, export_specs
from dit_jax.interop.tensors import InteropError, TensorSpec, write_pt, write_safetensors
from dit_jax.models import DiTConfig, FluxConfig
from dit_jax.nearest import one_of

DESTINATIONS = tuple(kind for kind in KINDS if kind != "edm_pkl")
_FOLDERS = ("dit_jax", "diffusers")
DTYPES = ("float32", "bfloat16", "float16")
TRANSFORMER_WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINE_VERSION = "0.42.1"  # of diffusers, with which exports were tested


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was (or, in a dry run, would be) written.

    Attributes:
        kind: the destination's.
        path: the destination.
        tensors: how many.
        parameters: numbers in all tensors.
        dtype: of the tensors.
        sha256: of the weights file; empty in a dry run.
        notes: what differs from what a user may expect.
    """

    kind: str
    path: Path
    tensors: int
    parameters: int
    dtype: str
    sha256: str
    notes: tuple[str, ...]


def write_model(
    model: FoundModel,
    kind: str,
    destination: str | Path,
    *,
    dtype: str = "float32",
    autoencoder: str | Path | None = None,
    pipeline: str | Path | None = None,
    class_names: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
    allow_inexact: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Writes a model as `kind`.

    Args:
        model: from `open_model`.
        kind: 'dit_jax' and 'diffusers' make a folder, 'dit_pt' and 'sit_pt', and the state dicts
            that were registered, a file (.safetensors by its suffix, else .pt).
        destination: must not exist, unless `overwrite`.
        dtype: of the tensors.
        autoencoder: the VAE of a pipeline; by default the one that came with the model.
        pipeline: a FLUX pipeline's folder or hub:owner/name, to be written with this model in place
            of its transformer.
        class_names: one a class for a pipeline's id2label; by default the model's, or numbers.
        metrics: an evaluation's record, for the model card.
        allow_inexact: write a state dict although the original code would compute something else
            with it than this model does.
        overwrite: replace an earlier export.
        dry_run: check everything that can be checked, write nothing.

    Raises:
        InteropError: the format cannot hold this model, or its code would compute something else.
        FileExistsError: the destination exists.
        OSError: the disk has no room for a pipeline.
    """
    if kind == "edm_pkl":
        raise InteropError(
            "--to=edm_pkl: such a pickle holds the code of its network; --to=edm_pt writes the "
            "state dict that EDM's network loads"
        )
    known = (*DESTINATIONS, *registered())
    if kind not in known:
        raise InteropError(f"--to={kind}: {one_of(kind, known)}")
    if dtype not in DTYPES:
        raise InteropError(f"--dtype={dtype}: {one_of(dtype, DTYPES)}")
    destination = Path(destination)
    _refuse_destination(model, destination, overwrite)
    plan = plan_export(model, kind, allow_inexact)
    shapes = parameter_shapes(model.network)
    specs = export_specs(plan.table, shapes, jnp.dtype(dtype))
    vae, vae_note = None, ()
    is_pipeline = kind == "diffusers" and isinstance(model.network.config, DiTConfig)
    if is_pipeline:
        vae, vae_note = _pipeline_autoencoder(model, autoencoder)
    elif autoencoder:
        raise InteropError(f"--vae does not apply to --to={kind}: only a DiT's pipeline takes one")
    others, others_note = _other_parts(model, kind, pipeline)
    if others:
        _refuse_source(destination, others.folder, "the pipeline")
        if destination.resolve().is_relative_to(others.folder.resolve()):
            raise InteropError(
                f"{destination} is inside {others.folder}, the pipeline being read: choose another "
                "destination"
            )
        others.require_space(destination, sum(spec.nbytes for spec in specs.values()))
    is_state_dict = kind not in _FOLDERS
    if is_state_dict and (class_names or metrics):
        option = "class_names" if class_names else "metrics"
        raise InteropError(f"--{option} does not apply to --to={kind}: a state dict has no room")
    summary = Summary(
        kind,
        destination,
        len(specs),
        sum(spec.size for spec in specs.values()),
        dtype,
        "",
        (*model.notes, *plan.notes, *vae_note, *others_note),
    )
    if dry_run:
        for path in model.paths:
            model.read(path)
        model.finiteness.require(model.path)
        return dataclasses.replace(summary, notes=summary.notes + model.finiteness.note())
    writer = _Writer(model, plan, shapes, specs, jnp.dtype(dtype))
    if is_state_dict:
        with atomic_file(destination, overwrite=overwrite) as file:
            digest = writer.write(Path(file.name), destination.suffix == ".safetensors")
    else:
        names = tuple(class_names) or model.class_names
        names = names or tuple(map(str, range(model.network.num_classes)))
        if len(names) != model.network.num_classes:
            raise InteropError(f"{len(names)} class names for {model.network.num_classes} classes")
        card = _card(model, names, dtype)
        with atomic_folder(destination, overwrite=overwrite) as folder:
            if kind == "dit_jax":
                digest = writer.write(folder / WEIGHTS, True)
            elif not is_pipeline:
                digest = _write_flux(folder, model, writer, others)
            else:
                digest = _write_pipeline(folder, model, plan, writer, vae, names)
            _write_json(folder / CARD, card | {"sha256": digest})
            said = plan.notes + vae_note + others_note
            text = model_card(model, kind, said, digest, metrics, whole=others is not None)
            (folder / "README.md").write_text(text)
    notes = summary.notes + model.finiteness.note()
    return dataclasses.replace(summary, sha256=digest, notes=notes)


def _refuse_destination(model: FoundModel, destination: Path, overwrite: bool) -> None:
    check_destination(destination, overwrite=overwrite)
    if not destination.exists():
        return
    _refuse_source(destination, model.path, "the model")
    if destination.is_dir() and any(destination.iterdir()) and not (destination / CARD).is_file():
        raise InteropError(
            f"{destination} is a folder that no conversion wrote (it has no {CARD}): --overwrite "
            "does not delete it. Choose another destination or remove it"
        )


def _refuse_source(destination: Path, source: Path, what: str) -> None:
    if destination.resolve() == source.resolve():
        raise InteropError(f"{destination} is {what} being read: choose another destination")
    if source.resolve().is_relative_to(destination.resolve()):
        raise InteropError(f"{destination} contains {what} being read")


def _other_parts(
    model: FoundModel, kind: str, pipeline: str | Path | None
) -> tuple[OtherParts | None, tuple[str, ...]]:
    """The other components of a FLUX pipeline, if one is to be written, and what to say of it."""
    is_flux = isinstance(model.network.config, FluxConfig)
    if pipeline is None:
        alone = (
            "this is the transformer alone: --pipeline=DIR writes it with the other parts of a "
            "pipeline; or give it as FluxPipeline.from_pretrained(pipeline, transformer=...)",
        )
        return None, alone if is_flux and kind == "diffusers" else ()
    if not is_flux:
        raise InteropError(
            f"--pipeline={pipeline} is for FLUX: this model is a {model.network.config.title}, of "
            "which --to=diffusers makes a pipeline by itself, with the VAE of --vae"
        )
    if kind != "diffusers":
        raise InteropError(f"--pipeline does not apply to --to={kind}: give --to=diffusers")
    others = open_others(pipeline, model.network.config)
    return others, (f"all but transformer/ is as in {pipeline}, byte for byte",)


def _pipeline_autoencoder(model: FoundModel, given: str | Path | None) -> tuple[Any, tuple]:
    """The autoencoder with its parameters, or None, and what to say of it."""
    channels, path = model.network.config.in_channels, given or model.autoencoder
    if path:
        autoencoder, params, _ = load_autoencoder(path)
        found = autoencoder.config.latent_channels
        if found != channels:
            raise InteropError(
                f"the VAE {path} makes latents of {found} channels, the model takes {channels}"
            )
        if autoencoder.config.shift_factor:
            raise InteropError(
                f"the VAE {path} has shift_factor={autoencoder.config.shift_factor}, which "
                "DiTPipeline does not apply"
            )
        return (autoencoder, params), ()
    if channels in (1, 3):
        note = (
            f"the model makes pixels: the pipeline's VAE is the identity, to within {TOLERANCE:g}"
        )
        return pixel_autoencoder(channels), (note,)
    note = "no VAE inside (--vae): load with DiTPipeline.from_pretrained(folder, vae=...)"
    return None, (note,)


@dataclasses.dataclass(frozen=True)
class _Writer:
    model: FoundModel
    plan: ExportPlan
    shapes: Mapping[str, tuple[int, ...]]
    specs: Mapping[str, TensorSpec]
    dtype: np.dtype

    def write(self, path: Path, safetensors: bool) -> str:
        """The SHA-256 of the file.

        Raises:
            InteropError: NaN or infinity in what is read, or, by the type, in what is written.
        """
        arrays = export_arrays(self.plan.table, self.shapes, self.model.read, self.dtype)
        written = Finiteness()
        arrays = written.watched(self.specs, arrays)
        if safetensors:
            digest = write_safetensors(path, self.specs, arrays, metadata={"format": "pt"})
        else:
            digest = write_pt(path, self.specs, arrays)
        self.model.finiteness.require(self.model.path)
        if written.found and not self.model.finiteness.found:
            raise InteropError(
                f"--dtype={self.dtype.name} cannot hold the values of {len(written.found)} "
                f"tensors: {written.listed()}. Choose --dtype=bfloat16 or float32"
            )
        return digest


def _card(model: FoundModel, class_names: Sequence[str], dtype: str) -> dict[str, Any]:
    """What a folder of ours says about itself, enough to read it back exactly."""
    return {
        "format": FORMAT,
        "dit_jax_version": __version__,
        "weights": model.weights,
        "step": model.step,
        "dtype": dtype,
        "num_classes": model.network.num_classes,
        "null_class": model.network.null_class,
        "guidance": not no_guidance(model),
        **_time_frequency_spacing(model.network.config),
        "class_names": list(class_names),
        "pixels": model.autoencoder is None and model.network.config.in_channels in (1, 3),
        "config": json.loads(config_lib.to_json(model.config)),
    }


def _time_frequency_spacing(network: Any) -> dict[str, str]:
    """For `pipelines.load_pipeline`, which knows DiT alone."""
    spacing = getattr(network, "time_frequency_spacing", None)
    return {} if spacing is None else {"time_frequency_spacing": spacing}


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _write_flux(folder: Path, model: FoundModel, writer: _Writer, others: OtherParts | None) -> str:
    if others:
        others.copy(folder)
        folder = folder / TRANSFORMER
        folder.mkdir()
    _write_json(folder / "config.json", flux.config_to_diffusers(model.network.config))
    return writer.write(folder / TRANSFORMER_WEIGHTS, True)


def _write_pipeline(
    folder: Path,
    model: FoundModel,
    plan: ExportPlan,
    writer: _Writer,
    vae: Any,
    class_names: Sequence[str],
) -> str:
    process = experiment.build_process(model.config)
    scheduler = scheduler_config(process)
    side = model.config.model.image_size
    transformer = dit.config_to_diffusers(model.network.config, plan.num_embeds, sample_size=side)
    version = {"_diffusers_version": PIPELINE_VERSION}
    for name in ("transformer", "scheduler"):
        (folder / name).mkdir()
    _write_json(folder / "transformer" / "config.json", transformer | version)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler | version)
    index: dict[str, Any] = {
        "_class_name": "DiTPipeline",
        **version,
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
    }
    if vae:
        index["vae"] = ["diffusers", "AutoencoderKL"]
        save_autoencoder(folder / "vae", *vae)
    _write_json(folder / "model_index.json", index)
    return writer.write(folder / "transformer" / TRANSFORMER_WEIGHTS, True)
