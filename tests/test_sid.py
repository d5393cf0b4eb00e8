"""SiD: its loss and gradient by hand, through both networks, and the identity that it rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from affine import (
    BATCH,
    COUNT,
    FAKE,
    SHAPE,
    STUDENT,
    TEACHER,
    assert_mean_of_parts,
    graded,
    network,
    normal,
    part,
    per_sample,
    teachers_data,
    tree,
    view,
)
from smooth import NULL, TEXT, smooth_network, smooth_params

from jax_distill.flow import Batch, GaussianOracle
from jax_distill.objectives.matching import RolloutDraws
from jax_distill.objectives.objective import View
from jax_distill.objectives.sid import Noised, SiD, SiDDraws, sid_loss, with_finite_gradient
from jax_distill.objectives.teacher import classifier_free, embedded_guidance


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def method(**settings) -> SiD:
    plain = {"learned_scale": 1.0, "compared_scale": 1.0, "time_shift": 0.0}
    return SiD(network(), TEACHER, **{**plain, **settings})


def draws(steps=1, count=0, shape=SHAPE) -> SiDDraws:
    def noised(seed):
        renoise = jnp.asarray(normal(seed + 10, (steps - 1, *shape)))
        rollout = RolloutDraws(jnp.asarray(normal(seed, shape)), renoise, jnp.asarray(count))
        t = jnp.linspace(0.1, 0.9, shape[0]) if seed == 1 else jnp.linspace(0.8, 0.2, shape[0])
        return Noised(rollout, t, jnp.asarray(normal(seed + 20, shape)))

    guidance = jnp.full(shape[:1], 3.0)
    return SiDDraws(guidance, jnp.arange(shape[0]) == 1, noised(1), noised(2))


# The loss.


def test_alpha_of_one_leaves_the_product_of_two_differences():
    x, fake, real = normal(0), normal(1), normal(2)
    terms = (real - fake) * (fake - x) / np.abs(x - real).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(sid_loss(x, fake, real), terms.sum((1, 2)), rtol=1e-12)
    # Where the student has the teacher's data already, its divisor has a lower bound.
    np.testing.assert_allclose(
        sid_loss(x, fake, x, alpha=0.5, least=1e-3),
        (-0.5 * (x - fake) ** 2).sum((1, 2)) / 1e-3,
        rtol=1e-12,
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_with_an_exact_fake_score_it_is_the_squared_difference(alpha):
    """E (r - f)((r - x) - alpha (r - f)) = (1 - alpha) E (r - f)^2: x - f says nothing of x_t.

    By a quadrature over data and noise that is exact for squares, on Gaussians.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(8)
    x, e = np.meshgrid(-0.4 + 0.9 * points, points)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    t = 0.4
    x_t = (1 - t) * x + t * e
    made, data = GaussianOracle(-0.4, 0.9), GaussianOracle(0.6, 0.5)
    fake, real = (x_t - t * net.velocity(x_t, jnp.full(8, t)) for net in (made, data))

    def mean(terms):
        return np.sum(weights * terms)

    terms = (real - fake) * ((real - x) - alpha * (real - fake))
    gap = mean((real - fake) ** 2)
    assert gap > 0.1
    np.testing.assert_allclose(mean(terms), (1 - alpha) * gap, atol=1e-10)
    # 0.2: the mean difference has the sign of the means' and vanishes with it.
    t2 = t**2 / ((1 - t) ** 2 * 0.25 + t**2)
    np.testing.assert_allclose(mean(real - fake), (0.6 + 0.4) * t2, atol=1e-10)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_the_students_gradient_goes_through_both_networks(alpha):
    given = draws()
    (loss, _), gradient = graded(method(alpha=alpha).student_loss)(
        tree(*STUDENT), view(), BATCH, given, 0
    )
    z, t, e = given.student.rollout.noise, per_sample(given.student.t), given.student.noise
    x = z - (STUDENT[0] * z + STUDENT[1])
    x_t = (1 - t) * x + t * e
    real, teachers_slope = teachers_data(x_t, t)
    fake, fakes_slope = x_t - t * (FAKE[0] * x_t + FAKE[1]), 1 - t * FAKE[0]
    divisor = np.abs(x - real).mean((1, 2), keepdims=True)
    first, second = real - fake, (real - x) - alpha * (real - fake)
    np.testing.assert_allclose(loss, np.mean((first * second / divisor).sum((1, 2))), rtol=1e-10)
    d_first = (teachers_slope - fakes_slope) * (1 - t)  # by x
    d_second = teachers_slope * (1 - t) - 1 - alpha * d_first
    d_x = (d_first * second + first * d_second) / divisor
    for name, slope in (("a", -z), ("b", -1.0)):
        by_hand = np.mean((d_x * slope).sum((1, 2)))
        np.testing.assert_allclose(gradient["network"][name], by_hand, rtol=1e-10)
        # It is another one where the networks' inputs are held.
        held = np.mean((-first / divisor * slope).sum((1, 2)))
        assert abs(by_hand - held) > 0.1 * abs(by_hand)


