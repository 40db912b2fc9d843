"""Trains a model.

  python launch/train.py --config=configs/dit_xl2.py --workdir=runs/dit_xl2 \\
      --config.optimizer.learning_rate=3e-4 --config.training.batch_size=1024

  python launch/train.py --config=configs/dit_xl2.py --workdir=runs/tuned --init_from=DiT-XL-2.pt

Running the same command again continues from the newest checkpoint. Ctrl-C saves and ends.

Many devices, and several processes (docs/scaling.md):

  python launch/train.py --config=configs/dit_xl2.py --workdir=runs/dit_xl2 --config.mesh.fsdp=8
  srun python launch/train.py --distributed --config=configs/dit_xl2.py --workdir=runs/dit_xl2
"""

import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from dit_jax.launch import command, configuration_flags, spelling
from dit_jax.launch.configuration_flags import flags

_CONFIG = configuration_flags.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints, metrics and pictures go; by default runs/NAME, of the file of --config.",
)
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Start from a checkpoint: .pt of DiT, SiT (sit_pt:FILE) or EDM, .pkl of EDM, diffusers folder, "
    "workdir, hub:...",
)
_NUM_HEADS = flags.DEFINE_integer(
    "num_heads", None, "Of a .pt given to --init_from; by default config.model's where it says not."
)
_NUM_CLASSES = flags.DEFINE_integer(
    "num_classes",
    None,
    "Classes of a .pt given to --init_from, the null class not counted; by default config.model's "
    "where its class table can be read both ways.",
)
_ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow_nonfinite", False, "Start from --init_from although it has NaN or infinity in it."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, which SLURM, Open MPI or Kubernetes started."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "One of several processes: host:port of the first."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0.", lower_bound=0
)
_FORCE = flags.DEFINE_bool("force", False, "Go on in a workdir of another configuration.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show stack traces of errors.")


def run(*args: Any, **options: Any) -> Any:
    """`launch.training.run`, imported when it is needed."""
    from dit_jax.launch import training

    return training.run(*args, **options)


def join_processes() -> None:
    """Joins the others where this is one of several processes; before JAX is used."""
    from dit_jax.parallel import distributed

    explicit = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or any(value is not None for value in explicit):
        distributed.initialize(*explicit)


def initial_options() -> dict[str, Any]:
    """What the command line says of --init_from.

    Raises:
        ValueError: it says so of nothing.
    """
    given = {"num_heads": _NUM_HEADS.value, "num_classes": _NUM_CLASSES.value}
    given["allow_nonfinite"] = _ALLOW_NONFINITE.value or None
    given = {name: value for name, value in given.items() if value is not None}
    if given and not _INIT_FROM.value:
        raise ValueError(f"--{next(iter(given))} is of --init_from, which is not given")
    return given


def main(argv: list[str]) -> None:
    """Entry point."""
    with command.readable_errors(traceback=_TRACEBACK.value):
        options = initial_options()
    directory = Path(_WORKDIR.value or Path("runs") / configuration_flags.config_name()).absolute()
    from dit_jax.parallel import distributed

    readable = command.readable_errors(traceback=_TRACEBACK.value)
    with distributed.ending_together(), readable:
        join_processes()
        if not _WORKDIR.value and distributed.is_first():
            print(f"no --workdir given: {directory}", flush=True)
        result = run(
            _CONFIG.value,
            directory,
            init_from=_INIT_FROM.value,
            init_options=options,
            force=_FORCE.value,
        )
    if result.interrupted:
        if distributed.is_first():
            print(f"saved step {result.step} in {directory}; run the same command to continue")
        sys.exit(128 + (result.signal or signal.SIGTERM))
    if distributed.is_first():
        print(f"done: step {result.step}, {result.steps_per_second:.4g} steps/s, in {directory}")
        from dit_jax import config, options
        from dit_jax.launch import next_steps
        from dit_jax.training.workdir import load_config

        following = next_steps.after_training(load_config(directory), directory)
        modules = options.extensions(config.choices(_CONFIG.value))
        before = f"{options.EXTENSIONS}={','.join(modules)} " if modules else ""
        print(f"next: {before}{spelling.spelled(shlex.join(following))}")


def start() -> None:
    """Runs the command line of this process."""
    configuration_flags.run(main)


if __name__ == "__main__":
    start()
