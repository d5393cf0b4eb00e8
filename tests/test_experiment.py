"""Runs: which stages a distillation has, and what each starts from."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from test_pipeline import tiny_config

from jax_distill import pipeline
from jax_distill.assembly import build, stages
from jax_distill.assembly.resolution import resolve
from jax_distill.data.mixture import Mixture, Part
from jax_distill.flow import Batch
from jax_distill.models import mmdit
from jax_distill.objectives.scm import SCM
from jax_distill.objectives.time_rescale import TimeRescale
from jax_distill.runs import experiment
from jax_distill.training import checkpoint, loop, rounding
from jax_distill.training.optimizer import trained
from jax_distill.worlds.shapes.world import Shapes


class Ran(NamedTuple):
    """A stage that was run."""

    objective: Any
    initial: dict
    frozen: dict
    workdir: Path


@pytest.fixture
def distil(monkeypatch, tmp_path):
    """Distils with a training that adds one to every parameter; returns the stages it ran."""

    def distil(config, teacher_config):
        network = build.initial_parameters(teacher_config)
        ran, saved = [], {}

        def fit(config, workdir, objectives, initial, frozen, source, hooks=(), embedder=None):
            (objective,) = objectives
            made = initial.make()
            assert jax.tree.structure(made) == jax.tree.structure(initial.shapes)
            ran.append(Ran(objective, made, frozen, workdir))
            saved[workdir] = {"network": jax.tree.map(lambda leaf: leaf + 1, made)}
            return saved[workdir]

        def load(source, mesh):
            return pipeline.Pipeline(teacher_config, lambda: {"network": network})

        for name, stub in (
            ("pipeline.load", load),
            ("loop.fit", fit),
            ("checkpoint.load_averaged", lambda workdir, mesh: saved[workdir]),
            ("rescaled_networks.compare", lambda *args: {"refitted": {}}),
            ("previews.previewer", lambda *args: lambda *args: None),
            ("previews.reference_row", lambda *args: lambda: None),
            ("scoring.conclude", lambda *args, **kwargs: None),
        ):
            monkeypatch.setattr(f"jax_distill.runs.experiment.{name}", stub)
        source = Mixture([Part(SimpleNamespace(null=None, embedder=None))])
        monkeypatch.setattr(Shapes, "source", lambda self, workdir: source)
        experiment.run(config, tmp_path)
        return network, ran

    return distil


def student(objective="scm"):
    config = tiny_config(objective)
    with config.unlocked():
        config.model = {"time_scale": 1.0, "guidance_embeds": True}
        config.objective = {"name": objective, "guidance_scales": (2.0,)}
    return config


def teacher(objective="flow_matching", time_scale=1000.0, guidance_embeds=False):
    config = tiny_config(objective)
    with config.unlocked():
        config.model.time_scale, config.model.guidance_embeds = time_scale, guidance_embeds
    return config


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("velocity", ["rescaled", "original"])
def test_a_plain_teacher_is_rescaled_first(distil, velocity, tmp_path):
    config = student()
    config.teacher.velocity = velocity
    plain, (first, second) = distil(config, teacher())
    assert isinstance(first.objective, TimeRescale) and first.workdir == tmp_path / "time_rescale"
    assert same(first.frozen["teacher"], plain)
    assert isinstance(second.objective, SCM)
    assert same(second.initial, jax.tree.map(lambda leaf: leaf + 1, first.initial))
    assert same(second.frozen["teacher"], second.initial if velocity == "rescaled" else plain)


def test_a_rescaled_teacher_is_taken_as_it_is(distil):
    taken, (only,) = distil(student(), teacher("time_rescale", 1.0, True))
    assert isinstance(only.objective, SCM)
    assert same(only.initial, taken) and same(only.frozen["teacher"], taken)


def test_time_rescale_is_a_run_of_its_own(distil, tmp_path):
    _, (only,) = distil(student("time_rescale"), teacher())
    assert isinstance(only.objective, TimeRescale) and only.workdir == tmp_path


def rounds(leaf) -> np.ndarray:
    """Which values are more than bfloat16 has."""
    return np.asarray(leaf) != np.asarray(leaf.astype(jnp.bfloat16).astype(jnp.float32))


def test_the_average_of_the_rescale_is_not_rounded():
    """The student starts from it; its own average may be in bfloat16, embedders excepted."""
    config = resolve(student(), teacher()).config
    with config.unlocked():
        config.ema_dtype = config.optimizer.moments = "bfloat16"
    first, second = resolve(config, teacher()).stages
    assert first.config.ema_dtype == "float32" and second.config.ema_dtype == "bfloat16"
    assert first.config.optimizer.moments == "bfloat16"
    network = jax.eval_shape(
        lambda: rounding.narrow({"network": build.initial_parameters(config)}, "bfloat16")
    )
    for name, leaf in traverse_util.flatten_dict(network, sep="/").items():
        assert leaf.dtype == ("float32" if "_embedder/" in name else "bfloat16"), name


def test_refitted_embedders_are_not_trained():
    config = student()
    with config.unlocked():
        config.model = {**config.model, "guidance_factor": 1.0}
        config.optimizer.frozen = "time_embedder"
    embedded = teacher("time_rescale", 1000.0, True)
    for stage in resolve(config, embedded).stages:
        network = jax.eval_shape(functools.partial(build.initial_parameters, stage.config))
        params = {"network": network}
        for path, is_trained in traverse_util.flatten_dict(
            trained(stage.config.optimizer, params), sep="/"
        ).items():
            refit = "time_embedder" in path or "guidance_embedder" in path
            assert is_trained != refit, (stage.name, path)


def test_a_rescale_keeps_the_teachers_interval_embedder():
    pair = teacher("flow_matching", 1000.0, True)
    with pair.unlocked():
        pair.model.interval_embeds = True
    network = build.initial_parameters(pair)
    stage = resolve(student(), pair).stages[0]
    start = stages.initial_network(stage, network)
    shapes = jax.eval_shape(lambda: build.initial_parameters(stage.config))
    assert jax.tree.structure(start) == jax.tree.structure(shapes)
    assert [x.embedder for x in stages.refitted(stage)] == ["time_embedder", "interval_embedder"]


def test_a_stage_of_no_steps_gives_what_it_starts_from(tmp_path):
    config = tiny_config("flow_matching")
    with config.unlocked():
        config.total_steps = 0
    objective, params = build.objective(config), build.initial_parameters(config)
    found = loop.fit(config, tmp_path, objective, params, {}, Examples(config))
    assert same(found["network"], params)
    assert same(checkpoint.load_averaged(tmp_path), found)


class Examples:
    """Data that no step asks for."""

    def __init__(self, config):
        self._count = config.batch_size

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return Batch(np.zeros(1))


@pytest.mark.parametrize("velocity", ["rescaled", "original"])
@pytest.mark.parametrize("given", ["plain", "rescaled"])
def test_no_initial_parameter_goes_through_bfloat16(distil, velocity, given):
    """Only what is frozen is narrowed, and of that no embedder."""
    config = student()
    with config.unlocked():
        config.teacher.velocity, config.dtype = velocity, "bfloat16"
    network, ran = distil(
        config, teacher() if given == "plain" else teacher("time_rescale", 1.0, True)
    )
    for stage in ran:
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stage.initial))
        for name, leaf in traverse_util.flatten_dict(stage.frozen["teacher"], sep="/").items():
            assert leaf.dtype == ("float32" if "_embedder/" in name else "bfloat16"), name
    start, before = ran[-1].initial, network
    if given == "plain":
        before = jax.tree.map(lambda leaf: leaf + 1, ran[0].initial)
    assert same(start, before)
    kernels = [leaf for leaf in jax.tree.leaves(start) if leaf.ndim > 1 and rounds(leaf).any()]
    assert np.mean([rounds(leaf).mean() for leaf in kernels]) > 0.9


def test_embedders_are_refitted_for_the_factors_of_the_student(distil):
    """The student takes t for 1000 t and w for 1000 w: both embeddings stay what they were."""
    config = student()
    with config.unlocked():
        config.model = {**config.model, "guidance_factor": 1.0}
    plain = teacher("time_rescale", 1000.0, True)
    with plain.unlocked():  # wide enough to follow
        plain.model.num_attention_heads, plain.model.attention_head_dim = 4, 32
        plain.model.axes_dims_rope = (8, 12, 12)
    smooth = {"time_embedder": 1.0, "guidance_embedder": 10.0}
    network = build.initial_parameters(plain)
    for name in smooth:  # slow features alone: those of 1000 v with frequencies below 10 / upper
        kernel = 0.3 * jax.random.normal(
            jax.random.key(1), network[name]["linear_1"]["kernel"].shape
        )
        slow = np.arange(256) % 128 >= 68 + (32 if name == "guidance_embedder" else 0)
        network[name]["linear_1"]["kernel"] = kernel * slow[:, None]
        network[name]["linear_2"]["kernel"] = jax.random.normal(jax.random.key(2), (128, 128))
    stage = resolve(config, plain).stages[0]
    start = stages.initial_network(stage, network)
    for name, upper in smooth.items():
        values = jnp.linspace(0.01, upper, 300)
        old = mmdit.scalar_embedding(network[name], 1000.0 * values)
        new = mmdit.scalar_embedding(start[name], values)
        variation = jnp.std(old, axis=0).mean()
        assert jnp.sqrt(jnp.mean((new - old) ** 2)) < 0.02 * variation
    for name in network.keys() - smooth.keys():
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, (start[name], network[name]))))


def test_a_finished_stage_is_read_back_as_its_average_alone(tmp_path, monkeypatch):
    config = tiny_config("flow_matching")
    with config.unlocked():
        config.total_steps = 1
    average = {"network": {"a": jnp.arange(3.0)}}
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        player = {"ema": average, "opt_state": {"b": jnp.zeros(4)}}
        checkpoints.save(1, Saved({"student": player}), {})
    monkeypatch.setattr(checkpoint.Checkpoints, "restore_latest", None)  # the whole state

    def never():
        raise AssertionError("made though there is a checkpoint")

    found = loop.fit(config, tmp_path, None, loop.Initial({}, never), {}, None)
    assert same(found, average)


class Saved(NamedTuple):
    players: dict
