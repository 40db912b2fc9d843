"""Memory that a run will need beside what there is: refused before the system ends the process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax.quantities import counted, format_bytes

_UNLIMITED = 1 << 60  # what control groups without a limit say, about

# What to change where an update needs too much, or where what is kept between updates does.
UPDATE_REMEDY = (
    "lower config.training.batch_size, raise config.training.num_microbatches, set "
    "config.model.remat='block', or make the network (config.model) smaller"
)
STATE_REMEDY = (
    "make the network (config.model: its width, its depth) smaller or keep fewer averages "
    "(config.ema); a smaller batch helps little"
)


class MemoryNeededError(ValueError):
    """Something that cannot fit into memory was asked for."""


def available_host_memory() -> int | None:
    """Bytes that this process can still take, swap included; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {
            name: int(rest.split()[0]) << 10 for name, _, rest in (s.partition(":") for s in lines)
        }
        free = found["MemAvailable"] + found.get("SwapFree", 0)
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return min(free, *_left_by_control_groups(), _UNLIMITED)


def _left_by_control_groups() -> list[int]:
    """What a container's limits leave, where there are any."""
    left = []
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            most, now = int((root / limit).read_text()), int((root / used).read_text())
            statistics = ((root / limit).parent / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no such group, or "max"
            continue
        # Pages of files are given back when memory is wanted.
        pages = [int(line.split()[1]) for line in statistics if line.split()[0] == cache]
        if most < _UNLIMITED:
            left.append(most - now + sum(pages))
    return left


def require_host_memory(needed: float, what: str, remedy: str) -> None:
    """Refuses what needs more bytes than this machine has left.

    Args:
        needed: bytes, rather too few than too many.
        what: that needs them.
        remedy: what to do.

    Raises:
        MemoryNeededError: with both numbers.
    """
    free = available_host_memory()
    if free is not None and needed > free:
        raise MemoryNeededError(
            f"{what} need at least {format_bytes(needed)} of memory, and {format_bytes(free)} are "
            f"free: {remedy}"
        )


@contextlib.contextmanager
def exhaustion_explained(what: str, remedy: str) -> Iterator[None]:
    """Names what to change where the memory of a device, or of this machine, runs out.

    Args:
        what: is done inside, as 'sampling 64 images at once'.
        remedy: what to do.

    Raises:
        MemoryNeededError: instead of the error of JAX or NumPy.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error).strip().split("\n")[0]
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text:
            raise
        text = text.partition("RESOURCE_EXHAUSTED:")[2].strip() or text
        raise MemoryNeededError(
            f"memory ran out while {what}: {remedy}" + (f" ({text})" if text else "")
        ) from error


def require_batches(batch_size: int, example_shape: tuple[int, ...], state: Any) -> None:
    """Refuses a batch whose mere images do not fit; what the network adds, `require_fits` knows.

    Args:
        batch_size: over all devices.
        example_shape: of an image.
        state: tree of arrays or shapes that is trained.

    Raises:
        MemoryNeededError: with the numbers and what to change.
    """
    example = 4 * int(np.prod(example_shape))
    remedy = f"lower config.training.batch_size={batch_size}"
    what = f"batches of {counted(batch_size, 'image')}"
    here = batch_size / jax.process_count()
    host = 2 * here * (example + 8)  # one is used while the next is read
    on_devices = here * 2 * example  # the images and the noise
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    if held > host + on_devices:  # the network, not the batch, is what is too large
        what, remedy = f"the training state ({_largest(state)}) and {what}", STATE_REMEDY
    if jax.default_backend() == "cpu":
        require_host_memory(host + on_devices + held, what, remedy)
        return
    require_host_memory(host, what, remedy)
    limit = device_memory()
    # At best both are divided over all devices.
    needed = on_devices / jax.local_device_count() + held / jax.device_count()
    if limit and needed > limit:
        raise MemoryNeededError(
            f"{what} need at least {format_bytes(needed)} of each device, which has "
            f"{format_bytes(limit)}: {remedy}"
        )


def _largest(state: Any) -> str:
    """The three largest parts of a state: 'params 1.00 GiB, ema 1.00 GiB, optimizer 2.00 GiB'."""
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path[:1], simple=True) or "arrays"
        sizes[name] = sizes.get(name, 0) + leaf.size * leaf.dtype.itemsize
    largest = sorted(sizes, key=sizes.get, reverse=True)[:3]
    return ", ".join(f"{name} {format_bytes(sizes[name])}" for name in largest)


def device_memory() -> int | None:
    """Bytes of one accelerator; None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _new_and_kept(compiled: Any) -> tuple[int, int]:
    """Bytes of a device: what the program needs beside its arguments, and these."""
    found = compiled.memory_analysis()
    new = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return new, found.argument_size_in_bytes


def bytes_needed(compiled: Any) -> int:
    """Bytes of a device that a compiled program needs, its arguments among them; 0 if unknown."""
    return 0 if compiled.memory_analysis() is None else sum(_new_and_kept(compiled))


def require_fits(compiled: Any) -> None:
    """Refuses a compiled update that would be ended for want of memory.

    Raises:
        MemoryNeededError: with what it needs and what there is.
    """
    if compiled.memory_analysis() is None:
        return
    new, kept = _new_and_kept(compiled)
    if jax.default_backend() == "cpu":
        # State and batch are in memory already.
        new, kept = new * jax.local_device_count(), kept * jax.local_device_count()
        free, needed, related = available_host_memory(), new, "beside"
        whose = "this machine has left"
    else:
        free, needed, related = device_memory(), new + kept, "with"
        whose = "a device has"
    if free is not None and needed > free:
        raise MemoryNeededError(
            f"an update needs {format_bytes(needed)} of memory, {related} {format_bytes(kept)} of "
            f"state and batch, and {whose} {format_bytes(free)}: "
            + (STATE_REMEDY if kept > new else UPDATE_REMEDY)
        )
