"""A student's sampler is stored with it: every command draws by it, in any later version."""

import dataclasses
import json

import few_step
import jax
import pytest
import two_players
from few_step import FewStep, registered  # noqa: F401
from tiny_runs import STUDENT, State, save_run, settings

from jax_distill import config as configuration
from jax_distill import pipeline
from jax_distill.assembly import build
from jax_distill.config import ConfigError
from jax_distill.objectives.methods import KINDS, OBJECTIVES
from jax_distill.runs import checks
from jax_distill.runs.exporting import export
from jax_distill.sampling import PushForward, Restart, Shifted
from jax_distill.training import checkpoint
from jax_distill.training.step import init_state, make_optimizers

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def run(tmp_path_factory, registered):  # noqa: F811
    objective = few_step.STUDENTS["restart_listed"]
    return save_run(tmp_path_factory.mktemp("run") / "few_step", settings(objective, **STUDENT))


def test_another_default_does_not_change_an_old_student(tmp_path, monkeypatch):
    configuration.save(settings({"name": "few_step"}, **STUDENT), tmp_path)

    @dataclasses.dataclass(frozen=True)
    class Later(FewStep):
        kind: str = "push_forward"

    for known in (KINDS, OBJECTIVES):
        monkeypatch.setitem(known, "few_step", Later)
    new = settings({"name": "few_step"}, **STUDENT)
    assert build.objective(new).sampled_by == PushForward(Shifted(None))
    old = configuration.load(tmp_path)
    assert build.objective(old).sampled_by == Restart(Shifted(None))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"times": [1.0]}, "objective.times: there is no such key"),
        ({"kind": "guess"}, "objective.kind: 'guess' is not one of restart, push_forward"),
        ({"angles": "first"}, "objective.angles: 'first' must be a list"),
        ({"name": "later"}, "objective.name: 'later' is not one of"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_read_are_refused(run, changes, words):
    path = run / "config.json"
    whole = path.read_text()
    values = json.loads(whole)
    values["objective"] |= changes
    path.write_text(json.dumps(values))
    try:
        for read in (pipeline.load, lambda x: export(str(x), run.with_name("out"))):
            with pytest.raises(
                ValueError, match=f"is no configuration of this version: {words}"
            ) as e:
                read(run)
            assert len(str(e.value).splitlines()) == 1
    finally:
        path.write_text(whole)
    assert not run.with_name("out").exists()


def test_more_steps_than_the_student_has_times_are_refused(run):
    words = "steps: 8 are more than the 4 times that the network is sampled at; ask for 4 or fewer"
    with pytest.raises(ValueError, match=f"^{words}"):
        pipeline.load(run)("a red circle", steps=8)
    config = configuration.load(run).copy_and_resolve_references()
    checks.check_evaluation(config)
    with config.unlocked():
        config.evaluation.student_steps = (1, 8)
    with pytest.raises(ConfigError, match=f"^evaluation.student_{words}"):
        checks.check_evaluation(config)


def test_the_students_average_alone_is_exported(tmp_path, monkeypatch):
    for known in (KINDS, OBJECTIVES):
        monkeypatch.setitem(known, "matching", two_players.Matching)
    config = two_players.matching_config()
    objective, params, *_ = two_players.prepared(config)
    state = init_state(objective, make_optimizers(objective, config), params, 0)
    student = state.players["student"]
    average = jax.tree.map(lambda leaf: leaf / 2, student.ema)
    both = {**state.players, "student": student._replace(ema=average)}
    for name, saved in (
        ("both", state._replace(players=both)),
        ("alone", State({"student": {"ema": {"network": average["network"]}}})),
    ):
        configuration.save(config, tmp_path / name)
        with checkpoint.Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            checkpoints.save(1, saved, {})
        export(str(tmp_path / name), tmp_path / f"{name}_out", layout="safetensors")
    files = [tmp_path / f"{name}_out/model.safetensors" for name in ("both", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
