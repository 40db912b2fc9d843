"""How commands start: what is imported before their flags are understood."""

import subprocess
import sys

import pytest

from dit_jax import config as config_lib
from dit_jax import config_help, evaluation
from dit_jax.models import linear
from interop import export, models
from launch import arguments, planning
from parallel import accelerators, sampling
from tests.launch.conftest import ROOT, environment, run

COMMANDS = ("train", "sample", "evaluate", "convert", "compare", "extract_features", "plan")
COMMANDS += ("write_pairs",)

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
        expected = "2" if flag != "--help" else ("1" if name in ("train", "plan") else "0")
        assert (status, loaded) == (expected, "[]"), (name, flag)
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize(
    ("listed", "known"),
    [
        (arguments.PARALLEL_MODES, sampling.MODES),
        (arguments.ROUNDING_RULES, evaluation.ROUNDING_RULES),
        (arguments.PROTOCOLS, evaluation.PROTOCOLS),
        (arguments.SCORES, evaluation.SCORES),
        (arguments.KINDS, models.KINDS),
        (arguments.DESTINATIONS, export.DESTINATIONS),
        (arguments.DTYPES, export.DTYPES),
        (arguments.PARAM_DTYPES, linear.PARAM_DTYPES),
        (arguments.ACCELERATORS, accelerators.ACCELERATORS),
        (planning.COMPILERS, ("train", "sample")),
    ],
)
def test_choices_of_flags_are_the_librarys(listed, known):
    assert tuple(listed) == tuple(known)


def test_help_config_explains_the_keys_that_have_a_word():
    said = config_help.meanings()
    assert set(said) == {path for path, _ in config_lib.flatten(config_lib.default_config())}
    assert said["training.batch_size"] == "over all devices"
    assert said["method.ladd.r1_noise"] == "its perturbation of data"  # of keys that methods share
    assert said["mesh.fsdp"].startswith("parts of a batch")
    assert config_help.explain("lr").splitlines()[0].split() == [
        *("config.optimizer.learning_rate", "0.0001", "after", "the", "warm-up")
    ]
    assert "config.sampling.guidance_scale" in config_help.explain("classifier-free")
    out, _ = run("train", "--help_config", "remat")
    assert out == config_help.explain("remat") + "\n"
    _, err = run("train", "--help_config=remta", status=2)
    assert "no key of the configuration has 'remta'" in err and "config.model.remat?" in err