@pytest.mark.parametrize("predicts", ["noise", "velocity"])
def test_the_fake_scores_gradient_is_the_formulas(predicts):
    given = draws()
    (loss, _), gradient = graded(method(fake_predicts=predicts).fake_loss)(
        tree(*FAKE), view(), BATCH, given._replace(dropped=jnp.zeros(COUNT, bool)), 0
    )
    z, t, e = given.fake.rollout.noise, per_sample(given.fake.t), given.fake.noise
    x = z - (STUDENT[0] * z + STUDENT[1])
    x_t = (1 - t) * x + t * e
    velocity = FAKE[0] * x_t + FAKE[1]
    if predicts == "noise":
        error, slope = x_t + (1 - t) * velocity - e, 1 - t
    else:
        error, slope = velocity - (e - x), 1.0
    np.testing.assert_allclose(loss, np.mean((error**2).sum((1, 2))), rtol=1e-10)
    for name, inner in (("a", x_t), ("b", 1.0)):
        by_hand = np.mean((2 * error * slope * inner).sum((1, 2)))
        np.testing.assert_allclose(gradient["network"][name], by_hand, rtol=1e-10)


def test_a_student_of_several_steps_is_differentiated_in_its_last():
    given = draws(steps=3, count=2)
    rollout, own = given.student.rollout, tree(*STUDENT)
    made, slopes = jax.jvp(
        lambda b: method(steps=3).made(
            {"network": {**own["network"], "b": b}}, BATCH, given.student, given.guidance
        ),
        (own["network"]["b"],),
        (jnp.ones(()),),
    )
    x, (a, b) = rollout.noise, STUDENT
    for t, s, fresh in ((1, 2 / 3, rollout.renoise[0]), (2 / 3, 1 / 3, rollout.renoise[1])):
        x = (1 - s) * (x - t * (a * x + b)) + s * fresh
    np.testing.assert_allclose(made, x - (a * x + b) / 3, rtol=1e-6)
    np.testing.assert_allclose(slopes, np.full(SHAPE, -1 / 3), rtol=1e-6)


def test_where_the_fake_score_is_the_teacher_nothing_moves():
    objective = SiD(network(), embedded_guidance(network()), compared_scale=1.0, time_shift=0.0)
    for fake, still in ((FAKE, True), (STUDENT, False)):
        seen = view(fake=fake)._replace(frozen={"teacher": tree(*FAKE)["network"]})
        (loss, _), gradient = graded(objective.student_loss)(
            tree(*STUDENT), seen, BATCH, draws(), 0
        )
        assert (abs(loss) < 1e-12) == still
        assert all((abs(leaf) < 1e-12) == still for leaf in jax.tree.leaves(gradient))


# Guidance.


def test_a_fake_score_under_guidance_is_compared_with_the_teacher_under_guidance():
    """Equal networks under equal scales agree; the captions that are dropped are not guided."""
    params, shape = smooth_params(dtype=np.float64), (8, 4, 3)
    plain = smooth_network()
    plain = plain._replace(
        velocity=lambda p, x, t, text, w=None: smooth_network().velocity(p, x, t, text)
    )
    seen = View({"teacher": params, "null": NULL}, {"fake": {"network": params}})
    seen.nets["student"] = {"network": smooth_params(3, np.float64)}
    batch, given = Batch(jnp.zeros(shape), TEXT), draws(shape=shape)
    given = given._replace(guidance=jnp.full(8, 2.0))

    def losses(**settings):
        objective = SiD(plain, classifier_free(plain), time_shift=0.0, **settings)
        rest = seen, batch, given, 0
        return (
            objective.student_loss(seen.nets["student"], *rest)[0],
            objective.fake_loss(seen.nets["fake"], *rest)[0],
            objective,
        )

    compared, learned, objective = losses()
    assert abs(compared) < 1e-10
    unequal, plainly, _ = losses(learned_scale=1.0, compared_scale=1.0)
    assert abs(unequal) > 0.01 and abs(learned - plainly) > 0.01
    # Alone, the sample whose caption is dropped has the null caption's velocity.
    x, t = jnp.asarray(normal(0, shape)), given.fake.t
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, TEXT)
    guided = objective.guided(seen.nets["fake"], seen, x, t, (TEXT, given.guidance), 2.0)
    one, other = (plain.velocity(params, x, t, text) for text in (TEXT, null))
    np.testing.assert_allclose(guided, 2 * one - other, rtol=1e-10)


