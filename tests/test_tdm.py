"""TDM: its re-noising, its losses by hand, and where it comes to rest."""

import itertools

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
    TEXT,
    assert_mean_of_parts,
    graded,
    network,
    normal,
    per_sample,
    teachers_data,
    tree,
    view,
)

from jax_distill import sampling
from jax_distill.flow import Batch, interpolate
from jax_distill.objectives import tdm
from jax_distill.objectives.tdm import TDM, Points, TDMDraws

EVEN = np.linspace(1, 0, 5)
TIMES = np.exp(0.8) * EVEN / (np.exp(0.8) * EVEN + 1 - EVEN)
STEP = np.array([0, 1, 3, 2])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def method(**settings) -> TDM:
    return TDM(network(), TEACHER, **{"time_shift": 0.8, **settings})


def draws(seed=0) -> TDMDraws:
    """The fake score and the student move at points of their own."""

    def points(seed, inside):
        start, end = TIMES[STEP], TIMES[STEP + 1]
        t = end + inside * (start - end)
        return Points(*map(jnp.asarray, (STEP, start, end, t, normal(seed))))

    guidance = jnp.full(COUNT, 3.0)
    noise = jnp.asarray(normal(seed + 1))
    return TDMDraws(noise, guidance, points(seed + 2, 0.6), points(seed + 3, 0.3))


def walked(noise, a, b):
    """The inputs of the drawn steps of an affine student, by hand."""
    kept = np.array(noise)
    for row, steps in enumerate(STEP):
        for t, s in itertools.pairwise(TIMES[: steps + 1]):
            kept[row] -= (t - s) * (a * kept[row] + b)
    return kept


def made(points, noise):
    """(z, t_k, x, predicted noise, x_t, e) of the student, by hand."""
    a, b = STUDENT
    z, t_k = walked(noise, a, b), per_sample(points.start)
    m, t = per_sample(points.end), per_sample(points.t)
    v = a * z + b
    x_m, e, kept = z - (t_k - m) * v, np.asarray(points.noise), (1 - t) / (1 - m)
    x_t = kept * x_m + np.sqrt(t**2 - (kept * m) ** 2) * e
    return z, t_k, z - t_k * v, z + (1 - t_k) * v, x_t, t


# Re-noising.


def test_what_is_renoised_has_the_marginal_of_its_time():
    m, part = np.meshgrid(np.linspace(0, 0.95, 9), np.linspace(0, 1, 9))
    t = m + part * (1 - m)
    kept, added = tdm.renoising(m, t)
    np.testing.assert_allclose(kept * (1 - m), 1 - t, atol=1e-12)  # of x_0
    np.testing.assert_allclose((kept * m) ** 2 + added**2, t**2, atol=1e-12)  # of the noise
    for mean, std in ((0.6, 0.5), (-2.0, 3.0)):  # so a Gaussian's mean and variance are carried on
        np.testing.assert_allclose(kept * (1 - m) * mean, (1 - t) * mean, atol=1e-12)
        variance = kept**2 * ((1 - m) ** 2 * std**2 + m**2) + added**2
        np.testing.assert_allclose(variance, (1 - t) ** 2 * std**2 + t**2, atol=1e-12)


def test_mixed_noise_is_what_stands_beside_the_data():
    x, predicted, noise = normal(0), normal(1), normal(2)
    m, t = np.array([0.0, 0.2, 0.5, 0.7]), np.array([0.3, 0.2, 0.9, 1.0])
    x_t = tdm.renoised(interpolate(x, predicted, m), noise, m, t)
    mixed = tdm.mixed_noise(predicted, noise, m, t)
    np.testing.assert_allclose(x_t, interpolate(x, mixed, t), atol=1e-12)
    # From data all noise is fresh; without a step none is.
    np.testing.assert_allclose(mixed[0], noise[0], atol=1e-12)
    np.testing.assert_allclose(mixed[1], predicted[1], atol=1e-7)
    weight = tdm.importance(mixed, noise)
    ratio = [np.exp(-np.mean(a**2) / 2) / np.exp(-np.mean(b**2) / 2) for a, b in zip(mixed, noise)]
    np.testing.assert_allclose(weight, ratio, rtol=1e-12)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("step_end", ["end", "inside"])
def test_times_lie_in_the_segment_of_their_step(separate, step_end):
    objective = method(separate=separate, step_end=step_end)
    batch = Batch(jnp.zeros((4000, 1, 1)))
    points = jax.jit(objective.points)(jax.random.key(0), batch)
    start, end = TIMES[points.step], TIMES[points.step + 1]
    np.testing.assert_allclose(points.start, start, rtol=1e-12)
    last = points.start if separate else 1.0
    assert np.all((points.t >= points.end) & (points.t >= 0.02) & (points.t <= last - 0.01))
    if step_end == "end":
        np.testing.assert_allclose(points.end, end, rtol=1e-12)
    else:
        assert np.all((points.end >= end - 1e-12) & (points.end <= start - 0.02 + 1e-12))
        assert len(np.unique(points.end)) > 3990
    assert np.all(np.bincount(points.step) > 900)
    share = (points.t - np.maximum(points.end, 0.02)) / (last - 0.01 - np.maximum(points.end, 0.02))
    np.testing.assert_allclose([share.min(), share.mean(), share.max()], [0, 0.5, 1], atol=0.02)


