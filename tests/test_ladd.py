"""LADD: who is judged against what, and that it moves samples to the data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_mixture as toy

from jax_distill.flow import Batch, Text
from jax_distill.models.heads import init_heads
from jax_distill.objectives.judged import HEADS
from jax_distill.objectives.ladd import LADD
from jax_distill.objectives.objective import STUDENT, View
from jax_distill.objectives.scm import SCM
from jax_distill.objectives.sprint import Sprint

ROWS = 8
SETTINGS = {"guidance_scales": (1.0,), "blocks": (0,), "head_width": 16}
METHOD = LADD(toy.perceptron(), toy.TEACHER, mismatched=True, **SETTINGS)


def captions():
    """Different ones: each of another mixture."""
    weights = jax.random.dirichlet(jax.random.key(8), jnp.ones(len(toy.MEANS)), (ROWS,))
    return Text(jnp.zeros((ROWS, 1, 1)), weights)


@pytest.fixture(scope="module")
def point():
    """Trees, the view of them, a batch and draws."""
    trees = METHOD.init(jax.random.key(0), toy.perceptron_params())
    batch = Batch(toy.samples(jax.random.key(1), captions()), captions())
    return trees, View(toy.FROZEN, trees), batch, METHOD.draw(jax.random.key(2), batch)


def heads_loss(point, method=METHOD, heads=None):
    trees, view, batch, draws = point
    return method.heads_loss(heads or trees[HEADS], view, batch, draws, 0)


def test_the_students_times_follow_the_shares_of_the_step():
    method = dataclasses.replace(METHOD, share_warmup=10)
    place = (jnp.arange(1000) + 0.5) / 1000
    for step, shares in ((9, (0, 0, 0.5, 0.5)), (10, (0.7, 0.1, 0.1, 0.1))):
        times = method.times(place, step)
        found = [float(jnp.mean(times == t)) for t in (1.0, 0.75, 0.5, 0.25)]
        np.testing.assert_allclose(found, shares, atol=1.5e-3)


def test_shares_of_other_numbers_are_refused():
    with pytest.raises(ValueError, match=r"^objective.first_shares: \(1.0,\) must have as many"):
        dataclasses.replace(METHOD, first_shares=(1.0,))
    with pytest.raises(ValueError, match="^objective.shares: .* whose sum is 1"):
        dataclasses.replace(METHOD, shares=(0.5, 0.4, 0.0, 0.0))


def test_the_gradient_goes_through_the_frozen_teacher_to_the_sample(point):
    """It is that of finite differences, and the student's parameters have all of it."""
    trees, view, batch, draws = point
    method = dataclasses.replace(METHOD, gan_loss="softplus")
    with jax.enable_x64(True):
        wide = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(np.float64(leaf)))
        view, batch, draws = wide(view), wide(batch), wide(draws)
        x = METHOD.made(view.nets[STUDENT], batch, draws, 0)
        gradient = jax.grad(method.fooling)(x, view, batch, draws)
        along = jax.random.normal(jax.random.key(3), x.shape)
        up, down = (method.fooling(x + h * along, view, batch, draws) for h in (1e-4, -1e-4))
        np.testing.assert_allclose(jnp.vdot(gradient, along), (up - down) / 2e-4, rtol=1e-3)
    gradient = jax.grad(lambda own: METHOD.student_loss(own, *point[1:], 0)[0])(trees[STUDENT])
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["network"]["blocks"]))


def logits_of(method, trees, view, batch, draws):
    """Of data, of samples, and of data with the captions of others."""
    judge = draws.judge

    def logits(x, noise, text):
        t = judge.tau[:, None, None]
        x_t = (1 - t) * x + t * noise
        return method.logits(trees[HEADS], view, x_t, judge.tau, text, draws.guidance)

    made = method.made(trees[STUDENT], batch, draws, jnp.zeros((), jnp.int32))
    rolled = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, 0), batch.text)
    return (
        logits(batch.x, judge.real_noise, batch.text),
        logits(made, judge.fake_noise, batch.text),
        logits(batch.x, judge.real_noise, rolled),
    )


