"""What another format holds of a model, and where its code would compute something else."""

import dataclasses
from typing import Any

from dit_jax import experiment
from dit_jax.diffusion.process import DDPM, EDM, RectifiedFlow
from dit_jax.interop import dit, edm, flux
from dit_jax.interop.found_model import FoundModel, no_guidance
from dit_jax.interop.kinds import registered
from dit_jax.interop.parameters import parameter_shapes
from dit_jax.interop.schedulers import scheduler_config
from dit_jax.interop.table import Table, native_table
from dit_jax.interop.tensors import InteropError
from dit_jax.models import DhariwalUNetConfig, DiTConfig, FluxConfig, SongUNetConfig

KINDS_OF = {
    DiTConfig: ("dit_pt", "sit_pt", "diffusers"),
    SongUNetConfig: ("edm_pt",),
    DhariwalUNetConfig: ("edm_pt",),
    FluxConfig: ("flux_pt", "diffusers"),
}
"""The formats of others that can hold a network, by its configuration's type."""


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """A destination's tensors and everything else it will hold.

    Attributes:
        table: of names and transforms.
        notes: what differs from what a user may expect.
        num_embeds: rows of a pipeline's class table; None for as many as there are.
    """

    table: Table
    notes: tuple[str, ...]
    num_embeds: int | None = None


def plan_export(model: FoundModel, kind: str, allow_inexact: bool) -> ExportPlan:
    """What is written of a model as `kind`.

    Args:
        model: from `open_model`.
        kind: see `export.write_model`.
        allow_inexact: although the other side would compute something else.

    Raises:
        InteropError: the format cannot hold this model, or its code would compute something else.
    """
    network = model.network.config
    process = experiment.build_process(model.config)
    if kind == "dit_jax":
        return ExportPlan(native_table(parameter_shapes(model.network)), ())
    outside = registered()
    own = [name for name, known in outside.items() if known.config is type(network)]
    kinds = (*KINDS_OF.get(type(network), ()), *own)
    if kind not in kinds:
        raise InteropError(
            f"--to={kind}: this model is a {type(network).__name__.removesuffix('Config')}, which "
            f"can be written as {', '.join(('dit_jax', *kinds))}"
        )
    if kind in outside:
        return ExportPlan(outside[kind].table(network), ())
    if kind == "edm_pt":
        return _plan_edm(model, process, allow_inexact)
    if isinstance(network, FluxConfig):
        return _plan_flux(network, process, kind, allow_inexact)
    for key, value in (("second_time", network.second_time), ("augment_dim", network.augment_dim)):
        if value not in ("none", 0):
            raise InteropError(
                f"--to={kind}: this model has parameters for config.model.{key}={value!r}, which "
                "the format has no place for: choose dit_jax"
            )
    if kind == "diffusers":
        scheduler_config(process)  # whether there is one
        return _plan_diffusers(model)
    differences = _differences_from_original(network, process, kind)
    if differences and not allow_inexact:
        listed = "\n".join(f"  {line}" for line in differences)
        raise InteropError(
            f"the original code would compute something else with these weights:\n{listed}\n"
            "--allow_inexact writes them all the same"
        )
    notes = [f"not what the original code computes: {line}" for line in differences]
    if network.num_classes and not network.null_class:
        notes.append(
            f"without a null class: load it into a model of num_classes={network.num_classes}, "
            "class_dropout_prob=0; to read it here, say --num_classes="
            f"{network.num_classes}, which the tensors do not tell"
        )
    elif reason := no_guidance(model):
        notes.append(f"guidance would mean nothing: {reason}")
    return ExportPlan(dit.original_table(network), tuple(notes))


def _plan_flux(network: FluxConfig, process: Any, kind: str, allow_inexact: bool) -> ExportPlan:
    differences = flux.differences(network, process)
    if differences and not allow_inexact:
        raise InteropError(
            f"others would compute something else with these weights: {differences[0]}\n"
            "--allow_inexact writes them all the same"
        )
    notes = [f"not what others compute: {line}" for line in differences]
    if kind == "flux_pt":
        return ExportPlan(flux.original_table(network), tuple(notes))
    flux.config_to_diffusers(network)  # whether the class can have this shape
    return ExportPlan(flux.diffusers_table(network), tuple(notes))


def _plan_edm(model: FoundModel, process: Any, allow_inexact: bool) -> ExportPlan:
    network = model.network.config
    table = edm.edm_table(network, parameter_shapes(model.network), process=process)
    if isinstance(process, EDM):
        return ExportPlan(table, (f"load it into {edm.constructor(network, process)}",))
    difference = f"it denoises {process}, the original {EDM()}"
    if not allow_inexact:
        raise InteropError(
            f"the original code would compute something else with these weights: {difference}\n"
            "--allow_inexact writes them all the same"
        )
    return ExportPlan(table, (f"not what the original code computes: {difference}",))


def _differences_from_original(network: Any, process: Any, kind: str) -> list[str]:
    height, width = network.input_size
    lines = []
    if network.time_frequency_spacing != "original":
        lines.append(
            f"its time frequencies are spaced as diffusers', "
            f"model.dit.time_frequency_spacing={network.time_frequency_spacing!r}"
        )
    if network.mlp_norm_epsilon != 1e-6:
        lines.append(
            f"model.dit.mlp_norm_epsilon={network.mlp_norm_epsilon:g}, the original's is 1e-6"
        )
    if height != width:
        lines.append(f"the input is {height}x{width}, the original's square")
    if not network.num_classes:
        lines.append("it is unconditional, the original needs classes")
    if kind == "dit_pt":
        wanted = DDPM(learned_variance=network.learn_sigma)
        if not isinstance(process, DDPM) or process != wanted:
            lines.append(f"it denoises {process}, the original {wanted}")
    elif not isinstance(process, RectifiedFlow) or process != RectifiedFlow():
        lines.append(f"it denoises {process}, SiT {RectifiedFlow()}")
    return lines


def _plan_diffusers(model: FoundModel) -> ExportPlan:
    network = model.network.config
    notes = []
    if network.time_frequency_spacing != "diffusers":
        notes.append(
            "INEXACT in plain diffusers: it spaces the time frequencies by 1/127, this model by "
            "1/128, and no transform of weights makes up for it. Load it with "
            "dit_jax.interop.pipelines.load_pipeline, which sets the spacing"
        )
    num_embeds = None
    count = network.num_classes
    if 0 < count < dit.PIPELINE_NULL_CLASS:
        num_embeds = dit.PIPELINE_NULL_CLASS
        notes.append(
            f"the class table is filled up with zeros from {count} to {num_embeds} classes, since "
            f"DiTPipeline takes index {num_embeds} for no class"
        )
    if reason := no_guidance(model):
        notes.append(
            f"WRONG with guidance, which is DiTPipeline's default: {reason}. Call it with "
            "guidance_scale=1"
        )
    elif count > dit.PIPELINE_NULL_CLASS:
        notes.append(
            f"INEXACT with guidance in plain diffusers: DiTPipeline takes class "
            f"{dit.PIPELINE_NULL_CLASS} for no class, this model {count}"
        )
    height, width = network.input_size
    if height != width:
        notes.append(
            f"the model was trained on {height}x{width}; DiTPipeline makes squares of "
            f"{model.config.model.image_size}, and plain diffusers cannot put other outputs "
            "together. Load it with interop.pipelines.load_pipeline, whose transformer takes any "
            "height and width"
        )
    # Whether the class can have this shape.
    dit.config_to_diffusers(network, sample_size=model.config.model.image_size)
    return ExportPlan(dit.diffusers_table(network, num_embeds), tuple(notes), num_embeds)
