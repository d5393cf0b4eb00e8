"""The programs of a run, from shapes alone: nothing of the model is ever allocated."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_distill import streams, worlds
from jax_distill.assembly import adapters, build, resolution, stages
from jax_distill.assembly.frozen import frozen_network
from jax_distill.config import ConfigError
from jax_distill.data.folders import folders, resolutions
from jax_distill.data.manifest import DESCRIPTION
from jax_distill.devices import sharding
from jax_distill.flow import Batch, Text
from jax_distill.objectives.methods import OBJECTIVES
from jax_distill.objectives.objective import STUDENT
from jax_distill.objectives.settings import settings_of
from jax_distill.planning.flops import count_flops
from jax_distill.training import rounding
from jax_distill.training.step import (
    PlayerState,
    init_state,
    jit_step,
    make_optimizers,
    make_step,
    turns,
    with_shardings,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes of its arguments, placed on a mesh.

    Attributes:
      config: with the student's whole network.
      mesh: of the devices it is for; an abstract one will do for everything but compiling.
      function: what is jitted.
      jitted: the same, with its shardings and donated arguments.
      arguments: shapes with shardings.
      kinds: the same, by what they are, such as "parameters".
      weights: shapes of all that one evaluation of the trained network reads, frozen or not.
      moving: shapes of the states of the players that move; none in a sampler.
      name: of the stage, with the players of its turn where there are several, or "sampling".
      steps: of the run that are this program; 0 for a sampler.
    """

    config: ConfigDict
    mesh: Any
    function: Callable
    jitted: Any
    arguments: tuple
    kinds: dict[str, Any]
    weights: Any
    moving: list[PlayerState]
    name: str
    steps: int = 0

    def flops(self) -> int:
        """Exact operations of the matrix products of one call, on all chips together."""
        return count_flops(self.function, *self.arguments)

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the arguments on a chip."""
        return {kind: bytes_on_a_chip(tree) for kind, tree in self.kinds.items()}


def training(stage: stages.Stage, mesh: Any) -> Iterator[Program]:
    """The steps of `loop.fit` on a mesh, given what the run gives them: a program for each turn."""
    config = stage.config
    objective = build.objective(config, stage.teacher)
    optimizers = make_optimizers(objective, config)

    def create():
        params = build.initial_parameters(config)
        return init_state(objective, optimizers, params, config.seed, config.ema_dtype)

    abstract = jax.eval_shape(create)
    shardings = sharding.shard_state(abstract, mesh)
    state = with_shardings(abstract, shardings)
    held = {"null": text_like(config, 1)}
    if stage.teacher is not None:
        held["teacher"] = jax.eval_shape(functools.partial(_frozen, stage))
    held = with_shardings(held, sharding.shard_state(held, mesh))
    batch = Batch(
        jax.ShapeDtypeStruct((config.batch_size, *build.token_shape(config)), jnp.float32),
        text_like(config, config.batch_size),
    )
    batch = split(batch, mesh)
    kinds = {}
    for name, player in state.players.items():
        whose = f"{name}'s " if len(state.players) > 1 else ""
        kinds |= {f"{whose}parameters": player.params, f"{whose}optimizer": player.opt_state}
        kinds |= {f"{whose}EMA": player.ema} if player.ema else {}
    kinds |= {"teacher": held.get("teacher", {}), "batch": (batch, held["null"])}
    whole = functools.partial(adapters.whole, config)
    student = state.players[STUDENT].params
    weights = jax.eval_shape(whole, held.get("teacher"), student)["network"]
    arguments = (state, held, batch)
    counts = turns(objective, config.total_steps)
    for turn, steps in counts.items():
        name = f"{stage.name}, {' and '.join(turn)}" if len(counts) > 1 else stage.name
        function = make_step(objective, optimizers, config, turn)
        jitted = jit_step(objective, optimizers, config, shardings, turn)
        moving = [state.players[player] for player in turn]
        yield Program(
            config, mesh, function, jitted, arguments, kinds, weights, moving, name, steps
        )


def sampling(stage: stages.Stage, mesh: Any) -> Program:
    """The sampler of what a stage trains, in the most of `evaluation.student_steps`, on a mesh."""
    config = stage.config
    objective = build.objective(config)
    beside = adapters.settings(config)

    def create():
        network = build.initial_parameters(config)
        if beside is None:
            return {"network": rounding.narrow(network, config.ema_dtype)}
        state = rounding.narrow(beside.split(streams.key(0), network), config.ema_dtype)
        return {"network": beside.attach(_frozen(stage), state)}

    params = jax.eval_shape(create)
    params = with_shardings(params, sharding.shard_state(params, mesh))
    count, steps = config.batch_size, sampling_steps(config)
    noise = jax.ShapeDtypeStruct((count, *build.token_shape(config)), jnp.float32)
    guidance = jax.ShapeDtypeStruct((count,), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(streams.key(0), count))
    inputs = split((noise, text_like(config, count), guidance, keys), mesh)
    null = text_like(config, 1)
    null = with_shardings(null, sharding.shard_state(null, mesh))

    def function(params, null, inputs):
        noise, text, guidance, keys = inputs
        return objective.sample(params, noise, text, null, guidance, keys, steps)

    kinds = {"parameters": params, "batch": (inputs, null)}
    arguments = (params, null, inputs)
    jitted, weights = jax.jit(function), params["network"]
    return Program(config, mesh, function, jitted, arguments, kinds, weights, [], "sampling")


def run_stages(config: ConfigDict) -> list[stages.Stage]:
    """The stages of a run that take steps, in order.

    Raises:
      ConfigError: a value that a run would refuse, nothing that has a plan, or no teacher.
    """
    resolution.validate(config)
    if config.objective.name == "autoencoder":
        raise ConfigError("objective.name: the autoencoder has no plan; give another --config")
    config = _largest(config)
    teacher = None if config.teacher.checkpoint else worlds.of(config).planned_teacher()
    resolved = resolution.resolve(_shifted(config.copy_and_resolve_references()), teacher)
    every = [stage._replace(config=_shifted(stage.config)) for stage in resolved.stages]
    return [stage for stage in every if stage.config.total_steps]


def _largest(config: ConfigDict) -> ConfigDict:
    """The configuration at the largest of the sizes that its data has, where that is there."""
    path = config.data.path
    if not all((Path(folder) / DESCRIPTION).is_file() for folder in folders(path)):
        return config
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        sizes = [*resolutions(path), tuple(config.data.resolution)]
        changed.data.resolution = max(sizes, key=math.prod)
    return changed


def _shifted(config: ConfigDict) -> ConfigDict:
    """The configuration with a time shift, which only a ported folder knows: it costs nothing."""
    settings = settings_of(OBJECTIVES[config.objective.name])
    if {**settings, **config.objective}.get("time_shift", 0.0) is None:
        with config.unlocked():
            config.objective.time_shift = 1.0
    return config


def sampling_steps(config: ConfigDict) -> int:
    """Evaluations of the network in the sampler that is planned."""
    return max(config.evaluation.student_steps)


def forward_flops(config: ConfigDict) -> int:
    """Operations of one evaluation of the student's network for a batch."""
    network = build.network(config)
    params = jax.eval_shape(lambda: build.initial_parameters(config))
    count = config.batch_size
    x = jax.ShapeDtypeStruct((count, *build.token_shape(config)), jnp.float32)
    scalar = jax.ShapeDtypeStruct((count,), jnp.float32)
    guidance = scalar if config.model.guidance_embeds else None
    return count_flops(network.velocity, params, x, scalar, text_like(config, count), guidance)