def test_a_fake_score_learns_null_captions_from_samples_without_captions():
    """Whose captions are dropped has no caption as it is drawn, either."""
    params, shape = smooth_params(dtype=np.float64), (8, 4, 3)
    plain = smooth_network()
    plain = plain._replace(
        velocity=lambda p, x, t, text, w=None: smooth_network().velocity(p, x, t, text)
    )
    nets = {"fake": {"network": params}, "student": {"network": smooth_params(3, np.float64)}}
    seen, given = View({"teacher": params, "null": NULL}, nets), draws(shape=shape)
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, TEXT)
    kept = given._replace(dropped=jnp.zeros(8, bool))

    def loss(text, given):
        objective = SiD(plain, classifier_free(plain), time_shift=0.0)
        return objective.fake_loss(nets["fake"], seen, Batch(jnp.zeros(shape), text), given, 0)[0]

    all_dropped = given._replace(dropped=jnp.ones(8, bool))
    np.testing.assert_allclose(loss(TEXT, all_dropped), loss(null, kept), rtol=1e-12)
    assert abs(loss(TEXT, kept) - loss(null, kept)) > 1e-3


def test_captions_are_dropped_for_a_fake_score_under_guidance_alone():
    batch = Batch(jnp.zeros((2000, 1, 1)))
    for settings, share in (({}, 0.0), ({"compared_scale": 2.0}, 0.1)):
        found = jax.jit(method(**settings).draw)(jax.random.key(0), batch)
        assert abs(np.mean(found.dropped) - share) < 0.02
        assert found.student.t.min() >= 0.02 and found.fake.t.max() <= 0.98
    with pytest.raises(ValueError, match="objective.drop_rate: 0 trains no null caption"):
        method(learned_scale=1.5, drop_rate=0.0).check_run("float32")
    with pytest.raises(ValueError, match="objective.score_from: 0.98 is not before score_to, 0.98"):
        method(score_from=0.98).check_run("float32")


# Samples that are not finite, and parts of a batch.


def test_a_sample_that_is_not_finite_is_left_out():
    """Of the loss and of the gradient, though not where the student itself is not finite."""
    found = jax.grad(lambda x: jnp.sum(with_finite_gradient(x) * jnp.array([np.nan, np.inf, 2.0])))
    np.testing.assert_array_equal(found(jnp.ones(3)), [0, 0, 2])
    good = draws()
    bad = good._replace(student=good.student._replace(t=jnp.array([0.1, np.nan, 0.5, 0.9])))
    grade, own = graded(method().student_loss), tree(*STUDENT)
    (loss, _), gradient = grade(own, view(), BATCH, bad, 0)
    left = jax.tree.map(lambda leaf: part(leaf, np.array([0, 2, 3])), (BATCH, bad))
    (rest, _), expected = grade(own, view(), *left, 0)
    np.testing.assert_allclose(loss, rest, rtol=1e-12)
    for name, wanted in expected["network"].items():
        np.testing.assert_allclose(gradient["network"][name], wanted, rtol=1e-12)


@pytest.mark.parametrize("player", ["student", "fake"])
def test_a_batch_is_the_mean_of_its_parts(player):
    given = draws(steps=2, count=1)._replace(dropped=jnp.zeros(COUNT, bool))
    own = tree(*(STUDENT if player == "student" else FAKE))
    assert_mean_of_parts(method(steps=2).players[player].loss, own, view(), BATCH, given)


def test_data_are_not_read_and_the_fake_score_moves_first():
    other = BATCH._replace(x=jnp.full(SHAPE, jnp.nan))
    assert np.isfinite(method().student_loss(tree(*STUDENT), view(), other, draws(), 0)[0])
    assert method().turn(0) == method().turn(7) == ("fake", "student")
