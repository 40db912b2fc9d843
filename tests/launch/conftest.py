"""Tiny experiments, and the commands run as a person runs them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_jax.config import default_config

ROOT = Path(__file__).parents[2]

TINY = """
from dit_jax.config import default_config

def get_config():
    config = default_config()
    config.name = "tiny"
    config.data.name = "digits"
    config.model.update(image_size=8, in_channels=1)
    config.model.dit.update(hidden_size=32, depth=1, num_heads=2)
    config.model.num_classes = 10
    config.model.dit.learn_sigma = False
    config.process.name = "flow"
    config.optimizer.learning_rate = 1e-3
    config.ema.decays = (0.9,)
    config.ema.power_stds = (0.1,)
    config.training.update(num_steps=12, batch_size=16, log_every=4, checkpoint_every=4)
    config.training.tensorboard = False
    config.sampling.update(solver="euler", steps=3, batch_size=16)
    return config
"""


def tiny_config(**overrides):
    """The experiment above with other values, as tiny_config(**{'model.dit.depth': 2})."""
    scope = {}
    exec(TINY, scope)
    config = scope["get_config"]()
    assert config.keys() == default_config().keys()
    for path, value in overrides.items():
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    return config


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """The experiment above as a file for --config."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(TINY)
    return path


def environment(devices=1, flags=""):
    """Of a command: this one's, but with so many virtual devices, and with further XLA_FLAGS."""
    device_flag = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ['XLA_FLAGS']} {flags} {device_flag}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}


def start(command, *arguments, devices=1, flags="", interruptible=False):
    """Starts `python launch/<command>.py arguments`.

    `interruptible`: by SIGINT, although tests that run in the background ignore it, which a command
    would inherit.
    """
    return subprocess.Popen(
        [sys.executable, f"launch/{command}.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment(devices, flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_interruptions if interruptible else None,
    )


def _hear_interruptions():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command, *arguments, devices=1, flags="", status=0):
    """Runs a command to its end and returns (stdout, stderr); its exit status must be `status`."""
    process = start(command, *arguments, devices=devices, flags=flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def curve(workdir):
    """{step: metrics} of a run's metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {line.pop("step"): line for line in map(json.loads, lines)}


def assert_same_curve(first, second, tolerance):
    """The same steps with the same losses and gradient norms, up to a relative `tolerance`."""
    assert first.keys() == second.keys() and first
    for step, metrics in first.items():
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(
                second[step][name], metrics[name], rtol=tolerance, err_msg=f"{step} {name}"
            )
