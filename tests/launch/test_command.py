"""How commands start: what is imported before their flags are understood."""

import ast
import logging
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from absl import logging as absl_logging

from dit_jax import config as config_lib
from dit_jax import config_help, evaluation, options
from dit_jax.interop import export, kinds
from dit_jax.launch import arguments, command, planning, train
from dit_jax.models import linear
from dit_jax.parallel import sampling
from dit_jax.parallel.planning import accelerators
from tests.launch.conftest import ROOT, environment, run, tiny_config

COMMANDS = ("train", "sample", "evaluate", "convert", "compare", "extract_features", "plan")
COMMANDS += ("write_pairs", "demo", "compile")


def start(command):
    """A process that does not ignore SIGINT, as children of a shell's background jobs do."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_what_is_logged_looks_as_the_commands_own_messages(capsys):
    root, absl = logging.getLogger(), absl_logging.get_absl_handler()
    handlers, former, filters = (
        root.handlers[:],
        absl.python_handler.formatter,
        logging.getLogger("absl").filters,
    )
    kept = filters[:]
    try:
        root.handlers[:] = []
        command.quieten()
        logging.getLogger("dit_jax.data").warning("skipped %d images", 2)
        record = logging.LogRecord("absl", logging.ERROR, "x.py", 1, "disk full", (), None)
        assert absl.format(record) == "error: disk full"
    finally:
        root.handlers[:], filters[:] = handlers, kept
        absl.setFormatter(former)
    assert capsys.readouterr().err == "warning: skipped 2 images\n"


# Runs every command with --help and with a flag that is not there, each in a fork of this process,
# and says what it has loaded at its end.
SCRIPT = """
import os, runpy, sys
heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "torch", "scipy", "clu"}
for name in %r:
    for flag in ("--help", "--no_such_flag"):
        if os.fork():
            os.wait()
            continue
        sys.argv = [f"launch/{name}.py", flag]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ending:
            print("ENDED", name, flag, ending.code, sorted(heavy & sys.modules.keys()), flush=True)
        os._exit(0)
"""


def test_help_and_mistyped_flags_are_answered_before_anything_heavy_is_imported():
    child = [sys.executable, "-c", SCRIPT % (COMMANDS,)]
    out = subprocess.run(child, cwd=ROOT, env=environment(), capture_output=True, text=True)
    ended = [line.split(maxsplit=4) for line in out.stdout.splitlines() if "ENDED" in line]
    assert len(ended) == 2 * len(COMMANDS), out.stderr
    for _, name, flag, status, loaded in ended:
        # A flag that may be meant for a key of the configuration is looked for among these, which
        # stand beside what they configure.
        keys = name in ("train", "plan") and flag != "--help"
        allowed = {"flax", "jax", "jaxlib", "optax", "scipy"} if keys else set()
        assert status == ("0" if flag == "--help" else "2"), (name, flag)
        assert set(ast.literal_eval(loaded)) <= allowed, (name, flag)
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize(
    ("listed", "known"),
    [
        (arguments.PARALLEL_MODES, sampling.MODES),
        (arguments.ROUNDING_RULES, evaluation.ROUNDING_RULES),
        (arguments.PROTOCOLS, evaluation.PROTOCOLS),
        (arguments.SCORES, evaluation.SCORES),
        (arguments.KINDS, kinds.KINDS),
        (arguments.DESTINATIONS, export.DESTINATIONS),
        (arguments.DTYPES, export.DTYPES),
        (arguments.PARAM_DTYPES, linear.PARAM_DTYPES),
        (arguments.ACCELERATORS, accelerators.ACCELERATORS),
        (planning.KINDS_OF_RUN, ("train", "sample")),
    ],
)
def test_choices_of_flags_are_the_librarys(listed, known):
    assert tuple(listed) == tuple(known)


def test_help_config_explains_the_keys_that_have_a_word():
    said = {path: known.meaning for path, known in options.schema().items()}
    assert set(said) == {path for path, _ in config_lib.flatten(config_lib.default_config())}
    assert all(said.values())
    assert said["training.batch_size"] == "over all devices"
    assert said["method.ladd.r1_noise"] == "its perturbation of data"  # of keys that methods share
    assert said["mesh.fsdp"].startswith("parts of a batch")
    assert config_help.explain("lr").splitlines()[0].split() == [
        *("config.optimizer.learning_rate", "0.0001", "after", "the", "warm-up")
    ]
    assert "config.sampling.guidance_scale" in config_help.explain("classifier-free")
    out, _ = run("train", "--help_config", "remat")
    assert out == f"Defaults of all experiments, and meanings:\n{config_help.explain('remat')}\n"
    _, err = run("train", "--help_config=remta", status=2)
    assert "no key of the configuration has 'remta'" in err and "config.model.remat?" in err


# A call that Python cannot interrupt, as a compilation is; and a file that is half written.
UNINTERRUPTIBLE = """
from dit_jax.launch import command
command.listen()
import hashlib, pathlib, sys, time
half = pathlib.Path(sys.argv[1])
with command.readable_errors(), command.temporary_folder("test-") as folder:
    with command.cleaning_up():
        try:
            half.touch()
            print(folder, flush=True)
            time.sleep(60)
        finally:
            half.unlink()
"""


def ended_by(number, process):
    """(stdout, stderr) of a process that a signal ends at once, with its status."""
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert time.monotonic() - started < 20  # (machines that run tests are busy)
    return out, err


def test_signals_end_what_python_cannot_interrupt_and_half_written_files_go(tmp_path):
    half = tmp_path / "half"
    for number, said in ((signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "terminated\n")):
        code = UNINTERRUPTIBLE.split("with command")[0]
        code += "print(1, flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
        process = start([sys.executable, "-c", code, str(half)])
        process.stdout.readline()
        assert ended_by(number, process)[1] == said
    process = start([sys.executable, "-c", UNINTERRUPTIBLE, str(half)])
    folder = pathlib.Path(process.stdout.readline().strip())
    assert half.exists() and folder.is_dir()
    assert ended_by(signal.SIGINT, process)[1] == "interrupted\n"
    assert not half.exists() and not folder.exists()


def test_sampling_and_conversion_are_interrupted_without_a_trace(tmp_path):
    workdir = tmp_path / "run"
    train.run(tiny_config(**{"training.num_steps": 1, "training.checkpoint_every": 1}), workdir)
    options = [f"--workdir={workdir}", "--num_images=100000", f"--out={tmp_path / 'x.npz'}"]
    process = start([sys.executable, "launch/sample.py", *options])
    while "time left" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(random.uniform(0, 2))  # compiling, or sampling
    _, err = ended_by(signal.SIGINT, process)
    assert err == "interrupted\n"
    target = tmp_path / "converted" / "x.pt"
    target.parent.mkdir()
    options = [str(workdir), str(target), "--to=dit_pt", "--allow_inexact"]
    process = start([sys.executable, "launch/convert.py", *options])
    while "converting to" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    # It is quick: it may have been done.
    assert [*target.parent.iterdir()] == ([target] if process.returncode == 0 else [])
    assert process.returncode == 0 or (process.returncode, err) == (130, "interrupted\n")