def bend(x):
    return jnp.mean(jnp.maximum(1 + x, 0))


def test_the_heads_learn_from_logits_of_data_samples_and_mismatched_captions(point):
    trees, view, batch, draws = point
    real, fake, wrong = logits_of(METHOD, *point)
    loss, metrics = heads_loss(point)
    both = bend(-real) + (bend(fake) + bend(wrong)) / 2
    np.testing.assert_allclose(loss, both, rtol=1e-5)
    np.testing.assert_allclose(metrics["mismatched"], jnp.mean(wrong), rtol=1e-4, atol=1e-6)
    alone, metrics = heads_loss(point, dataclasses.replace(METHOD, mismatched=False))
    np.testing.assert_allclose(alone, bend(-real) + bend(fake), rtol=1e-5)
    assert "mismatched" not in metrics and abs(alone - loss) > 1e-4

    late = dataclasses.replace(METHOD, heads_first=3)
    before, after = (
        late.heads_loss(trees[HEADS], view, batch, draws, jnp.int32(moves))[0] for moves in (2, 3)
    )
    np.testing.assert_allclose(before, bend(-real) + bend(wrong), rtol=1e-5)
    np.testing.assert_allclose(after, both, rtol=1e-5)


def test_one_row_has_no_other_caption():
    batch = Batch(jnp.zeros((1, *toy.SHAPE)), toy.captions(1))
    with pytest.raises(ValueError, match="^objective.mismatched: a batch of one has no other"):
        METHOD.draw(jax.random.key(0), batch)
    dataclasses.replace(METHOD, mismatched=False).draw(jax.random.key(0), batch)


@pytest.mark.parametrize("kind", ["noised", "clean"])
def test_the_penalty_is_added_by_its_weight(point, kind):
    plain, _ = heads_loss(point)
    for weight in (1.0, 100.0):
        method = dataclasses.replace(METHOD, r1_weight=weight, r1_input=kind)
        loss, metrics = heads_loss(point, method)
        assert metrics["r1"] > 0
        np.testing.assert_allclose(loss, plain + weight * metrics["r1"], rtol=1e-4)
    constant = jax.tree.map(jnp.zeros_like, point[0][HEADS])
    assert heads_loss(point, method, constant)[1]["r1"] == 0


