"""Runs: what happens, in which order, for a configuration."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from jax_distill import build, prepare, train
from jax_distill import config as configuration
from jax_distill.data import shapes
from jax_distill.data.pipeline import CaptionedLatents, Pictures
from jax_distill.data.records import DESCRIPTION, LatentRecords
from jax_distill.models import autoencoder
from jax_distill.models.binding import binder, parameters
from jax_distill.models.latents import LatentCodec
from jax_distill.objectives.autoencoder import AutoencoderObjective


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains what `config` describes in `workdir`, or goes on with what is there."""
    workdir.mkdir(parents=True, exist_ok=True)
    configuration.save(config, workdir / "config.json")
    if config.objective.name == "autoencoder":
        train_autoencoder(config, workdir)
    else:
        train_teacher(config, workdir)


def train_autoencoder(config: ConfigDict, workdir: Path) -> None:
    """Trains the autoencoder and measures the scale and shift of its latents."""
    settings = autoencoder.AutoencoderConfig(**config.autoencoder)
    size = shapes.IMAGE_SIZE // settings.downsampling
    bind = binder(lambda: autoencoder.Autoencoder(settings, rngs=nnx.Rngs(0)))
    objective = AutoencoderObjective(
        encode=lambda params, images: tuple(bind(params).encode(images)),
        decode=lambda params, latents: bind(params).decode(latents),
        latent_shape=(size, size, settings.latent_channels),
        kl_weight=config.objective.kl_weight,
        l1_weight=config.objective.l1_weight,
    )
    params = parameters(autoencoder.Autoencoder(settings, rngs=nnx.Rngs(config.seed)))
    source = Pictures(config.data.examples, config.data.seed)
    params = train.fit(config, workdir, objective, params, {}, source)

    raw = dataclasses.replace(settings, scaling_factor=1.0, shift_factor=0.0)
    codec = LatentCodec(raw, params)
    pictures = np.stack([shapes.sample(config.data.seed, i).image for i in range(1024)])
    latents = np.concatenate([codec.encode(part) for part in np.split(pictures, 16)])
    measured = dataclasses.replace(
        settings,
        scaling_factor=float(1 / latents.std()),
        shift_factor=float(latents.mean()),
    )
    (workdir / "autoencoder.json").write_text(json.dumps(measured.to_dict(), indent=2) + "\n")


def latents_source(config: ConfigDict, workdir: Path) -> CaptionedLatents:
    """The training data: `data.path`, or the shapes world, encoded once into the workdir."""
    path = Path(config.data.path or workdir / "data")
    if not config.data.path and not (path / DESCRIPTION).exists():
        logging.info("encoding %d pictures into %s", config.data.examples, path)
        codec = build.embedded_codec()
        prepare.prepare_shapes(path, config.data.examples, config.data.seed, codec)
    return CaptionedLatents(LatentRecords(path), build.caption_encoder(config))


def train_teacher(config: ConfigDict, workdir: Path) -> None:
    objective = build.objective(config)
    params = build.initial_parameters(config)
    source = latents_source(config, workdir)
    train.fit(config, workdir, objective, params, {"null": build.null_text(config)}, source)
