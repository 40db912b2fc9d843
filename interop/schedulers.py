"""Processes as diffusers' schedulers, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dit_jax.diffusion.process import DDPM, Process, RectifiedFlow
from dit_jax.diffusion.schedules import schedule, shift_of_tokens
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


_FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
# Options of diffusers' scheduler that FLUX does not use, by the values that mean so.
_UNUSED = {
    "invert_sigmas": (False,),
    "shift_terminal": (None, 0),
    "stochastic_sampling": (False,),
    "time_shift_type": ("exponential",),
    "use_beta_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_karras_sigmas": (False,),
}
_LINE = ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift")
FLUX_SHIFT = (256, 0.5, 4096, 1.15)


@dataclasses.dataclass(frozen=True)
class FlowTimes:
    """At which times of a rectified flow FLUX and its like are evaluated.

    Attributes:
        shift: of all sizes, where there are no `points`; 1 for none, as schnell.
        points: (tokens, log shift, other tokens, their log shift), see `schedules.shift_of_tokens`.
    """

    shift: float = 1.0
    points: tuple[float, ...] = ()

    def __call__(self, steps: int, tokens: int) -> np.ndarray:
        """The times of so many steps for an image of so many tokens, float32 [steps + 1]."""
        return schedule(RectifiedFlow(), steps, shift=self.shift_of(tokens))

    def shift_of(self, tokens: int) -> float:
        """The shift of images of so many tokens."""
        return shift_of_tokens(tokens, self.points) if self.points else self.shift

    def shifted(self, sigmas: Sequence[float], tokens: int) -> np.ndarray:
        """The times for sigmas of a caller's own, as diffusers' argument of this name.

        Raises:
            ValueError: they do not fall from at most 1 to above 0.
        """
        given, shift = np.asarray(sigmas, np.float64), self.shift_of(tokens)
        falls = given.ndim == 1 and given.size and given[-1] > 0 and given[0] <= 1
        if not (falls and (np.diff(given) < 0).all()):
            raise ValueError(
                f"sigmas={sigmas}: expected numbers that fall from at most 1 to above 0"
            )
        times = shift * given / (1.0 + (shift - 1.0) * given)
        return np.append(times, 0.0).astype(np.float32)


def flow_times_from_scheduler(values: Mapping[str, Any], where: str) -> FlowTimes:
    """The scheduler_config.json of a `FlowMatchEulerDiscreteScheduler` as ours.

    Raises:
        InteropError: another scheduler, or an option that is not known here.
    """
    check_types(
        where,
        values,
        integers=("num_train_timesteps",),
        numbers=("shift", *_LINE),
        truths=("use_dynamic_shifting",),
        nullable=(*_LINE, "shift"),
    )
    name = values.get("_class_name")
    if name != _FLOW_EULER:
        raise InteropError(f"{where} describes {shown(name)}; expected a {_FLOW_EULER}")
    for key, known in _UNUSED.items():
        if values.get(key, known[0]) not in known:
            raise InteropError(
                f"{where}: {key}={shown(values[key])} is not known here; expected {known[0]}"
            )
    if values.get("num_train_timesteps", 1000) != 1000:
        raise InteropError(
            f"{where}: num_train_timesteps={values['num_train_timesteps']}; FLUX is told 1000 t"
        )
    if values.get("use_dynamic_shifting", False):
        found = zip(_LINE, FLUX_SHIFT, strict=True)
        return FlowTimes(points=tuple(values.get(key) or default for key, default in found))
    shift = values.get("shift")
    if shift is not None and not shift > 0:
        raise InteropError(f"{where}: shift={shift}; expected a number above 0")
    return FlowTimes(1.0 if shift is None else float(shift))


def flow_times_to_scheduler(times: FlowTimes) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers' FluxPipeline takes the same times."""
    points = times.points or FLUX_SHIFT
    return {
        "_class_name": _FLOW_EULER,
        **dict(zip(_LINE, points, strict=True)),
        "num_train_timesteps": 1000,
        "shift": times.shift,
        "use_dynamic_shifting": bool(times.points),
    }
