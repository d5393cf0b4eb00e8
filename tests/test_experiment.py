"""Runs: which stages a distillation has, and what each starts from."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_pipeline import tiny_config

from jax_distill import build, experiment, pipeline
from jax_distill.objectives.scm import SCM
from jax_distill.objectives.time_rescale import TimeRescale
from jax_distill.worlds.shapes import Shapes


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Distils with a training that adds one to every parameter; returns the stages it ran."""

    def distil(config, teacher_config):
        teacher = pipeline.Pipeline(
            teacher_config, {"network": build.initial_parameters(teacher_config)}
        )
        ran = []

        def fit(config, workdir, objective, params, frozen, source, hooks=()):
            ran.append((objective, params, frozen, workdir))
            return {"network": jax.tree.map(lambda leaf: leaf + 1, params)}

        for name, stub in (
            ("pipeline.load", lambda source, mesh: teacher),
            ("train.fit", fit),
            ("compare_stages", lambda *args: None),
            ("previewer", lambda *args: lambda *args: None),
            ("scoring.conclude", lambda *args, **kwargs: None),
        ):
            monkeypatch.setattr(f"jax_distill.experiment.{name}", stub)
        monkeypatch.setattr(Shapes, "source", lambda self, workdir: SimpleNamespace(null=None))
        experiment.run(config, tmp_path)
        return teacher, ran

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
def test_a_plain_teacher_is_rescaled_first(stages, velocity, tmp_path):
    config = student()
    config.teacher.velocity = velocity
    plain, ((first, initial, frozen, where), (second, start, guide, _)) = stages(config, teacher())
    assert isinstance(first, TimeRescale) and where == tmp_path / "time_rescale"
    assert same(frozen["teacher"], plain.params["network"])
    assert isinstance(second, SCM)
    assert same(start, jax.tree.map(lambda leaf: leaf + 1, initial))
    expected = start if velocity == "rescaled" else plain.params["network"]
    assert same(guide["teacher"], expected)


def test_a_rescaled_teacher_is_taken_as_it_is(stages):
    taken, ((objective, start, frozen, _),) = stages(student(), teacher("time_rescale", 1.0, True))
    assert isinstance(objective, SCM)
    assert same(start, taken.params["network"]) and same(frozen["teacher"], start)


def test_time_rescale_is_a_run_of_its_own(stages, tmp_path):
    _, ((objective, _, _, where),) = stages(student("time_rescale"), teacher())
    assert isinstance(objective, TimeRescale) and where == tmp_path
