"""Processes as diffusers' schedulers, and back."""

from collections.abc import Mapping
from typing import Any

from dit_jax.diffusion.process import DDPM, Process, RectifiedFlow
from dit_jax.interop.claims import check_types
from dit_jax.interop.tensors import InteropError
from dit_jax.untrusted import shown

# diffusers' name of what the network predicts, by ours.
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "velocity": "v_prediction"}

_MAX_TIMESTEPS = 10**6
_DDPM_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
_FLOW_CLASSES = (
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)


def scheduler_config(process: Process) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers' DiTPipeline samples the process.

    Raises:
        InteropError: no scheduler of diffusers computes it.
    """
    if isinstance(process, DDPM):
        return {
            "_class_name": "DDIMScheduler",
            "beta_end": process.beta_end,
            "beta_schedule": "linear",
            "beta_start": process.beta_start,
            "clip_sample": False,
            "num_train_timesteps": process.num_timesteps,
            "prediction_type": _PREDICTIONS[process.prediction],
            "rescale_betas_zero_snr": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "timestep_spacing": "leading",
        }
    if isinstance(process, RectifiedFlow):
        if (process.network_convention, process.time_scale) != ("flux", 1000.0):
            raise InteropError(
                "diffusers samples rectified flows whose network sees 1000 t and predicts eps - x0 "
                "(process.flow.network_convention='flux', process.flow.time_scale=1000); this one "
                f"has {process.network_convention!r} and {process.time_scale:g}. Export the state "
                "dict with --to=sit_pt, or train with those two values"
            )
        # Second order; the pipeline needs `scale_model_input`, which the flow-matching Euler
        # scheduler lacks.
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "final_sigmas_type": "zero",
            "flow_shift": 1.0,
            "lower_order_final": True,
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "solver_order": 2,
            "use_flow_sigmas": True,
        }
    raise InteropError(
        f"diffusers' DiTPipeline has no scheduler for a {type(process).__name__} process; it "
        "samples DDPM and rectified flows"
    )


def process_from_scheduler(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The sections process and sampling of a configuration for a scheduler_config.json.

    Raises:
        InteropError: a scheduler, or a schedule of noise, that this library does not have.
    """
    check_types(
        where,
        values,
        integers=("num_train_timesteps",),
        numbers=("beta_start", "beta_end", "flow_shift", "shift"),
        texts=("_class_name", "prediction_type", "beta_schedule"),
        nullable=("_class_name", "flow_shift", "shift"),
    )
    if (values.get("num_train_timesteps") or 1) > _MAX_TIMESTEPS:
        raise InteropError(
            f"{where}: num_train_timesteps={values['num_train_timesteps']}; at most "
            f"{_MAX_TIMESTEPS} are possible"
        )
    name = values.get("_class_name") or "DDIMScheduler"
    prediction = values.get("prediction_type", "epsilon")
    if prediction == "flow_prediction" or name == "FlowMatchEulerDiscreteScheduler":
        if name not in _FLOW_CLASSES:
            raise InteropError(f"{where}: {name[:80]} with flow_prediction is not known here")
        shift = values.get("flow_shift", values.get("shift", 1.0)) or 1.0
        return {
            "process": {"name": "flow", "flow": {"network_convention": "flux", "time_scale": 1e3}},
            "sampling": {"solver": "heun", "steps": 25, "shift": float(shift)},
        }
    if name not in _DDPM_CLASSES:
        raise InteropError(f"{where}: the scheduler {name[:80]} is not known here")
    if values.get("beta_schedule", "linear") != "linear" or values.get("trained_betas") is not None:
        raise InteropError(
            f"{where}: beta_schedule={shown(values.get('beta_schedule'))}; a DDPM process here has "
            "linear betas"
        )
    if values.get("rescale_betas_zero_snr"):
        raise InteropError(f"{where}: rescale_betas_zero_snr is not known here")
    ours = {theirs: mine for mine, theirs in _PREDICTIONS.items()}
    if prediction not in ours:
        raise InteropError(
            f"{where}: prediction_type={shown(prediction)}; expected one of {sorted(ours)}"
        )
    return {
        "process": {
            "name": "ddpm",
            "ddpm": {
                "num_timesteps": values.get("num_train_timesteps", 1000),
                "beta_start": values.get("beta_start", 1e-4),
                "beta_end": values.get("beta_end", 2e-2),
                "prediction": ours[prediction],
            },
        },
        # DiTPipeline's own way: DDIM over `leading` indices, all latent channels guided.
        "sampling": {"solver": "ddim", "steps": 250, "spacing": "leading"},
    }
