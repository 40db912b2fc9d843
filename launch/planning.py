"""Wires `parallel.planning` to methods and meshes; `launch/plan.py` is the command."""

from pathlib import Path
from typing import Any

import ml_collections

from dit_jax.launch import methods, wiring
from dit_jax.output_formats import require_suffix
from dit_jax.parallel.planning import plan as planning
from dit_jax.parallel.planning import programs
from dit_jax.parallel.planning.accelerators import Accelerator, accelerator
from dit_jax.ranges import POSITIVE

KINDS_OF_RUN = ("train", "sample")


def check_options(
    *,
    what: str,
    devices: int,
    accelerator_name: str,
    hbm_gib: float | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Refuses what cannot be planned, before anything is started.

    Args:
        what: one of `KINDS_OF_RUN`.
        devices: how many.
        accelerator_name: see `parallel.planning.accelerators`.
        hbm_gib: memory of one device, None for the accelerator's own.
        out: a file of JSON that must not be there yet, or None.
        overwrite: it may be there.

    Raises:
        ValueError: one of them is not so.
        FileExistsError: `out` is there.
    """
    accelerator(accelerator_name)
    if devices < 1:
        raise ValueError(f"--devices={devices}: expected at least 1")
    if what not in KINDS_OF_RUN:
        raise ValueError(f"--what={what!r}: expected one of {', '.join(KINDS_OF_RUN)}")
    if hbm_gib is not None and hbm_gib not in POSITIVE:
        raise ValueError(f"--hbm_gib={hbm_gib}: expected {POSITIVE}")
    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another --out, or give --overwrite")
    if out is not None:
        require_suffix(out, ".json")


def make_plan(
    config: ml_collections.ConfigDict,
    what: str,
    device: Accelerator,
    hbm_gib: float,
    folder: Path,
) -> dict[str, Any]:
    """All there is to say of an experiment on `jax.device_count()` devices, as plain values.

    Args:
        config: the experiment.
        what: one of `KINDS_OF_RUN`.
        device: the accelerator meant.
        hbm_gib: memory of one device, GiB.
        folder: where XLA writes programs.

    Raises:
        ConfigError: the configuration cannot work.
        ValueError: mesh, batch and devices do not go together.
    """
    config, chosen = programs.accelerator_config(config)
    config = methods.resolve_config(config)
    method = methods.build_method(config) if what == "train" else None
    placement = wiring.create_placement(config)
    return planning.make_plan(config, placement, method, device, hbm_gib, folder, chosen)
