"""Checks of a run before anything is written."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill import worlds
from jax_distill.assembly import adapters, build, draw_settings, resolution
from jax_distill.assembly.stages import Stage
from jax_distill.config import ConfigError
from jax_distill.config.settings import flatten
from jax_distill.data.loader import check_batch_size
from jax_distill.data.records import LatentRecords
from jax_distill.devices import sharding
from jax_distill.evaluation import scoring
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.objectives.methods import FROM_SCRATCH
from jax_distill.runs import resuming
from jax_distill.storage import buckets, paths
from jax_distill.training.step import make_optimizers


def check(config: ConfigDict, workdir: Path) -> None:
    """Checks a configuration, the folders it points to, and the workdir.

    Raises:
      ConfigError or ValueError: one sentence that names the key and the fix.
    """
    check_workdir(workdir)
    resolution.validate(config)
    name = config.objective.name
    check_objective(config)
    taught = name not in FROM_SCRATCH
    for section in ("teacher", "start") if taught else ():
        if resolution.absolute(config[section].checkpoint) == str(paths.absolute(workdir)):
            raise ConfigError(
                f"{section}.checkpoint: '{workdir}' is the run's own --workdir; give another"
            )
    resolved = resolution.resolve(config)
    config = resolved.config
    if name == "autoencoder":
        if worlds.of(config).pictures() is None:
            raise ConfigError(f"world: {config.world!r} has its autoencoder; none is trained there")
        AutoencoderConfig(**config.autoencoder)
        check_batches(config, ("batch_size",), config.data.examples)
    else:
        check_evaluation(config)
        check_data(config)
    check_lora(config)
    resuming.check(config, workdir)
    if name != "autoencoder":
        check_stages(resolved.stages)


def check_workdir(workdir: Path) -> None:
    """Checks that a workdir is a folder or does not exist yet; that its bucket is there.

    Raises:
      ConfigError: it is a file, or there is no such bucket.
    """
    if paths.is_bucket(workdir):
        try:
            buckets.check_bucket(workdir)
        except FileNotFoundError as error:
            raise ConfigError(f"--workdir: '{workdir}': {error}; make it or give another") from None
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir: '{workdir}' is a file; give a folder")


def check_objective(config: ConfigDict) -> None:
    """Checks an objective's settings, and those of others that it depends on."""
    configuration.check_objective(config.objective)
    try:
        method = build.without_networks(config)
        for words in method.check_run(config.dtype):
            logging.warning("objective.%s", words)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    used = {player.optimizer for player in method.players.values()} - {""}
    for name in config.optimizers:
        if name not in used:
            known = ", ".join(sorted(used)) or "none"
            raise ConfigError(
                f"optimizers.{name}: no player of {method.name!r} has it; known: {known}"
            )


def check_batches(
    config: ConfigDict, keys: Sequence[str], examples: int, rows_per_example: int = 1
) -> None:
    """Checks that batches divide among micro-batches and devices, and that the data fills them."""
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


def check_lora(config: ConfigDict) -> None:
    """Checks that adapters have a frozen teacher with projections to adapt."""
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
    """Checks the evaluation, which would otherwise fail after training."""
    world = worlds.of(config)
    try:
        for steps in config.evaluation.student_steps:
            draw_settings.steps(steps, config)
    except ValueError as error:
        raise ConfigError(f"evaluation.student_{error}") from None
    if world.scored:
        try:
            scoring.held_out(config.evaluation.prompts)
            if config.evaluation.diversity_prompts:
                scoring.held_out(config.evaluation.diversity_prompts, "diversity_prompts")
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
    """Checks the data against the network's shapes, the batch size and the world's captions."""
    world, path = worlds.of(config), config.data.path
    widths = zip(("joint_attention_dim", "pooled_projection_dim"), world.text_widths)
    for key, width in widths:
        if config.model[key] != width:
            raise ConfigError(f"model.{key}: {config.model[key]} must be the captions' {width}")
    records = LatentRecords(paths.path(path)) if path else None
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


def check_stages(every: Sequence[Stage]) -> None:
    """Counts each stage's turns, and traces its losses and optimizers.

    That finds players that there are not, networks and batches that do not fit together, and
    patterns of frozen parameters that match none, before the first stage is trained.
    """
    for stage in every:
        try:
            objective = build.objective(stage.config, stage.teacher)
            optimizers = make_optimizers(objective, stage.config)
            for name, loss, arguments in build.abstract_losses(stage.config, stage.teacher):
                jax.eval_shape(loss, *arguments)
                jax.eval_shape(optimizers[name].init, arguments[0])
        except ValueError as error:
            raise ConfigError(f"{stage.name}: {error}") from None
