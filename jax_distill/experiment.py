"""Runs: what happens, in which order, for a configuration."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from jax_distill import (
    adapters,
    build,
    flow,
    parallel,
    pipeline,
    processes,
    scoring,
    train,
    worlds,
)
from jax_distill import config as configuration
from jax_distill.data import shapes
from jax_distill.data.pipeline import Pictures
from jax_distill.evaluation import grids, report
from jax_distill.files import write_json
from jax_distill.models import autoencoder, lora, mmdit
from jax_distill.models.binding import binder, parameters
from jax_distill.models.latents import LatentCodec
from jax_distill.objectives import time_rescale
from jax_distill.objectives.autoencoder import AutoencoderObjective
from jax_distill.pipeline import held
from jax_distill.train import Interrupted
from jax_distill.worlds import Source, World

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


def begin(config: ConfigDict, workdir: Path) -> None:
    """Writes the configuration into the workdir.

    Raises:
      ValueError: not all processes of the run see it there.
    """
    if processes.is_leader():
        configuration.save(config, workdir)
    processes.wait("configuration written")
    if not (workdir / "config.json").exists():
        raise ValueError(
            f"--workdir: process {jax.process_index()} does not see what process 0 writes into"
            f" '{workdir}'; give a folder that all hosts share"
        )


def data(world: World, workdir: Path) -> Source:
    """The data of a run, which one process makes where it must be made."""
    return processes.leader_first(lambda: world.source(workdir), "data made")


def train_autoencoder(config: ConfigDict, workdir: Path) -> None:
    """Trains the autoencoder and measures the scale and shift of its latents."""
    begin(config, workdir)
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
    params = parallel.gather(train.fit(config, workdir, objective, params, {}, source))
    if not processes.is_leader():
        return
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


def train_teacher(config: ConfigDict, workdir: Path) -> None:
    """Trains a network from scratch by flow matching, and evaluates it."""
    begin(config, workdir)
    world = worlds.of(config)
    objective = build.objective(config)
    initial = build.initial_parameters(config)
    source = data(world, workdir)
    frozen = {"null": source.null}
    trained = pipeline.Pipeline(config, {}, world)
    preview = previewer(workdir, trained, source, {"teacher": config.evaluation.teacher_steps})
    hooks = [(config.samples.every, preview)]
    trained.params = train.fit(config, workdir, objective, initial, frozen, source, hooks=hooks)
    preview(config.total_steps, trained.params)
    conclude(workdir, teacher=trained)


def rescale_teacher(config: ConfigDict, workdir: Path) -> None:
    """Time rescale as a run of its own: a teacher for many students."""
    config, teacher = with_teacher(config)
    source = data(teacher.world, workdir)
    rescaled = rescale(config, workdir, teacher, source)
    counts = {"rescaled": config.evaluation.teacher_steps}
    previewer(workdir, rescaled, source, counts, teacher)(config.total_steps, rescaled.params)
    conclude(workdir, teacher=rescaled)


def distill(config: ConfigDict, workdir: Path) -> None:
    """Makes a few-step student of a teacher: time rescale, the objective, and the evaluation."""
    config, teacher = with_teacher(config)
    begin(config, workdir)
    adapters.check_teacher(config, workdir, teacher.params["network"], note=True)
    world = teacher.world
    source = data(world, workdir)
    origin = start = teacher
    if needs_rescale(config, teacher.config):
        start = rescale(rescale_config(config), workdir / "time_rescale", teacher, source)
        if config.teacher.velocity == "rescaled":
            origin = start
    initial = rescaled_parameters(config, start.config, start.params["network"])
    objective = build.objective(config, origin.config)
    frozen = {"teacher": origin.params["network"], "null": source.null}
    whole = functools.partial(adapters.whole, config, frozen["teacher"])
    counts = {"student": config.evaluation.student_steps}
    student = pipeline.Pipeline(config, {}, world)
    preview = previewer(workdir, student, source, counts, teacher)
    hooks = [(config.samples.every, preview)]
    if world.scored:
        record = scoring.recorder(workdir / scoring.SCORES, student)
        hooks.append((config.evaluation.every, record))
    hooks = [(every, of_whole(hook, whole)) for every, hook in hooks]
    trained = train.fit(config, workdir, objective, initial, frozen, source, hooks=hooks)
    student.params = whole(trained)
    preview(config.total_steps, student.params)
    conclude(workdir, teacher=teacher, student=student)


def with_teacher(config: ConfigDict) -> tuple[ConfigDict, pipeline.Pipeline]:
    """The student's whole configuration, and the teacher, in the student's world and precision."""
    mesh = parallel.make_mesh(config.mesh)
    teacher = pipeline.load(config.teacher.checkpoint or pipeline.EMBEDDED, mesh=mesh)
    config = student_config(config, teacher.config)
    settings = teacher.config.copy_and_resolve_references()
    with settings.unlocked():
        settings.dtype = config.dtype
    params = {**teacher.params, "network": lora.merged(teacher.params["network"])}
    params = held(params, config.dtype)
    params["network"] = adapters.held(config, params["network"])
    return config, pipeline.Pipeline(settings, params, worlds.of(config))


def conclude(
    workdir: Path, *, teacher: pipeline.Pipeline, student: pipeline.Pipeline | None = None
) -> None:
    """Scores what was trained, in a world that is scored, and writes the report."""
    if teacher.world.scored:
        scoring.conclude(workdir, teacher=teacher, student=student)
    elif processes.is_leader():
        print(f"report: {report.write_report(workdir)}")


def rescale(
    config: ConfigDict, workdir: Path, teacher: pipeline.Pipeline, source: Source
) -> pipeline.Pipeline:
    """The teacher with the student's inputs: t for 1000 t, and the guidance scale embedded."""
    begin(config, workdir)
    original = teacher.params["network"]
    adapters.check_teacher(config, workdir, original, note=True)
    initial = rescaled_parameters(config, teacher.config, original)
    objective = build.objective(config, teacher.config)
    frozen = {"teacher": original, "null": source.null}
    params = train.fit(config, workdir, objective, initial, frozen, source)
    params = adapters.whole(config, original, params)
    if processes.agreed(not (workdir / "rescale.json").exists()):
        old = jax.tree.map(  # of the types of the new one: all stages but the last compile as one
            lambda leaf, like: jnp.asarray(leaf, like.dtype),
            original["time_embedder"],
            initial["time_embedder"],
        )
        unfitted = {**initial, "time_embedder": old}
        stages = {"unfitted": unfitted, "refitted": initial, "finetuned": params["network"]}
        compare_stages(workdir / "rescale.json", config, teacher, stages, source)
    return pipeline.Pipeline(config, held(params, config.dtype), teacher.world)


