"""Training's cost in network evaluations: what is counted by hand, for each method."""

import pytest
from test_plan import preset
from test_start import TEACHER, save, student
from tiny_runs import settings

from jax_distill import worlds
from jax_distill.assembly import resolution
from jax_distill.config import ConfigError
from jax_distill.planning import evaluations
from jax_distill.worlds.flux.world import Flux
from jax_distill.worlds.shapes.world import Shapes

FORWARD, BACKWARD, TEACHER_CFG, BATCH = 1, 2, 2, 4
WIDE = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}  # embedders count for little


def costs(name, **changes):
    config = student(name, **changes)
    with config.unlocked():
        config.total_steps, config.batch_size = 100, BATCH
        config.model.update(WIDE)
        config.rescale.total_steps = 0
    teacher = settings({"name": "flow_matching"}, **WIDE)
    return evaluations.of_stages(resolution.resolve(config, teacher).stages)


def near(value):
    """So many evaluations, for each example of a batch."""
    return pytest.approx(BATCH * value, rel=0.08)


@pytest.mark.parametrize(
    "name", ["scm:flux_lite", pytest.param("dmd2:flux_lite_lora", marks=pytest.mark.slow)]
)
def test_presets_for_flux_are_counted_without_a_checkpoint(name, monkeypatch):
    config = preset(name)
    teacher = worlds.of(config).planned_teacher()
    teacher.model.update(num_layers=1, num_single_layers=1, num_attention_heads=2)
    monkeypatch.setattr(Flux, "planned_teacher", lambda self: teacher)
    assert evaluations.summary(config)["evaluations_per_step"] > 4 * config.batch_size


SCM = TEACHER_CFG + FORWARD + FORWARD + BACKWARD  # the tangent is one more forward
MADE, LEARNED = FORWARD, FORWARD + BACKWARD
MATCHED = MADE + BACKWARD + FORWARD + TEACHER_CFG  # the fake score's and the teacher's opinion


def test_a_step_of_scm_is_that_of_its_forwards():
    found = costs("scm")
    assert found.a_step(100) == near(SCM)
    assert found.at(200) - found.at(100) == pytest.approx(100 * found.a_step(100))


@pytest.mark.parametrize(("steps", "rolled"), [(1, 0), (4, 1.5)])
def test_a_rollout_counts_as_long_as_it_is_in_the_mean(steps, rolled):
    """One step of the student in five; a rollout takes 0 to steps - 1 steps before the last."""
    found = costs("dmd2", **{"objective.steps": steps, "objective.student_every": 5})
    student, fake = rolled + MATCHED, rolled + MADE + LEARNED
    assert found.players["student"].of(1) == near(student)
    assert found.players["fake"].of(1) == near(fake)
    assert found.a_step(100) == near((student + 4 * fake) / 5)
    both = costs("dmd2", **{"objective.steps": steps, "objective.cadence": "both"})
    assert both.a_step(100) == near(student / 5 + fake)


@pytest.mark.slow
def test_a_warm_up_costs_what_it_computes(monkeypatch):
    monkeypatch.setattr(evaluations, "COUNTED", 16)  # few places to look for the switch
    changes = {"objective.scm_steps": 10, "objective.student_every": 2}
    changes |= {"objective.drop_nonfinite": False}  # else the forward is computed again
    found = costs("rcm", **changes).players["student"]
    assert found.switch == 10 and found.early == near(SCM)
    assert found.late > found.early + BATCH * (TEACHER_CFG + FORWARD + BACKWARD)
    assert found.of(12) == 10 * found.early + 2 * found.late


def test_a_budget_gives_the_most_steps_within_it():
    found = costs("dmd2", **{"objective.steps": 1, "objective.student_every": 3})
    for budget in (200.0, 493.6, found.at(17)):
        steps = found.steps_within(budget)
        assert found.at(steps) <= budget < found.at(steps + 1)
    late = found._replace(before=1000.0)
    assert late.steps_within(1000 + found.at(17)) in (16, 17)  # to rounding
    with pytest.raises(ConfigError, match="are not enough for one step; .* takes 1000"):
        late.steps_within(999.0)


def test_runs_before_count_once_and_a_rescale_by_its_own_batches(tmp_path, monkeypatch):
    """By made-up prices: 10 an example of a move, and a forward of one operation."""

    def moves(stage, _):
        price = 10.0 * stage.config.batch_size
        return evaluations.Moves(price, price, 0)

    monkeypatch.setattr(evaluations, "_moves", moves)
    monkeypatch.setattr(evaluations, "example_flops", lambda config: 1.0)
    monkeypatch.setattr(Shapes, "default_teacher", lambda self: TEACHER)
    rescaled, start = tmp_path / "rescaled", tmp_path / "start"
    save(rescaled, student("time_rescale", total_steps=8, batch_size=4))
    taught = {"teacher.checkpoint": str(rescaled), "total_steps": 5, "batch_size": 4}
    save(start, student("scm", **taught))
    first = evaluations.of_run(student("scm", **taught))
    assert (first.before, first.at(5)) == (8 * 40, 8 * 40 + 5 * 40)
    second = {**taught, "batch_size": 2, "start.checkpoint": str(start)}
    assert evaluations.of_run(student("scm", **second)).before == 13 * 40
    stage = {"model.time_scale": 10.0, "rescale.total_steps": 3, "rescale.batch_size": 12}
    assert evaluations.of_run(student("scm", batch_size=4, **stage)).before == 3 * 120
