"""What can be compiled for, told from what is installed; targets and their texts."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dit_jax.parallel.planning import compilers
from dit_jax.parallel.planning.accelerators import ACCELERATORS, accelerator
from dit_jax.parallel.planning.gpu_targets import MEMORY_BYTES, TARGET_TEXTS
from tests.plugin import needs_plugin

PLUGIN = {"jax-cuda12-plugin": jax.__version__, "jax-cuda12-pjrt": jax.__version__}
LIBRARIES = {"nvidia-cuda-nvcc-cu12": "12.9", "nvidia-cudnn-cu12": "9.10"}


@pytest.fixture
def installed(monkeypatch):
    """Sets the versions of the packages that are installed."""

    def install(**packages):
        packages = {name.replace("_", "-"): version for name, version in packages.items()}

        def version(name):
            if name not in packages:
                raise importlib.metadata.PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


def test_without_the_plugin_the_extra_is_named(installed):
    installed()
    assert "dit-jax[plan]" in compilers.missing_plugin()
    installed(**PLUGIN, **LIBRARIES)
    assert compilers.missing_plugin() == ""


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        (
            PLUGIN | {"jax-cuda12-plugin": "0.9.0"} | LIBRARIES,
            "jax-cuda12-plugin is 0.9.0: they mu",
        ),
        (PLUGIN | {"jax-cuda12-pjrt": "0.9.0"} | LIBRARIES, "jax-cuda12-pjrt is 0.9.0: they must"),
        ({"jax-cuda12-plugin": jax.__version__}, "jax-cuda12-pjrt is not installed: they must"),
        (PLUGIN | {"nvidia-cuda-nvcc-cu12": "12.9"}, "needs nvidia-cudnn-cu12 to compile"),
        (PLUGIN, "needs nvidia-cuda-nvcc-cu12 and nvidia-cudnn-cu12 to compile"),
    ],
)
def test_a_plugin_that_cannot_work_is_an_error(installed, packages, message):
    installed(**packages)
    with pytest.raises(compilers.PluginError, match=message):
        compilers.missing_plugin()


def test_every_gpu_has_a_target_and_memory_like_its_data_sheet():
    gpus = {name for name in ACCELERATORS if accelerator(name).kind.startswith("NVIDIA")}
    assert set(TARGET_TEXTS) == set(MEMORY_BYTES) == gpus
    for name, size in MEMORY_BYTES.items():
        gigabytes = accelerator(name).memory_gib
        assert 0.9 * gigabytes < size / 2**30 < 1.01 * gigabytes
        assert f"device_memory_size: {size}" in TARGET_TEXTS[name]


def test_nodes_are_whole():
    with pytest.raises(ValueError, match="whole nodes of 8, as 8 or 16"):
        compilers.GpuCompiler("h100", 12).devices()


@needs_plugin
def test_programs_for_each_gpu_in_a_process_of_its_own():
    code = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from dit_jax.parallel.planning import compilers
from dit_jax.parallel.planning.gpu_targets import TARGET_TEXTS
for name in TARGET_TEXTS:
    for count in (1, 16):
        compiler = compilers.GpuCompiler(name, count)
        devices = compiler.devices()
        mesh = jax.make_mesh((count,), ("a",), devices=devices)
        rows = NamedSharding(mesh, PartitionSpec("a"))
        x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=rows)
        whole = NamedSharding(mesh, PartitionSpec())
        w = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=whole)
        found = compiler.compile(lambda: jax.jit(lambda x, w: x @ w).lower(x, w))
        assert len({d.id for d in devices}) == count
        assert len({d.process_index for d in devices}) == max(1, count // 8)
        assert found.memory["arguments"] == 2 * (64 // count * 256 + 256 * 256), found.memory
        print([kernel.kind for kernel in found.schedule.kernels])
"""
    environment = {**os.environ, **compilers.GPU_ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cuBLASLt bf16") == 6
