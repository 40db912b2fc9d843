"""Compiling for devices that are not there: for a GPU by JAX's CUDA plugin, else for virtual CPUs.

The plugin (the extra 'plan') compiles without a GPU or a driver; what comes out is the program that
such a GPU would run, up to choices that XLA makes by timing kernels (autotuning), for which it
takes its defaults.
"""

import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from dit_jax.fp8_kernels import check_compiled
from dit_jax.parallel.planning.accelerators import ACCELERATORS, Accelerator
from dit_jax.parallel.planning.gpu_targets import TARGET_TEXTS
from dit_jax.parallel.planning.program import Program
from dit_jax.parallel.planning.schedule import Schedule, predict
from dit_jax.target import targeting

PROGRAM_NAME = "planned_program"  # by which XLA's files are found
DEVICES_PER_NODE = 8
EXTRA = "python -m pip install 'dit-jax[plan]'"
_PLUGIN = ("jax-cuda12-plugin", "jax-cuda12-pjrt")
_LIBRARIES = ("nvidia-cuda-nvcc-cu12", "nvidia-cudnn-cu12")

# What XLA would find out by timing on the device has to be said where there is none. Large products
# go to cuBLASLt; without this they all become Triton kernels of a default shape.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# That the plugin starts without a driver; and the virtual devices are not asked for.
GPU_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program as XLA has compiled it.

    Attributes:
        program: read from its text.
        memory: bytes of one device by kind: arguments, outputs, temporaries, aliased (outputs that
            take the place of arguments), code, peak (0 where XLA does not tell).
        seconds: it took to compile.
        schedule: predicted, None for virtual devices.
    """

    program: Program
    memory: Mapping[str, int]
    seconds: float
    schedule: Schedule | None = None

    @property
    def total(self) -> int:
        """Bytes a device has to have."""
        memory = self.memory
        return (
            sum(memory[kind] for kind in ("arguments", "outputs", "temporaries", "code"))
            - (memory["aliased"])
        )


class PluginError(ImportError):
    """JAX's CUDA plugin is there, but does not fit JAX or lacks a library."""


def missing_plugin() -> str:
    """Why nothing can be compiled for GPUs here, '' if it can.

    Raises:
        PluginError: the plugin is there and cannot work, with what to install.
    """
    versions = {name: _version(name) for name in (*_PLUGIN, *_LIBRARIES)}
    if not any(versions[name] for name in _PLUGIN):
        return f"JAX's CUDA plugin is not installed ({EXTRA})"
    wanted = jax.__version__
    for name in _PLUGIN:
        if versions[name] != wanted:
            found = f"is {versions[name]}" if versions[name] else "is not installed"
            both = " ".join(f"{plugin}=={wanted}" for plugin in _PLUGIN)
            raise PluginError(
                f"jax is {wanted} and {name} {found}: they must be of one version. "
                f"python -m pip install {both}"
            )
    if lacking := [name for name in _LIBRARIES if not versions[name]]:
        raise PluginError(
            f"{_PLUGIN[0]} needs {' and '.join(lacking)} to compile for a GPU: "
            f"python -m pip install {' '.join(lacking)}"
        )
    return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclasses.dataclass(frozen=True)
class GpuCompiler:
    """Compiles for GPUs that are not there.

    Attributes:
        name: of `gpu_targets.TARGET_TEXTS`.
        count: of devices, `DEVICES_PER_NODE` a node.
        options: of XLA, beside `GPU_OPTIONS`.
    """

    name: str
    count: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def devices(self) -> list[jax.Device]:
        """Stand-ins for the devices, of which meshes and shardings can be made.

        Raises:
            ValueError: so many do not make whole nodes.
        """
        from jax.experimental import topologies

        count, node = self.count, DEVICES_PER_NODE
        if count > node and count % node:
            below = count // node * node
            raise ValueError(
                f"--devices={count}: expected at most {node}, or whole nodes of {node}, as "
                f"{below} or {below + node}"
            )
        nodes = max(1, count // node)
        return topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x{nodes}x{count // nodes}",
            target_config=TARGET_TEXTS[self.name],
        ).devices

    def targeting(self) -> contextlib.AbstractContextManager:
        """In which 'auto' is what it is on a GPU."""
        return targeting("gpu")

    def compile(self, lower: Callable[[], Any], computed_share: float = 1.0) -> Compiled:
        """Traces by `lower() -> jax.stages.Lowered`, compiles and predicts.

        Args:
            lower: of the program.
            computed_share: see `program.Program`.

        Raises:
            ValueError: an option that this XLA does not have, or not with this value.
            WideProductError: products of fp8 did not become 8-bit kernels.
        """
        with self.targeting():
            lowered = lower()
        started = time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options={**GPU_OPTIONS, **self.options})
        except jax.errors.JaxRuntimeError as error:
            if self.options and "option" in str(error):
                raise ValueError(f"XLA's compiler: {error}") from error
            raise
        seconds = time.perf_counter() - started
        with self.targeting():
            check_compiled(lowered, compiled)
        program = Program(compiled.as_text(), computed_share)
        schedule = predict(program, self.accelerator)
        return Compiled(program, memory_by_kind(compiled), seconds, schedule)

    @property
    def accelerator(self) -> Accelerator:
        """Its figures."""
        return ACCELERATORS[self.name]


@dataclasses.dataclass(frozen=True)
class VirtualCompiler:
    """Compiles for virtual CPU devices, and reads what leaves XLA's partitioner.

    Later passes of the CPU backend turn bfloat16 into float32.

    Attributes:
        accelerator: that is meant.
        folder: where XLA writes, by its flags (`virtual_xla_flags`).
    """

    accelerator: Accelerator
    folder: Path

    def devices(self) -> list[jax.Device]:
        """The virtual devices."""
        return jax.devices()

    def targeting(self) -> contextlib.AbstractContextManager:
        """Nothing: 'auto' has been replaced (`programs.accelerator_config`)."""
        return contextlib.nullcontext()

    def compile(self, lower: Callable[[], Any], computed_share: float = 1.0) -> Compiled:
        """Traces by `lower() -> jax.stages.Lowered` a program called `PROGRAM_NAME`, and compiles.

        Args:
            lower: of the program.
            computed_share: see `program.Program`.

        Raises:
            RuntimeError: XLA has not written it where it should.
        """
        started = time.perf_counter()
        before = set(self.folder.iterdir())
        compiled = lower().compile()
        seconds = time.perf_counter() - started
        text = compiled.as_text()
        if jax.device_count() > 1:
            written = sorted(set(self.folder.glob("*after_spmd-partitioning*")) - before)
            if not written:
                raise RuntimeError(
                    f"XLA wrote no partitioned program to {self.folder}: this version of JAX "
                    f"({jax.__version__}) names its passes otherwise than 0.10 does"
                )
            text = written[-1].read_text()
        return Compiled(Program(text, computed_share), memory_by_kind(compiled), seconds)


def virtual_xla_flags(devices: int, folder: Path) -> tuple[str, ...]:
    """XLA's flags of a process that has virtual devices and writes programs to a folder."""
    return (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",  # of machine code, which nobody will run
        f"--xla_dump_to={folder}",
        "--xla_dump_hlo_pass_re=spmd.*",
        f"--xla_dump_hlo_module_re=jit_{PROGRAM_NAME}.*",
    )


def memory_by_kind(compiled: Any) -> dict[str, int]:
    """What XLA says of a program's memory on one device, bytes; see `Compiled.memory`."""
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
        "peak": getattr(found, "peak_memory_in_bytes", 0),
    }
