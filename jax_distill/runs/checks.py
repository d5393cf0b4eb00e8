"""What can be wrong with a run, found before anything is written."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill import pipeline, worlds
from jax_distill.assembly import adapters, build, stages
from jax_distill.assembly.stages import FROM_SCRATCH
from jax_distill.config import ConfigError, base, load
from jax_distill.config.settings import flatten
from jax_distill.data.loader import check_batch_size
from jax_distill.data.records import LatentRecords
from jax_distill.devices import sharding
from jax_distill.evaluation import scoring
from jax_distill.interop import ported_folder
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.objectives.methods import OBJECTIVES
from jax_distill.runs import resuming
from jax_distill.storage.files import check_no_partial
from jax_distill.training import checkpoint
from jax_distill.training.optimizer import make_optimizer
from jax_distill.worlds.shapes import bundled

_TEACHERS = (
    *("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "axes_dims_rope"),
    *("num_attention_heads", "joint_attention_dim", "pooled_projection_dim"),
)
"""Settings of a network that a student shares with its teacher."""


def check(config: ConfigDict, workdir: Path) -> None:
    """Checks a configuration, what it points to, and the workdir.

    Raises:
      ConfigError or ValueError: one sentence that names the key and the fix.
    """
    check_workdir(workdir)
    validate(config)
    make_optimizer(config.optimizer, config.total_steps)
    name = config.objective.name
    check_objective(config)
    teacher = None
    if name == "autoencoder":
        if config.world != "shapes":
            raise ConfigError(f"world: {config.world!r} has its autoencoder; none is trained there")
        AutoencoderConfig(**config.autoencoder)
        check_batches(config, ("batch_size",), config.data.examples)
    else:
        if name not in FROM_SCRATCH:
            teacher = teacher_config(config)
            if pipeline.absolute(config.teacher.checkpoint) == str(workdir.resolve()):
                raise ConfigError(
                    f"teacher.checkpoint: '{workdir}' is the run's own --workdir; give another"
                )
            config = student_config(config, teacher)
        check_evaluation(config)
        check_data(config)
    check_lora(config)
    check_same_run(config, workdir)
    if name != "autoencoder":
        check_loss(config, teacher)


def check_workdir(workdir: Path) -> None:
    """Checks that a workdir is a folder, or may become one.

    Raises:
      ConfigError: it is something else.
    """
    if workdir.parts and workdir.parts[0].endswith(":"):  # "gs://bucket/run", as a path
        raise ConfigError(
            f"--workdir: '{workdir}' is an address; mount the bucket and give a folder of it"
        )
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir: '{workdir}' is a file; give a folder")


def check_objective(config: ConfigDict) -> None:
    """Checks an objective's settings, and what they ask of others."""
    given = dict(config.objective)
    configuration.check_objective(given)
    name = given.pop("name")
    if name in OBJECTIVES:
        try:
            for words in OBJECTIVES[name](None, None, **given).check_run(config.dtype):
                logging.warning("objective.%s", words)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def check_batches(
    config: ConfigDict, keys: Sequence[str], examples: int, rows_per_example: int = 1
) -> None:
    """Checks that batches divide among processes, micro-batches and devices, and can be filled."""
    mesh = sharding.make_mesh(config.mesh)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    values = flatten(config.to_dict())
    for key in keys:
        size = values[key]
        if size % (config.accumulate * devices):
            tensor = mesh.size // math.gcd(size // config.accumulate, mesh.size)
            fits = size % config.accumulate == 0 and tensor < mesh.size and config.mesh.data == 1
            raise ConfigError(
                f"{key}: {size} does not divide into accumulate={config.accumulate} micro-batches"
                f" on {devices} device{'s' * (devices > 1)} (mesh.data x mesh.fsdp); make it a"
                f" multiple of {config.accumulate * devices}" + f", or mesh.tensor {tensor}" * fits
            )
        check_batch_size(size, examples, key, rows_per_example)


def teacher_config(config: ConfigDict) -> ConfigDict:
    """The configuration of the teacher that `teacher.checkpoint` names, without its weights.

    Raises:
      ConfigError: there is no trained teacher, or it is of another world.
    """
    source = config.teacher.checkpoint
    if source in ("", pipeline.EMBEDDED):
        if config.world != "shapes":
            raise ConfigError(
                f"teacher.checkpoint: missing; world={config.world!r} needs a folder that python -m"
                " jax_distill.port made, or a run that began with one"
            )
        return ConfigDict(bundled.load("teacher")[1]["config"])
    check_no_partial(source, "teacher.checkpoint")
    try:
        teacher = load(Path(source))
        configuration.check_teachers(Path(source))
        if not ported_folder.is_ported(Path(source)):
            checkpoint.complete_steps(Path(source))
    except ValueError as error:
        raise ConfigError(f"teacher.checkpoint: {error}") from None
    if teacher.objective.name not in build.TEACHERS:
        raise ConfigError(
            f"teacher.checkpoint: '{source}' is a run of objective {teacher.objective.name!r}, no"
            " teacher; give one such as configs/teacher.py or configs/time_rescale.py makes"
        )
    if (world := teacher.get("world", "shapes")) != config.world:
        raise ConfigError(
            f"world: {config.world!r} is not that of the teacher in '{source}', {world!r};"
            " FLUX's is that of presets such as configs/scm.py:flux_lite"
        )
    return teacher


