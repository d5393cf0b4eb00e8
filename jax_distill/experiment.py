"""Runs: what happens, in which order, for a configuration."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from jax_distill import build, flow, pipeline, scoring, train
from jax_distill import config as configuration
from jax_distill.data import shapes
from jax_distill.data.encoding import encode_shapes
from jax_distill.data.pipeline import CaptionedLatents, Pictures
from jax_distill.data.records import DESCRIPTION, LatentRecords
from jax_distill.evaluation import grids
from jax_distill.files import write_json
from jax_distill.models import autoencoder, mmdit
from jax_distill.models.binding import binder, parameters
from jax_distill.models.latents import LatentCodec
from jax_distill.objectives import time_rescale
from jax_distill.objectives.autoencoder import AutoencoderObjective
from jax_distill.train import Interrupted

__all__ = ["Interrupted", "run"]


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains what `config` describes in `workdir`, or goes on with what is there."""
    if config.objective.name == "autoencoder":
        train_autoencoder(config, workdir)
    elif config.objective.name == "flow_matching":
        train_teacher(config, workdir)
    elif config.objective.name == "time_rescale":
        rescale_teacher(config, workdir)
    else:
        distill(config, workdir)


def train_autoencoder(config: ConfigDict, workdir: Path) -> None:
    """Trains the autoencoder and measures the scale and shift of its latents."""
    configuration.save(config, workdir)
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
    write_json(workdir / "autoencoder.json", measured.to_dict())


def latents_source(config: ConfigDict, workdir: Path) -> CaptionedLatents:
    """The training data: `data.path`, or the shapes world, encoded once into the workdir."""
    path = Path(config.data.path or workdir / "data")
    if not config.data.path and not (path / DESCRIPTION).exists():
        logging.info("encoding %d pictures into %s", config.data.examples, path)
        encode = build.embedded_codec().encode
        encode_shapes(path, config.data.examples, config.data.seed, encode)
    return CaptionedLatents(LatentRecords(path), build.caption_encoder(config))


def train_teacher(config: ConfigDict, workdir: Path) -> None:
    """Trains a network from scratch by flow matching, and scores it."""
    configuration.save(config, workdir)
    objective = build.objective(config)
    initial = build.initial_parameters(config)
    source = latents_source(config, workdir)
    frozen = {"null": build.null_text(config)}
    preview = previewer(config, workdir, {"teacher": config.evaluation.teacher_steps})
    hooks = [(config.samples.every, preview)]
    params = train.fit(config, workdir, objective, initial, frozen, source, hooks=hooks)
    preview(config.total_steps, params)
    scoring.conclude(workdir, teacher=pipeline.Pipeline(config, params, build.embedded_codec()))


def rescale_teacher(config: ConfigDict, workdir: Path) -> None:
    """Time rescale as a run of its own: a teacher for many students."""
    teacher = pipeline.load(config.teacher.checkpoint or pipeline.EMBEDDED)
    config = student_config(config, teacher.config)
    rescaled = rescale(config, workdir, teacher, latents_source(config, workdir))
    scoring.conclude(workdir, teacher=rescaled)


def distill(config: ConfigDict, workdir: Path) -> None:
    """Makes a few-step student of a teacher: time rescale, the objective, and the evaluation."""
    teacher = pipeline.load(config.teacher.checkpoint or pipeline.EMBEDDED)
    config = student_config(config, teacher.config)
    configuration.save(config, workdir)
    source = latents_source(config, workdir)
    origin = start = teacher
    if needs_rescale(config, teacher.config):
        start = rescale(rescale_config(config), workdir / "time_rescale", teacher, source)
        if config.teacher.velocity == "rescaled":
            origin = start
    initial = rescaled_parameters(config, start.config, start.params["network"])
    objective = build.objective(config, origin.config)
    frozen = {"teacher": origin.params["network"], "null": origin.null}
    counts = {"student": config.evaluation.student_steps}
    preview = previewer(config, workdir, counts, teacher)
    student = pipeline.Pipeline(config, {}, teacher.codec)
    hooks = [
        (config.samples.every, preview),
        (config.evaluation.every, scoring.recorder(workdir / scoring.SCORES, student)),
    ]
    student.params = train.fit(config, workdir, objective, initial, frozen, source, hooks=hooks)
    preview(config.total_steps, student.params)
    scoring.conclude(workdir, teacher=teacher, student=student)


