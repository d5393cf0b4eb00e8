"""Stages of a run: the trainings that follow one another, and the start of each.

Functions of configurations and parameter trees. A run calls them with arrays and `plan` with
shapes, so that plans are of the programs that run.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill.assembly import adapters, build
from jax_distill.devices import sharding
from jax_distill.models import mmdit
from jax_distill.models.inputs import GUIDANCE, INPUTS, INTERVAL, TIME, Input
from jax_distill.objectives import embedder_fit


class Stage(NamedTuple):
    """One training of a run.

    Attributes:
      name: "time_rescale", or the objective's.
      config: of the stage, with its whole network.
      source: configuration of the network it starts from; None from scratch.
      teacher: configuration of the network whose velocity it learns; None from scratch.
      adapted: whether the teacher has adapters, from the stage before.
    """

    name: str
    config: ConfigDict
    source: ConfigDict | None
    teacher: ConfigDict | None
    adapted: bool = False


def of(
    config: ConfigDict, teacher: ConfigDict | None, start: ConfigDict | None = None
) -> list[Stage]:
    """The stages of a run, in order.

    Args:
      config: of the run, with the student's whole network.
      teacher: of the teacher as the run takes it; None from scratch.
      start: of the student that this one starts from; None for the teacher.
    """
    name = config.objective.name
    if teacher is None:
        return [Stage(name, config, None, None)]
    if start is not None:
        return [Stage(name, config, start, teacher)]
    if name == "time_rescale" or not needs_rescale(config, teacher):
        return [Stage(name, config, teacher, teacher)]
    rescale = rescale_config(config, teacher)
    rescaled = config.teacher.velocity == "rescaled"
    adapted = rescaled and adapters.settings(config) is not None
    return [
        Stage("time_rescale", rescale, teacher, teacher),
        Stage(name, config, rescale, rescale if rescaled else teacher, adapted),
    ]


def rescale_config(config: ConfigDict, teacher: ConfigDict) -> ConfigDict:
    """The configuration of the stage before distillation, a run of its own.

    Args:
      config: of the run, with the student's whole network.
      teacher: of the teacher as the run takes it.
    """
    stage = config.copy_and_resolve_references()
    with stage.unlocked():
        stage.name = f"{config.name}/time_rescale"
        scales = build.without_networks(config).guidance_scales
        settings = {"guidance_scales": scales} if scales else {}
        stage.objective = {"name": "time_rescale", **settings}
        stage.model.interval_embeds = build.network_config(teacher).interval_embeds
        stage.ema_dtype = "float32"  # what the student starts from
        stage.total_steps = config.rescale.total_steps
        stage.batch_size = config.rescale.batch_size
        stage.optimizers = {}  # of players that only the student's stage has
        stage.optimizer = configuration.base().optimizer  # the student's suits its own loss
        stage.optimizer.moments = config.optimizer.moments  # but memory is the machine's
        stage.optimizer.learning_rate = config.rescale.learning_rate
        stage.optimizer.schedule = "cosine"
        stage.optimizer.warmup_steps = config.rescale.total_steps // 10
        # Refitted, see `refit_embedder`; and those that the student keeps as they are.
        stage.optimizer.frozen = frozen_too(config.optimizer.frozen, "time_embedder")
    return stage


def frozen_too(frozen: str, embedder: str) -> str:
    """The pattern `optimizer.frozen` with an embedder added."""
    parts = [part for part in frozen.split("|") if part]
    return frozen if embedder in parts else "|".join([embedder, *parts])


def needs_rescale(config: ConfigDict, teacher: ConfigDict) -> bool:
    """Whether the student's network takes time or guidance differently from the teacher's."""
    if config.model.guidance_embeds != teacher.model.guidance_embeds:
        return True
    return any(changes(config, teacher, x) for x in (TIME, GUIDANCE))


def refit(old: dict, factor: float, new_factor: float, upper: float) -> dict:
    """Refits an embedder to another factor of its input, see `embedder_fit.refit_embedder`."""
    embed = _embedding(sharding.gather(old), factor)
    hidden = old["linear_2"]["bias"].shape[0]
    return embedder_fit.refit_embedder(embed, hidden, factor=new_factor, upper=upper)


def refitted(stage: Stage) -> list[Input]:
    """The inputs whose embedders a stage refits."""
    return [x for x in INPUTS if changes(stage.config, stage.source, x)]


def changes(config: ConfigDict, source: ConfigDict, x: Input) -> bool:
    """Whether the source embeds an input that the network of `config` takes by another factor."""
    old, new = build.network_config(source), build.network_config(config)
    embedded = {INTERVAL: old.interval_embeds, GUIDANCE: old.guidance_embeds}.get(x, True)
    return embedded and getattr(old, x.factor) != getattr(new, x.factor)


def qualities(stage: Stage, source: dict, network: dict) -> dict[str, embedder_fit.FitQuality]:
    """The fit of refitted embedders to those of the source, by their names.

    Args:
      stage: with a source.
      source: parameters of the source.
      network: made of them by `initial_network`.
    """
    old, new = build.network_config(stage.source), build.network_config(stage.config)
    found = {}
    for name, factor, upper in refitted(stage):
        before, after = (sharding.gather(tree[name]) for tree in (source, network))
        found[name] = embedder_fit.fit_quality(
            _embedding(before, getattr(old, factor)),
            _embedding(after, getattr(new, factor)),
            after,
            factor=getattr(new, factor),
            upper=upper,
        )
    return found


def _embedding(embedder: dict, factor: float) -> Callable[[np.ndarray], jax.Array]:
    return lambda values: mmdit.scalar_embedding(embedder, factor * jnp.asarray(values))


def initial_network(stage: Stage, network: dict) -> dict:
    """The parameters a stage starts from: those of its source, with embedders refitted.

    Embedders that the source lacks are initialised to add nothing. All else is the source's own
    arrays, not copies.

    Args:
      stage: with a source.
      network: parameters of the source.
    """
    old, new = build.network_config(stage.source), build.network_config(stage.config)

    def fresh() -> dict:
        created = build.initial_parameters(stage.config)
        return {name: leaf for name, leaf in created.items() if name not in network}

    made = {
        name: refit(network[name], getattr(old, factor), getattr(new, factor), upper)
        for name, factor, upper in refitted(stage)
    }
    return {**jax.jit(fresh)(), **network, **made}
