"""How a pipeline's programs run: on which devices, skipping what, found in which folder."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.solvers import Euler
from dit_jax.experiment import SamplingPlan
from dit_jax.models import AutoencoderKL, Network
from dit_jax.models.step_cache import CachedNetwork, StepCache
from dit_jax.parallel.sampling import ImageParallel, ImagePlacement
from dit_jax.parallel.vae import RowDecoder
from dit_jax.pipelines.divided import Divided
from dit_jax.programs import Program, Programs
from dit_jax.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the parts of a pipeline run; what is computed does not depend on it but by rounding,
    except where a step cache or displaced patches approximate.

    Attributes:
        parallel: one image on several devices; None for one.
        vae_devices: devices over which the decoder splits an image's rows; None for one.
        vae_tile: side in latents of tiles that are decoded one by one, a multiple of 4; None for
            whole images.
        step_cache: skip blocks where the first changes less than this, as 0.1 (docs/speed.md); 0:
            never.
        programs: a folder of compiled programs, found there or kept there; None: not kept.
        divided: over which devices weights are divided; None: each has all that it computes with.

    Raises:
        ValueError: options that exclude each other, or tiles that cannot overlap.
    """

    parallel: ImageParallel | None = None
    vae_devices: int | None = None
    vae_tile: int | None = None
    step_cache: float = 0.0
    programs: Programs | None = None
    divided: Divided | None = None

    def __post_init__(self):
        if self.divided is not None and self.parallel is not None:
            raise ValueError(
                f"weights divided over a mesh and parallel={self.parallel.mode!r}, which divides "
                "pictures over devices of its own: give one of the two"
            )
        if self.divided is not None and self.programs is not None:
            raise ValueError(
                "programs of divided weights are not kept: leave programs out, or the mesh (JAX's "
                "own cache, JAX_COMPILATION_CACHE_DIR, keeps them, too)"
            )
        if self.vae_tile is not None and (self.vae_tile < 4 or self.vae_tile % 4):
            raise ValueError(
                f"vae_tile={self.vae_tile}: expected a multiple of 4, as 64: a quarter of a tile "
                "overlaps the next"
            )
        if self.vae_tile is not None and (self.vae_devices or self.programs):
            raise ValueError(
                f"vae_tile={self.vae_tile} decodes by several small programs on one device: leave "
                "vae_devices and programs out"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """What is sampled at once.

    Attributes:
        size: (height, width) of the latents.
        times: of the solver [n], from noise to clean.
        conditions: of the network, an example each.
        scale: of guidance by two evaluations; 1 for none.
        nulls: what that compares with; None for nothing.
    """

    size: tuple[int, int]
    times: np.ndarray
    conditions: dict[str, Any]
    scale: float = 1.0
    nulls: dict[str, Any] | None = None

    @property
    def count(self) -> int:
        """How many images."""
        return len(self.conditions["pooled"])


class Latents:
    """From conditions to latents: one compiled program.

    Args:
        network: on one device.
        params: its parameters.
        process: it was trained on.
        execution: how it runs.
    """

    def __init__(self, network: Network, params: Any, process: Process, execution: Execution):
        self._network, self._params, self._process = network, params, process
        self._execution = execution
        self._placed: _Placed | None = None
        self._placements: dict[Any, ImagePlacement] = {}

    def replace_params(self, params: Any) -> None:
        """Goes on with other parameters of the network."""
        self._params = params  # of which those that are the same stay where they were placed

    def by_keys(self, draw: Draw, keys: Array, noise: Any = None) -> Float[Array, "b h w c"]:
        """Latents of one key an image, or from standard normal noise [b, h, w, c]."""
        divided, count = self._execution.divided, draw.count
        plan, params, placement = self._plan(draw)
        if divided is None:
            keys = keys if placement is None else placement.put_keys(keys)
            given, context = (draw.conditions, noise), contextlib.nullcontext()
        else:
            keys = divided.put_examples(keys, count)
            given = divided.put_examples((draw.conditions, noise), count)
            context = divided.tracing(count)
        with context:
            conditions, noise = given
            more = {"nulls": draw.nulls, "noise": noise}
            return plan.sampler(params, keys, conditions, draw.times, draw.scale, **more)

    def by_number(self, draw: Draw, seed: int, first: int) -> Float[Array, "b h w c"]:
        """The same latents of the images number `first` on under `seed`, by a kept program."""
        return self._execution.programs.call(self.program(draw, seed, first))

    def program(self, draw: Draw, seed: int = 0, first: int = 0) -> Program:
        """What is compiled."""
        plan, params, placement = self._plan(draw)
        indices = np.arange(first, first + draw.count, dtype=np.uint32)
        if placement is not None:
            indices = jax.device_put(indices, placement.split)
        return plan.program(params, seed, indices, draw.conditions, draw.nulls)

    def notes(self, draw: Draw) -> tuple[str, ...]:
        """How an image is split, in words."""
        _, _, placement = self._plan(draw)
        return () if placement is None else placement.notes

    def plan(self, draw: Draw) -> SamplingPlan:
        """How one device samples."""
        network = self._network
        if self._execution.step_cache:
            cache = StepCache(threshold=self._execution.step_cache)
            cache.check(len(draw.times) - 1)
            network = CachedNetwork(network, cache)
        sampler = Sampler(Denoiser(network, self._process), Euler(), size=draw.size)
        return SamplingPlan(sampler, draw.times, draw.scale)

    def _plan(self, draw: Draw) -> tuple[SamplingPlan, Any, ImagePlacement | None]:
        """The plan, parameters where it wants them, and its placement if on several devices."""
        plan, parallel = self.plan(draw), self._execution.parallel
        if self._execution.divided is not None:
            self._place(_OnMesh(self._execution.divided))
            return plan, self._placed.params, None
        if parallel is None:
            return plan, self._params, None
        at_hand = (draw.size, len(draw.times), draw.count, draw.scale == 1.0)
        if at_hand not in self._placements:  # once, as it warns
            self._placements[at_hand] = parallel.distribute(plan, batch_size=draw.count)
        placement = self._placements[at_hand]
        self._place(placement)
        plan = dataclasses.replace(plan, sampler=placement.plan.sampler)
        return plan, self._placed.params, placement

    def _place(self, placement: "ImagePlacement | _OnMesh") -> None:
        if self._placed is not None and self._placed.mesh != placement.mesh:
            self._placed = None  # one copy at a time
        if self._placed is None or self._placed.source is not self._params:
            self._placed = _place(self._params, placement, self._placed)


@dataclasses.dataclass(frozen=True)
class _OnMesh:
    """Where a transformer lives whose weights are divided, as `ImagePlacement` says it."""

    divided: Divided

    @property
    def mesh(self) -> Mesh:
        return self.divided.mesh

    def param_shardings(self, params: Any) -> Any:
        return self.divided.shardings("flux", params)


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed:
    """Parameters on a mesh.

    Attributes:
        mesh: where they are.
        source: what was placed.
        params: the same, placed.
    """

    mesh: Mesh
    source: Any
    params: Any


def _place(params: Any, placement: ImagePlacement | _OnMesh, before: _Placed | None) -> _Placed:
    """Places parameters but for arrays that were placed before: a LoRA's weight moves no kernel."""
    known = {}
    if before is not None:
        pairs = zip(*map(jax.tree.leaves, (before.source, before.params)), strict=True)
        known = {(id(leaf), placed.sharding): placed for leaf, placed in pairs}
    leaves, structure = jax.tree.flatten(params)
    wheres = jax.tree.leaves(placement.param_shardings(params))
    found = [known.get((id(leaf), where)) for leaf, where in zip(leaves, wheres, strict=True)]
    new = [i for i, placed in enumerate(found) if placed is None]
    placed = jax.device_put([leaves[i] for i in new], [wheres[i] for i in new])
    for i, array in zip(new, placed, strict=True):
        found[i] = array
    return _Placed(placement.mesh, params, structure.unflatten(found))


class Pixels:
    """From latents to pixels, one image at a time, and back.

    Args:
        vae: the autoencoder.
        params: its parameters.
        execution: how it runs.

    Raises:
        ValueError: there are not so many devices.
    """

    def __init__(self, vae: AutoencoderKL, params: Any, execution: Execution):
        self._vae, self._params, self._execution = vae, params, execution
        self._rows = None
        if execution.vae_devices is not None:
            self._rows = RowDecoder(vae, execution.vae_devices)
            self._params = jax.device_put(params, self._rows.replicated)

    def decode(self, latents: Any) -> Float[np.ndarray, "n h w c"]:
        """In about [-1, 1]."""
        elsewhere = self._execution.parallel or self._execution.divided
        if len(latents) > 1 or elsewhere:  # to be cut, or from another mesh
            latents = np.asarray(latents)
        parts = [latents[i : i + 1] if len(latents) > 1 else latents for i in range(len(latents))]
        return np.concatenate([np.asarray(self._decode_one(part)) for part in parts])

    def placed(self, latents: Any) -> Any:
        """Latents of one image where its decoder wants them."""
        return latents if self._rows is None else jax.device_put(latents, self._rows.replicated)

    def encode(self, pixels: np.ndarray) -> Float[Array, "n h w c"]:
        """Latents, the posterior's mean, of pixels [n, h2, w2, c] in [-1, 1]."""
        return _encode(self._vae, self._params, pixels)

    def program(self, latents: Any) -> Program:
        """What is compiled."""
        compiled_in = {"autoencoder": self._vae.config, "rows": self._rows}
        inputs = {"params": self._params, "latents": latents}
        function = functools.partial(_decode, self._vae, self._rows)
        return Program("decode", function, compiled_in, inputs)

    def _decode_one(self, latents: Any) -> Any:
        vae, tile = self._vae, self._execution.vae_tile
        if tile is not None:
            return vae.decode_tiled(self._params, vae.from_latents(jnp.asarray(latents)), tile=tile)
        latents = self.placed(latents)
        if self._execution.programs is not None:
            return self._execution.programs.call(self.program(latents))
        return _decode(vae, self._rows, self._params, latents)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    vae: AutoencoderKL, rows: RowDecoder | None, params: Any, latents: Float[Array, "n h w c"]
) -> Float[Array, "n H W channels"]:
    return (rows or vae.decode)(params, vae.from_latents(latents))


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    vae: AutoencoderKL, params: Any, pixels: Float[Array, "n H W channels"]
) -> Float[Array, "n h w c"]:
    return vae.to_latents(vae.encode(params, pixels)[0])
