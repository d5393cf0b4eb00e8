"""Runs: what happens, in which order, for a configuration."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill import pipeline, streams, worlds
from jax_distill.assembly import adapters, build, stages
from jax_distill.assembly.frozen import frozen_network
from jax_distill.assembly.resolution import EMBEDDED, Resolved, resolve
from jax_distill.data.mixture import Mixture
from jax_distill.devices import processes, sharding
from jax_distill.devices.signals import Interrupted
from jax_distill.evaluation import previews, report, scoring
from jax_distill.evaluation import rescaled as rescaled_networks
from jax_distill.models import autoencoder, lora
from jax_distill.models.binding import binder, parameters
from jax_distill.models.latents import LatentCodec
from jax_distill.objectives.autoencoder import AutoencoderObjective
from jax_distill.storage import lease, paths
from jax_distill.storage.files import write_json
from jax_distill.training import acceptance, checkpoint, loop
from jax_distill.worlds import World
from jax_distill.worlds.shapes import renderer

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
    """Writes the configuration of a new run; `loop.fit` accepts that of one that goes on.

    Raises:
      ValueError: not all processes of the run see it there.
    """
    path = workdir / "config.json"
    if processes.is_leader() and not path.exists():
        acceptance.note_data(config, workdir)
        configuration.save(config, workdir)
    processes.wait("configuration written")
    if not path.exists():
        raise ValueError(
            f"--workdir: process {jax.process_index()} does not see what process 0 writes into"
            f" '{workdir}'; give a folder that all hosts share"
        )


def data(world: World, workdir: Path) -> Mixture:
    """The data of a run, which one process makes where it must be made."""
    return processes.leader_first(lambda: world.source(workdir), "data made")


def train_autoencoder(config: ConfigDict, workdir: Path) -> None:
    """Trains the autoencoder and measures the scale and shift of its latents."""
    begin(config, workdir)
    settings = autoencoder.AutoencoderConfig(**config.autoencoder)
    size = renderer.IMAGE_SIZE // settings.downsampling
    bind = binder(lambda: autoencoder.Autoencoder(settings, rngs=nnx.Rngs(0)))
    objective = AutoencoderObjective(
        encode=lambda params, images: tuple(bind(params).encode(images)),
        decode=lambda params, latents: bind(params).decode(latents),
        latent_shape=(size, size, settings.latent_channels),
        kl_weight=config.objective.kl_weight,
        l1_weight=config.objective.l1_weight,
    )
    params = parameters(autoencoder.Autoencoder(settings, rngs=nnx.Rngs(streams.key(config.seed))))
    source = worlds.of(config).pictures()
    params = sharding.gather(loop.fit(config, workdir, objective, params, {}, source))
    if not processes.is_leader():
        return
    raw = dataclasses.replace(settings, scaling_factor=1.0, shift_factor=0.0)
    codec = LatentCodec(raw, params)
    pictures = np.stack([renderer.sample(config.data.seed, i).image for i in range(1024)])
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
    source = data(world, workdir)
    objectives = build.objectives(config, None, source.resolutions)
    held = {"null": source.null}
    trained = pipeline.Pipeline(config, {}, world)
    preview = previews.previewer(
        workdir, trained, source.first, {"teacher": config.evaluation.teacher_steps}
    )
    hooks = [(config.samples.every, previews.under_way(preview))]
    fresh = functools.partial(build.initial_parameters, config)
    initial = loop.Initial(jax.eval_shape(fresh), fresh)
    trained.params = loop.fit(
        config, workdir, objectives, initial, held, source, hooks=hooks, embedder=source.embedder
    )
    preview(config.total_steps, trained.params)
    conclude(workdir, teacher=trained)


def rescale_teacher(config: ConfigDict, workdir: Path) -> None:
    """Time rescale as a run of its own: a teacher for many students."""
    (config, _, (stage,)), teacher = with_teacher(config)
    source = data(teacher.world, workdir)
    rescaled = rescale(stage, workdir, teacher, source)
    counts = {"rescaled": config.evaluation.teacher_steps}
    reference = previews.reference_row(teacher, source.first, config.samples)
    previews.previewer(workdir, rescaled, source.first, counts, reference)(
        config.total_steps, rescaled.params
    )
    conclude(workdir, teacher=rescaled)


def distill(config: ConfigDict, workdir: Path) -> None:
    """Makes a few-step student of a teacher: time rescale, the objective, and the evaluation.

    A student that starts from another run's needs no time rescale.

    While the student is trained, nothing is held of teacher and rescaled network but what its loss
    reads (and the teacher's embedders, where adapters learn from the rescaled network); what is
    needed before and after is read again.
    """
    (config, _, (*before, stage)), teacher = with_teacher(config)
    begin(config, workdir)
    adapters.check_teacher(config, workdir, teacher.params["network"], note=True)
    world = teacher.world
    source = data(world, workdir)
    reference = previews.reference_row(teacher, source.first, config.samples)
    read, network = stored_network(config, teacher), teacher.params["network"]
    if config.start.checkpoint:
        read = started_network(config, teacher)
    if before:
        with lease.of_run(workdir / "time_rescale"):
            rescaled = rescale(before[0], workdir / "time_rescale", teacher, source)
        read = rescaled.taken
        if config.teacher.velocity == "rescaled":
            reference()
            network = frozen_network(config, read(), mesh_of(config), adapted=stage.adapted)
            if adapters.settings(config) is None:  # else its arrays are the adapters' base
                teacher.release()
    whole = functools.partial(adapters.whole, config, network)
    counts = {"student": config.evaluation.student_steps}
    student = pipeline.Pipeline(config, {}, world)
    preview = previews.previewer(workdir, student, source.first, counts, reference)
    hooks = [(config.samples.every, preview)]
    if world.scored:
        record = scoring.recorder(workdir / scoring.SCORES, student)
        hooks.append((config.evaluation.every, record))
    hooks = [(every, previews.under_way(of_whole(hook, whole))) for every, hook in hooks]
    objectives = build.objectives(config, stage.teacher, source.resolutions)
    held = {"teacher": network, "null": source.null}
    initial = initial_of(stage, read)
    trained = loop.fit(
        config, workdir, objectives, initial, held, source, hooks=hooks, embedder=source.embedder
    )
    student.params = whole(trained)
    preview(config.total_steps, student.params)
    conclude(workdir, teacher=teacher, student=student)


def with_teacher(config: ConfigDict) -> tuple[Resolved, pipeline.Pipeline]:
    """The run's configuration, resolved, and the teacher as the student's run holds it.

    The teacher is in the student's world and precision, frozen, on the mesh of the run; it can be
    released and is then read again where it is needed.
    """
    mesh = mesh_of(config)
    loaded = pipeline.load(config.teacher.checkpoint or EMBEDDED, mesh=mesh)
    resolved = resolve(config, loaded.config)

    def read() -> dict:
        return {"network": frozen_network(resolved.config, loaded.taken(), mesh)}

    teacher = pipeline.Pipeline(resolved.teacher, read, worlds.of(resolved.config))
    kind, asked = build.guidance_of(teacher.config), config.teacher.guidance
    how = f"teacher.guidance={asked}" if asked != "auto" else f"auto: {kind}"
    logging.info("teacher: %s (%s)", build.GUIDANCE[kind], how)
    return resolved, teacher


def mesh_of(config: ConfigDict) -> Mesh:
    """The mesh that a run trains on."""
    return sharding.make_mesh(config.mesh)


def initial_of(stage: stages.Stage, read: Callable[[], dict]) -> loop.Initial:
    """The start of a stage: the network that `read` gives, which is called where it begins."""
    fresh = functools.partial(build.initial_parameters, stage.config)
    return loop.Initial(jax.eval_shape(fresh), lambda: stages.initial_network(stage, read()))


def stored_network(config: ConfigDict, teacher: pipeline.Pipeline) -> Callable[[], dict]:
    """A function that gives the teacher's parameters, none of them narrowed.

    They are those that the run holds, where that is as wide as they are stored, or where only
    adapters are trained: these start from embedders alone, which are held as they are stored.
    Otherwise they are read anew.
    """

    def read() -> dict:
        if config.dtype == "float32" or adapters.settings(config) is not None:
            return teacher.params["network"]
        source = config.teacher.checkpoint or EMBEDDED
        return lora.merged(pipeline.load(source, mesh=mesh_of(config)).params["network"])

    return read


def started_network(config: ConfigDict, teacher: pipeline.Pipeline) -> Callable[[], dict]:
    """A function that reads the averaged student that `start.checkpoint` has."""
    folder = paths.path(config.start.checkpoint)
    adapters.check_teacher(config, folder, teacher.params["network"])

    def read() -> dict:
        logging.info("student: starts from the one in '%s'", folder)
        average = checkpoint.load_averaged(folder, mesh_of(config))
        return adapters.whole(config, teacher.params["network"], average)["network"]

    return read


def conclude(
    workdir: Path, *, teacher: pipeline.Pipeline, student: pipeline.Pipeline | None = None
) -> None:
    """Scores what was trained, in a world that is scored, and writes the report."""
    if teacher.world.scored:
        scoring.conclude(workdir, teacher=teacher, student=student)
    elif processes.is_leader():
        print(f"report: {report.write_report(workdir)}")


def rescale(
    stage: stages.Stage, workdir: Path, teacher: pipeline.Pipeline, source: Mixture
) -> pipeline.Pipeline:
    """The teacher with the student's inputs: t for 1000 t, and the guidance scale embedded."""
    config = stage.config
    begin(config, workdir)
    adapters.check_teacher(config, workdir, teacher.params["network"], note=True)
    initial = initial_of(stage, stored_network(config, teacher))
    objectives = build.objectives(config, stage.teacher, source.resolutions)
    held = {"teacher": teacher.params["network"], "null": source.null}
    loop.fit(config, workdir, objectives, initial, held, source, embedder=source.embedder)

    def read() -> dict:
        average = checkpoint.load_averaged(workdir, mesh_of(config))
        if adapters.settings(config) is None:
            return average
        return adapters.whole(config, teacher.params["network"], average)

    rescaled = pipeline.Pipeline(config, read, teacher.world)
    if processes.agreed(not (workdir / "rescale.json").exists()):
        refitted = initial.make()
        quality = stages.qualities(stage, teacher.params["network"], refitted)
        old = jax.tree.map(  # of the types of the new one: all stages but the last compile as one
            lambda leaf, like: jnp.asarray(leaf, like.dtype),
            teacher.params["network"]["time_embedder"],
            refitted["time_embedder"],
        )
        networks = {
            "unfitted": {**refitted, "time_embedder": old},
            "refitted": refitted,
            "finetuned": rescaled.params["network"],
        }
        compared = rescaled_networks.compare(config, teacher, networks, source.first)
        for name, (error, condition) in quality.items():
            logging.info(
                "%s: refitted with an error of %.3f of its variation, condition %.1f",
                name,
                error,
                condition,
            )
            values = {f"{name}_error": error, f"{name}_condition": condition}
            compared["refitted"] |= values
        if processes.is_leader():
            write_json(workdir / "rescale.json", compared)
    return rescaled


def of_whole(hook: Callable[[int, dict], None], whole: Callable[[dict], dict]):
    """A hook of training, given whole parameters."""
    return lambda step, params: hook(step, whole(params))
