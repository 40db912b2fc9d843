"""One image on many devices: a sampling plan in, the same plan on a mesh out.

  parallel = ImageParallel("displaced", patch_devices=4)
  placed = parallel.distribute(plan, batch_size=1)
  draw = placed.bind(params)
  images = draw(image_keys(0, np.arange(1)), np.array([7]))

Solver, process and guidance stay as they are, on global arrays; only the network's evaluation runs
inside `jax.shard_map`, on slabs of rows of the image. What a mode exchanges is its attention
strategy (`patch.py`, `sequence.py`).
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dit_jax.experiment import SamplingPlan
from dit_jax.models import network_name
from dit_jax.models.step_cache import CachedNetwork
from dit_jax.nearest import one_of
from dit_jax.parallel.mesh import put_whole
from dit_jax.parallel.network import BATCH_AXES, PATCH_AXES, image_network
from dit_jax.parallel.partitioning import rules_for
from dit_jax.parallel.transformer import (
    DIT_MODES,
    ParallelTransformer,
    exchange_note,
    split_shardings,
)
from dit_jax.parallel.unet import (
    ALIASES,
    DISPLACED_MODES,
    UNET_MODES,
)

MODES = (*DIT_MODES, *UNET_MODES)
DEFAULT_WARMUP_STEPS = 4
# Below so many steps, or with more than this share of them synchronous, displaced patches pay
# little: see `_warn_of_few_steps`.
FEW_STEPS = 8
LARGE_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class ImageParallel:
    """How one image is shared by several devices.

    Attributes:
        mode: 'displaced', 'synchronous', 'naive' (patches), 'ulysses', 'ring' (sequence), 'tensor'.
            For U-Nets the first three and those of `dit_jax.parallel.unet`.
        patch_devices: devices an image (a guidance branch of it) is split over.
        warmup_steps: synchronous steps before displaced ones; None for 4. 'displaced', and U-Nets'
            modes like it, only.
        split_guidance: conditional and unconditional evaluation on devices of their own, which
            takes twice as many.
        ulysses: of `patch_devices`, how many exchange heads, the others being a ring; None for all
            in mode 'ulysses', none in mode 'ring'. In these two modes only.
        devices: the devices to use; None for all.

    Raises:
        ValueError: an option out of range, or one that would do nothing.
    """

    mode: str = "displaced"
    patch_devices: int = 1
    warmup_steps: int | None = None
    split_guidance: bool = False
    ulysses: int | None = None
    devices: tuple[jax.Device, ...] | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"parallel={self.mode!r}: {one_of(self.mode, MODES)}")
        if self.patch_devices < 1:
            raise ValueError(f"patch_devices={self.patch_devices}: expected at least 1")
        if self.patch_devices == 1 and not self.split_guidance:
            raise ValueError(
                "patch_devices=1 splits nothing: give 2 or more, or split_guidance as well"
            )
        if self.warmup_steps is not None:
            if not self.is_displaced:
                raise ValueError(
                    f"warmup_steps={self.warmup_steps} would do nothing with parallel={self.mode!r}"
                    ": only displaced patches have a warm-up"
                )
            if self.warmup_steps < 1:
                raise ValueError(
                    f"warmup_steps={self.warmup_steps}: expected at least 1, as the first step has "
                    "no keys and values of a step before"
                )
        if self.ulysses is not None:
            if self.mode not in ("ulysses", "ring"):
                raise ValueError(
                    f"ulysses_devices={self.ulysses} would do nothing with parallel={self.mode!r}: "
                    "it is of 'ulysses' and 'ring'"
                )
            if self.ulysses < 1 or self.patch_devices % self.ulysses:
                raise ValueError(
                    f"ulysses_devices={self.ulysses} does not divide patch_devices="
                    f"{self.patch_devices}: the ring takes patch_devices / ulysses_devices"
                )

    @property
    def is_displaced(self) -> bool:
        """Whether steps take something of the step before, and so begin with a warm-up."""
        return ALIASES.get(self.mode, self.mode) in DISPLACED_MODES

    @property
    def ulysses_degree(self) -> int:
        """Devices of the Ulysses axis."""
        if self.ulysses is not None:
            return self.ulysses
        return self.patch_devices if self.mode == "ulysses" else 1

    @property
    def devices_per_image(self) -> int:
        """Devices that work on one image."""
        return self.patch_devices * (2 if self.split_guidance else 1)

    def distribute(self, plan: SamplingPlan, *, batch_size: int = 1) -> "ImagePlacement":
        """Puts a plan on a mesh.

        Args:
            plan: how one device samples.
            batch_size: images at once; they are split over what devices are left.

        Raises:
            ValueError: the network, the plan and the devices do not go together.
        """
        network, cache = plan.sampler.denoiser.network, None
        if isinstance(network, CachedNetwork):
            network, cache = network.network, network.cache
        network = network.at_size(plan.sampler.sample_shape[:2])
        guided = not (np.isscalar(plan.guidance_scale) and plan.guidance_scale == 1.0)
        if self.split_guidance and not guided:
            raise ValueError(
                "split_guidance would do nothing with a guidance scale of 1: there is one branch"
            )
        warmup_steps = 0
        if self.is_displaced:
            warmup_steps = self._check_warmup(len(plan.times) - 1)
        mesh, unused = self._create_mesh(batch_size)
        parallel = image_network(network.config)
        split = (self.mode, self.patch_devices, self.ulysses_degree)
        notes = parallel.notes(network.config, *split)
        if unused:
            notes.append(unused)
        if issubclass(parallel, ParallelTransformer) and self.patch_devices > 1:
            branches = 2 if guided and not self.split_guidance else 1
            examples = branches * max(1, batch_size // mesh.shape["data"])
            notes.append(exchange_note(network.config, *split, examples))
        placed = parallel(network, mesh, self.mode, warmup_steps)
        if cache is not None:
            placed = CachedNetwork(placed, cache)
        denoiser = dataclasses.replace(plan.sampler.denoiser, network=placed)
        sampler = dataclasses.replace(plan.sampler, denoiser=denoiser)
        return ImagePlacement(dataclasses.replace(plan, sampler=sampler), mesh, tuple(notes))

    def _check_warmup(self, steps: int) -> int:
        warmup_steps = self.warmup_steps
        if warmup_steps is None:
            warmup_steps = min(DEFAULT_WARMUP_STEPS, steps)
        if warmup_steps > steps:
            raise ValueError(
                f"warmup_steps={warmup_steps} is more than the {steps} steps there are: with "
                f"{steps} all are synchronous"
            )
        _warn_of_few_steps(warmup_steps, steps)
        return warmup_steps

    def _create_mesh(self, batch_size: int) -> tuple[Mesh, str]:
        """The mesh, and a note if it leaves devices out."""
        devices = np.asarray(jax.devices() if self.devices is None else self.devices)
        needed = self.devices_per_image
        if needed > len(devices):
            guidance = " x 2 guidance branches" if self.split_guidance else ""
            raise ValueError(
                f"patch_devices={self.patch_devices}{guidance} needs {needed} devices; there are "
                f"{len(devices)}"
            )
        most = len(devices) // needed
        data = max(count for count in range(1, most + 1) if batch_size % count == 0)
        guidance, ulysses = 2 if self.split_guidance else 1, self.ulysses_degree
        if self.mode == "tensor":
            axes, shape = (*BATCH_AXES, "tensor"), (guidance, data, self.patch_devices)
        else:
            ring = self.patch_devices // ulysses
            axes, shape = (*BATCH_AXES, *PATCH_AXES), (guidance, data, ulysses, ring)
        used = guidance * data * self.patch_devices
        note = ""
        if used < len(devices):
            note = (
                f"{len(devices) - used} of {len(devices)} devices are not used: {batch_size} "
                f"images at once over groups of {needed}"
            )
        types = (jax.sharding.AxisType.Auto,) * len(axes)
        return Mesh(devices[:used].reshape(shape), axes, axis_types=types), note


def _warn_of_few_steps(warmup_steps: int, steps: int) -> None:
    share = warmup_steps / steps
    if warmup_steps == steps:
        message = "all of them: nothing is displaced. Use parallel='synchronous', or more steps"
    elif share > LARGE_SHARE or steps < FEW_STEPS:
        message = f"at most {1 - share:.0%} of the communication can overlap with computation"
        if steps < FEW_STEPS:
            message += (
                f". With fewer than {FEW_STEPS} steps keys and values of the step before are also "
                "far from fresh ones: expect images that differ visibly from one device's"
            )
    else:
        return
    warnings.warn(
        f"displaced patches: {warmup_steps} of {steps} steps ({share:.0%}) are synchronous, "
        f"{message}",
        stacklevel=4,
    )


@dataclasses.dataclass(frozen=True)
class ImagePlacement:
    """A plan on a mesh, and where its inputs live.

    Attributes:
        plan: samples on the mesh.
        mesh: axes guidance, data, ulysses and ring; or guidance, data and tensor.
        notes: lines for the user: padding, devices that are not used, bytes exchanged.
    """

    plan: SamplingPlan
    mesh: Mesh
    notes: tuple[str, ...] = ()

    @property
    def num_devices(self) -> int:
        """Groups of devices a batch is split over: its size is a multiple of it."""
        return self.mesh.shape["data"]

    @property
    def replicated(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def split(self) -> NamedSharding:
        """The leading axis (of keys, one an image) split over the groups."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def put_keys(self, keys: Array) -> Array:
        """Keys that every process has, one an image of a batch, onto the devices."""
        return jax.random.wrap_key_data(put_whole(jax.random.key_data(keys), self.split))

    def tracing(self) -> contextlib.AbstractContextManager:
        """A context for tracing programs: none, as the network says where its parts lie."""
        return contextlib.nullcontext()

    def param_shardings(self, params: Any) -> Any:
        """Where parameters, or their shapes, are used: on every device, in mode 'tensor' split."""
        if "tensor" not in self.mesh.axis_names:
            return jax.tree.map(lambda _: self.replicated, params)
        name = network_name(self.plan.sampler.denoiser.network.config)
        return split_shardings(params, self.mesh, rules_for(name))

    def place(self, params: Any) -> Any:
        """Parameters put where they are used."""
        return jax.device_put(params, self.param_shardings(params))

    def bind(self, params: Any, nulls: Mapping[str, Any] | None = None) -> Callable[..., Array]:
        """A function (keys, conditions) -> images, with `params` placed; see `SamplingPlan`."""
        draw = self.plan.bind(self.place(params), nulls)
        return lambda keys, conditions: draw(jax.device_put(keys, self.split), conditions)