def example_flops(config: ConfigDict) -> float:
    """As `forward_flops`, for one example."""
    return forward_flops(config) / config.batch_size


def text_like(config: ConfigDict, count: int) -> Text:
    """Shapes of embedded captions as the data has them, (count, ..)."""
    dtype = jnp.bfloat16 if worlds.of(config).stores_text else jnp.float32
    model = config.model
    return Text(
        jax.ShapeDtypeStruct((count, config.data.text_length, model.joint_attention_dim), dtype),
        jax.ShapeDtypeStruct((count, model.pooled_projection_dim), dtype),
    )


def make_mesh(config: ConfigDict, devices: Sequence[Any]) -> Mesh:
    """The mesh of a configuration on these devices; checks that it divides the batch.

    Raises:
      ConfigError or ValueError: naming the key and the fix.
    """
    try:
        mesh = sharding.make_mesh(config.mesh, devices)
    except NotImplementedError as error:  # the mesh's axes are not made of the topology's
        reason = str(error).split(". ")[0]
        raise ConfigError(f"mesh: {dict(config.mesh)} does not fit the wiring ({reason})") from None
    check_batch(config, mesh)
    return mesh


def check_batch(config: ConfigDict, mesh: Any) -> None:
    """Raises ConfigError, naming the key and the fix, if the mesh does not divide the batch."""
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % (config.accumulate * groups):
        raise ConfigError(
            f"batch_size: {config.batch_size} does not divide into"
            f" accumulate={config.accumulate} micro-batches on {groups} groups of chips (mesh.data"
            f" x mesh.fsdp); make it a multiple of {config.accumulate * groups}"
        )


def bytes_on_a_chip(tree: Any) -> int:
    """Bytes of the part of every leaf that one chip holds."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def _frozen(stage: stages.Stage) -> dict:
    """The frozen network of a stage, as the run makes it; to be traced."""
    network = frozen_network(stage.config, build.initial_parameters(stage.teacher))
    if stage.adapted:
        beside = adapters.settings(stage.config)
        network = beside.attach(network, beside.split(streams.key(0), network))
        network = frozen_network(stage.config, network, adapted=True)
    return network


def split(tree: Any, mesh: Any) -> Any:
    """Shapes of arrays that are split over a mesh along their first axis, as batches are."""
    place = NamedSharding(mesh, PartitionSpec(*sharding.BATCH))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
    )