def compare_stages(
    path: Path,
    config: ConfigDict,
    teacher: pipeline.Pipeline,
    stages: dict[str, dict],
    source: Source,
) -> None:
    """Writes how near each stage of the rescale is to the teacher, and how smooth in time."""
    # About 64 pictures, no more on a device than a step of training has there.
    mesh = parallel.make_mesh(config.mesh)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    most = config.batch_size // config.accumulate
    count = min(most, len(source) // devices * devices, max(devices, 64 // devices * devices))
    batch = jax.tree.map(lambda *rows: np.stack(rows), *[source[index] for index in range(count)])
    t = jnp.linspace(0.01, 0.99, count)
    noise = jax.random.normal(jax.random.key(config.seed), batch.x.shape)
    guidance = jnp.full(count, config.evaluation.guidance)
    split = NamedSharding(mesh, parallel.BATCH)
    points = parallel.put((batch, noise, t, guidance), split)
    frozen = {"teacher": teacher.params["network"], "null": source.null}
    old = build.teacher_velocity(teacher.config, worlds.of(config).resolution)
    network = build.network(config)

    @jax.jit
    def measure(params, frozen, batch, noise, t, guidance):
        return time_rescale.compare(
            lambda x, t: network.velocity(params, x, t, batch.text, guidance),
            lambda x, t: old(frozen, x, t, batch.text, guidance),
            flow.interpolate(batch.x, noise, t),
            t,
        )

    stage_values = {}
    for name, params in stages.items():
        measured = measure(params, frozen, *points)
        values = {key: float(value) for key, value in measured._asdict().items()}
        stage_values[name] = values
        logging.info(
            "time rescale, %s: relative velocity error %.3f, rms d(net)/dt %.3g (teacher's %.3g)",
            name,
            values["velocity_error"],
            values["time_derivative"],
            values["old_time_derivative"],
        )
    if processes.is_leader():
        write_json(path, stage_values)


def previewer(
    workdir: Path,
    trained: pipeline.Pipeline,
    source: Source,
    steps: dict[str, Sequence[int]],
    teacher: pipeline.Pipeline | None = None,
):
    """A function (step, averaged parameters) that draws fixed prompts into `samples/`.

    Args:
      workdir: of the run.
      trained: what is trained; its parameters are set.
      source: the data.
      steps: numbers of sampling steps, a row each, under the name of what is trained.
      teacher: draws the first row, once.
    """
    config, world = trained.config, trained.world
    full = config.samples.teacher_steps
    prompts, text = world.preview(source, config.samples.prompts)
    draw = functools.partial(pipeline.Pipeline.draw, text=text, resolution=world.resolution)
    reference = functools.cache(lambda: draw(teacher, steps=full))
    ((name, counts),) = steps.items()

    def preview(step: int, params: dict) -> None:
        trained.params = params
        rows = {f"{name}, {count} step{'s' * (count > 1)}": count for count in counts}
        pictures = [draw(trained, steps=count) for count in rows.values()]
        labels = list(rows)
        if teacher is not None:
            pictures, labels = [reference(), *pictures], [f"teacher, {full} steps", *labels]
        if not processes.is_leader():
            return
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
        resolved.teacher.checkpoint = pipeline.absolute(config.teacher.checkpoint)
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
        # Refitted, see `refit_time_embedder`; and what the student keeps as it is.
        frozen = {"time_embedder", config.optimizer.frozen} - {""}
        stage.optimizer.frozen = "|".join(sorted(frozen))
    return stage


def needs_rescale(config: ConfigDict, teacher: ConfigDict) -> bool:
    """Whether the student's network takes its time or its guidance in another way."""
    inputs = ("time_scale", "guidance_embeds")
    return any(config.model[name] != teacher.model[name] for name in inputs)


def rescaled_parameters(config: ConfigDict, teacher: ConfigDict, params: dict) -> dict:
    """The teacher's parameters in the student's network, its time embedder refitted.

    Embedders that the teacher does not have start as they are initialised: adding nothing. All else
    is the teacher's own arrays, no copies.
    """

    def fresh() -> dict:
        created = build.initial_parameters(config)
        return {name: leaf for name, leaf in created.items() if name not in params}

    merged = {**jax.jit(fresh)(), **params}
    old, new = build.network_config(teacher), build.network_config(config)
    if old.time_scale != new.time_scale:
        embedder = parallel.gather(params["time_embedder"])
        merged["time_embedder"] = time_rescale.refit_time_embedder(
            lambda t: mmdit.time_embedding(old, embedder, t), new.hidden_size
        )
    return merged


def of_whole(hook: Callable[[int, dict], None], whole: Callable[[dict], dict]):
    """A hook of training, given whole parameters."""
    return lambda step, params: hook(step, whole(params))