def test_losses_of_half_batches_have_the_mean_of_the_whole(point):
    """So do their gradients: accumulation agrees."""
    method = dataclasses.replace(METHOD, mismatched=False, distillation_weight=0.5, r1_weight=1.0)
    trees, view, batch, draws = point

    for name, loss in (("student", method.student_loss), ("heads", method.heads_loss)):

        @jax.jit
        def gradient(batch, draws, name=name, loss=loss):
            return jax.grad(lambda own: loss(own, view, batch, draws, 600)[0])(trees[name])

        halves = [
            gradient(*jax.tree.map(lambda leaf, part=part: leaf[part], (batch, draws)))
            for part in (slice(0, ROWS // 2), slice(ROWS // 2, None))
        ]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
            mean,
            gradient(batch, draws),
        )


def test_distillation_is_the_distance_from_the_teachers_prediction(point):
    """Zero where samples are what the teacher predicts of them, noised; nothing at tau = 1."""
    _, view, batch, draws = point
    at_noise = draws._replace(judge=draws.judge._replace(tau=jnp.ones(ROWS)))
    assert METHOD.distillation(batch.x, view, batch, at_noise) == 0
    near = draws._replace(judge=draws.judge._replace(tau=jnp.full(ROWS, 1e-4)))
    at_data = METHOD.distillation(batch.x, view, batch, near)
    assert at_data < 1e-4 < METHOD.distillation(batch.x + 1, view, batch, draws)


def test_the_heads_move_at_each_step_and_the_student_before_them_at_some():
    turns = [dataclasses.replace(METHOD, student_every=3).turn(step) for step in range(4)]
    assert turns == [(STUDENT, HEADS), (HEADS,), (HEADS,), (STUDENT, HEADS)]
    late = dataclasses.replace(METHOD, student_every=2, heads_first=3)
    assert [late.turn(step) for step in range(3)] == [(HEADS,)] * 3
    assert [late.turn(step) for step in (3, 4, 5)] == [(STUDENT, HEADS), (HEADS,), (STUDENT, HEADS)]


def test_both_players_count_the_warm_up_of_shares_from_the_students_first_step(point):
    trees, view, batch, draws = point

    def losses(step, **changes):
        method = dataclasses.replace(METHOD, share_warmup=10, **changes)
        of_student, _ = method.student_loss(
            trees[STUDENT], view, batch, draws, step // method.student_every
        )
        of_heads, _ = method.heads_loss(trees[HEADS], view, batch, draws, method.heads_first + step)
        return [float(of_student), float(of_heads)]

    late = {"heads_first": 4, "student_every": 2}
    assert losses(8, **late) == losses(8)
    assert losses(10, **late) == losses(10)
    assert all(first != later for first, later in zip(losses(8), losses(10)))


# SANA-Sprint.


def test_sprint_is_the_sum_of_two_losses(point):
    params = toy.perceptron_params()
    method = Sprint(toy.perceptron(), toy.TEACHER, **SETTINGS, adversarial_weight=0.3)
    alone = SCM(toy.perceptron(), toy.TEACHER, guidance_scales=(1.0,))
    trees = method.init(jax.random.key(0), params)
    view, batch = View(toy.FROZEN, trees), point[2]
    draws = method.draw(jax.random.key(4), batch)
    loss, metrics = method.student_loss(trees[STUDENT], view, batch, draws, 7)
    expected, _ = alone.loss(trees[STUDENT], view, batch, draws.consistency, 7)
    made = method.made(trees[STUDENT], batch, draws, 7)
    fooling = method.fooling(made, view, batch, draws)
    np.testing.assert_allclose(loss, expected + 0.3 * fooling, rtol=1e-6)
    # The heads' loss has half of the hinge, mismatched captions among the fakes.
    heads, _ = method.heads_loss(trees[HEADS], view, batch, draws, 7)
    real, fake, wrong = logits_of(method, trees, view, batch, draws)
    np.testing.assert_allclose(heads, (bend(-real) + (bend(fake) + bend(wrong)) / 2) / 2, rtol=1e-5)
    same = alone.draw(jax.random.key(4), batch)
    assert isinstance(draws.consistency, type(same))
    many = method.draw(jax.random.key(5), toy_batch(200))
    assert 0.2 < np.mean(many.t == 1) < 0.8
    # Angles atan(e^(n - 0.6) / 0.5) in the time of the straight path.
    angle = np.arctan(np.exp(-0.6) / 0.5)
    middle = np.sin(angle) / (np.sin(angle) + np.cos(angle))
    assert abs(np.median(many.judge.tau) - middle) < 0.06


def toy_batch(rows):
    return Batch(jnp.zeros((rows, *toy.SHAPE)), toy.captions(rows))


# The mixture in the plane.


@pytest.mark.slow
def test_samples_become_the_mixture():
    """One step of the teacher's velocity draws the mean; LADD's draws the five components."""
    start = toy.pretrained()
    method = dataclasses.replace(
        METHOD, shares=(1.0,), first_shares=(1.0,), head_width=64, mismatched=False
    )
    heads = {HEADS: {"learning_rate": 1e-3, "b1": 0.0}}
    state = toy.train(method, start, 400, learning_rate=3e-4, b1=0.0, optimizers=heads)
    before, after = (
        toy.drawn(method, tree, 1) for tree in ({"network": start}, state.players[STUDENT].ema)
    )
    assert toy.distance(before) > 0.9 and toy.distance(after) < 0.04
    assert np.abs(toy.shares(after) - toy.WEIGHTS).max() < 0.08


def test_heads_are_made_for_the_blocks_of_the_network():
    params = toy.perceptron_params()
    made = METHOD.init(jax.random.key(0), params)
    assert set(made) == {STUDENT, HEADS} and set(made[HEADS]) == {"block_0"}
    same = init_heads(jax.random.split(jax.random.key(0))[1], (0,), toy.WIDTH, 16, len(toy.MEANS))
    jax.tree.map(np.testing.assert_array_equal, made[HEADS], same)
