"""From a run's configuration to the student's network, the teacher, and the stages of training.

Checks, runs and plans all begin with `resolve`, so that what is checked and planned is what runs.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill import worlds
from jax_distill.assembly import build, stages
from jax_distill.config import ConfigError
from jax_distill.config.settings import flatten
from jax_distill.interop import ported_folder
from jax_distill.models.inputs import GUIDANCE
from jax_distill.objectives.methods import FROM_SCRATCH
from jax_distill.storage import paths
from jax_distill.storage.files import check_no_partial
from jax_distill.training import checkpoint
from jax_distill.worlds.flux.world import ported_config
from jax_distill.worlds.shapes import bundled

EMBEDDED = "embedded"
"""In the place of a workdir: the bundled teacher."""

_SHARED = (
    *("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "axes_dims_rope"),
    *("num_attention_heads", "joint_attention_dim", "pooled_projection_dim"),
)
"""Settings of a network that a student shares with its teacher."""

_BESIDE = ("lora.rank", "lora.alpha", "lora.targets", "lora.base", "teacher.checkpoint", "dtype")
"""Settings that adapters share with those that they start from."""


class Resolved(NamedTuple):
    """A run's configuration with nothing left open.

    Attributes:
      config: of the run, with the student's whole network.
      teacher: of the teacher as the run takes it, in its precision and guided as it says; None from
        scratch.
      stages: the trainings of the run, in order.
    """

    config: ConfigDict
    teacher: ConfigDict | None
    stages: list[stages.Stage]


def resolve(config: ConfigDict, teacher: ConfigDict | None = None) -> Resolved:
    """Resolves the configuration of a run and that of its teacher.

    Args:
      config: of the run; one that was resolved before stays as it is.
      teacher: of the teacher; by default the one that `teacher.checkpoint` names.

    Raises:
      ConfigError: the teacher is missing or unfit, or contradicts the run's settings.
    """
    name = config.objective.name
    if config.start.checkpoint and name in (*FROM_SCRATCH, "time_rescale"):
        raise ConfigError(
            f"start.checkpoint: {name} trains no student, which alone can start from another;"
            " leave it out"
        )
    if name in FROM_SCRATCH:
        return Resolved(config, None, stages.of(config, None))
    if teacher is None:
        teacher = teacher_config(config)
    config = _student_config(config, teacher)
    taken = as_teacher(config, teacher)
    return Resolved(config, taken, stages.of(config, taken, _start_config(config, taken)))


def validate(config: ConfigDict) -> None:
    """Checks everything that can be told from the configuration alone.

    Raises:
      ConfigError: naming the key, its value, and what it must be.
    """
    given = config.to_dict()
    objective, model = given.get("objective"), given.get("model")
    distils = isinstance(objective, dict) and objective.get("name") not in FROM_SCRATCH
    if distils and isinstance(model, dict):  # None is the teacher's
        given["model"] = {key: value for key, value in model.items() if value is not None}
    # A student's model is its teacher's, where the configuration says nothing else.
    configuration.check(given, partial=("model",) if distils else ())
    if not config.name:
        raise ConfigError("name: '' is not a word; it names the default workdir")
    if config.data.embedding == "training" and not worlds.of(config).stores_text:
        raise ConfigError(
            f"data.embedding: 'training', but captions of world={config.world!r} are embedded as"
            " they are read, without a network; set it to prepared"
        )


def absolute(source: str) -> str:
    """The same source of a network or of data, named independently of the current folder."""
    return source if source in ("", EMBEDDED) else str(paths.absolute(source))


def trained_config(source: str | Path) -> ConfigDict:
    """The configuration of a trained network, without its weights.

    Args:
      source: the workdir of a run, a ported folder, or "embedded".

    Raises:
      ValueError: the run does not exist, or has no checkpoint yet.
    """
    if str(source) == EMBEDDED:
        return bundled.teacher_config()
    folder = paths.path(source)
    if ported_folder.is_ported(folder):
        return ported_config(folder)
    config = configuration.load(folder)
    configuration.check_teachers(folder)
    checkpoint.complete_steps(folder)
    return config


def teacher_config(config: ConfigDict) -> ConfigDict:
    """The configuration of a run's teacher, as the teacher's own folder has it.

    Raises:
      ConfigError: the teacher is missing, untrained, or of another world.
    """
    source = config.teacher.checkpoint
    if source in ("", EMBEDDED):
        return worlds.of(config).default_teacher()
    check_no_partial(source, "teacher.checkpoint")
    try:
        teacher = trained_config(source)
    except ValueError as error:
        raise ConfigError(f"teacher.checkpoint: {error}") from None
    if teacher.objective.name not in build.TEACHERS:
        raise ConfigError(
            f"teacher.checkpoint: '{source}' is a run of objective {teacher.objective.name!r}, no"
            " teacher; give one such as configs/teacher.py or configs/time_rescale.py makes"
        )
    own, theirs = worlds.name(config), worlds.name(teacher)
    if own != theirs:
        raise ConfigError(
            f"world: {own!r} is not that of the teacher in '{source}', {theirs!r};"
            " FLUX's is that of presets such as configs/scm.py:flux_lite"
        )
    return teacher


def _student_config(config: ConfigDict, teacher: ConfigDict) -> ConfigDict:
    """The run's configuration with the student's whole network: the teacher's, and what differs."""
    length = config.data.text_length
    if length not in (configuration.base().data.text_length, teacher.data.text_length):
        raise ConfigError(
            f"data.text_length: {length} differs from the teacher's {teacher.data.text_length},"
            " which a student takes over; leave it out"
        )
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        changes = {name: value for name, value in config.model.items() if value is not None}
        resolved.model = {**teacher.model, **changes}
        resolved.data.text_length = teacher.data.text_length
        resolved.teacher.checkpoint = absolute(config.teacher.checkpoint)
        resolved.start.checkpoint = absolute(config.start.checkpoint)
        if stages.changes(resolved, teacher, GUIDANCE):
            # Its ramps are as steep as the time embedder's, see `refit_embedder`.
            for section in (resolved.optimizer, *resolved.optimizers.values()):
                if section.get("frozen") is not None:
                    section.frozen = stages.frozen_too(section.frozen, GUIDANCE.embedder)
    own, source = build.network_config(resolved), build.network_config(teacher)
    for key in _SHARED:
        if getattr(own, key) != getattr(source, key):
            raise ConfigError(
                f"model.{key}: {getattr(own, key)} differs from the teacher's"
                f" {getattr(source, key)}, whose parameters the student starts from; leave it out"
            )
    return resolved


