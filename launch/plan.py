"""Tells what an experiment needs on devices that are not there, and how fast it can be on them.

  python launch/plan.py --config=configs/dit_xl2.py --devices=8
  python launch/plan.py --config=configs/dit_7b.py --devices=256 --accelerator=h200 --out=plan.json
  python launch/plan.py --config=configs/dit_xl2.py --devices=8 --what=sample \\
      --parallel=displaced --patch_devices=8 --config.model.image_size=64
  python launch/plan.py --config=configs/sit_xl2.py --devices=8 --what=sample --height=512

The real training update (or sampler) is compiled for the accelerator by JAX's CUDA plugin (the
extra 'plan'), which needs no GPU, else for so many virtual CPU devices. No array is ever made, so a
laptop does. How to read the result: docs/planning.md.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from absl import flags

import dit_jax
from dit_jax.launch import arguments, command, configuration_flags, spelling

_CONFIG = configuration_flags.define_config()
_DEVICES = flags.DEFINE_integer("devices", None, "How many devices there would be.")
_ACCELERATOR = flags.DEFINE_string(
    "accelerator", "h100", f"One of {', '.join(arguments.ACCELERATORS)}."
)
_HBM_GIB = flags.DEFINE_float(
    "hbm_gib", None, "Memory of one device that may be used; by default 92 % of a GPU's."
)
_WHAT = flags.DEFINE_string("what", "train", "train: an update; sample: a batch of samples.")
_HEIGHT = flags.DEFINE_integer(
    "height", None, "Of the images in pixels; by default as configured.", lower_bound=1
)
_WIDTH = flags.DEFINE_integer(
    "width", None, "Of the images in pixels; by default as configured.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", None, "Also write the plan to this file, as JSON.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out if it is there.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show stack traces of errors.")

_VIRTUAL = flags.DEFINE_bool(
    "virtual", False, "Compile for virtual CPU devices even where JAX's CUDA plugin is installed."
)
_XLA = flags.DEFINE_multi_string(
    "xla", [], "An option of XLA's GPU compiler, NAME=VALUE; can be given several times."
)
_PARALLEL = flags.DEFINE_string(
    "parallel",
    None,
    f"With --what=sample: devices share an image; {', '.join(arguments.PARALLEL_MODES)}.",
)
_PATCH_DEVICES = flags.DEFINE_integer("patch_devices", None, "Devices one image is split over.")
_WARMUP_STEPS = flags.DEFINE_integer(
    "warmup_steps", None, "Synchronous steps before displaced ones."
)
_SPLIT_GUIDANCE = flags.DEFINE_bool(
    "split_guidance", False, "The two evaluations of guidance on devices of their own."
)
_COMPUTED_SHARE = flags.DEFINE_float(
    "computed_share",
    None,
    "With a step cache: the share of the evaluations to count as computed in full; by default all.",
)
_ULYSSES_DEVICES = flags.DEFINE_integer(
    "ulysses_devices", None, "Of --patch_devices, those that exchange heads."
)

# Tells the process that compiles where XLA writes programs; what its devices are was set before.
_CHILD = "DIT_JAX_PLAN_PROGRAMS"


def run_again(options: list[str], reason: str) -> int:
    """Runs this command in a process of its own with the devices meant; returns its exit status.

    What they are is fixed when JAX starts, and so is where XLA writes programs.
    """
    from dit_jax.launch import planning

    with command.temporary_folder("plan-") as folder:
        root = str(Path(dit_jax.__file__).parents[1])
        environment = {
            **os.environ,
            **planning.environment(_ACCELERATOR.value, reason, _DEVICES.value, folder),
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            _CHILD: str(folder),
        }
        again = [*spelling.started_as(Path(__file__)), *options]
        return subprocess.run(again, env=environment, check=False).returncode


def image_parallel():
    """How devices share an image, as the flags say; None if they do not."""
    from dit_jax.launch import wiring

    return wiring.image_parallel(
        argparse.Namespace(
            parallel=_PARALLEL.value,
            patch_devices=_PATCH_DEVICES.value,
            warmup_steps=_WARMUP_STEPS.value,
            split_guidance=_SPLIT_GUIDANCE.value,
            ulysses_devices=_ULYSSES_DEVICES.value,
        )
    )


def main(argv: list[str]) -> None:
    """Entry point, of both processes."""
    del argv
    with command.readable_errors(traceback=_TRACEBACK.value):
        from dit_jax.evaluation import save_json
        from dit_jax.launch import planning
        from dit_jax.parallel.planning.report import format_plan

        out, parallel = Path(_OUT.value) if _OUT.value else None, image_parallel()
        planning.check_options(
            what=_WHAT.value,
            devices=_DEVICES.value,
            accelerator_name=_ACCELERATOR.value,
            hbm_gib=_HBM_GIB.value,
            parallel=parallel,
            computed_share=_COMPUTED_SHARE.value,
            out=out,
            overwrite=_OVERWRITE.value,
        )
        options = planning.xla_options(_XLA.value)
        reason = planning.why_virtual(_ACCELERATOR.value, asked_for=_VIRTUAL.value)
        planning.check_xla_options(options, _ACCELERATOR.value, reason)
        folder = os.environ.get(_CHILD)
        if folder is None:
            sys.exit(run_again(sys.argv[1:], reason))
        plan = planning.make_plan(
            _CONFIG.value,
            _WHAT.value,
            _ACCELERATOR.value,
            _DEVICES.value,
            Path(folder),
            hbm_gib=_HBM_GIB.value,
            parallel=parallel,
            reason=reason,
            size=(_HEIGHT.value, _WIDTH.value),
            options=options,
            computed_share=_COMPUTED_SHARE.value,
        )
        print(format_plan(plan))
        if out:
            save_json(out, plan, overwrite=_OVERWRITE.value)


def start() -> None:
    """Runs the command line of this process."""
    configuration_flags.run(main, required={"devices": "8"}, announce=_CHILD not in os.environ)


if __name__ == "__main__":
    start()
