"""Chips and their wiring: the only place with hardware numbers."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from jax_distill.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Capabilities of one chip.

    Attributes:
      hbm: bytes of its memory.
      flops: peak of bfloat16 matrix products, FLOP/s.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one link to another chip, in one direction.
      links: links of a chip.
      wraps: an axis of the topology of this many chips, or a multiple, is a ring; 0: none is, or
        there are no axes.
      reach: share of `flops`, and of the bandwidths, that well-made programs reach.
      source: where the numbers are from.
    """

    hbm: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    wraps: int
    reach: float
    source: str


# Links: the published bandwidth of a chip, both directions of all links, over two, over links.
# Reach is a choice. MaxText's documentation gives 65% of peak for dense training on v5p and 44 to
# 50% on v6e, rematerialised arithmetic not counted, which would be up to a third more.
TPU_REACH = 0.75
TPUS: Mapping[str, Chip] = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 50e9, 6, 4, TPU_REACH, "cloud.google.com/tpu/docs/v4"),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 50e9, 4, 16, TPU_REACH, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 100e9, 6, 4, TPU_REACH, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 100e9, 4, 16, TPU_REACH, "cloud.google.com/tpu/docs/v6e"),
}
# NVLink: 18 links of 25e9 bytes/s in each direction, all of them to a switch.
GPUS: Mapping[str, Chip] = {
    "a100": Chip(80 * 10**9, 312e12, 2039e9, 300e9, 1, 0, 0.6, "NVIDIA A100 80GB SXM datasheet"),
    "h100": Chip(80 * 10**9, 989e12, 3350e9, 450e9, 1, 0, 0.6, "NVIDIA H100 SXM datasheet"),
    "h200": Chip(141 * 10**9, 989e12, 4800e9, 450e9, 1, 0, 0.6, "NVIDIA H200 SXM datasheet"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are laid out.

    Attributes:
      name: as asked for, such as "v5p:4x4x4".
      kind: "tpu", "gpu" or "cpu".
      chip: one of them.
      shape: chips along each axis of the wiring.
    """

    name: str
    kind: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def bandwidth(self, group: int) -> float:
        """Bytes/s that a chip can take in from a group of chips that exchange data.

        A group of all chips has all links: two along an axis that is a ring, otherwise one, that of
        the chips at the ends. A smaller group has its share of the axes, log(group) / log(chips).
        """
        if self.kind != "tpu" or self.chips == 1:
            return self.chip.links * self.chip.link_bandwidth

        def links(size: int) -> int:
            if size == 1:
                return 0
            return 2 if size % self.chip.wraps == 0 else 1

        share = math.log(max(group, 2)) / math.log(self.chips)
        return max(share * sum(map(links, self.shape)), 1) * self.chip.link_bandwidth


def parse(name: str) -> Topology:
    """The topology of a name: "v5p:4x4x4", "gpu:h200x8", "cpu".

    Raises:
      ConfigError: an unknown chip or layout.
    """
    if name == "cpu":
        return Topology(name, "cpu", _this_machine(), (1,))
    if match := re.fullmatch(r"gpu:(\w+?)x(\d+)", name):
        if match[1] in GPUS and int(match[2]) > 0:
            return Topology(name, "gpu", GPUS[match[1]], (int(match[2]),))
    elif match := re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name):
        shape = tuple(map(int, match[2].split("x")))
        if match[1] in TPUS and min(shape) > 0:
            return Topology(name, "tpu", TPUS[match[1]], shape)
    raise ConfigError(
        f"--topology: {name!r} is none of TPU:AxB, TPU:AxBxC, gpu:GPUxN and cpu, with TPU one of"
        f" {', '.join(TPUS)} and GPU one of {', '.join(GPUS)}; such as v5p:4x4x4 or gpu:h200x8"
    )


def tpu_devices(topology: Topology) -> Any:
    """The devices of a TPU topology as its compiler knows them; no TPU is needed.

    Raises:
      ConfigError: the compiler is not installed, or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks the network for a TPU
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # and warns that it found none
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # plans beside plans: no chip is taken
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"--topology: {topology.name} needs the TPU compiler, which is not installed; get it"
            " with: pip install jax[tpu]"
        ) from None
    from jax.experimental import topologies

    options = {"chips_per_host_bounds": [1, 1, 1]} if topology.chips == 1 else {}
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu", **options).devices
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--topology: the TPU compiler does not know {topology.name} ({reason}); try one such"
            " as v5e:8x8, v5p:4x4x4 or v6e:8x8"
        ) from None


def _this_machine() -> Chip:
    """A rough idea of this machine: 32 FLOP a cycle and core at 3 GHz, and its memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count() or 1
    return Chip(memory, cores * 96e9, 20e9, 20e9, 1, 0, 0.5, "this machine")
