"""Stages of a run: which trainings follow one another, and what each of them starts from.

Functions of configurations and parameter trees. A run calls them with arrays and `plan` with
shapes, so that what is planned is what runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from jax_distill import adapters, build, parallel, pipeline
from jax_distill import config as configuration
from jax_distill.models import mmdit
from jax_distill.objectives import time_rescale

FROM_SCRATCH = ("autoencoder", "flow_matching")
"""Objectives without a teacher."""

GUIDANCE_REACH = 10.0  # guidance scales that a refitted embedder follows, from 0


class Stage(NamedTuple):
    """One training of a run.

    Attributes:
      name: "time_rescale", or the objective's.
      config: of the stage, with its whole network.
      source: configuration of the network that it starts from; None from scratch.
      teacher: configuration of the network whose velocity it learns; None from scratch.
      adapted: whether that network has adapters, from the stage before.
    """

    name: str
    config: ConfigDict
    source: ConfigDict | None
    teacher: ConfigDict | None
    adapted: bool = False


def of(config: ConfigDict, teacher: ConfigDict | None) -> list[Stage]:
    """The stages of a run, in order.

    Args:
      config: of the run, whole: `student_config` has made it.
      teacher: of the network that `teacher.checkpoint` names; None from scratch.
    """
    name = config.objective.name
    if teacher is None:
        return [Stage(name, config, None, None)]
    teacher = as_teacher(config, teacher)
    if name == "time_rescale" or not needs_rescale(config, teacher):
        return [Stage(name, config, teacher, teacher)]
    rescale = rescale_config(config)
    rescaled = config.teacher.velocity == "rescaled"
    adapted = rescaled and adapters.settings(config) is not None
    return [
        Stage("time_rescale", rescale, teacher, teacher),
        Stage(name, config, rescale, rescale if rescaled else teacher, adapted),
    ]


def student_config(config: ConfigDict, teacher: ConfigDict) -> ConfigDict:
    """The configuration with the student's whole network: the teacher's, and what differs."""
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        changes = {name: value for name, value in config.model.items() if value is not None}
        resolved.model = {**teacher.model, **changes}
        resolved.data.text_length = teacher.data.text_length
        resolved.teacher.checkpoint = pipeline.absolute(config.teacher.checkpoint)
    return resolved


def as_teacher(config: ConfigDict, teacher: ConfigDict) -> ConfigDict:
    """The teacher's configuration as the run takes it: in its precision, guided as it says.

    Raises:
      ConfigError: the teacher's network cannot be guided like that.
    """
    taken = teacher.copy_and_resolve_references()
    with taken.unlocked():
        taken.dtype = config.dtype
        if (asked := config.teacher.get("guidance", "auto")) != "auto":
            taken.teacher.guidance = asked
    build.guidance_of(taken)
    return taken


def rescale_config(config: ConfigDict) -> ConfigDict:
    """The configuration of the stage before distillation, a run of its own."""
    stage = config.copy_and_resolve_references()
    with stage.unlocked():
        stage.name = f"{config.name}/time_rescale"
        stage.objective = {
            "name": "time_rescale",
            "guidance_scales": build.objective(config).guidance_scales,
        }
        stage.model.interval_embeds = False
        stage.total_steps = config.rescale.total_steps
        stage.batch_size = config.rescale.batch_size
        stage.optimizer = configuration.base().optimizer  # the student's is made for its own loss
        stage.optimizer.moments = config.optimizer.moments  # but memory is the machine's
        stage.optimizer.learning_rate = config.rescale.learning_rate
        stage.optimizer.schedule = "cosine"
        stage.optimizer.warmup_steps = config.rescale.total_steps // 10
        # Refitted, see `refit_embedder`; and what the student keeps as it is.
        frozen = {"time_embedder", config.optimizer.frozen} - {""}
        stage.optimizer.frozen = "|".join(sorted(frozen))
    return stage


def needs_rescale(config: ConfigDict, teacher: ConfigDict) -> bool:
    """Whether the student's network takes its time or its guidance in another way."""
    ours, theirs = build.network_config(config), build.network_config(teacher)
    if ours.guidance_embeds != theirs.guidance_embeds or ours.time_scale != theirs.time_scale:
        return True
    return ours.guidance_embeds and ours.guidance_factor != theirs.guidance_factor


Refit = Callable[..., dict]
"""(old embedder, factor of the old one, of the new one, largest value, name) -> new embedder."""


def refit(old: dict, factor: float, new_factor: float, upper: float, name: str) -> dict:
    """An embedder made for another factor of its input, see `time_rescale.refit_embedder`."""
    old = parallel.gather(old)

    def embed(values):
        return mmdit.scalar_embedding(old, factor * jnp.asarray(values))

    hidden = old["linear_2"]["bias"].shape[0]
    inputs = {"factor": new_factor, "upper": upper}
    new = time_rescale.refit_embedder(embed, hidden, **inputs)
    quality = time_rescale.fit_quality(
        embed, lambda v: mmdit.scalar_embedding(new, new_factor * jnp.asarray(v)), new, **inputs
    )
    logging.info(
        "%s refitted, factor %g for %g: error %.3f of its variation on [0, %g], condition %.1f",
        name,
        new_factor,
        factor,
        quality.error,
        upper,
        quality.condition,
    )
    return new


def initial_network(stage: Stage, network: dict, refit: Refit = refit) -> dict:
    """The parameters that a stage starts from: those of another network, embedders refitted.

    Embedders that the other one does not have start as they are initialised: adding nothing. All
    else is the other network's own arrays, no copies.

    Args:
      stage: with a source.
      network: parameters of the source.
      refit: makes embedders for other factors; `plan`, which has shapes alone, gives its own.
    """
    old, new = build.network_config(stage.source), build.network_config(stage.config)

    def fresh() -> dict:
        created = build.initial_parameters(stage.config)
        return {name: leaf for name, leaf in created.items() if name not in network}

    merged = {**jax.jit(fresh)(), **network}
    for name, factor, upper in (
        ("time_embedder", "time_scale", 1.0),
        ("interval_embedder", "time_scale", 1.0),
        ("guidance_embedder", "guidance_factor", GUIDANCE_REACH),
    ):
        factors = getattr(old, factor), getattr(new, factor)
        if name in network and factors[0] != factors[1]:
            merged[name] = refit(network[name], *factors, upper, name)
    return merged
