"""Set before JAX is imported: 8 virtual CPU devices, compiled programs kept from run to run."""

import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# JAX's CUDA plugin, where it is installed, compiles for GPUs without a driver.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax-tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
DEVICES_FLAG = "--xla_force_host_platform_device_count=8"
# Most tests run a program once or twice: compiling it is what takes the time. Those that run one
# thousands of times say so (tests/compilations.py). What is given in the environment comes after
# these and so counts.
QUICK_COMPILATION_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # flags unknown to XLA end the process
    QUICK_COMPILATION_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(
    (*QUICK_COMPILATION_FLAGS, os.environ.get("XLA_FLAGS", ""), DEVICES_FLAG)
)

from jaxtyping import install_import_hook  # noqa: E402

import tests.typechecking  # noqa: E402, F401 (for the hook to find)

# Shape annotations of these packages are checked in every test; not yet those of interop
# and launch.
_CHECKED = (
    "conditions",
    "config",
    "data",
    "denoiser",
    "diffusion",
    "distill",
    "evaluation",
    "experiment",
    "models",
    "parallel",
    "pipelines",
    "sampling",
    "training",
)
install_import_hook(
    [f"dit_jax.{name}" for name in _CHECKED],
    "tests.typechecking.typechecked",
)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import pytest  # noqa: E402

# Of arrays that every device has whole, orbax lets each device write a part, cut by a program for
# every shape: a hundred compilations before the first checkpoint. Commands in processes of their
# own (tests/launch/) do as orbax does.
_ARRAYS = ocp.type_handlers.get_type_handler(jax.Array)
_ARRAYS._min_slice_bytes_for_replica_parallel = 1 << 30


# Files that take longest begin first: one that began last would be alone at the end. Whoever finds
# another among them (`--durations`) adds it; without its place it runs as well.
LONGEST_FIRST = (
    "models/test_edm.py",
    "launch/test_processes.py",
    "launch/test_resume.py",
    "distill/test_mean_flow.py",
    "distill/test_jvp.py",
    "launch/test_distillation.py",
    "interop/test_edm.py",
    "launch/test_sizes.py",
    "launch/test_commands.py",
    "launch/test_extract_features.py",
    "models/test_quantization.py",
    "launch/test_recording.py",
    "parallel/test_unet.py",
    "models/test_linear.py",
    "distill/test_consistency.py",
    "parallel/test_parallel_sampling.py",
    "distill/test_dmd2.py",
    "parallel/test_sharded_training.py",
    "distill/test_scm.py",
    "distill/test_ladd.py",
    "launch/test_bad_input.py",
    "interop/test_autoencoder_kl.py",
    "test_documents.py",
    "test_packaging.py",
    "evaluation/test_inception.py",
    "launch/test_buckets.py",
    "launch/test_compile.py",
)


def pytest_collection_modifyitems(items):
    """Puts the files in order; the tests of a file keep theirs."""
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(autouse=True)
def _no_silent_broadcasting(request):
    """Arrays of different rank do not mix unnoticed where formulas are tested."""
    if request.path.parent.name in ("data", "diffusion", "evaluation", "models"):
        with jax.numpy_rank_promotion("raise"):
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def _wrong_values_reach_the_code(request):
    """Tests of error messages give wrong values on purpose: there our own checks must speak."""
    if "error" not in request.node.name and "refused" not in request.node.name:
        yield
        return
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