def _start_config(config: ConfigDict, teacher: ConfigDict) -> ConfigDict | None:
    """The configuration of the run that a student starts from; None where that is the teacher.

    That run may have had another teacher, objective and precision. Its network must be the
    student's; adapters must stand beside the same teacher, in the same way.

    Args:
      config: of the run, with the student's whole network.
      teacher: of the teacher as the run takes it.

    Raises:
      ConfigError: there is no such student, or the run's settings do not fit it.
    """
    source = config.start.checkpoint
    if not source:
        return None
    check_no_partial(source, "start.checkpoint")
    try:
        start = configuration.load(source)
        checkpoint.complete_steps(paths.path(source))
    except ValueError as error:
        raise ConfigError(f"start.checkpoint: {error}") from None
    if start.objective.name in FROM_SCRATCH:
        raise ConfigError(
            f"start.checkpoint: '{source}' is a run of objective {start.objective.name!r}, no"
            " student; give one such as configs/scm.py makes"
        )
    if config.teacher.velocity == "rescaled" and stages.needs_rescale(config, teacher):
        raise ConfigError(
            "teacher.velocity: 'rescaled' is of a stage that there is not before a student with a"
            " start.checkpoint; set it to original, or teacher.checkpoint to a rescaled teacher"
        )
    for key, own, theirs in _start_settings(config, start):
        if own != theirs:
            raise ConfigError(
                f"{key}: {own!r} differs from {theirs!r}, that of the student in '{source}' that"
                f" this one starts from; set it to {theirs!r}"
            )
    return start


def _start_settings(config: ConfigDict, start: ConfigDict) -> Iterator[tuple[str, Any, Any]]:
    """Settings that a student must share with the one it starts from: key, own value, theirs."""
    yield "world", worlds.name(config), worlds.name(start)
    own, theirs = (dataclasses.asdict(build.network_config(x)) for x in (config, start))
    for key in own:
        if key not in ("remat", "attention"):  # neither changes what a parameter means
            yield f"model.{key}", own[key], theirs[key]
    if config.lora.rank or start.lora.rank:
        own, theirs = (flatten(x.to_dict()) for x in (config, start))
        for values in (own, theirs):
            values["teacher.checkpoint"] = absolute(values["teacher.checkpoint"]) or EMBEDDED
        for key in _BESIDE:
            yield key, own[key], theirs[key]


def as_teacher(config: ConfigDict, teacher: ConfigDict) -> ConfigDict:
    """The teacher's configuration as the run takes it: in its precision, guided as it says.

    Raises:
      ConfigError: the teacher's network cannot be guided like that.
    """
    taken = teacher.copy_and_resolve_references()
    asked = config.teacher.get("guidance", "auto")
    with taken.unlocked():
        taken.dtype = config.dtype
        if asked != "auto":
            build.check_guidance(asked, taken.model.guidance_embeds)
            taken.teacher.guidance = asked
    build.guidance_of(taken)
    return taken
