"""Lower bound on the time of a step, and the part of the chip that sets it."""

import dataclasses
from collections.abc import Iterable

from jax_distill.planning.chips import Topology
from jax_distill.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step for each part of a chip, as if it were the only one.

    Attributes:
      compute: of the matrix products.
      hbm: of moving the program's bytes to and from memory.
      ici: of the exchanges between chips.
    """

    compute: float
    hbm: float
    ici: float

    @property
    def bound(self) -> str:
        """The slowest part: "compute", "hbm" or "ici"."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]

    @property
    def seconds(self) -> float:
        """Of a step in which the parts work at the same time: those of the slowest."""
        return max(self.compute, self.hbm, self.ici)


def roofline(
    topology: Topology, flops: float, hbm_bytes: float, exchanges: Iterable[Collective]
) -> Roofline:
    """The roofline of a program, at what well-made programs reach of a chip (`Chip.reach`).

    Args:
      topology: the chips.
      flops: of all chips together.
      hbm_bytes: that a chip moves to and from its memory.
      exchanges: of the compiled program.
    """
    chip = topology.chip
    ici = sum(e.received / topology.bandwidth(e.group) for e in exchanges)
    return Roofline(
        flops / topology.chips / (chip.reach * chip.flops),
        hbm_bytes / (chip.reach * chip.hbm_bandwidth),
        ici / chip.reach,
    )


def utilisation(topology: Topology, flops: float, seconds: float) -> float:
    """The share of the chips' peak that `flops` in `seconds` are."""
    return flops / (seconds * topology.chips * topology.chip.flops)
