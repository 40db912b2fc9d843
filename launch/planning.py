"""Wires `parallel.planning` to methods and meshes; `launch/plan.py` is the command."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from dit_jax import experiment
from dit_jax.config import ConfigError
from dit_jax.launch import sizes, wiring
from dit_jax.nearest import one_of
from dit_jax.output_formats import require_suffix
from dit_jax.parallel.planning import choices, compilers, programs
from dit_jax.parallel.planning import plan as planning
from dit_jax.parallel.planning.accelerators import accelerator
from dit_jax.parallel.planning.gpu_targets import TARGET_TEXTS
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.ranges import POSITIVE, Range

KINDS_OF_RUN = ("train", "sample")
_TRUTHS = {"true": True, "false": False}
_SHARE = Range(0, 1, above=True)


def check_options(
    *,
    what: str,
    devices: int,
    accelerator_name: str,
    hbm_gib: float | None = None,
    parallel: ImageParallel | None = None,
    computed_share: float | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Refuses what cannot be planned, before anything is started.

    Args:
        what: one of `KINDS_OF_RUN`.
        devices: how many.
        accelerator_name: see `parallel.planning.accelerators`.
        hbm_gib: memory of one device, None for the accelerator's own.
        parallel: how devices share an image, or None.
        computed_share: of the evaluations with a step cache, those that are computed in full, or
            None.
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
        raise ValueError(f"--what={what!r}: {one_of(what, KINDS_OF_RUN)}")
    if parallel is not None and what != "sample":
        raise ValueError(
            f"--parallel={parallel.mode} would do nothing with --what={what}: devices share an "
            "image in sampling. Add --what=sample"
        )
    if computed_share is not None and what != "sample":
        raise ValueError(
            f"--computed_share={computed_share} would do nothing with --what={what}: a step cache "
            "skips blocks in sampling. Add --what=sample"
        )
    if computed_share is not None and computed_share not in _SHARE:
        raise ValueError(f"--computed_share={computed_share}: expected {_SHARE}")
    if hbm_gib is not None and hbm_gib not in POSITIVE:
        raise ValueError(f"--hbm_gib={hbm_gib}: expected {POSITIVE}")
    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another --out, or give --overwrite")
    if out is not None:
        require_suffix(out, ".json")


def xla_options(given: Sequence[str]) -> dict[str, str | bool]:
    """Options of XLA's compiler by name, from 'NAME=VALUE' or '--NAME=VALUE'.

    Raises:
        ValueError: something else was given.
    """
    found = {}
    for option in given:
        name, equals, value = option.removeprefix("--").partition("=")
        if not equals or not name.startswith("xla_"):
            raise ValueError(
                f"--xla={option}: expected NAME=VALUE, where names begin with xla_, for instance "
                "--xla=xla_gpu_enable_triton_gemm=true"
            )
        found[name] = _TRUTHS.get(value.lower(), value)
    return found


def check_xla_options(options: dict[str, str | bool], accelerator_name: str, reason: str) -> None:
    """Refuses options of a compiler that is not used.

    Raises:
        ValueError: virtual CPU devices are compiled for.
    """
    if options and is_virtual(accelerator_name, reason):
        raise ValueError(
            f"--xla={next(iter(options))}=... would do nothing: no GPU is compiled for"
            + (f" ({reason})" if reason else "")
        )


def check_computed_share(config: ml_collections.ConfigDict, share: float | None) -> None:
    """Refuses a share of computed evaluations that no step cache of the configuration can have.

    Args:
        config: resolved.
        share: those computed in full, None if nothing was said.

    Raises:
        ValueError: there is no step cache; it computes more of them in any case.
    """
    if share is None:
        return
    plan = experiment.build_sampling(config)
    if not plan.has_cache:
        raise ValueError(
            f"--computed_share={share} would do nothing: there is no step cache. Add "
            "--config.cache.name=first_block, or leave it out"
        )
    cache, evaluations = plan.network.cache, plan.evaluations
    least = cache.least_computed(evaluations)
    if share < least / evaluations:
        raise ValueError(
            f"--computed_share={share}: of {evaluations} evaluations at least {least} "
            f"({least / evaluations:.1%}) are computed in full with config.cache.first_block."
            f"warmup={cache.warmup} and max_reuses={cache.max_reuses}"
        )


def why_virtual(accelerator_name: str, *, asked_for: bool = False) -> str:
    """Why virtual CPU devices are compiled for in place of the accelerator, '' if they are not.

    Args:
        accelerator_name: see `parallel.planning.accelerators`.
        asked_for: by the user.

    Raises:
        PluginError: JAX's CUDA plugin is there, but cannot work.
    """
    if accelerator_name == "cpu":
        return ""
    if asked_for:
        return "--virtual was given"
    if accelerator_name not in TARGET_TEXTS:
        return f"there is a compiler without the devices for {', '.join(TARGET_TEXTS)} alone"
    return compilers.missing_plugin()


def is_virtual(accelerator_name: str, reason: str) -> bool:
    """Whether virtual CPU devices are compiled for; `reason` is of `why_virtual`."""
    return bool(reason) or accelerator_name == "cpu"


def environment(accelerator_name: str, reason: str, devices: int, folder: Path) -> dict[str, str]:
    """Variables of the process that compiles, which decide what JAX's devices are.

    Args:
        accelerator_name: see `parallel.planning.accelerators`.
        reason: of `why_virtual`.
        devices: how many are meant.
        folder: where XLA shall write programs.
    """
    virtual = is_virtual(accelerator_name, reason)
    flags = " ".join(compilers.virtual_xla_flags(devices, folder)) if virtual else ""
    return {
        **({} if virtual else compilers.GPU_ENVIRONMENT),
        "XLA_FLAGS": flags or os.environ.get("XLA_FLAGS", ""),
        "JAX_PLATFORMS": "cpu",
        # A program from a cache would not pass the partitioner again.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def _refuse_te(config: ml_collections.ConfigDict, accelerator_name: str) -> None:
    """Refuses products that cannot be compiled for a device that is not there.

    Raises:
        ConfigError: with those that can be.
    """
    if accelerator_name != "cpu" and config.model.get("quantization") == "te":
        raise ConfigError(
            "config.model.quantization='te': Transformer Engine asks the GPU itself while a "
            f"program is traced, and there is no {accelerator(accelerator_name).title} here: it "
            "cannot be planned, with JAX's CUDA plugin or without. Plan "
            "config.model.quantization='fp8', which computes as much in 8 bits"
        )


def make_plan(
    config: ml_collections.ConfigDict,
    what: str,
    accelerator_name: str,
    devices: int,
    folder: Path,
    *,
    hbm_gib: float | None = None,
    parallel: ImageParallel | None = None,
    reason: str = "",
    size: tuple[int | None, int | None] = (None, None),
    options: dict[str, str | bool] | None = None,
    computed_share: float | None = None,
) -> dict[str, Any]:
    """All there is to say of an experiment on devices that are not there, as plain values.

    Args:
        config: the experiment.
        what: one of `KINDS_OF_RUN`.
        accelerator_name: see `parallel.planning.accelerators`.
        devices: how many; virtual ones have to be there.
        folder: where XLA writes programs of virtual devices.
        hbm_gib: memory of one device that may be used, GiB.
        parallel: how devices share an image, or None.
        reason: of `why_virtual`.
        size: (height, width) of the images in pixels; None for the configured one.
        options: of XLA's GPU compiler, see `xla_options`.
        computed_share: of the evaluations with a step cache, those that are computed in full; None
            for all.

    Raises:
        ConfigError: the configuration cannot work.
        ValueError: mesh, batch and devices do not go together.
    """
    given = config
    _refuse_te(config, accelerator_name)
    if is_virtual(accelerator_name, reason):
        compiler = compilers.VirtualCompiler(accelerator(accelerator_name), folder)
        if accelerator_name != "cpu":
            config = choices.accelerator_config(config)
    else:
        compiler = compilers.GpuCompiler(accelerator_name, devices, options or {})
    with compiler.targeting():
        config = experiment.resolve_config(sizes.at_size(config, *size))
        check_computed_share(config, computed_share)

    def needs(config: ml_collections.ConfigDict) -> programs.Needs:
        if parallel is not None:
            return programs.plan_parallel_sampling(config, parallel, compiler.devices())
        placement = wiring.create_placement(config, compiler.devices())
        if what == "sample":
            return programs.plan_sampling(config, placement)
        method = experiment.build_method(config)
        if message := experiment.effect_error(config, method):
            raise ConfigError(message)
        return programs.plan_training(config, placement, method)

    subject = planning.Subject(config, given, what, needs, computed_share)
    return planning.make_plan(subject, compiler, hbm_gib, reason)
