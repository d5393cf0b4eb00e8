"""What methods of distribution matching share, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill.flow import GaussianOracle, Network, interpolate, path_velocity
from jax_distill.objectives.scores import (
    ScoreTimes,
    predicted_data,
    pulled,
    score_difference,
    velocity_loss,
)
from jax_distill.objectives.teacher import TeacherVelocity

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
WEIGHTS = WEIGHTS / WEIGHTS.sum()  # of a standard normal number


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def difference(generator, data, t, **settings):
    """The gradient, noised samples by quadrature: (nodes of x, nodes of noise)."""
    x, noise = jnp.meshgrid(generator.mean + generator.std * NODES, NODES, indexing="ij")
    times = jnp.full(len(x), t)
    x_t = interpolate(x, noise, times)
    fake, real = (predicted_data(x_t, times, net.velocity(x_t, times)) for net in (generator, data))
    return score_difference(x, fake, real, **settings)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("a", [-0.9, 0.4, 1.7])
@pytest.mark.parametrize("b", [0.3, 1.5])
def test_the_mean_gradient_leads_from_the_generators_mean_to_that_of_data(t, a, b):
    """E[f - r] = (a - m) t^2 / ((1 - t)^2 S^2 + t^2), whatever the generator's spread b."""
    m, s = 0.4, 0.8
    g = difference(GaussianOracle(a, b), GaussianOracle(m, s), t, normalize=False)
    mean = WEIGHTS @ g @ WEIGHTS
    np.testing.assert_allclose(mean, (a - m) * t**2 / (((1 - t) * s) ** 2 + t**2), atol=1e-8)
    assert np.sign(np.round(mean, 12)) == np.sign(a - m)  # descending moves a towards m


@pytest.mark.parametrize("b", [0.3, 0.8, 1.5])
def test_the_spread_is_pulled_to_that_of_data(b):
    """The part of g that is linear in x has the sign of b - S, and is gone at equality."""
    m, s = 0.4, 0.8
    g = difference(GaussianOracle(m, b), GaussianOracle(m, s), 0.5, normalize=False)
    slope = WEIGHTS @ (g * NODES[:, None]) @ WEIGHTS
    np.testing.assert_allclose(np.sign(np.round(slope, 12)), np.sign(b - s))
    # x_t has the variance (b^2 + 1) / 4, and f - r the slope k_b - k_s in it.
    slope_of = [2 * v**2 / (v**2 + 1) for v in (b, s)]
    np.testing.assert_allclose(slope, b / 2 * (slope_of[0] - slope_of[1]), atol=1e-8)


def test_nothing_pulls_where_the_fake_score_is_the_teacher():
    same = GaussianOracle(0.4, 0.8)
    assert (difference(same, same, 0.3) == 0).all()


def test_guidance_alone_pulls_where_the_fake_score_is_the_unguided_teacher():
    """g = -(w - 1) (r_cond - r_null) / mean |x - r|, and zero for w = 1."""
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 5, 3, 2))
    t = jnp.linspace(0.1, 0.9, 5)

    def velocity(params, x, t, text=None, guidance=None, interval=None):
        return jnp.tanh(x) * jnp.reshape(text, (-1, 1, 1))

    teacher, x_t = TeacherVelocity(Network(velocity, None), "cfg"), interpolate(x, noise, t)
    text, null = jnp.linspace(1, 2, 5), jnp.full(1, 0.5)
    plain, empty = (predicted_data(x_t, t, velocity(None, x_t, t, words)) for words in (text, null))
    for w in (1.0, 3.0):
        guided = teacher({"teacher": None, "null": null}, x_t, t, text, jnp.full(5, w))
        real = predicted_data(x_t, t, guided)
        norm = jnp.mean(jnp.abs(x - real), (1, 2), keepdims=True)
        np.testing.assert_allclose(
            score_difference(x, plain, real), -(w - 1) * (plain - empty) / norm, atol=1e-8
        )


def test_what_is_pulled_has_twice_the_gradient_as_its_slope():
    """So 1/2 mean gives g / (number of elements), mean 2 g / (that), and sum 2 g."""
    x, g = np.random.default_rng(1).standard_normal((2, 4, 3, 2))
    for reduce, scale in (
        (lambda y: jnp.mean(y) / 2, 1 / x.size),
        (jnp.mean, 2 / x.size),
        (jnp.sum, 2),
    ):
        slope = jax.grad(lambda x, reduce=reduce: reduce(pulled(x, g)))(x)
        np.testing.assert_allclose(slope, scale * g, atol=1e-12)
    np.testing.assert_allclose(pulled(x, g), g**2, atol=1e-12)


def test_the_divisor_is_a_mean_over_the_sample_with_a_floor_or_an_addition():
    x, fake, real = np.random.default_rng(2).standard_normal((3, 4, 3, 2))
    real[0] = x[0]  # nothing to divide by
    mean = np.abs(x - real).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(
        score_difference(x, fake, real, least=1e-5), (fake - real) / np.maximum(mean, 1e-5)
    )
    np.testing.assert_allclose(
        score_difference(x, fake, real, added=1e-6), (fake - real) / (mean + 1e-6)
    )
    without = score_difference(x, fake, real)
    assert (without[0] == 0).all() and np.isfinite(without).all()


def test_no_gradient_passes_through_the_score_difference():
    x, fake, real = np.random.default_rng(3).standard_normal((3, 2, 3, 2))
    slopes = jax.grad(lambda *nets: jnp.sum(score_difference(*nets)), (0, 1, 2))(x, fake, real)
    assert all((slope == 0).all() for slope in slopes)


@pytest.mark.parametrize("predicts", ["velocity", "data"])
def test_a_fake_scores_loss_is_least_at_the_mean_velocity(predicts):
    """Nothing beats the velocity that is expected of noised samples, and it is x0's error, too."""
    generator, t = GaussianOracle(0.3, 0.7), 0.4
    x, noise = jnp.meshgrid(0.3 + 0.7 * NODES, NODES, indexing="ij")
    times = jnp.full(len(x), t)
    x_t = interpolate(x, noise, times)

    def mean(change):
        velocity = generator.velocity(x_t, times) + change * jnp.sin(x_t)
        if predicts == "data":
            error = predicted_data(x_t, times, velocity) - x
        else:
            error = velocity - path_velocity(x, noise)
        loss = velocity_loss(velocity, x, noise, times, predicts)
        np.testing.assert_allclose(loss, jnp.mean(error**2, 1), rtol=1e-10)
        return WEIGHTS @ error**2 @ WEIGHTS

    assert mean(0.0) < min(mean(0.1), mean(-0.1))


def test_predictions_are_made_in_float32_at_least():
    x, v = jnp.ones((2, 3, 1), jnp.bfloat16), jnp.full((2, 3, 1), 1.0078125, jnp.bfloat16)
    made = predicted_data(x, jnp.full(2, 0.3, jnp.float32), v)
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(made, 1 - 0.3 * 1.0078125, rtol=1e-6)


def test_score_times_stay_within_their_bounds():
    times = ScoreTimes("logit_normal", shift=1.0, low=0.02, high=0.98)
    t = np.asarray(times.draw(jax.random.key(0), (4000,)))
    assert 0.02 <= t.min() and t.max() <= 0.98
    unshifted = (t - 0.02) / 0.96
    logits = np.log(unshifted / (1 - unshifted))
    assert abs(logits.mean() - 1) < 0.05 and abs(logits.std() - 1) < 0.05
