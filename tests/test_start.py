"""Students that start from another run's: from its average, without a rescale, or not at all."""

import shutil

import jax
import numpy as np
import pytest
from tiny_runs import STUDENT, State, random_parameters, settings

from jax_distill import config as configuration
from jax_distill import pipeline
from jax_distill.assembly import adapters, build
from jax_distill.assembly.resolution import resolve
from jax_distill.config import ConfigError
from jax_distill.runs import checks, experiment
from jax_distill.training import checkpoint

TEACHER = settings({"name": "flow_matching"})
RANK = {"lora.rank": 2, "lora.alpha": 2.0}


def student(name="rcm", **changes):
    config = settings({"name": name}, **STUDENT)
    with config.unlocked():
        config.teacher.velocity = "original"
        config.update_from_flattened_dict(changes)
    return config


def teacher():
    network = random_parameters(TEACHER, 1)
    return pipeline.Pipeline(TEACHER, {"network": network})


def save(workdir, config):
    """A run whose average is of random weights; returns it."""
    average = {"network": random_parameters(config, 2)}
    if (beside := adapters.settings(config)) is not None:
        average["network"] = beside.split(jax.random.key(0), average["network"])
        average = jax.tree.map(lambda leaf: leaf + 0.1, average)  # B is not zero
    configuration.save(config, workdir)
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, State({"student": {"ema": average}}), {})
    return average


@pytest.mark.parametrize("lora", [{}, RANK], ids=["whole", "adapters"])
def test_a_student_starts_from_another_runs_average(lora, tmp_path):
    """Adapters are taken over as they are, by the fake score too; no rescale comes before."""
    average = save(tmp_path, student("scm", **lora))
    config, _, (stage,) = resolve(student(**{"start.checkpoint": str(tmp_path), **lora}), TEACHER)
    read = experiment.started_network(config, teacher())
    initial = experiment.initial_of(stage, read).make()
    players = build.objective(config, stage.teacher).init(jax.random.key(3), initial)
    for name in ("student", "fake"):
        jax.tree.map(np.testing.assert_array_equal, players[name]["network"], average["network"])
    assert stage.teacher.to_dict() == resolve(student(), TEACHER).teacher.to_dict()


def test_adapters_start_beside_the_teacher_that_they_were_trained_beside(tmp_path):
    save(tmp_path, student("scm", **RANK))
    config = resolve(student(**{"start.checkpoint": str(tmp_path)}, **RANK), TEACHER).config
    beside = teacher()
    adapters.check_teacher(config, tmp_path, beside.params["network"], note=True)
    experiment.started_network(config, beside)
    beside.params = {"network": jax.tree.map(lambda leaf: leaf + 1, beside.params["network"])}
    with pytest.raises(ValueError, match="no longer what the adapters in .* were trained beside"):
        experiment.started_network(config, beside)


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        ({"model.time_scale": 10.0}, {}, r"model.time_scale: 10.0 differs from 1.0, that of the s"),
        ({"model.interval_embeds": True}, {}, "model.interval_embeds: True differs"),
        ({"teacher.velocity": "rescaled"}, {}, "teacher.velocity: 'rescaled' is of a stage that"),
        (RANK, {}, "lora.rank: 2 differs from 0"),
        ({}, RANK, "lora.rank: 0 differs from 2"),
        ({**RANK, "lora.alpha": 3.0}, RANK, "lora.alpha: 3.0 differs from 2.0"),
        ({**RANK, "dtype": "bfloat16"}, RANK, "dtype: 'bfloat16' differs from 'float32'"),
        (RANK, {**RANK, "teacher.checkpoint": "/other"}, "teacher.checkpoint: 'embedded' differs"),
        ({"objective.name": "time_rescale"}, {}, "time_rescale trains no student"),
        ({"objective.name": "flow_matching"}, {}, "flow_matching trains no student"),
        ({}, {"objective.name": "flow_matching"}, "'flow_matching', no student; give one"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_a_sentence(own, theirs, expected, tmp_path):
    save(tmp_path, student("scm", **theirs))
    with pytest.raises(ConfigError, match=expected) as caught:
        resolve(student(**{"start.checkpoint": str(tmp_path), **own}), TEACHER)
    assert "\n" not in str(caught.value)


def test_remat_precision_and_the_other_runs_teacher_are_free(tmp_path):
    save(tmp_path, student("scm", **{"teacher.checkpoint": "/gone", "model.remat": "full"}))
    own = {"start.checkpoint": str(tmp_path), "dtype": "bfloat16", "model.attention": "xla"}
    (stage,) = resolve(student(**own), TEACHER).stages
    assert stage.source.model.remat == "full"


def test_there_must_be_a_checkpoint(tmp_path):
    config = student(**{"start.checkpoint": str(tmp_path)})
    with pytest.raises(ConfigError, match="start.checkpoint: .* is no workdir of a run"):
        resolve(config, TEACHER)
    save(tmp_path, student("scm"))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="start.checkpoint: .* has no checkpoints; train it"):
        resolve(config, TEACHER)
    with pytest.raises(ConfigError, match="start.checkpoint: .* is the run's own --workdir"):
        checks.check(config, tmp_path)
