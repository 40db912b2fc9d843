"""Set before JAX is imported: 8 virtual CPU devices, compiled programs kept from run to run."""

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
# Most tests run a program once or twice: compiling it is what takes the time. (At level 0 sums are
# rounded otherwise, and training to a distance comes out elsewhere.) What is given in the
# environment comes after it and so counts.
QUICK_COMPILATION_FLAG = "--xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = " ".join(
    (QUICK_COMPILATION_FLAG, os.environ.get("XLA_FLAGS", ""), DEVICES_FLAG)
)

from jaxtyping import install_import_hook  # noqa: E402

import tests.typechecking  # noqa: E402, F401 (for the hook to find)

# Shape annotations of our own packages are checked in every test.
_CHECKED = (
    "config",
    "data",
    "denoiser",
    "diffusion",
    "evaluation",
    "experiment",
    "models",
    "parallel",
    "sampling",
    "training",
)
install_import_hook(
    [f"dit_jax.{name}" for name in _CHECKED],
    "tests.typechecking.typechecked",
)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402


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
