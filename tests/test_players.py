"""Several players: who moves when, by which optimizer, and what the others see of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from regression import Source, parameters
from two_players import (
    TEACHER,
    Duel,
    Matching,
    duel_config,
    matching_config,
    never_bad,
    prepared,
)

from jax_distill.assembly import stages
from jax_distill.config import ConfigError, optimizer_of
from jax_distill.devices.signals import Interrupted
from jax_distill.flow import Batch
from jax_distill.objectives.methods import KINDS, OBJECTIVES
from jax_distill.objectives.objective import View
from jax_distill.planning import chips, planner, program, table
from jax_distill.runs import checks
from jax_distill.training import checkpoint, loop
from jax_distill.training.optimizer import learning_rate
from jax_distill.training.step import (
    followed,
    init_state,
    make_optimizers,
    make_step,
    moves_of,
    turns,
)

ROOT = Path(__file__).parents[1]
DUEL = Duel()
BOTH, FAKE = ("student", "fake"), ("fake",)


@pytest.fixture(scope="module")
def batch():
    return Batch(np.random.default_rng(3).standard_normal((4, 4, 8)).astype(np.float32))


@pytest.fixture(scope="module")
def walk(batch):
    """(bad, changes) -> states and metrics of some steps, the initial state first."""
    compiled = {}

    def steps(count=6, bad=None, **changes):
        config = duel_config(**changes)
        optimizers = make_optimizers(DUEL, config)
        states, metrics = [init_state(DUEL, optimizers, parameters(), 0)], []
        for step in range(count):
            turn = DUEL.turn(step)
            key = (turn, *sorted(changes.items()))
            if key not in compiled:
                compiled[key] = jax.jit(make_step(DUEL, optimizers, config, turn))
            state, found = compiled[key](states[-1], bad or never_bad(), batch)
            states.append(state)
            metrics.append(found)
        return states, metrics

    return steps


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def test_players_move_at_their_own_cadence(walk):
    states, metrics = walk()
    assert [int(s.step) for s in states] == [0, 1, 2, 3, 4, 5, 6]
    assert [int(s.players["student"].moves) for s in states] == [0, 0, 0, 1, 1, 1, 2]
    assert [int(s.players["fake"].moves) for s in states] == [0, 1, 2, 3, 4, 5, 6]
    for before, after, turn in zip(states, states[1:], [FAKE, FAKE, BOTH] * 2):
        for name in BOTH:
            assert same(before.players[name], after.players[name]) == (name not in turn)
    assert "student/loss" not in metrics[0] and {"student/loss", "fake/loss"} < metrics[2].keys()
    # A loss counts its own player's moves.
    assert [int(m["student/moves"]) for m in metrics if "student/moves" in m] == [0, 1]


def test_the_later_player_of_a_turn_sees_what_the_earlier_has_become(walk, batch):
    states, metrics = walk(3)
    before, after = states[2].players, states[3].players
    draws = DUEL.draw(jax.random.fold_in(jax.random.key(0), 2), batch)
    losses = {
        kind: DUEL.fake_loss(
            before["fake"].params,
            View(never_bad(), averages={"student": of["student"].ema}),
            batch,
            draws,
            2,
        )[0]
        for kind, of in (("old", before), ("new", after))
    }
    assert abs(losses["old"] - losses["new"]) > 1e-4
    np.testing.assert_allclose(metrics[2]["fake/loss"], losses["new"], rtol=1e-5)


def test_clipping_and_optimizers_are_a_players_own(walk):
    """Plain descent would show the gradients; Adam's first moments are what was clipped."""
    states, metrics = walk(3)

    def first_moment(player):
        found = [
            leaf
            for path, leaf in jax.tree.leaves_with_path(player.opt_state)
            if ".mu" in jax.tree_util.keystr(path)
        ]
        return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in found)))

    # After one move the first moment is a tenth of the clipped gradient.
    np.testing.assert_allclose(first_moment(states[1].players["fake"]), 0.1 * 0.05, rtol=1e-3)
    norm = min(1.0, float(metrics[2]["student/gradient_norm"]))
    np.testing.assert_allclose(first_moment(states[3].players["student"]), 0.1 * norm, rtol=1e-3)