def rescale(
    config: ConfigDict, workdir: Path, teacher: pipeline.Pipeline, source: CaptionedLatents
) -> pipeline.Pipeline:
    """The teacher with the student's inputs: t for 1000 t, and the guidance scale embedded."""
    configuration.save(config, workdir)
    original = teacher.params["network"]
    initial = rescaled_parameters(config, teacher.config, original)
    objective = build.objective(config, teacher.config)
    frozen = {"teacher": original, "null": teacher.null}
    params = train.fit(config, workdir, objective, initial, frozen, source)
    if not (workdir / "rescale.json").exists():
        unfitted = {**initial, "time_embedder": original["time_embedder"]}
        stages = {"unfitted": unfitted, "refitted": initial, "finetuned": params["network"]}
        compare_stages(workdir / "rescale.json", config, teacher, stages, source)
    return pipeline.Pipeline(config, params, teacher.codec)


def compare_stages(
    path: Path,
    config: ConfigDict,
    teacher: pipeline.Pipeline,
    stages: dict[str, dict],
    source: CaptionedLatents,
) -> None:
    """Writes how near each stage of the rescale is to the teacher, and how smooth in time."""
    batch = jax.tree.map(lambda *rows: np.stack(rows), *[source[index] for index in range(64)])
    t = jnp.linspace(0.01, 0.99, 64)
    noise = jax.random.normal(jax.random.key(config.seed), batch.x.shape)
    guidance = jnp.full(64, config.evaluation.guidance)
    frozen = {"teacher": teacher.params["network"], "null": teacher.null}
    old = build.teacher_velocity(teacher.config)
    network = build.network(config)

    @jax.jit
    def measure(params):
        return time_rescale.compare(
            lambda x, t: network.velocity(params, x, t, batch.text, guidance),
            lambda x, t: old(frozen, x, t, batch.text, guidance),
            flow.interpolate(batch.x, noise, t),
            t,
        )

    report = {}
    for name, params in stages.items():
        values = {key: float(value) for key, value in measure(params)._asdict().items()}
        report[name] = values
        logging.info(
            "time rescale, %s: relative velocity error %.3f, rms d(net)/dt %.3g (teacher's %.3g)",
            name,
            values["velocity_error"],
            values["time_derivative"],
            values["old_time_derivative"],
        )
    write_json(path, report)


def previewer(
    config: ConfigDict,
    workdir: Path,
    steps: dict[str, Sequence[int]],
    teacher: pipeline.Pipeline | None = None,
):
    """A function (step, averaged parameters) that draws fixed prompts into `samples/`.

    Args:
      config: of the run.
      workdir: of the run.
      steps: numbers of sampling steps, a row each, under the name of what is trained.
      teacher: draws the first row, once.
    """
    prompts = [prompt.caption for prompt in scoring.spread(config.samples.prompts)]
    full = config.samples.teacher_steps
    reference = functools.cache(lambda: teacher(prompts, steps=full))
    ((name, counts),) = steps.items()
    trained = pipeline.Pipeline(config, {}, build.embedded_codec())

    def preview(step: int, params: dict) -> None:
        trained.params = params
        rows = {f"{name}, {count} step{'s' * (count > 1)}": count for count in counts}
        pictures = [trained(prompts, steps=count) for count in rows.values()]
        labels = list(rows)
        if teacher is not None:
            pictures, labels = [reference(), *pictures], [f"teacher, {full} steps", *labels]
        grids.save_grid(
            workdir / "samples" / f"step-{step:06d}.png",
            pictures,
            row_labels=labels,
            column_labels=prompts,
            title=f"{config.name}, step {step}",
        )

    return preview


def student_config(config: ConfigDict, teacher: ConfigDict) -> ConfigDict:
    """The configuration with the student's whole network: the teacher's, and what differs."""
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        resolved.model = {**teacher.model, **config.model}
        resolved.data.text_length = teacher.data.text_length
    return resolved


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
        stage.optimizer.learning_rate = config.rescale.learning_rate
        stage.optimizer.schedule = "cosine"
        stage.optimizer.warmup_steps = config.rescale.total_steps // 10
        stage.optimizer.frozen = "time_embedder"  # refitted; see `refit_time_embedder`
    return stage


def needs_rescale(config: ConfigDict, teacher: ConfigDict) -> bool:
    """Whether the student's network takes its time or its guidance in another way."""
    inputs = ("time_scale", "guidance_embeds")
    return any(config.model[name] != teacher.model[name] for name in inputs)


def rescaled_parameters(config: ConfigDict, teacher: ConfigDict, params: dict) -> dict:
    """The teacher's parameters in the student's network, its time embedder refitted.

    Embedders that the teacher does not have start as they are initialised: adding nothing.
    """
    merged = {**build.initial_parameters(config), **params}
    old, new = build.network_config(teacher), build.network_config(config)
    if old.time_scale != new.time_scale:
        merged["time_embedder"] = time_rescale.refit_time_embedder(
            lambda t: mmdit.time_embedding(old, params["time_embedder"], t), new.hidden_size
        )
    return merged
