"""What accelerators can do at most, by their vendors' data sheets, and the time a program needs.

Peaks are dense; links are counted one way, half of the usual advertised sum.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping

import numpy as np

from dit_jax.nearest import one_of
from dit_jax.parallel.planning.program import Collective
from dit_jax.training.metrics import peak_flops


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device and what joins it to others.

    Attributes:
        title: for people.
        kind: JAX's name of it, by which the peak is found (`dit_jax.training.metrics.PEAK_FLOPS`).
        peaks: FLOP/s of other precisions than bfloat16, see `products.Product.precision`.
        memory_bandwidth: of its own memory, bytes/s.
        memory_gib: capacity, GiB.
        link_bandwidth: to devices of the same node, bytes/s each way.
        network_bandwidth: to devices of other nodes, bytes/s each way and device.
        devices_per_node: consecutive devices that share fast links; 0: all there are.
    """

    title: str
    kind: str
    peaks: Mapping[str, float]
    memory_bandwidth: float
    memory_gib: float
    link_bandwidth: float
    network_bandwidth: float
    devices_per_node: int

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16, FLOP/s; infinity where nothing is known of the speed (CPUs)."""
        return peak_flops(self.kind) or math.inf

    @property
    def speed_is_known(self) -> bool:
        """Whether times can be told."""
        return math.isfinite(self.peak_flops)

    def peak(self, precision: str) -> float:
        """FLOP/s of a product; those of bfloat16 where there is no unit for the precision."""
        return self.peaks.get(precision, self.peak_flops)

    def seconds_of(self, collective: Collective) -> float:
        """The least time of a collective: the longer of what links and network carry.

        Between nodes every array is taken to cross once, shared by all devices of a node's group
        (hierarchical or rail-wise rings): (M - 1) / M of it on M nodes, divided by the group's
        devices in one node. Latency is not counted.
        """
        return collective.count * max(self._seconds_each(collective))

    def _seconds_each(self, collective: Collective) -> tuple[float, float]:
        """By links, and by the network."""
        sent = collective.bytes_sent
        local = sent / self.link_bandwidth
        if not self.devices_per_node:
            return local, 0.0
        nodes = collective.groups // self.devices_per_node
        counts = [len(np.unique(row)) for row in nodes]
        count = max(counts, default=1)
        if count == 1:
            return local, 0.0
        if collective.kind == "collective-permute":
            return local, sent / self.network_bandwidth
        within = collective.group_size / count
        share = (count - 1) / count / ((collective.group_size - 1) / collective.group_size)
        crossing = sent * share if collective.kind == "all-to-all" else sent * share / within
        return local, crossing / self.network_bandwidth


def _machine_gib() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


_HOPPER = {"f8": 1979e12, "s8": 1979e12, "tf32": 494.7e12, "f32": 66.9e12, "f64": 66.9e12}
_AMPERE = {"s8": 624e12, "tf32": 156e12, "f32": 19.5e12, "f64": 19.5e12}
ACCELERATORS = {
    "h100": Accelerator("NVIDIA H100 SXM", "NVIDIA H100", _HOPPER, 3.35e12, 80, 450e9, 50e9, 8),
    "h200": Accelerator("NVIDIA H200", "NVIDIA H200", _HOPPER, 4.8e12, 141, 450e9, 50e9, 8),
    "a100": Accelerator("NVIDIA A100 80 GB", "NVIDIA A100", _AMPERE, 2.0e12, 80, 300e9, 25e9, 8),
    # One torus: no nodes, and all six links of 100 GB/s in use at once at best.
    "tpu_v5p": Accelerator("TPU v5p", "TPU v5p", {"s8": 918e12}, 2.765e12, 95, 600e9, 600e9, 0),
    # This machine, of whose speed nothing is known.
    "cpu": Accelerator("CPU", "cpu", {}, math.inf, _machine_gib(), math.inf, math.inf, 0),
}


def accelerator(name: str) -> Accelerator:
    """The accelerator called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in ACCELERATORS:
        raise ValueError(f"accelerator={name!r}: {one_of(name, ACCELERATORS)}")
    return ACCELERATORS[name]


@dataclasses.dataclass(frozen=True)
class Limits:
    """The least time of one run of a program, by what limits it, in seconds.

    Attributes:
        arithmetic: of matrix products at the peak.
        memory: of the traffic with the device's own memory that cannot be avoided.
        communication: of the collectives.
    """

    arithmetic: float
    memory: float
    communication: float

    @property
    def overlapped(self) -> float:
        """If everything runs beside everything else: the longest alone counts."""
        return max(self.arithmetic, self.memory, self.communication)

    @property
    def in_turn(self) -> float:
        """If collectives wait for arithmetic and the other way round."""
        return max(self.arithmetic, self.memory) + self.communication

    @property
    def bottleneck(self) -> str:
        """Name of the longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def limits(
    device: Accelerator,
    flops: float,
    memory_bytes: float,
    collectives: Iterable[Collective],
    precision: str = "",
) -> Limits:
    """The limits of a program on `device`.

    Args:
        device: which.
        flops: of one device.
        memory_bytes: that one device must read and write at least.
        collectives: with their counts.
        precision: of the fastest products, a key of `Accelerator.peaks`; '': bfloat16.
    """
    return Limits(
        arithmetic=flops / device.peak(precision),
        memory=memory_bytes / device.memory_bandwidth,
        communication=math.fsum(device.seconds_of(c) for c in collectives),
    )