def test_schedules_end_after_a_players_own_moves():
    config = duel_config(total_steps=10)
    assert turns(DUEL, 10) == {FAKE: 7, BOTH: 3} and moves_of(DUEL, 10) == {
        "student": 3,
        "fake": 10,
    }
    assert turns(DUEL, 3 * 10**6) == {FAKE: 2 * 10**6 + 1, BOTH: 10**6 - 1}  # to a millionth
    assert optimizer_of(config, "").learning_rate == 1e-3
    assert optimizer_of(config, "fake").learning_rate == 0.01
    assert optimizer_of(config, "fake").schedule == "cosine"  # as the student's
    assert float(learning_rate(config.optimizer, 3)(3)) == 0
    # The student's optimizer ends with its third move, though the run goes on.
    optimizer, params = make_optimizers(DUEL, config)["student"], {"kernel": np.ones(2, np.float32)}
    state, updates = optimizer.init(params), []
    for _ in range(4):
        update, state = optimizer.update(params, state, params)
        updates.append(float(np.abs(update["kernel"]).max()))
    assert min(updates[:3]) > 1e-5 and updates[3] < 1e-9


def test_an_average_is_kept_of_those_who_ask(walk):
    states, _ = walk(3)
    assert states[3].players["fake"].ema == {}
    student = states[3].players["student"]
    expected = jax.tree.map(  # of one move, the average warms up by the player's own count
        lambda a, p: 0.1 * a + 0.9 * p, states[0].players["student"].params, student.params
    )
    for a, b in zip(jax.tree.leaves(student.ema), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("who", ["student", "fake"])
def test_a_move_that_is_not_finite_holds_back_its_player_alone(walk, who):
    states, metrics = walk(3, bad=never_bad(**{who: [1]}))
    other = "fake" if who == "student" else "student"
    at = 3 if who == "student" else 1  # the step of that move
    held, moved = states[at].players[who], states[3].players[other]
    assert same(held[:3], states[at - 1].players[who][:3])
    assert int(held.skipped) == 1 and int(moved.skipped) == 0
    assert not same(moved.params, states[2].players[other].params)
    assert int(metrics[at - 1][f"{who}/skipped"]) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[3]))


@pytest.fixture(scope="module")
def follow(batch):
    """(method, turn, state, bad) -> the state after the turn."""
    config, compiled = duel_config(), {}

    def move(method, turn, state=None, bad=None):
        optimizers = make_optimizers(method, config)
        state = state or init_state(method, optimizers, parameters(), 0)
        if (method, turn) not in compiled:
            compiled[method, turn] = jax.jit(make_step(method, optimizers, config, turn))
        return compiled[method, turn](state, bad or never_bad(), batch)[0]

    return move


def test_a_follower_goes_a_share_of_the_way_after_each_of_the_students_moves(follow):
    method = Duel(follow=0.25)
    apart = follow(DUEL, FAKE)
    before, after = apart.players, follow(method, ("student",), apart).players
    assert same(after["student"], follow(DUEL, ("student",), apart).players["student"])
    for name, leaf in after["fake"].params["network"].items():
        fake, student = (x.params["network"][name] for x in (before["fake"], after["student"]))
        assert np.abs(fake - student).max() > 1e-3
        np.testing.assert_allclose(leaf, 0.75 * fake + 0.25 * student, rtol=1e-5, atol=1e-7)
    rest = after["fake"]._replace(params=after["fake"].params["head"])
    assert same(rest, before["fake"]._replace(params=before["fake"].params["head"]))
    # It follows before its own move of the turn; nobody follows after a move of its own alone.
    one_by_one = follow(method, ("student",), apart)._replace(step=apart.step)
    assert same(follow(method, BOTH, apart), follow(DUEL, FAKE, one_by_one))
    assert same(follow(method, FAKE, apart), follow(DUEL, FAKE, apart))


def test_nobody_follows_a_move_that_was_skipped(follow):
    method, bad = Duel(follow=0.25), never_bad(student=[1])
    apart = follow(DUEL, FAKE)
    after = follow(method, ("student",), apart, bad)
    assert int(after.players["student"].skipped) == 1
    assert same(after.players["fake"], apart.players["fake"])
    # Its second move counts again.
    again = follow(method, ("student",), after, bad).players["fake"]
    assert not same(again.params["network"], apart.players["fake"].params["network"])


def test_what_is_the_same_in_both_stays_to_the_bit():
    """Such as embedders that no player trains."""
    rng = np.random.default_rng(0)
    network = {"kernel": rng.standard_normal((32, 32)).astype(np.float32)}
    state = init_state(DUEL, make_optimizers(DUEL, duel_config()), parameters(), 0)
    players = {n: x._replace(params={"network": network}) for n, x in state.players.items()}
    found = jax.jit(lambda x: followed(Duel(follow=0.3), x, True))(players)
    assert list(found) == ["fake"] and same(found["fake"].params, players["fake"].params)


class Killed(Exception):
    pass


