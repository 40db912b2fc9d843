"""Tells what an experiment needs on many devices, and how fast it can be at most, without them.

  python launch/plan.py --config=configs/dit_xl2.py --devices=64 --config.mesh.fsdp=8
  python launch/plan.py --config=configs/dit_7b.py --devices=256 --accelerator=h200 --out=plan.json
  python launch/plan.py --config=configs/sit_xl2.py --devices=8 --what=sample

The real training update (or sampler) is compiled for so many virtual CPU devices; no array is ever
made, so a laptop does. How to read the result: docs/planning.md.
"""

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
_HBM_GIB = flags.DEFINE_float("hbm_gib", None, "Memory of one device; by default all it has.")
_WHAT = flags.DEFINE_string("what", "train", "train: an update; sample: a batch of samples.")
_OUT = flags.DEFINE_string("out", None, "Also write the plan to this file, as JSON.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out if it is there.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show stack traces of errors.")

# Tells the process that compiles, which has the virtual devices, where XLA writes programs.
_CHILD = "DIT_JAX_PLAN_PROGRAMS"


def run_with_devices(options: list[str], devices: int) -> int:
    """Runs this command in a process of its own with virtual devices; returns its exit status.

    The number of devices is fixed when JAX starts, and so is where XLA writes the programs that its
    partitioner hands to the backend (`parallel.planning.programs`).
    """
    from dit_jax.parallel.planning.programs import PROGRAM_NAME

    with command.temporary_folder("plan-") as folder:
        xla_flags = (
            f"--xla_force_host_platform_device_count={devices}",
            "--xla_backend_optimization_level=0",  # of machine code, which nobody will run
            f"--xla_dump_to={folder}",
            "--xla_dump_hlo_pass_re=spmd.*",
            f"--xla_dump_hlo_module_re=jit_{PROGRAM_NAME}.*",
        )
        root = str(Path(dit_jax.__file__).parents[1])
        environment = {
            **os.environ,
            "XLA_FLAGS": " ".join(xla_flags),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            # A program from a cache would not pass the partitioner again.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            _CHILD: str(folder),
        }
        again = [*spelling.started_as(Path(__file__)), *options]
        return subprocess.run(again, env=environment, check=False).returncode


def main(argv: list[str]) -> None:
    """Entry point, of both processes."""
    del argv
    with command.readable_errors(traceback=_TRACEBACK.value):
        from dit_jax.evaluation import save_json
        from dit_jax.launch import planning
        from dit_jax.parallel.planning.accelerators import accelerator
        from dit_jax.parallel.planning.report import format_plan

        out = Path(_OUT.value) if _OUT.value else None
        planning.check_options(
            what=_WHAT.value,
            devices=_DEVICES.value,
            accelerator_name=_ACCELERATOR.value,
            hbm_gib=_HBM_GIB.value,
            out=out,
            overwrite=_OVERWRITE.value,
        )
        folder = os.environ.get(_CHILD)
        if folder is None:
            sys.exit(run_with_devices(sys.argv[1:], _DEVICES.value))
        device = accelerator(_ACCELERATOR.value)
        hbm_gib = _HBM_GIB.value or device.memory_gib
        plan = planning.make_plan(_CONFIG.value, _WHAT.value, device, hbm_gib, Path(folder))
        print(format_plan(plan))
        if out:
            save_json(out, plan, overwrite=_OVERWRITE.value)


def start() -> None:
    """Runs the command line of this process."""
    configuration_flags.run(main, required=("devices",), announce=_CHILD not in os.environ)


if __name__ == "__main__":
    start()