def student_config(config: ConfigDict, teacher: ConfigDict) -> ConfigDict:
    """As `stages.student_config`, which passes over a `data.text_length` of our own."""
    length = config.data.text_length
    if length not in (base().data.text_length, teacher.data.text_length):
        raise ConfigError(
            f"data.text_length: {length} differs from the teacher's {teacher.data.text_length},"
            " which a student takes over; leave it out"
        )
    whole = stages.student_config(config, teacher)
    own, source = build.network_config(whole), build.network_config(teacher)
    for key in _TEACHERS:
        if getattr(own, key) != getattr(source, key):
            raise ConfigError(
                f"model.{key}: {getattr(own, key)} differs from the teacher's"
                f" {getattr(source, key)}, whose parameters the student starts from; leave it out"
            )
    return whole


def check_lora(config: ConfigDict) -> None:
    """Checks that adapters have projections to be beside, and a teacher that is frozen."""
    lora = adapters.settings(config)
    if lora is None:
        return
    if config.objective.name in FROM_SCRATCH:
        raise ConfigError(
            f"lora.rank: {lora.rank}, but {config.objective.name} trains a network from scratch;"
            " adapters need a teacher: give a config such as configs/scm.py, or set it to 0"
        )
    try:
        lora.kernels(jax.eval_shape(lambda: build.initial_parameters(config)))
    except ValueError as error:
        raise ConfigError(f"lora.{error}") from None


def check_evaluation(config: ConfigDict) -> None:
    """Checks what else would only fail when training is over."""
    world = worlds.of(config)
    if world.scored:
        try:
            scoring.held_out(config.evaluation.prompts)
        except ValueError as error:
            raise ConfigError(f"evaluation.{error}") from None
    elif config.evaluation.every:
        raise ConfigError(
            f"evaluation.every: {config.evaluation.every}, but pictures of world={config.world!r}"
            " are not scored; leave it 0 and look at the grids of samples.every"
        )
    channels = world.latent_channels
    if config.model.in_channels != channels:
        raise ConfigError(
            f"model.in_channels: {config.model.in_channels} cannot be drawn by the world's"
            f" autoencoder, whose packed latents have {channels} channels"
        )


def check_data(config: ConfigDict) -> None:
    """Checks the data against the network's shapes, the batch and the world's captions."""
    world, path = worlds.of(config), config.data.path
    widths = zip(("joint_attention_dim", "pooled_projection_dim"), world.text_widths)
    for key, width in widths:
        if config.model[key] != width:
            raise ConfigError(f"model.{key}: {config.model[key]} must be the captions' {width}")
    records = LatentRecords(Path(path)) if path else None
    if records is not None:
        tokens, channels = records[0].latents.shape
        if channels != config.model.in_channels:
            raise ConfigError(
                f"data.path: the latents in '{path}' have {channels} channels,"
                f" model.in_channels is {config.model.in_channels}; they must be equal"
            )
        if tokens != (wanted := build.token_shape(config)[0]):
            raise ConfigError(
                f"data.path: the pictures in '{path}' have {tokens} tokens, where"
                f" {world.resolution} pixels have {wanted}; set data.resolution to their size"
            )
    world.check(records)
    examples = config.data.examples if records is None else len(records)
    check_batches(config, ("batch_size",), examples, build.objective(config).rows_per_example)
    if config.objective.name not in FROM_SCRATCH:
        check_batches(config, ("rescale.batch_size",), examples)


def check_loss(config: ConfigDict, teacher: ConfigDict | None) -> None:
    """Traces each stage's loss, which finds what does not fit together in networks and batch."""
    build.objective(config)
    for stage in stages.of(config, teacher):
        try:
            for _, loss, arguments in build.abstract_losses(stage.config, stage.teacher):
                jax.eval_shape(loss, *arguments)
        except ValueError as error:
            raise ConfigError(f"{stage.name}: {error}") from None


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


def check_same_run(config: ConfigDict, workdir: Path) -> None:
    """As `resuming.check`."""
    resuming.check(config, workdir)