def test_its_players_draw_apart_and_the_fake_score_moves_first():
    found = method().draw(jax.random.key(0), BATCH)
    assert all(not np.array_equal(a, b) for a, b in zip(found.student[3:], found.fake[3:]))
    assert method().turn(0) == method().turn(7) == ("fake", "student")


# Losses.


def test_inputs_are_those_of_the_sampler():
    objective, own, given = method(), tree(*STUDENT), draws()
    inputs = objective.inputs(own, BATCH, given, given.student.step)
    np.testing.assert_allclose(inputs, walked(given.noise, *STUDENT), rtol=1e-12)
    # The last one is an evaluation before the sample.
    last = objective.inputs(own, BATCH, given, jnp.full(COUNT, 3))
    drawn = objective.sample(own, given.noise, TEXT, None, given.guidance, jax.random.key(0), 4)
    t = TIMES[3]
    np.testing.assert_allclose(drawn, last - t * (STUDENT[0] * last + STUDENT[1]), rtol=1e-12)


@pytest.mark.parametrize("distance", ["huber", "mse"])
def test_the_students_gradient_is_the_formulas(distance):
    given, objective = draws(), method(distance=distance, huber_constant=0.3)
    (loss, _), gradient = graded(objective.student_loss)(tree(*STUDENT), view(), BATCH, given, 0)
    z, t_k, x, _, x_t, t = made(given.student, given.noise)
    real, fake = teachers_data(x_t, t)[0], x_t - t * (FAKE[0] * x_t + FAKE[1])
    weight = 1 / np.mean(np.abs(x - real), axis=(1, 2), keepdims=True)
    error = fake - real  # of x from the target x + r - f
    if distance == "huber":
        value, slope = np.sqrt(error**2 + 0.09) - 0.3, error / np.sqrt(error**2 + 0.09)
    else:
        value, slope = error**2, 2 * error
    np.testing.assert_allclose(loss, np.mean(weight * value), rtol=1e-10)
    expected = {"a": np.mean(weight * slope * -t_k * z), "b": np.mean(weight * slope * -t_k)}
    for name, by_hand in expected.items():
        assert abs(by_hand) > 1e-3
        np.testing.assert_allclose(gradient["network"][name], by_hand, rtol=1e-10)


def test_the_fake_scores_gradient_is_the_formulas():
    given, objective = draws(), method()
    (loss, _), gradient = graded(objective.fake_loss)(tree(*FAKE), view(), BATCH, given, 0)
    _, _, x, predicted, x_t, t = made(given.fake, given.noise)
    m, e = per_sample(given.fake.end), given.fake.noise
    kept = (1 - t) / (1 - m)
    mixed = (m * kept * predicted + np.sqrt(t**2 - (kept * m) ** 2) * e) / t
    ratio = np.exp((np.mean(e**2, (1, 2)) - np.mean(mixed**2, (1, 2))) / 2)
    snr = ((1 - t) / t) ** 2
    assert snr.min() < 5 < snr.max()
    weight = np.minimum(snr, 5) * per_sample(ratio)
    error = x_t - t * (FAKE[0] * x_t + FAKE[1]) - x
    np.testing.assert_allclose(loss, np.mean(weight * error**2), rtol=1e-10)
    for name, slope in (("a", -t * x_t), ("b", -t)):
        np.testing.assert_allclose(
            gradient["network"][name], np.mean(weight * 2 * error * slope), rtol=1e-10
        )


def test_where_the_fake_score_is_the_teacher_nothing_moves():
    """Whatever the student makes; with another fake score it does move."""
    objective = TDM(network(), TEACHER.__class__(network(), "embedded"), time_shift=0.8)
    for fake, still in ((FAKE, True), (STUDENT, False)):
        seen = view(fake=fake)._replace(frozen={"teacher": tree(*FAKE)["network"]})
        (loss, _), gradient = graded(objective.student_loss)(
            tree(*STUDENT), seen, BATCH, draws(), 0
        )
        assert (loss == 0) == still
        assert all((leaf == 0) == still for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("player", ["student", "fake"])
def test_a_batch_is_the_mean_of_its_parts(player):
    own = tree(*(STUDENT if player == "student" else FAKE))
    assert_mean_of_parts(method().players[player].loss, own, view(), BATCH, draws())


def test_data_are_not_read():
    other = BATCH._replace(x=jnp.full(SHAPE, jnp.nan))
    assert np.isfinite(method().student_loss(tree(*STUDENT), view(), other, draws(), 0)[0])


def test_samplers_take_its_times():
    assert method().sampled_by == sampling.PushForward(sampling.Shifted(0.8))
