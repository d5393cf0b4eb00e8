"""Captions embedded between steps (`data.embedding="training"`): bytes, arithmetic and time.

The text encoders are a program of their own, whose parameters a run holds beside those of the step.
`temporaries`, `hbm_bytes` and `exchanges` are for that program what `formulas` has for a step's.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from jax_distill import worlds
from jax_distill.devices import sharding
from jax_distill.planning.chips import GIB, Topology
from jax_distill.planning.collectives import Collective
from jax_distill.planning.formulas import COMPUTE_BYTES, WORKING_WIDTHS
from jax_distill.planning.program import Program, bytes_on_a_chip, split
from jax_distill.planning.roofline import Roofline, roofline
from jax_distill.training.step import with_shardings

KIND = "text encoders"
WIDE_BYTES = 4  # of the residual stream, which is summed over `tensor`


@dataclasses.dataclass(frozen=True)
class Embedding:
    """What a step's captions take.

    Attributes:
      held: bytes of the text encoders on a chip, as long as the run lasts.
      peak: bytes of the program on a chip, the text encoders included.
      flops: a step, of all chips together.
      roofline: seconds a step by part.
      steps: whose captions are embedded at a time.
    """

    held: int
    peak: int
    flops: int
    roofline: Roofline
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "held_gib": self.held / GIB,
            "peak_gib": self.peak / GIB,
            "flops_per_step": self.flops,
            "steps_at_a_time": self.steps,
            "roofline_seconds": dataclasses.asdict(self.roofline),
            "seconds_per_step": self.roofline.seconds,
            "bound": self.roofline.bound,
        }


def plan(
    config: ConfigDict, mesh: Any, topology: Topology, measured: Callable[[Program], Any]
) -> Embedding | None:
    """Plans the embedding of a run's batches; None where captions come embedded.

    Args:
      config: of a stage.
      mesh: of the run.
      topology: the chips.
      measured: compiles or estimates a program, to a `planner.Measured`.
    """
    found = program(config, mesh)
    if found is None:
        return None
    flops, sizes, steps = found.flops(), measured(found), len(found.arguments[1])
    parts = roofline(topology, flops, sizes.hbm_bytes, sizes.exchanges)
    of_a_step = Roofline(*(seconds / steps for seconds in dataclasses.astuple(parts)))
    return Embedding(found.bytes_by_kind()[KIND], sizes.peak, flops // steps, of_a_step, steps)


def program(config: ConfigDict, mesh: Any) -> Program | None:
    """The program that embeds captions of some batches; None where they come embedded."""
    planned = worlds.of(config).planned_embedding(config.batch_size, mesh)
    if planned is None:
        return None
    places = sharding.shard_state(planned.parameters, mesh)
    params = with_shardings(planned.parameters, places)
    tokens = split(planned.tokens, mesh)
    kinds = {KIND: params, "batch": tokens}
    arguments = (params, tokens)
    functions = planned.function, planned.jitted
    return Program(config, mesh, *functions, arguments, kinds, params, [], KIND)


def temporaries(planned: Program) -> int:
    """Bytes of a chip beside the arguments: activations of a block, and the weights of two."""
    weights, tensor = _weight_bytes(planned), planned.mesh.shape["tensor"]
    activations = _tokens(planned) * _width(planned) * WORKING_WIDTHS * COMPUTE_BYTES
    return (activations + 2 * weights // _depth(planned)) // tensor


def hbm_bytes(planned: Program) -> int:
    """Bytes that a chip moves: weights as they come and as they are read, activations."""
    activations = 2 * _tokens(planned) * _width(planned) * WORKING_WIDTHS * COMPUTE_BYTES
    moved = activations * _depth(planned) + 2 * _weight_bytes(planned)
    return moved // planned.mesh.shape["tensor"] + bytes_on_a_chip(planned.weights)


def exchanges(planned: Program) -> list[Collective]:
    """Weights over `fsdp`, a block at a time, and two sums of activations a block over `tensor`."""
    sizes, depth, found = planned.mesh.shape, _depth(planned), []
    if sizes["fsdp"] > 1:
        size = _weight_bytes(planned) // sizes["tensor"] // depth
        found.append(Collective("all-gather", size, sizes["fsdp"], depth, 1, "weights"))
    if sizes["tensor"] > 1:
        size = _tokens(planned) * _width(planned) * WIDE_BYTES
        found.append(Collective("all-reduce", size, sizes["tensor"], 2 * depth, 1, "activations"))
    return found


def _weight_bytes(planned: Program) -> int:
    """Of both encoders, all chips together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(planned.weights))


def _tokens(planned: Program) -> int:
    """T5's tokens on a chip."""
    count, length = planned.arguments[1][0].t5.shape
    count *= len(planned.arguments[1])
    return math.ceil(count / (planned.mesh.shape["data"] * planned.mesh.shape["fsdp"])) * length


def _width(planned: Program) -> int:
    return planned.weights["t5"]["token_embedding"].shape[-1]


def _depth(planned: Program) -> int:
    """T5's blocks, which are stacked; CLIP's are small beside them."""
    return jax.tree.leaves(planned.weights["t5"]["blocks"])[0].shape[0]