def fit(workdir, *, method=DUEL, stop=None, die=None, bad=None, **changes):
    def hook(step, params):
        del params
        if step == die:
            raise Killed
        if step == stop:
            os.kill(os.getpid(), 15)

    start = duel_config(**changes), workdir, method, parameters(), bad or never_bad(), Source()
    return loop.fit(*start, hooks=[(1, hook)])


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "time" and "per_sec" not in k} for x in lines]


def final_state(workdir):
    config = duel_config()
    like = init_state(DUEL, make_optimizers(DUEL, config), parameters(), config.seed)
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore(12, like).state


@pytest.mark.parametrize("method", [DUEL, Duel(follow=0.25)], ids=["duel", "follower"])
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, method):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    average = fit(whole, method=method)
    with pytest.raises(Killed):
        fit(broken, method=method, die=6)  # after a checkpoint of the fourth step
    with pytest.raises(Interrupted):
        fit(broken, method=method, stop=8)  # between two moves of the student
    assert same(average, fit(broken, method=method))
    assert same(final_state(whole), final_state(broken))
    assert logged(whole) == logged(broken)
    line = logged(whole)[-1]
    assert {"student/loss", "fake/loss", "student/learning_rate", "fake/skipped"} < line.keys()
    assert line["student/learning_rate"] != line["fake/learning_rate"]
    assert same(checkpoint.load_averaged(whole), average)


def test_a_run_says_whose_loss_is_not_finite(tmp_path, caplog):
    with pytest.raises(loop.NonFiniteLoss, match="step 5: fake's loss"):
        fit(tmp_path / "stopped", bad=never_bad(fake=[5]))
    fit(tmp_path / "skipped", bad=never_bad(fake=[5]), on_nonfinite="skip")
    assert "fake's move skipped" in caplog.text
    assert logged(tmp_path / "skipped")[-1]["fake/skipped"] == 1
    with pytest.raises(loop.NonFiniteLoss, match="step 3: fake's and student's loss"):
        fit(tmp_path / "both", bad=never_bad(student=[1], fake=[3]))


@pytest.mark.parametrize("turn", [(), ("student", "critic"), ("fake", "fake")])
def test_a_turn_that_cannot_be_is_named(turn):
    class Odd(Duel):
        def turn(self, step):
            return turn

    with pytest.raises(ConfigError, match="is no turn of its players"):
        make_optimizers(Odd(), duel_config())


def test_a_student_keeps_an_average():
    class Odd(Duel):
        @property
        def players(self):
            return {name: player._replace(averaged=False) for name, player in DUEL.players.items()}

    with pytest.raises(ConfigError, match="no 'student' whose average is kept"):
        make_optimizers(Odd(), duel_config())


def test_a_pattern_of_the_students_need_not_match_another_player(batch):
    """Heads have no embedders that are kept frozen; a pattern of their own must match."""

    class Heads(Duel):
        def init(self, key, params):
            made = super().init(key, params)
            return {**made, "fake": {"head": made["fake"]["head"]}}

    config = duel_config(optimizer__frozen="network/bias")
    heads = Heads()
    state = init_state(heads, make_optimizers(heads, config), parameters(), 0)
    assert set(state.players["fake"].params) == {"head"}
    with config.unlocked():
        config.optimizers.fake.frozen = "network/bias"
    with pytest.raises(ConfigError, match="matches no parameter"):
        init_state(heads, make_optimizers(heads, config), parameters(), 0)


# With networks.


@pytest.fixture
def registered(monkeypatch):
    for known in (KINDS, OBJECTIVES):
        monkeypatch.setitem(known, "matching", Matching)


