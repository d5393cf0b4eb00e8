"""Checks of a run before anything is written."""

import itertools
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
from jax_distill.data import folders, mixture
from jax_distill.data.damaged import share_of
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
        if config.data.caption_dropout:
            raise ConfigError(
                f"data.caption_dropout: {config.data.caption_dropout:g}, but the autoencoder learns"
                " from pictures alone; leave it 0"
            )
        check_batches(config, ("batch_size",), config.data.examples)
    else:
        check_evaluation(config)
        check_data(config)
    check_lora(config)
    resuming.check(config, workdir)
    if name != "autoencoder":
        check_stages(resolved.stages, folders.resolutions(config.data.path) or [None])


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
    world = worlds.of(config)
    widths = zip(("joint_attention_dim", "pooled_projection_dim"), world.text_widths)
    for key, width in widths:
        if config.model[key] != width:
            raise ConfigError(f"model.{key}: {config.model[key]} must be the captions' {width}")
    examples = config.data.examples
    if config.data.path:
        examples = check_folders(config, world)
    else:
        world.check(None)
    check_batches(config, ("batch_size",), examples, build.objective(config).rows_per_example)
    if config.objective.name not in FROM_SCRATCH:
        check_batches(config, ("rescale.batch_size",), examples)


def check_folders(config: ConfigDict, world: worlds.World) -> int:
    """Checks the folders of `data.path`; returns the examples of the size that has the fewest."""
    try:
        weighed = folders.weighed(config.data.path, config.data.weights)
        mixture.rounds([weight for _, weight in weighed])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    counts: dict[tuple[int, ...], int] = {}
    for folder, _ in weighed:
        records = LatentRecords(paths.path(folder), share_of(config.data))
        check_folder(config, world, records, folder, first=folder == weighed[0][0])
        world.check(records, folder)
        size = folders.resolution_of(records.description) or world.resolution
        counts[size] = counts.get(size, 0) + len(records)
    return min(counts.values())


def check_folder(
    config: ConfigDict, world: worlds.World, records: LatentRecords, folder: str, *, first: bool
) -> None:
    """Checks the pictures of a folder against the network, the world and the run's resolution."""
    name = worlds.name(config)
    if (theirs := records.description.get("world", name)) != name:
        raise ConfigError(
            f"data.path: '{folder}' is of world={theirs!r}, the run of world={name!r}; prepare"
            " pictures for that"
        )
    tokens, channels = records.latents_shape
    if channels != config.model.in_channels:
        raise ConfigError(
            f"data.path: the latents in '{folder}' have {channels} channels, model.in_channels is"
            f" {config.model.in_channels}; they must be equal"
        )
    size, fix = world.resolution, "set data.resolution to their size"
    if not first:
        size, fix = folders.resolution_of(records.description) or size, "make the folder again"
    try:
        wanted = build.token_shape(config, size)[0]
    except ValueError as error:
        raise ConfigError(f"data.path: the pictures in '{folder}' have a {error}") from None
    if tokens != wanted:
        raise ConfigError(
            f"data.path: the pictures in '{folder}' have {tokens} tokens, where {size} pixels have"
            f" {wanted}; {fix}"
        )


def check_stages(
    every: Sequence[Stage], resolutions: Sequence[tuple[int, int] | None] = (None,)
) -> None:
    """Counts each stage's turns, and traces its losses, for each size of pictures, and optimizers.

    That finds players that there are not, networks and batches that do not fit together, and
    patterns of frozen parameters that match none, before the first stage is trained.
    """
    for stage, size in itertools.product(every, resolutions):
        try:
            objective = build.objective(stage.config, stage.teacher, resolution=size)
            optimizers = make_optimizers(objective, stage.config)
            for name, loss, arguments in build.abstract_losses(
                stage.config, stage.teacher, resolution=size
            ):
                jax.eval_shape(loss, *arguments)
                jax.eval_shape(optimizers[name].init, arguments[0])
        except ValueError as error:
            raise ConfigError(f"{stage.name}: {error}") from None
