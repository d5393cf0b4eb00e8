"""Memory, traffic and exchanges of a step by formula: for GPUs, and for candidates of a sweep."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jax_distill.assembly import build
from jax_distill.devices.sharding import AXES
from jax_distill.planning.collectives import Collective
from jax_distill.planning.program import Program, bytes_on_a_chip, sampling_steps

COMPUTE_BYTES = 2  # bfloat16
SAVED_WIDTHS = {"full": 1, "dots": 10, "none": 50}
"""Channels that each remat policy saves of a token and block for the gradient, in units of the
network's width. Counted from the jaxpr of FLUX.1-lite's gradient, see tests/test_plan.py."""
WORKING_WIDTHS = 60
"""The same for a block while its gradient is taken: heads, MLP, their tangents and cotangents. A
choice: with it, temporaries are 1.1 to 1.4 times those of the TPU compiler in docs/plans.md for
full students, and 0.8 to 0.9 times for adapters. Each pass of `hbm_bytes` moves them once."""
TRAINING_FORWARDS = 6
"""Forwards whose arithmetic a step has: teacher, student, its tangent, gradient (2), remat."""
TRAINING_READS = 3
"""How often a step reads all weights: the teacher's, forward, and back again."""


def abstract_mesh(shape: tuple[int, ...]) -> AbstractMesh:
    """A mesh without devices."""
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return AbstractMesh(shape, AXES, axis_types=types)


def temporaries(program: Program) -> int:
    """Bytes of a chip that the step holds beside its arguments: gradients and activations."""
    config, mesh = program.config, program.mesh
    model = build.network_config(config)
    depth = model.num_layers + model.num_single_layers
    widths = WORKING_WIDTHS
    if program.moving:
        widths += SAVED_WIDTHS[model.remat] * depth
    activations = _tokens(program) * model.hidden_size * widths * COMPUTE_BYTES
    gathered = 2 * _block_bytes(program)  # one in use, one on its way
    gradients = max((bytes_on_a_chip(player.params) for player in program.moving), default=0)
    return gradients + activations // mesh.shape["tensor"] + gathered


def hbm_bytes(program: Program) -> int:
    """Bytes that a chip moves to and from its memory in a step."""
    weights = _weight_bytes(program) // program.mesh.shape["tensor"]
    passes = _passes(program)
    updated = 2 * sum(bytes_on_a_chip(player[:3]) for player in program.moving)
    activations = 2 * passes * _tokens(program) * build.network_config(program.config).hidden_size
    depth = sum(_blocks(program))
    moved = activations * WORKING_WIDTHS * depth * COMPUTE_BYTES // program.mesh.shape["tensor"]
    return updated + 2 * passes * weights + moved


def exchanges(program: Program) -> list[Collective]:
    """Exchanges among chips: weights over fsdp, gradients, activations over tensor.

    All weights are gathered, frozen or not; gradients are of trained parameters. A double block has
    two all-reduces of activations a forward, a single block one: those of its output layers.
    """
    sizes, config = program.mesh.shape, program.config
    double, single = _blocks(program)
    depth = double + single
    micro = config.accumulate if program.moving else 1
    found = []
    weights = _weight_bytes(program) // sizes["tensor"]
    learned = sum(build.count(player.params) for player in program.moving)
    gradients = 2 * COMPUTE_BYTES * learned // sizes["tensor"]
    if sizes["fsdp"] > 1:
        count = _passes(program) * depth * micro
        gathered = Collective("all-gather", weights // depth, sizes["fsdp"], count, 1, "weights")
        found.append(gathered)
        if program.moving:
            count = depth * micro
            size = gradients // depth
            scattered = Collective("reduce-scatter", size, sizes["fsdp"], count, 1, "gradients")
            found.append(scattered)
    if sizes["data"] > 1 and program.moving:
        whole = gradients // sizes["fsdp"]
        found.append(Collective("all-reduce", whole, sizes["data"], 1, 0, "gradients"))
    if sizes["tensor"] > 1:
        width = build.network_config(config).hidden_size
        passes = TRAINING_FORWARDS * len(program.moving) or sampling_steps(config)
        count = (2 * double + single) * passes * micro
        moved = _tokens(program) * width * COMPUTE_BYTES
        found.append(Collective("all-reduce", moved, sizes["tensor"], count, 1, "activations"))
    return found


def _passes(program: Program) -> int:
    """How often all weights are read."""
    return TRAINING_READS * len(program.moving) or sampling_steps(program.config)


def _tokens(program: Program) -> int:
    """Tokens of text and picture on a chip at a time."""
    config, sizes = program.config, program.mesh.shape
    accumulate = config.accumulate if program.moving else 1
    samples = math.ceil(config.batch_size / (accumulate * sizes["data"] * sizes["fsdp"]))
    return samples * (build.token_shape(config)[0] + config.data.text_length)


def _blocks(program: Program) -> tuple[int, int]:
    model = program.config.model
    return model.num_layers, model.num_single_layers


def _weight_bytes(program: Program) -> int:
    """Of one evaluation, all layers and chips together: as they are computed with, or in int8."""
    return _network_bytes(program.weights)


def _block_bytes(program: Program) -> int:
    """Of the largest block's weights, gathered over fsdp."""
    largest = max(
        _network_bytes(program.weights[name]) // count
        for name, count in zip(("double_blocks", "single_blocks"), _blocks(program))
        if count
    )
    return largest // program.mesh.shape["tensor"]


def _network_bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * min(leaf.dtype.itemsize, COMPUTE_BYTES) for leaf in leaves)