def test_adapters_of_both_players_stand_beside_one_base(registered):
    config = matching_config(rank=2)
    objective, params, frozen, batch = prepared(config)
    made = objective.init(jax.random.key(0), params)
    flat = {name: traverse_util.flatten_dict(tree, sep="/") for name, tree in made.items()}
    for name in BOTH:
        kernels = {path for path in flat[name] if "blocks/" in path}
        assert kernels and all(path.rpartition("/")[2].startswith("lora_") for path in kernels)
    assert not same(made["student"]["network"], made["fake"]["network"])
    # New adapters add nothing: both players begin as the teacher, whose base is not copied.
    draws, trees = objective.draw(jax.random.key(1), batch), {"network": frozen["teacher"]}
    plain = {name: {**made[name], **trees} for name in BOTH}
    averages = {"student": made["student"]}
    for name in BOTH:
        rest = View(frozen, made, averages), batch, draws, 0
        loss, _ = jax.jit(objective.players[name].loss)(made[name], *rest)
        rest = View(frozen, plain), batch, draws, 0
        expected, _ = jax.jit(objective.objective.players[name].loss)(plain[name], *rest)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_of_adapters_that_follow_each_factor_is_mixed():
    """Their product is not; embedders are, which a player has of its own, and heads are not."""
    config = matching_config(2, "dmd2")
    with config.unlocked():
        config.objective.follow = 0.5
    objective, params, *_ = prepared(config)
    state = init_state(objective, make_optimizers(objective, config), params, 0)
    grown = jax.tree.map(lambda leaf: leaf + 0.1, state.players["student"].params)
    players = state.players | {"student": state.players["student"]._replace(params=grown)}
    found = followed(objective, players, True)
    before, after = (x["fake"].params for x in (players, found))
    assert list(found) == ["fake"] and same(after["heads"], before["heads"])
    paths = list(traverse_util.flatten_dict(after["network"], sep="/"))
    assert any("lora_a" in x for x in paths) and any("guidance_embedder" in x for x in paths)
    leaves = (jax.tree.leaves(x["network"]) for x in (after, before, grown))
    for mixed, own, student in zip(*leaves):
        np.testing.assert_allclose(mixed, (own + student) / 2, rtol=1e-5, atol=1e-6)


def test_a_method_without_guidance_scales_leaves_them_to_the_stage_before(registered):
    teacher = TEACHER.copy_and_resolve_references()
    with teacher.unlocked():
        teacher.model.time_scale = 1000.0
    before, stage = stages.of(matching_config(), teacher)
    assert before.config.objective.to_dict() == {"name": "time_rescale"}
    assert stage.config.objective.name == "matching"


def test_mistakes_of_players_are_found_before_a_run(registered, monkeypatch):
    config = matching_config()

    def check():
        checks.check_stages([stages.Stage("matching", config, TEACHER, TEACHER)])

    check()
    with monkeypatch.context() as patch:
        patch.setattr(Matching, "turn", lambda self, step: ("critic",))
        with pytest.raises(ConfigError, match="is no turn of its players"):
            check()
    with monkeypatch.context() as patch:  # the second player keeps no average
        patch.setattr(Matching, "fake_loss", lambda self, own, view, *rest: view.averages["fake"])
        with pytest.raises(KeyError, match="fake"):
            check()
    with config.unlocked():
        config.optimizers.fake.frozen = "critic"
    with pytest.raises(ConfigError, match="'critic' matches no parameter"):
        check()


def test_each_turn_is_a_program_of_the_plan(registered, monkeypatch):
    config = matching_config()
    stage = stages.Stage("matching", config, TEACHER, TEACHER)
    monkeypatch.setattr(program, "run_stages", lambda config: [stage])
    plan = planner.make_plan(config, chips.parse("cpu"), compiled=False)
    found = {x.stage: x for x in (plan, *plan.others)}
    assert {name: x.total_steps for name, x in found.items()} == {
        "matching, fake": 4,
        "matching, student and fake": 2,
    }
    short, long = found["matching, fake"], found["matching, student and fake"]
    assert plan is long and long.arithmetic.flops > short.arithmetic.flops
    mean = (4 * short.step_seconds + 2 * long.step_seconds) / 6
    np.testing.assert_allclose([x.mean_step_seconds for x in found.values()], mean)
    assert short.held == long.held
    assert {"student's parameters", "fake's optimizer", "student's EMA"} < long.held.keys()
    assert "fake's EMA" not in long.held
    assert "matching, fake" in table.describe(plan)


ONE_AXIS = ("8x1x1", "1x8x1")
SEVERAL_AXES = ("2x2x2", "1x4x2")


@pytest.mark.parametrize(
    ("method", "rank", "meshes"),
    [
        ("dmd2", 0, ONE_AXIS + SEVERAL_AXES),
        ("matching", 0, ONE_AXIS + SEVERAL_AXES),
        ("matching", 2, SEVERAL_AXES),
        ("ladd", 0, SEVERAL_AXES),
        ("rcm", 0, SEVERAL_AXES),
    ],
    ids=str,
)
@pytest.mark.slow
def test_steps_on_meshes_are_those_of_one_device(method, rank, meshes):
    """In double precision: in float32, too, they differ by rounding alone."""
    done = subprocess.run(
        [
            *(sys.executable, "tests/two_players.py"),
            *(",".join(meshes), str(rank), method, "float64"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert tuple(report) == meshes
    for mesh, found in report.items():
        assert found["metrics"] < 1e-6 and found["states"] < 1e-6, (mesh, found)
