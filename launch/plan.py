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
import tempfile
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from dit_jax import config as config_lib
from dit_jax.evaluation import save_json
from launch import plan_report, planning, wiring
from parallel.accelerators import ACCELERATORS, accelerator

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, a file of configs/; override with --config.key=value."
)
_DEVICES = flags.DEFINE_integer("devices", None, "How many devices there would be.")
_ACCELERATOR = flags.DEFINE_string("accelerator", "h100", f"One of {', '.join(ACCELERATORS)}.")
_HBM_GIB = flags.DEFINE_float("hbm_gib", None, "Memory of one device; by default all it has.")
_WHAT = flags.DEFINE_string("what", "train", "train: an update; sample: a batch of samples.")
_OUT = flags.DEFINE_string("out", None, "Also write the plan to this file, as JSON.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out if it is there.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show stack traces of errors.")

# Tells the process that compiles, which has the virtual devices, where XLA writes programs.
_CHILD = "DIT_JAX_PLAN_PROGRAMS"


def run_with_devices(arguments: list[str], devices: int) -> int:
    """Runs this command in a process of its own with virtual devices; returns its exit status.

    The number of devices is fixed when JAX starts, and so is where XLA writes the programs that its
    partitioner hands to the backend (`planning.compile_program`).
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        xla_flags = (
            f"--xla_force_host_platform_device_count={devices}",
            "--xla_backend_optimization_level=0",  # of machine code, which nobody will run
            f"--xla_dump_to={folder}",
            "--xla_dump_hlo_pass_re=spmd.*",
            f"--xla_dump_hlo_module_re=jit_{planning.PROGRAM_NAME}.*",
        )
        root = str(Path(__file__).parents[1])
        environment = {
            **os.environ,
            "XLA_FLAGS": " ".join(xla_flags),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            # A program from a cache would not pass the partitioner again.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            _CHILD: folder,
        }
        command = [sys.executable, str(Path(__file__).absolute()), *arguments]
        return subprocess.run(command, env=environment, check=False).returncode


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with mistakes told as all others are."""
    known = {path for path, _ in config_lib.flatten(config_lib.default_config())}
    with wiring.readable_errors():
        for argument in argv[1:]:
            key = argument.lstrip("-").partition("=")[0].removeprefix("no")
            if key.startswith("config.") and key.removeprefix("config.") not in known:
                hint = config_lib.nearest_key(key.removeprefix("config."))
                raise config_lib.ConfigError(f"unknown key {key}{hint}")
        try:
            rest = flags.FLAGS(argv)[1:]
        except flags.Error as error:
            raise ValueError(f"{error} (see --help)") from error
        if rest:
            raise ValueError(f"unexpected arguments: {' '.join(rest)}")
    return argv[:1]


def main(argv: list[str]) -> None:
    """Entry point, of both processes."""
    del argv
    logging.set_verbosity(logging.WARNING)
    with wiring.readable_errors(traceback=_TRACEBACK.value):
        out = Path(_OUT.value) if _OUT.value else None
        planning.check_options(
            what=_WHAT.value,
            devices=_DEVICES.value,
            accelerator_name=_ACCELERATOR.value,
            hbm_gib=_HBM_GIB.value,
            out=None if _OVERWRITE.value else out,
        )
        folder = os.environ.get(_CHILD)
        if folder is None:
            sys.exit(run_with_devices(sys.argv[1:], _DEVICES.value))
        device = accelerator(_ACCELERATOR.value)
        hbm_gib = _HBM_GIB.value or device.memory_gib
        plan = planning.make_plan(_CONFIG.value, _WHAT.value, device, hbm_gib, Path(folder))
        print(plan_report.format_plan(plan))
        if out:
            save_json(out, plan, overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "devices"])
    app.run(main, flags_parser=parse_flags)
